"""What only a GPU can show, skipped without one; two gloo ranks share a single device."""

import time
from functools import partial

import forked_runs
import pytest
import torch
from conftest import TINY, rows, summary
from test_failures import _spoil

from cifar_accel.records import checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture
def words(tmp_path, cache):
    """Options of a tiny training on the GPU in this test's folder."""
    about = [
        "--data-dir",
        cache,
        "--save-dir",
        str(tmp_path / "ck"),
        "--device",
        "cuda",
        "--tracker",
        "none",
    ]
    return lambda *more: [*TINY, *about, *more]


@pytest.mark.parametrize("world, accumulation", [(2, 1), (1, 2), (2, 2)])
def test_one_run_on_any_number_of_processes(words, tmp_path, world, accumulation):
    options = ("--mixup", "0.5", "--log-every", "1", "--epochs", "7", "--learning-rate", "1e-3")
    micro = ("--micro-batch-size", str(32 // world // accumulation))
    forked_runs.finish(words(*options, "--run-name", "one"), tmp_path / "a")
    forked_runs.finish(words(*options, *micro, "--run-name", "b"), tmp_path / "b", world)
    for a, b in zip(rows(tmp_path / "ck" / "one"), rows(tmp_path / "ck" / "b"), strict=True):
        assert a["train/lr"] == b["train/lr"] and a["train/loss"] == pytest.approx(
            b["train/loss"], rel=1e-4
        )
    assert summary(tmp_path / "ck" / "b")["evaluated_images"] == 100


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_killed_and_resumed(words, tmp_path, precision):
    environment = {"ACCELERATE_MIXED_PRECISION": precision}
    options, run = (
        words("--epochs", "30", "--save-every", "2steps", "--run-name", "a"),
        tmp_path / "ck" / "a",
    )
    done = forked_runs.finish_with_kills(
        options, tmp_path / "log", run, 4, 3, (1, 2), environment=environment
    )
    assert (
        done >= 2
        and forked_runs.resumes(tmp_path / "log") >= 2
        and summary(run)["status"] == "finished"
    )
    lines = rows(run)
    assert len({line["step"] for line in lines}) == len(lines) == 80 + 20


def test_a_signal_stops_both_ranks(words, tmp_path):
    training = forked_runs.Training(
        words("--epochs", "4000", "--run-name", "a"), tmp_path / "log", 2
    )
    while not (tmp_path / "ck" / "a" / "metrics.jsonl").exists():
        time.sleep(0.05)
    training.ranks[1].terminate()
    assert training.wait(60) and training.codes == [143, 143]
    assert checkpoint.newest_valid(tmp_path / "ck" / "a", print) is not None


def test_a_step_that_is_not_finite(words, tmp_path):
    failed = forked_runs.finish(
        words("--run-name", "a", "--log-every", "50"),
        tmp_path / "log",
        2,
        hook=partial(_spoil, 13, "1"),
    )
    assert failed.codes == [1, 1] and "step 13 is not finite" in (tmp_path / "log").read_text()


def test_too_large_a_batch_is_refused_before_the_first_step(words, tmp_path):
    more = [
        "--model",
        "vit_base_patch8_224",
        "--image-size",
        "224",
        "--batch-size",
        "1024",
        "--limit-train",
        "1024",
    ]
    refused = forked_runs.finish(words(*more, "--run-name", "a"), tmp_path / "log", seconds=300)
    said = (tmp_path / "log").read_text()
    assert (
        refused.codes == [2]
        and "Give --micro-batch-size" in said
        and not (tmp_path / "ck").exists()
    )


def test_compiled_with_cuda_graphs(words, tmp_path):
    options = words(
        "--compile", "--compile-mode", "reduce-overhead", "--model", "test_vit", "--run-name", "a"
    )
    forked_runs.finish(options, tmp_path / "log", seconds=300)
    assert rows(tmp_path / "ck" / "a")[-1]["train/compiled_graphs"] == 2
