"""Losses and gradients that are not finite."""

import json
import os
from functools import partial

import forked_runs
import pytest
from conftest import files_of, rows, summary

from cifar_accel.cli import evaluate_command
from cifar_accel.data.batches import Pipeline
from cifar_accel.data.order import Order
from cifar_accel.files import read_json
from cifar_accel.records import checkpoint


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_step_that_is_not_finite(words, tmp_path, world, optimizer):
    """Step 13, on the last rank, long before the next row."""
    options = words(*"--run-name a --tracker none --log-every 50 --optimizer".split(), optimizer)
    log = tmp_path / "log"
    run = tmp_path / "ck" / "a"
    spoil = partial(forked_runs.spoil_images, 13, world - 1)
    failed = forked_runs.finish(options, log, world, hook=spoil)
    assert failed.codes == [1] * world

    # What is said: step, norm, rate and images.
    said = log.read_text()
    assert "Traceback" not in said
    assert "step 13 is not finite: loss" in said
    assert "gradient norm nan, learning rate 0.00" in said
    samples = Order(3407, 256, 32).samples_of(13).tolist()
    shown = ", ".join(map(str, samples[:8]))
    assert f"training images {shown}, ..." in said

    # What is left.
    assert read_json(run / "diverged.json")["samples"] == samples
    assert summary(run)["status"] == "failed"
    assert "step 13" in summary(run)["error"]
    newest = checkpoint.newest_valid(run, print)
    assert newest.name == "step-00000008", "the last good checkpoint is untouched"

    # The fault was not in the images themselves, so the same command goes on.
    forked_runs.finish(options, log, world)
    assert summary(run)["status"] == "finished"
    assert not (run / "diverged.json").exists()


def infinite_loss() -> None:
    """Hook: the loss of step 13 is infinite on rank 1 alone, with gradients that are finite."""
    from timm import loss as losses

    forward = losses.SoftTargetCrossEntropy.forward
    calls = 0

    def spoilt_forward(self, x, target):
        nonlocal calls
        calls += 1
        loss = forward(self, x, target)
        # The first call is of step 0.
        if calls == 14 and os.environ.get("RANK") == "1":
            return loss + float("inf")
        return loss

    losses.SoftTargetCrossEntropy.forward = spoilt_forward


def test_a_loss_that_is_not_finite_on_one_rank(words, tmp_path):
    options = words(*"--run-name a --tracker none --log-every 50".split())
    failed = forked_runs.finish(options, tmp_path / "log", 2, hook=infinite_loss)
    assert failed.codes == [1, 1]
    said = (tmp_path / "log").read_text()
    assert said.count("step 13 is not finite: loss inf") == 2, said
    assert read_json(tmp_path / "ck" / "a" / "diverged.json")["step"] == 13


def spoil_a_weight() -> None:
    """Hook: after the step that ends at 16 a weight is infinite; its loss and gradients are not."""
    from cifar_accel import train

    take_step = train.take_step

    def spoilt(run, step, *words):
        take_step(run, step, *words)
        if step == 15:
            list(run.model.module.parameters())[-1].data[0] = float("inf")

    train.take_step = spoilt


def test_weights_that_are_not_finite_replace_no_checkpoint(words, tmp_path):
    options = words(*"--run-name a --tracker none".split())
    failed = forked_runs.finish(options, tmp_path / "log", hook=spoil_a_weight)
    assert failed.codes == [1]
    said = (tmp_path / "log").read_text()
    assert "the weights are not finite after step 16" in said and "Traceback" not in said
    assert checkpoint.newest_valid(tmp_path / "ck" / "a", print).name == "step-00000008"


def test_what_a_run_prints_of_a_divergence(trainer):
    done = trainer(*"--learning-rate 1e30 --warmup-epochs 0".split(), check=1)
    assert done.stderr.count("\n") == 1
    assert "is not finite" in done.stderr
    assert "no checkpoint holds it" in done.stderr
    assert summary(done.run)["status"] == "failed"


# ---- evaluations


def overflow_in_evaluations() -> None:
    """Hook: the last rank evaluates images so large that the model's numbers are not finite."""
    evaluation_batches = Pipeline.evaluation_batches

    def large_batches(self, batch_size, world=1, rank=0):
        for batch in evaluation_batches(self, batch_size, world, rank):
            yield batch._replace(images=batch.images * 1e38) if rank == world - 1 else batch

    Pipeline.evaluation_batches = large_batches


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("world", [1, 2])
def test_an_evaluation_that_is_not_finite(words, tmp_path, in_process, monkeypatch, world):
    """The weights are finite, and the checkpoint of the step is there already."""
    options = words(*"--run-name a --tracker none --epochs 2".split())
    log = tmp_path / "log"
    run = tmp_path / "ck" / "a"
    failed = forked_runs.finish(options, log, world, hook=overflow_in_evaluations)
    assert failed.codes == [1] * world
    said = log.read_text()
    assert "Traceback" not in said
    assert "Diverged: the evaluation after step 8 is not finite: loss nan over 100 images" in said
    assert summary(run)["status"] == "failed"
    assert [row["step"] for row in rows(run)] == [3, 6]
    for file, held in files_of(run).items():
        if file.suffix == ".json":
            json.loads(held, parse_constant=no_constant)
    assert checkpoint.newest_valid(run, print).name == "step-00000008"

    # The fault was not in the weights, so the same command goes on.
    forked_runs.finish(options, log, world)
    assert summary(run)["status"] == "finished"

    monkeypatch.setattr(Pipeline, "evaluation_batches", Pipeline.evaluation_batches)
    overflow_in_evaluations()
    code, _, stderr = in_process(evaluate_command, run, "--tracker", "none")
    assert code == 1
    assert stderr.count("\n") == 1 and "the evaluation is not finite: loss nan" in stderr
