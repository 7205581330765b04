"""Whole runs, in real processes, one and two: what a run leaves and every way to train."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import forked_runs
import numpy as np
import pytest
import timm
import torch
from conftest import (
    BIN,
    FRESH,
    ROOT,
    TINY,
    TWO,
    image_folder,
    options_of_run,
    parquet_folder,
    rows,
    steps,
    summary,
    wandb_inspect,
    wandb_runs,
    wandb_summary,
)
from safetensors.numpy import load_file

from cifar_accel import train
from cifar_accel.cli import evaluate_command, main, train_command
from cifar_accel.errors import DoesNotFit
from cifar_accel.files import read_json
from cifar_accel.records.meters import Clock
from cifar_accel.records.predictions import read_predictions
from cifar_accel.records.trackers import wandb_config, wandb_row
from cifar_accel.results.plots import PLOTS
from cifar_accel.step import take_step


def wandb_rows(file: Path) -> list[dict]:
    """The logged rows of an offline run, read back by wandb itself."""
    records = [json.loads(text) for text in wandb_inspect(file).splitlines()]
    history = [record["history"] for record in records if record["type"] == "history"]
    return [entry.get("item", entry) for entry in history]


def without_wandbs_own(values: dict) -> dict:
    return {key: value for key, value in values.items() if not key.startswith("_")}


# ---- what a run leaves


def test_what_a_run_leaves(trainer, in_process, tmp_path):
    words = "--epochs 3 --save-epochs 2 --model-ema --model-ema-decay 0.9 --tracker wandb".split()
    done = trainer(*words)
    run = done.run
    result = summary(run)
    assert f"accuracy {result['accuracy']:.2%} on 100 test images" in done.stdout
    assert result["status"] == "finished"
    assert result["evaluated_images"] == 100
    assert result["steps"] == 24
    assert_config_is_whole(run)
    assert_rows_are_whole(run)

    files = [
        *PLOTS,
        "model/model.safetensors",
        "model-epoch-0002/config.json",
        "checkpoints/step-00000024/manifest.json",
    ]
    for name in files:
        assert (run / name).exists(), name
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-00000016", "step-00000024"]
    assert_the_average_is_what_counts(run)
    assert not list(run.rglob("*.tmp"))

    # The same command again trains nothing.
    rows_before = rows(run)
    again = trainer(*words)
    assert "is finished" in again.stdout
    assert rows(run) == rows_before
    assert len(wandb_runs(run)) == 1

    # Moved elsewhere, timm and `evaluate` give the reported accuracy.
    moved = tmp_path / "moved"
    shutil.move(run, moved)
    code, out, _ = in_process(main, "evaluate", moved)
    assert code == 0
    assert f"{result['accuracy']:.4%}" in out
    assert "100 test images" in out
    assert accuracy_by_timm(moved) == result["accuracy"]


def assert_the_average_is_what_counts(run: Path) -> None:
    """With --model-ema it goes on from step to step, and is what is saved."""
    last = run / "checkpoints" / "step-00000024"
    average = load_file(last / "ema.safetensors")
    saved = load_file(run / "model" / "model.safetensors")
    assert saved.keys() == average.keys()
    assert all((saved[name] == average[name]).all() for name in saved)
    for other in (last / "model.safetensors", last.parent / "step-00000016" / "ema.safetensors"):
        weights = load_file(other)
        assert any((weights[name] != average[name]).any() for name in average)


def assert_config_is_whole(run: Path) -> None:
    """config.json says each option, where it comes from, and what was trained on."""
    config = read_json(run / "config.json")
    assert config["options"]["learning_rate"] == 3e-3
    assert config["provenance"]["learning_rate"] == "flag"
    assert config["provenance"]["smoothing"] == "recipe"
    assert config["provenance"]["seed"] == "default"
    derived = {"mixed_precision", "memory_format", "total_steps", "data_fingerprint"}
    assert derived <= config["options"].keys()
    assert config["versions"]["torch"]
    assert config["hardware"]["cpu_cores"]
    assert config["command"][1:]


def assert_rows_are_whole(run: Path) -> None:
    """A row every 3 steps and at each epoch's end, and a summary that agrees with them."""
    result = summary(run)
    assert steps(run) == sorted({*range(3, 25, 3), 8, 16, 24})

    evaluated = [row for row in rows(run) if "eval/accuracy" in row]
    assert [row["step"] for row in evaluated] == [8, 16, 24]
    assert evaluated[-1]["eval/accuracy"] == result["accuracy"]
    assert result["best_accuracy"] == max(row["eval/accuracy"] for row in evaluated)

    # The reported loss is the last epoch's mean; a row's counts for the steps since the one before.
    previous_step = 16
    total = 0.0
    for row in rows(run):
        if row["step"] > 16:
            total += (row["step"] - previous_step) * row["train/loss"]
            previous_step = row["step"]
    assert result["train_loss"] == pytest.approx(total / 8, rel=1e-12)


def accuracy_by_timm(run: Path) -> float:
    """Accuracy of the saved model on the test images, by timm and torch alone."""
    from cifar_accel.data.decode import load_dataset
    from cifar_accel.data.splits import limit

    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    test = limit(load_dataset("digits", options_of_run(run)["data_dir"], 32).test, 100, "", 3407)
    images = torch.from_numpy(test.images).float()
    images = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    mean = torch.tensor(model.pretrained_cfg["mean"]).view(1, 3, 1, 1)
    std = torch.tensor(model.pretrained_cfg["std"]).view(1, 3, 1, 1)
    with torch.no_grad():
        predictions = model((images / 255 - mean) / std).argmax(1).numpy()
    return (predictions == test.labels).mean()


# ---- several processes, and launchers


def test_two_processes_are_one_run(trainer):
    # An odd number of test images: the ranks' shares differ.
    words = "--mixup 0.5 --epochs 3 --group pair --limit-test 99 --run-name".split()
    one = trainer(*words, "one").run
    two = trainer(*words, "two", launcher=TWO).run
    for row, expected in zip(rows(two), rows(one), strict=True):
        assert row["step"] == expected["step"]
        assert row["train/lr"] == expected["train/lr"]
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
        assert row.get("eval/loss", 0) == pytest.approx(expected.get("eval/loss", 0), rel=1e-4)
    assert summary(two)["evaluated_images"] == 99

    # One run of wandb too, with every row.
    (file,) = wandb_runs(two)
    *logged, objects = [without_wandbs_own(row) for row in wandb_rows(file)]
    assert [row.pop("trainer/step") for row in logged] == steps(two)
    for row, line in zip(logged, rows(two), strict=True):
        expected = wandb_row(line)
        del expected["trainer/step"]
        assert row == pytest.approx(expected)
    assert any(name.startswith("test/mistakes") for name in objects)

    # With its result, its configuration and its group.
    seen = wandb_summary(file)
    assert seen["state"] == "finished"
    assert seen["summary"]["test/accuracy"] == summary(two)["accuracy"]
    assert without_wandbs_own(seen["config"]) == wandb_config(options_of_run(two))
    assert options_of_run(two)["processes"] == 2
    assert options_of_run(two)["device_batch_size"] == 16
    assert b"pair" in file.read_bytes()
    assert b"train" in file.read_bytes()


def test_batch_norm_on_two_processes_is_evaluated_with_the_weights_that_are_saved(
    trainer, in_process
):
    """Each rank gathers its own running statistics; all evaluate with those of the saved model."""
    words = "--model test_efficientnet --epochs 2 --tracker none --limit-test 359".split()
    run = trainer(*words, launcher=TWO).run
    code, out, _ = in_process(main, "evaluate", run)
    assert code == 0
    assert f"loss      {summary(run)['test_loss']:.4f}" in out


def test_accelerate_config_and_launch(trainer, tmp_path):
    accelerate = str(BIN / "accelerate")

    # A config as `accelerate config` writes it.
    config = tmp_path / "accelerate.yaml"
    write_config = [accelerate, *"config default --config_file".split(), config]
    subprocess.run(write_config, check=True, capture_output=True)
    launcher = (accelerate, "launch", "--config_file", str(config))
    done = trainer("--max-steps", "4", launcher=launcher)
    assert summary(done.run)["steps"] == 4

    # A config of this project.
    shipped = ROOT / "accelerate_configs" / "cpu.yaml"
    launcher = (accelerate, "launch", "--config_file", str(shipped))
    done = trainer("--max-steps", "4", "--run-name", "b", launcher=launcher)
    assert "precision fp32 (from the launcher)" in done.stdout


def test_bf16_is_the_launchers(trainer):
    done = trainer("--epochs", "2", env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert "precision bf16 (from the launcher)" in done.stdout
    assert summary(done.run)["status"] == "finished"
    assert options_of_run(done.run)["mixed_precision"] == "bf16"
    refused = trainer("--epochs", "2", check=2)
    assert "--mixed-precision bf16 -> no" in refused.stderr
    sharded = trainer("--run-name", "b", env={"ACCELERATE_USE_FSDP": "true"}, check=2)
    assert "asks for FSDP" in sharded.stderr


def test_accumulation_from_the_option_and_from_the_launcher(trainer):
    words = "--max-steps 8 --tracker none --mixup 0.3 --run-name".split()
    whole = trainer(*words, "a")
    cut = trainer(*words, "b", "--micro-batch-size", "9")
    assert "batch     32 = 1 process x 8 images x 4 accumulation steps" in cut.stdout
    four = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    launched = trainer(*words, "c", env=four)
    assert "x 4 acc" in launched.stdout
    for other in (cut, launched):
        for row, expected in zip(rows(other.run), rows(whole.run), strict=True):
            assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)


# ---- kinds of training


def test_validation_split_reads_the_test_set_once(trainer):
    done = trainer(*"--validation-fraction 0.25 --epochs 2 --tracker none".split())
    options = options_of_run(done.run)
    assert options["train_images"] == 192
    assert options["held_out_images"] == 64
    assert options["test_images"] == 100
    assert done.stdout.count("reading the test set") == 1
    assert summary(done.run)["evaluated_images"] == 100
    # While training, whole images of the 64 are counted.
    correct = rows(done.run)[-1]["eval/accuracy"] * 64
    assert correct == pytest.approx(round(correct))


@pytest.mark.parametrize(
    "words",
    [
        "--clip-grad 1",
        "--clip-grad 0.01 --clip-mode agc",
        "--bce-loss",
        "--optimizer lion",
        "--scheduler one_cycle",
        "--memory-format contiguous",
        "--model test_vit --memory-format channels_last",
        "--optimizer sgdm --learning-rate 0.05 --warmup-epochs 1",
        "--no-decay-all",
        "--recipe plain --reprob 0.3 --color-jitter 0.3",
    ],
)
def test_every_kind_of_step_trains(in_process, cache, tmp_path, words):
    base = [*TINY, "--data-dir", cache, "--save-dir", tmp_path, "--tracker", "none"]
    code, _, err = in_process(train_command, *base, *words.split())
    assert code == 0, err
    (file,) = tmp_path.rglob("metrics.jsonl")
    losses = [row["train/loss"] for row in rows(file.parent)]
    assert losses[-1] < losses[0]


def test_what_acts_in_a_step_has_an_effect(trainer):
    def losses(*words):
        run = trainer(*"--epochs 1 --log-every 1 --tracker none --run-name".split(), *words).run
        return [row["train/loss"] for row in rows(run)]

    plain = losses("plain")
    for name, words in (
        ("clipped", ["--clip-grad", "0.05"]),
        ("bce", ["--bce-loss"]),
        ("spared", ["--no-decay-all", "--weight-decay", "1"]),
    ):
        changed = losses(name, *words)
        assert changed[-1] != plain[-1], name
        # The first loss is of the same weights.
        assert (changed[0] == plain[0]) == (name != "bce")


def test_a_checkpoint_by_the_clock_is_for_all_ranks(words, tmp_path):
    """The clock of any of them says when."""
    options = "--save-every 10m --keep-checkpoints 9 --run-name a --tracker none".split()
    log = tmp_path / "log"
    done = forked_runs.finish(words(*options), log, 2, hook=ten_minutes_on_rank_1)
    assert done.codes == [0, 0], log.read_text()
    folders = (tmp_path / "ck" / "a" / "checkpoints").iterdir()
    assert sorted(int(folder.name[-4:]) for folder in folders) == [5, 32]


def ten_minutes_on_rank_1() -> None:
    """Hook: ten minutes are over after the fifth step, by the clock of rank 1."""
    minutes_up = Clock.minutes_up
    asked = 0

    def passed(self, minutes):
        nonlocal asked
        asked += 1
        return minutes_up(self, minutes) or (asked == 6 and os.environ["RANK"] == "1")

    Clock.minutes_up = passed


def test_what_does_not_fit_is_told_before_the_first_step(in_process, cache, tmp_path, monkeypatch):
    """A GPU is tried; here the trial is made to fail."""

    def fails(run):
        raise DoesNotFit("out of memory with 32 images at once")

    monkeypatch.setattr(train, "check_memory", fails)
    places = ["--data-dir", cache, "--save-dir", tmp_path / "ck"]
    code, _, err = in_process(train_command, *TINY, *places)
    assert code == 2
    assert err == "cifar_accel: out of memory with 32 images at once\n"
    assert not (tmp_path / "ck").exists()


def test_every_layer_learns_at_its_own_rate(in_process, cache, tmp_path, monkeypatch):
    seen = []

    def watched(run, step, *words):
        take_step(run, step, *words)
        rate = run.plan.learning_rate(step)
        seen.append([group["lr"] / rate for group in run.optimizer.param_groups])

    monkeypatch.setattr(train, "take_step", watched)
    base = [*TINY, "--data-dir", cache, "--save-dir", tmp_path, "--tracker", "none"]
    words = "--model test_vit --model-kwargs patch_size=8 --layer-decay 0.5 --max-steps 2".split()
    code, _, err = in_process(train_command, *base, *words)
    assert code == 0, err
    # From the head backwards: it, the blocks, the embedding.
    assert len(seen) == 2
    layers = sorted({round(scale, 9) for scale in seen[0]}, reverse=True)
    assert layers == [0.5**layer for layer in range(len(layers))]
    assert len(layers) > 3
    assert seen[1] == pytest.approx(seen[0])


@pytest.mark.parametrize("model", ["test_vit --model-kwargs patch_size=8", "test_resnet"])
@pytest.mark.parametrize("pipeline", ["device", "timm --workers 0"])
def test_sizes_that_grow(in_process, cache, tmp_path, model, pipeline):
    base = [*TINY, "--data-dir", cache, "--save-dir", tmp_path, "--tracker", "none"]
    words = f"--model {model} --pipeline {pipeline} --image-size 16:0.4,24:0.7,32 --run-name a"
    code, _, err = in_process(train_command, *base, *words.split())
    assert code == 0, err
    run = tmp_path / "a"
    sizes = {row["step"]: row["train/image_size"] for row in rows(run)}
    # A row is of one size: there is one after the last step of each.
    assert [sizes[step] for step in (3, 13, 15, 22, 24, 32)] == [16, 16, 24, 24, 32, 32]
    assert read_json(run / "model/config.json")["pretrained_cfg"]["input_size"] == [3, 32, 32]
    # What was saved is what was evaluated.
    code, out, err = in_process(evaluate_command, run, "--device", "cpu")
    assert f"accuracy  {summary(run)['accuracy']:.4%}" in out, err


@pytest.mark.parametrize(
    "make, classes",
    [(image_folder, ["cat", "dog"]), (parquet_folder, ["ant", "bee", "cow", "dog"])],
)
def test_own_images_train(in_process, cache, tmp_path, make, classes):
    """Folders made here: one of PNG files by class, one of parquet files as the hub has them."""
    folder = make(tmp_path / "data")
    words = [
        *"--model test_nfnet --no-pretrained --recipe plain --batch-size 4 --epochs 2".split(),
        "--tracker",
        "none",
        "--dataset",
        folder,
        "--data-dir",
        cache,
        "--save-dir",
        tmp_path / "ck",
    ]
    code, _, err = in_process(train_command, *words)
    assert code == 0, err
    (file,) = tmp_path.rglob("summary.json")
    run = file.parent
    assert summary(run)["status"] == "finished"
    assert summary(run)["evaluated_images"] == options_of_run(run)["test_images"]
    assert read_json(run / "model" / "config.json")["label_names"] == classes


def test_real_images_and_imagenet_weights(trainer, cifar, weights):
    """The report's recipe with timm's augmentation in workers, from ImageNet weights."""
    words = [
        "--dataset",
        cifar,
        "--model",
        f"local-dir:{weights / 'tf_efficientnet_lite0.in1k'}",
        *"--epochs 2 --limit-train 512 --limit-test 300 --batch-size 64".split(),
        *"--tracker none --pipeline timm --workers 1".split(),
    ]
    done = trainer(*words, base=())
    assert summary(done.run)["evaluated_images"] == 300
    assert summary(done.run)["status"] == "finished"
    options = options_of_run(done.run)
    assert options["aa"] == "rand-m15-n2"
    assert options["pipeline"] == "timm"
    assert options["classes"] == 100
    policy = "policy    rand-m15-n2 (m15 acts as m10, timm's ceiling unless mmax raises it)"
    assert policy in done.stdout


def test_finetune_beats_the_report(trainer, weights):
    """The same weights and images, real ones of handwritten digits, for 96 steps."""
    model = f"local-dir:{weights / 'deit_tiny_patch16_224.fb_in1k'}"
    few = "--epochs 3 --limit-train 512 --limit-test 200 --batch-size 16 --tracker none".split()
    accuracy = {}
    for recipe in ("report", "finetune --image-size 64"):
        words = ["--dataset", "digits", "--model", model, *few, "--recipe", *recipe.split()]
        done = trainer(*words, "--resume", "never", base=())
        accuracy[recipe.split()[0]] = summary(done.run)["accuracy"]
        said = "a baseline; finetune goes past it" in done.stdout
        assert said == (recipe == "report")
    assert accuracy["finetune"] > accuracy["report"] + 0.2, accuracy


def test_what_finetune_derived_holds_for_every_later_start(trainer, in_process, tmp_path):
    """Also on two processes, and where a rule has changed since."""
    trained = trainer(*"--epochs 1 --run-name start --tracker none".split())
    weights = ("--checkpoint", str(trained.run), "--recipe", "finetune", "--run-name", "a")
    words = (*weights, *"--image-size 16:0.4,32 --epochs 26 --batch-size 32".split())
    first = trainer(*words, "--max-steps", "3")
    options = options_of_run(first.run)
    assert (options["clip_mode"], options["cutmix"]) == ("agc", 1.0)
    assert read_json(first.run / "config.json")["provenance"]["cutmix"] == "derived"
    # As if an earlier version had derived another value.
    file = first.run / "config.json"
    file.write_text(file.read_text().replace('"cutmix": 1.0', '"cutmix": 0.5'))
    again = trainer(*words, "--max-steps", "6", launcher=TWO)
    assert "resume: from" in again.stdout
    assert options_of_run(again.run)["cutmix"] == 0.5
    # A flag that says otherwise is another configuration.
    refused = trainer(*words, "--max-steps", "9", "--cutmix", "1", check=2)
    assert "--cutmix 0.5 -> 1.0" in refused.stderr


@pytest.mark.parametrize("model, parameters", [("nfnet", 68e6), ("vit", 85e6)])
def test_the_reports_architectures_train(trainer, cifar, model, parameters):
    words = [
        "--dataset",
        cifar,
        *f"--model {model} --no-pretrained --max-steps 2".split(),
        *"--limit-train 64 --limit-test 32 --batch-size 16".split(),
        *"--tracker none --save-every none".split(),
    ]
    # A process of its own, since it takes all cores.
    all_cores = {"OMP_NUM_THREADS": str(os.cpu_count())}
    done = trainer(*words, base=(), env=all_cores, launcher=FRESH)
    assert summary(done.run)["evaluated_images"] == 32
    assert options_of_run(done.run)["parameters"] > parameters


# ---- what the model says of each image


def test_predictions_agree_with_the_summary(trainer, in_process):
    """Of the test images and of those held out; and evaluate writes them where they are missing."""
    words = "--validation-fraction 0.25 --epochs 2 --tracker none --log-every 100".split()
    run = trainer(*words).run
    written = read_predictions(run)
    counts = {kind: len(predictions.labels) for kind, predictions in written.items()}
    assert counts == {"held-out": 64, "test": 100}
    assert written["test"].correct.mean() == summary(run)["accuracy"]
    assert written["held-out"].correct.mean() == rows(run)[-1]["eval/accuracy"]
    in_five = (written["test"].first_five == written["test"].labels[:, None]).any(1)
    assert in_five.mean() == summary(run)["top5_accuracy"]

    (run / "predictions.safetensors").unlink()
    code, out, _ = in_process(evaluate_command, run, "--device", "cpu")
    assert code == 0 and f"written   {run / 'predictions.safetensors'}" in out
    again = read_predictions(run)["test"]
    assert again.images == written["test"].images
    assert (again.logits == written["test"].logits).all()
    # Once they are there, they stay.
    code, out, _ = in_process(evaluate_command, run, "--device", "cpu")
    assert code == 0 and "written" not in out


def test_predictions_of_two_processes_are_in_the_order_of_the_split(trainer):
    """With a test set that leaves the last batches filled up."""
    words = "--epochs 1 --limit-test 99 --tracker none".split()
    one = read_predictions(trainer(*words, "--run-name", "one").run)["test"]
    two = read_predictions(trainer(*words, "--run-name", "two", launcher=TWO).run)["test"]
    assert one.images == two.images
    assert len(two.labels) == 99
    assert np.abs(one.logits.astype(float) - two.logits).max() < 0.05
