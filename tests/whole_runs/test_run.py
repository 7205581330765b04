"""Whole runs, in real processes, one and two: what a run leaves and every way to train."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from conftest import BIN, FRESH, TINY, TWO, rows, summary, wandb_runs, wandb_summary
from test_sources import image_folder, parquet_folder

from cifar_accel.cli import main, train_command
from cifar_accel.files import read_json
from cifar_accel.results.charts import PLOTS


def wandb_rows(file: Path) -> list[dict]:
    """The logged rows of an offline run, read back by wandb itself."""
    out = subprocess.run(
        [BIN / "wandb", "leet", "inspect", "--json", file],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    records = [json.loads(line) for line in out.splitlines()]
    return [r["history"].get("item", r["history"]) for r in records if r["type"] == "history"]


def test_what_a_run_leaves(trainer, in_process, tmp_path):
    done = trainer(
        "--epochs",
        "3",
        "--save-epochs",
        "2",
        "--model-ema",
        "--model-ema-decay",
        "0.9",
        "--tracker",
        "wandb",
    )
    run, config = done.run, read_json(done.run / "config.json")
    assert (
        config["options"]["learning_rate"] == 3e-3
        and config["provenance"]["learning_rate"] == "flag"
    )
    assert (
        config["provenance"]["smoothing"] == "recipe" and config["provenance"]["seed"] == "default"
    )
    assert {"mixed_precision", "memory_format", "total_steps", "data_fingerprint"} <= config[
        "options"
    ].keys()
    assert config["versions"]["torch"] and config["hardware"]["cpu_cores"] and config["command"][1:]
    result, lines = summary(run), rows(run)
    assert f"accuracy {result['accuracy']:.2%} on 100 test images" in done.stdout
    assert (
        result["status"] == "finished"
        and result["evaluated_images"] == 100
        and result["steps"] == 24
    )
    steps = [line["step"] for line in lines]
    assert steps == sorted({*range(3, 25, 3), 8, 16, 24})
    evaluated = [line for line in lines if "eval/accuracy" in line]
    assert [line["step"] for line in evaluated] == [8, 16, 24] and evaluated[-1][
        "eval/accuracy"
    ] == result["accuracy"]
    assert result["best_accuracy"] == max(line["eval/accuracy"] for line in evaluated)
    last_epoch = [line for line in lines if line["step"] > 16]
    window = [
        b - a
        for a, b in zip(
            [16, *(x["step"] for x in last_epoch)], (x["step"] for x in last_epoch), strict=False
        )
    ]
    mean = sum(n * line["train/loss"] for n, line in zip(window, last_epoch, strict=True)) / 8
    assert result["train_loss"] == pytest.approx(mean, rel=1e-12)
    for name in (
        *PLOTS,
        "model/model.safetensors",
        "model-epoch-0002/config.json",
        "checkpoints/step-00000024/manifest.json",
    ):
        assert (run / name).exists(), name
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "step-00000016",
        "step-00000024",
    ]
    assert not list(run.rglob("*.tmp"))
    # The same command again trains nothing
    again = trainer(
        "--epochs",
        "3",
        "--save-epochs",
        "2",
        "--model-ema",
        "--model-ema-decay",
        "0.9",
        "--tracker",
        "wandb",
    )
    assert "is finished" in again.stdout and rows(run) == lines and len(wandb_runs(run)) == 1
    # Moved elsewhere, timm and `evaluate` give the reported accuracy
    moved = tmp_path / "moved"
    shutil.move(run, moved)
    code, out, _ = in_process(main, "evaluate", moved)
    assert code == 0 and f"{result['accuracy']:.4%}" in out and "100 test images" in out
    model = timm.create_model(f"local-dir:{moved / 'model'}", pretrained=True).eval()
    from cifar_accel.data.datasets import limit
    from cifar_accel.data.decode import load_dataset

    test = limit(load_dataset("digits", config["options"]["data_dir"], 32).test, 100, "", 3407)
    x = torch.nn.functional.interpolate(
        torch.from_numpy(test.images).float(), (32, 32), mode="bilinear", antialias=True
    )
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        correct = model((x / 255 - mean) / std).argmax(1).numpy() == test.labels
    assert correct.mean() == result["accuracy"]


def test_two_processes_are_one_run(trainer):
    words = ("--mixup", "0.5", "--epochs", "3", "--group", "pair")
    one, two = (
        trainer(*words, "--run-name", n, launcher=how).run
        for n, how in (("one", None), ("two", TWO))
    )
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a["step"] == b["step"] and a["train/lr"] == b["train/lr"]
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5)
    assert summary(two)["evaluated_images"] == 100
    (file,) = wandb_runs(two)
    logged = [{k: v for k, v in row.items() if not k.startswith("_")} for row in wandb_rows(file)]
    assert len(logged) == len(rows(two))
    for row, line in zip(logged, rows(two), strict=True):
        assert row.pop("trainer/step") == line.pop("step") and row == pytest.approx(line)
    seen = wandb_summary(file)
    assert seen["state"] == "finished" and seen["summary"]["accuracy"] == summary(two)["accuracy"]
    options = read_json(two / "config.json")["options"]
    assert {k: v for k, v in seen["config"].items() if not k.startswith("_")} == options
    assert options["processes"] == 2 and options["device_batch_size"] == 16
    text = file.read_bytes()
    assert b"pair" in text and b"train" in text


def test_batch_norm_on_two_processes_is_evaluated_with_the_weights_that_are_saved(
    trainer, in_process
):
    """Each rank gathers its own running statistics; evaluation must use those of the saved model on every rank."""
    words = (
        "--model",
        "test_efficientnet",
        "--epochs",
        "2",
        "--tracker",
        "none",
        "--limit-test",
        "359",
    )
    run = trainer(*words, launcher=TWO).run
    code, out, _ = in_process(main, "evaluate", run)
    assert code == 0 and f"loss      {summary(run)['test_loss']:.4f}" in out


def test_accelerate_config_and_launch(trainer, tmp_path):
    config = tmp_path / "accelerate.yaml"
    accelerate = str(BIN / "accelerate")
    subprocess.run(
        [accelerate, "config", "default", "--config_file", config], check=True, capture_output=True
    )
    done = trainer(
        "--max-steps", "4", launcher=(accelerate, "launch", "--config_file", str(config))
    )
    assert summary(done.run)["steps"] == 4
    shipped = Path(__file__).parent.parent / "accelerate_configs" / "cpu.yaml"
    done = trainer(
        "--max-steps",
        "4",
        "--run-name",
        "b",
        launcher=(accelerate, "launch", "--config_file", str(shipped)),
    )
    assert "precision fp32 (from the launcher)" in done.stdout


def test_bf16_is_the_launchers(trainer):
    done = trainer("--epochs", "2", env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert (
        "precision bf16 (from the launcher)" in done.stdout
        and summary(done.run)["status"] == "finished"
    )
    assert read_json(done.run / "config.json")["options"]["mixed_precision"] == "bf16"
    refused = trainer("--epochs", "2", check=2)
    assert "--mixed-precision bf16 -> no" in refused.stderr
    sharded = trainer("--run-name", "b", env={"ACCELERATE_USE_FSDP": "true"}, check=2)
    assert "asks for FSDP" in sharded.stderr


def test_accumulation_from_the_option_and_from_the_launcher(trainer):
    words = ("--max-steps", "8", "--tracker", "none", "--mixup", "0.3")
    whole = trainer(*words, "--run-name", "a")
    cut = trainer(*words, "--run-name", "b", "--micro-batch-size", "9")
    launched = trainer(
        *words, "--run-name", "c", env={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    )
    assert (
        "batch     32 = 1 process x 8 images x 4 accumulation steps" in cut.stdout
        and "x 4 acc" in launched.stdout
    )
    for other in (cut, launched):
        for a, b in zip(rows(whole.run), rows(other.run), strict=True):
            assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5)


def test_validation_split_reads_the_test_set_once(trainer):
    done = trainer("--validation-fraction", "0.25", "--epochs", "2", "--tracker", "none")
    options = read_json(done.run / "config.json")["options"]
    assert (options["train_images"], options["held_out_images"], options["test_images"]) == (
        192,
        64,
        100,
    )
    assert (
        done.stdout.count("reading the test set") == 1
        and summary(done.run)["evaluated_images"] == 100
    )
    assert rows(done.run)[-1]["eval/accuracy"] * 64 == pytest.approx(
        round(rows(done.run)[-1]["eval/accuracy"] * 64)
    )


@pytest.mark.parametrize(
    "words",
    [
        ("--clip-grad", "1"),
        ("--clip-grad", "0.01", "--clip-mode", "agc"),
        ("--bce-loss",),
        ("--optimizer", "lion"),
        ("--scheduler", "one_cycle"),
        ("--memory-format", "contiguous"),
        ("--model", "test_vit", "--memory-format", "channels_last"),
        ("--optimizer", "sgdm", "--learning-rate", "0.05", "--warmup-epochs", "1"),
        ("--no-decay-all",),
        ("--recipe", "plain", "--reprob", "0.3", "--color-jitter", "0.3"),
    ],
)
def test_every_kind_of_step_trains(in_process, cache, tmp_path, words):
    base = [*TINY, "--data-dir", cache, "--save-dir", tmp_path, "--tracker", "none"]
    code, _, err = in_process(train_command, *base, *words)
    assert code == 0, err
    (file,) = tmp_path.rglob("metrics.jsonl")
    losses = [row["train/loss"] for row in rows(file.parent)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("make", [image_folder, parquet_folder])
def test_own_images_train(in_process, cache, tmp_path, make):
    """Folders made here: one of PNG files by class, one of parquet files as the hub has them."""
    folder = make(tmp_path / "data")
    words = [
        "--dataset",
        folder,
        "--model",
        "test_nfnet",
        "--no-pretrained",
        "--recipe",
        "plain",
        "--batch-size",
        "4",
        "--epochs",
        "2",
        "--tracker",
        "none",
        "--data-dir",
        cache,
        "--save-dir",
        tmp_path / "ck",
    ]
    code, _, err = in_process(train_command, *words)
    assert code == 0, err
    (file,) = tmp_path.rglob("summary.json")
    result, config = summary(file.parent), read_json(file.parent / "config.json")
    assert (
        result["status"] == "finished"
        and result["evaluated_images"] == config["options"]["test_images"]
    )
    names = {image_folder: ["cat", "dog"], parquet_folder: ["ant", "bee", "cow", "dog"]}[make]
    assert read_json(file.parent / "model" / "config.json")["label_names"] == names


def test_real_images_and_imagenet_weights(trainer, cifar, weights):
    """The report's recipe with timm's augmentation in workers, from ImageNet weights, on real CIFAR-100."""
    words = [
        "--dataset",
        cifar,
        "--model",
        f"local-dir:{weights / 'tf_efficientnet_lite0.in1k'}",
        "--epochs",
        "2",
        "--limit-train",
        "512",
        "--limit-test",
        "300",
        "--batch-size",
        "64",
        "--tracker",
        "none",
        "--pipeline",
        "timm",
        "--workers",
        "1",
    ]
    done = trainer(*words, base=())
    result = summary(done.run)
    assert result["evaluated_images"] == 300 and result["status"] == "finished"
    options = read_json(done.run / "config.json")["options"]
    assert (options["aa"], options["pipeline"], options["classes"]) == ("rand-m15-n2", "timm", 100)
    assert (
        "policy    rand-m15-n2 (m15 acts as m10, timm's ceiling unless mmax raises it)"
        in done.stdout
    )


@pytest.mark.parametrize("model", ["nfnet", "vit"])
def test_the_reports_architectures_train(trainer, cifar, model):
    words = [
        "--dataset",
        cifar,
        "--model",
        model,
        "--no-pretrained",
        "--max-steps",
        "2",
        "--limit-train",
        "64",
        "--limit-test",
        "32",
        "--batch-size",
        "16",
        "--tracker",
        "none",
        "--save-every",
        "none",
    ]
    done = trainer(*words, base=(), env={"OMP_NUM_THREADS": str(os.cpu_count())}, launcher=FRESH)
    options = read_json(done.run / "config.json")["options"]
    assert summary(done.run)["evaluated_images"] == 32
    assert options["parameters"] > {"nfnet": 68e6, "vit": 85e6}[model]
