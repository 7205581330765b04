"""Whole runs, in real processes: what a run leaves, how it is stopped, killed and continued, and on two processes."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY, rows, summary, wait_for, without_clock
from test_sources import image_folder, parquet_folder

from cifar_accel.cli import main, train_command
from cifar_accel.report import PLOTS
from cifar_accel.run_folder import read_json

BIN = Path(sys.executable).parent
TWO = (str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2")


def sha256(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def wandb_runs(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"))


def wandb_rows(file: Path) -> list[dict]:
    """The logged rows of an offline run, read back by wandb itself."""
    out = subprocess.run(
        [BIN / "wandb", "leet", "inspect", "--json", file], capture_output=True, text=True, check=True
    ).stdout
    records = [json.loads(line) for line in out.splitlines()]
    return [r["history"].get("item", r["history"]) for r in records if r["type"] == "history"]


def wandb_summary(file: Path) -> dict:
    command = [BIN / "wandb", "leet", "inspect", "--summary", "--json", file]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_what_a_run_leaves(trainer, in_process, tmp_path):
    done = trainer(
        "--epochs", "3", "--save-epochs", "2", "--model-ema", "--model-ema-decay", "0.9", "--tracker", "wandb"
    )
    run, config = done.run, read_json(done.run / "config.json")
    assert config["options"]["learning_rate"] == 3e-3 and config["provenance"]["learning_rate"] == "flag"
    assert config["provenance"]["smoothing"] == "recipe" and config["provenance"]["seed"] == "default"
    assert {"mixed_precision", "memory_format", "total_steps", "data_fingerprint"} <= config["options"].keys()
    assert config["versions"]["torch"] and config["hardware"]["cpu_cores"] and config["command"][1:]
    result, lines = summary(run), rows(run)
    assert f"accuracy {result['accuracy']:.2%} on 100 test images" in done.stdout
    assert result["status"] == "finished" and result["evaluated_images"] == 100 and result["steps"] == 24
    steps = [line["step"] for line in lines]
    assert steps == sorted({*range(3, 25, 3), 8, 16, 24})
    evaluated = [line for line in lines if "eval/accuracy" in line]
    assert [line["step"] for line in evaluated] == [8, 16, 24] and evaluated[-1]["eval/accuracy"] == result["accuracy"]
    assert result["best_accuracy"] == max(line["eval/accuracy"] for line in evaluated)
    last_epoch = [line for line in lines if line["step"] > 16]
    window = [
        b - a for a, b in zip([16, *(x["step"] for x in last_epoch)], (x["step"] for x in last_epoch), strict=False)
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
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-00000016", "step-00000024"]
    assert not list(run.rglob("*.tmp"))
    # The same command again trains nothing
    again = trainer(
        "--epochs", "3", "--save-epochs", "2", "--model-ema", "--model-ema-decay", "0.9", "--tracker", "wandb"
    )
    assert "is finished" in again.stdout and rows(run) == lines and len(wandb_runs(run)) == 1
    # Moved elsewhere, timm and `evaluate` give the reported accuracy
    moved = tmp_path / "moved"
    shutil.move(run, moved)
    code, out, _ = in_process(main, "evaluate", moved)
    assert code == 0 and f"{result['accuracy']:.4%}" in out and "100 test images" in out
    model = timm.create_model(f"local-dir:{moved / 'model'}", pretrained=True).eval()
    from cifar_accel.data.cache import load_dataset
    from cifar_accel.data.sources import limit

    test = limit(load_dataset("digits", config["options"]["data_dir"], 32).test, 100, "", 3407)
    x = torch.nn.functional.interpolate(
        torch.from_numpy(test.images).float(), (32, 32), mode="bilinear", antialias=True
    )
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        correct = model((x / 255 - mean) / std).argmax(1).numpy() == test.labels
    assert correct.mean() == result["accuracy"]


@pytest.mark.parametrize(
    "words",
    [
        (),
        (
            "--mixup",
            "0.5",
            "--cutmix",
            "1",
            "--model-ema",
            "--save-every",
            "5steps",
            "--model-kwargs",
            "drop_rate=0.2",
            "drop_path_rate=0.1",
        ),
    ],
)
def test_killed_and_resumed_is_never_killed(trainer, tmp_path, words):
    words = (*words, "--tracker", "none", "--epochs", "6")
    whole = trainer(*words, "--run-name", "whole").run
    run = tmp_path / "ck" / "killed"
    process = subprocess.Popen(trainer.command(*words, "--run-name", "killed"), stdout=subprocess.DEVNULL)
    wait_for(lambda: (run / "metrics.jsonl").exists() and '"step": 18' in (run / "metrics.jsonl").read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "summary.json").exists(), "the kill came too late to test anything"
    done = trainer(*words, "--run-name", "killed")
    assert "resume: from" in done.stdout
    assert sha256(run) == sha256(whole)
    assert without_clock(rows(run)) == without_clock(rows(whole))
    for key in ("accuracy", "best_accuracy", "train_loss", "steps"):
        assert summary(run)[key] == summary(whole)[key]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_143(trainer, tmp_path, number):
    words = ("--epochs", "16", "--run-name", "stopped")
    run = tmp_path / "ck" / "stopped"
    process = subprocess.Popen(trainer.command(*words), stdout=subprocess.PIPE, text=True)
    wait_for(lambda: (run / "metrics.jsonl").exists())
    process.send_signal(number)
    assert process.wait(30) == 143
    assert signal.Signals(number).name in (run / "PREEMPTED").read_text()
    assert summary(run)["status"] == "preempted"
    stopped_at = summary(run)["steps"]
    assert (run / "checkpoints" / f"step-{stopped_at:08d}").is_dir()
    done = trainer(*words)
    assert f"after step {stopped_at}" in done.stdout
    assert not (run / "PREEMPTED").exists() and summary(run)["status"] == "finished"
    first, second = wandb_runs(run)  # two parts of one wandb run
    assert first.name == second.name
    assert wandb_summary(second)["summary"]["accuracy"] == summary(run)["accuracy"]


def test_two_processes_are_one_run(trainer):
    words = ("--mixup", "0.5", "--epochs", "3", "--group", "pair")
    one, two = (
        trainer(*words, "--run-name", n, launcher=how).run for n, how in (("one", (sys.executable,)), ("two", TWO))
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


def test_batch_norm_on_two_processes_is_evaluated_with_the_weights_that_are_saved(trainer, in_process):
    """Each rank gathers its own running statistics; evaluation must use those of the saved model on every rank."""
    words = ("--model", "test_efficientnet", "--epochs", "2", "--tracker", "none", "--limit-test", "359")
    run = trainer(*words, launcher=TWO).run
    code, out, _ = in_process(main, "evaluate", run)
    assert code == 0 and f"loss      {summary(run)['test_loss']:.4f}" in out


def test_two_processes_stop_together_and_resume_as_one(trainer, tmp_path):
    words = ("--epochs", "16", "--tracker", "none", "--run-name", "stopped")
    run = tmp_path / "ck" / "stopped"
    command = [*TWO, *trainer.command(*words)[1:]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (run / "metrics.jsonl").exists())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert (run / "PREEMPTED").exists() and summary(run)["status"] == "preempted"
    steps = summary(run)["steps"]
    assert "resume: from" in trainer("--epochs", "16", "--tracker", "none", "--run-name", "stopped").stdout
    lines = rows(run)
    assert len({line["step"] for line in lines}) == len(lines) and lines[-1]["step"] == 128 > steps


def test_accelerate_config_and_launch(trainer, tmp_path):
    config = tmp_path / "accelerate.yaml"
    accelerate = str(BIN / "accelerate")
    subprocess.run([accelerate, "config", "default", "--config_file", config], check=True, capture_output=True)
    done = trainer("--max-steps", "4", launcher=(accelerate, "launch", "--config_file", str(config)))
    assert summary(done.run)["steps"] == 4
    shipped = Path(__file__).parent.parent / "accelerate_configs" / "cpu.yaml"
    done = trainer(
        "--max-steps", "4", "--run-name", "b", launcher=(accelerate, "launch", "--config_file", str(shipped))
    )
    assert "precision fp32 (from the launcher)" in done.stdout


def test_bf16_is_the_launchers(trainer):
    done = trainer("--epochs", "2", env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert "precision bf16 (from the launcher)" in done.stdout and summary(done.run)["status"] == "finished"
    assert read_json(done.run / "config.json")["options"]["mixed_precision"] == "bf16"
    refused = trainer("--epochs", "2", check=2)
    assert "--mixed-precision bf16 -> no" in refused.stderr
    sharded = trainer("--run-name", "b", env={"ACCELERATE_USE_FSDP": "true"}, check=2)
    assert "asks for FSDP" in sharded.stderr


def test_accumulation_from_the_option_and_from_the_launcher(trainer):
    words = ("--max-steps", "8", "--tracker", "none", "--mixup", "0.3")
    whole = trainer(*words, "--run-name", "a")
    cut = trainer(*words, "--run-name", "b", "--micro-batch-size", "9")
    launched = trainer(*words, "--run-name", "c", env={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})
    assert "batch     32 = 1 process x 8 images x 4 accumulation steps" in cut.stdout and "x 4 acc" in launched.stdout
    for other in (cut, launched):
        for a, b in zip(rows(whole.run), rows(other.run), strict=True):
            assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5)


def test_max_steps_cuts_and_a_larger_one_goes_on(trainer):
    whole = trainer("--run-name", "whole", "--tracker", "none").run
    cut = trainer("--run-name", "cut", "--tracker", "none", "--max-steps", "11").run
    assert summary(cut)["steps"] == 11 and rows(cut)[-1]["step"] == 11
    cut = trainer("--run-name", "cut", "--tracker", "none").run
    assert sha256(cut) == sha256(whole)
    assert [r["train/lr"] for r in rows(cut) if r["step"] == 12] == [
        r["train/lr"] for r in rows(whole) if r["step"] == 12
    ]


def test_stopped_before_the_first_step(trainer, tmp_path):
    """While data and model are made there is nothing to save: the process ends at once, and leaves nothing."""
    process = subprocess.Popen(
        trainer.command("--run-name", "a"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("model: making"):
        pass
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143 and "Traceback" not in err
    assert not (tmp_path / "ck" / "a" / "model").exists()


def test_a_resume_does_not_need_the_starting_weights_again(trainer, tmp_path):
    source = trainer("--epochs", "1", "--tracker", "none", "--run-name", "source").run / "model" / "model.safetensors"
    weights = tmp_path / "start.safetensors"
    shutil.copy(source, weights)
    words = ("--checkpoint", str(weights), "--tracker", "none", "--run-name", "b")
    trainer(*words, "--max-steps", "8")
    weights.unlink()
    assert "after step 8" in trainer(*words, "--max-steps", "9").stdout


def test_validation_split_reads_the_test_set_once(trainer):
    done = trainer("--validation-fraction", "0.25", "--epochs", "2", "--tracker", "none")
    options = read_json(done.run / "config.json")["options"]
    assert (options["train_images"], options["held_out_images"], options["test_images"]) == (192, 64, 100)
    assert done.stdout.count("reading the test set") == 1 and summary(done.run)["evaluated_images"] == 100
    assert rows(done.run)[-1]["eval/accuracy"] * 64 == pytest.approx(round(rows(done.run)[-1]["eval/accuracy"] * 64))


def test_resume_never_and_resume_path(trainer):
    words = ("--tracker", "none", "--epochs", "2")
    first = trainer(*words, "--run-name", "a").run
    before = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    second = trainer(*words, "--run-name", "a", "--resume", "never").run
    assert second.name == "a-2" and sha256(second) == sha256(first)
    assert {p: p.read_bytes() for p in first.rglob("*") if p.is_file()} == before
    done = trainer(*words, "--run-name", "c", "--resume", str(first / "checkpoints" / "step-00000008"))
    assert "after step 8" in done.stdout and sha256(done.run) == sha256(first)
    assert without_clock(rows(done.run)) == without_clock(rows(first))


def test_a_damaged_newest_checkpoint_is_passed_over(trainer):
    words = ("--tracker", "none", "--epochs", "3", "--run-name", "a")
    whole = trainer(*words).run
    digest = sha256(whole)
    (whole / "summary.json").unlink()
    weights = whole / "checkpoints" / "step-00000024" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    done = trainer(*words)
    assert "step-00000024 is passed over" in done.stdout and "after step 16" in done.stdout
    assert sha256(whole) == digest


def test_two_runs_cannot_write_one_folder(trainer, tmp_path):
    run = tmp_path / "ck" / "a"
    process = subprocess.Popen(trainer.command("--epochs", "400", "--run-name", "a"), stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists())
        refused = trainer("--epochs", "400", "--run-name", "a", check=2)
        assert f"in use by process {process.pid}" in refused.stderr
    finally:
        process.kill()
        process.wait()


def test_a_profile_is_written(trainer):
    done = trainer("--profile", "2", "--epochs", "1", "--tracker", "none")
    folder = done.run / "profile"
    assert f"profile: {folder / 'trace.json.gz'}" in done.stdout
    with gzip.open(folder / "trace.json.gz") as f:
        events = json.load(f)["traceEvents"]
    steps = {e["name"] for e in events if e["name"].startswith("ProfilerStep")}
    assert len(steps) == 2 and "convolution" in (folder / "operators.txt").read_text()


def test_compiled_runs_see_one_shape_a_model(trainer, tmp_path):
    """Two graphs, training and evaluation, though 100 test images are no whole number of batches; and a resume."""
    words = (
        "--model",
        "test_vit",
        "--model-kwargs",
        "patch_size=8",
        "--compile",
        "--batch-size",
        "64",
        "--tracker",
        "none",
    )
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = trainer(*words, "--micro-batch-size", "32", "--max-steps", "6", env=cache)
    assert rows(done.run)[-1]["train/compiled_graphs"] == 2 and "compiled  2 graphs" in done.stdout
    again = trainer(*words, "--micro-batch-size", "32", "--max-steps", "8", env=cache)
    assert "after step 6" in again.stdout and summary(again.run)["steps"] == 8


def test_without_a_compiler_a_run_goes_on_uncompiled(trainer, tmp_path):
    broken = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = trainer("--compile", "--epochs", "1", "--tracker", "none", env=broken)
    assert done.stdout.count("warning: --compile does not work here and is left out") == 1
    assert summary(done.run)["status"] == "finished" and "train/compiled_graphs" not in rows(done.run)[-1]


def test_a_loss_that_is_not_finite_ends_the_run(trainer):
    done = trainer("--learning-rate", "1e30", "--warmup-epochs", "0", "--clip-grad", "0", check=1)
    assert "Diverged" in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert summary(done.run)["status"] == "failed"


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
    assert result["status"] == "finished" and result["evaluated_images"] == config["options"]["test_images"]
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
    done = trainer(*words, base=(), env={"OMP_NUM_THREADS": str(os.cpu_count())})
    options = read_json(done.run / "config.json")["options"]
    assert summary(done.run)["evaluated_images"] == 32
    assert options["parameters"] > {"nfnet": 68e6, "vit": 85e6}[model]
