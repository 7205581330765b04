"""What only a GPU can show, skipped without one; two gloo ranks share a single device."""

from functools import partial

import forked_runs
import pytest
import torch
from conftest import TINY, rows, steps, summary, wait_for

from cifar_accel.records import checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture
def words(tmp_path, cache):
    """Options of a tiny training on the GPU, with more of them at the end."""
    places = ["--data-dir", cache, "--save-dir", str(tmp_path / "ck")]
    return lambda *more: [*TINY, *places, *"--device cuda --tracker none".split(), *more]


@pytest.mark.parametrize("world, accumulation", [(2, 1), (1, 2), (2, 2)])
def test_one_run_on_any_number_of_processes(words, tmp_path, world, accumulation):
    options = "--mixup 0.5 --log-every 1 --epochs 7 --learning-rate 1e-3".split()
    whole = tmp_path / "ck" / "whole"
    forked_runs.finish(words(*options, "--run-name", "whole"), tmp_path / "a")

    cut = tmp_path / "ck" / "cut"
    micro = ("--micro-batch-size", str(32 // world // accumulation))
    forked_runs.finish(words(*options, *micro, "--run-name", "cut"), tmp_path / "b", world)
    for row, expected in zip(rows(cut), rows(whole), strict=True):
        assert row["train/lr"] == expected["train/lr"]
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-4)
    assert summary(cut)["evaluated_images"] == 100


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_killed_and_resumed(words, tmp_path, precision):
    run = tmp_path / "ck" / "a"
    log = tmp_path / "log"
    done = forked_runs.finish_with_kills(
        words(*"--epochs 30 --save-every 2steps --run-name a".split()),
        log,
        run,
        kills=4,
        seed=3,
        worlds=(1, 2),
        environment={"ACCELERATE_MIXED_PRECISION": precision},
    )
    assert done >= 2
    assert forked_runs.resumes(log) >= 2
    assert summary(run)["status"] == "finished"
    # Of 240 steps every third has a row, and every eighth.
    assert steps(run) == sorted({*range(3, 241, 3), *range(8, 241, 8)})


def test_a_signal_stops_both_ranks(words, tmp_path):
    run = tmp_path / "ck" / "a"
    options = words(*"--epochs 4000 --run-name a".split())
    training = forked_runs.Training(options, tmp_path / "log", 2)
    wait_for((run / "metrics.jsonl").exists)
    # To one rank alone; both must hear of it.
    training.ranks[1].terminate()
    assert training.wait(60)
    assert training.codes == [143, 143]
    assert checkpoint.newest_valid(run, print) is not None


def test_a_step_that_is_not_finite(words, tmp_path):
    options = words(*"--run-name a --log-every 50".split())
    spoil = partial(forked_runs.spoil_images, 13, 1)
    failed = forked_runs.finish(options, tmp_path / "log", 2, hook=spoil)
    assert failed.codes == [1, 1]
    assert "step 13 is not finite" in (tmp_path / "log").read_text()


def test_too_large_a_batch_is_refused_before_the_first_step(words, tmp_path):
    options = words(
        *"--model vit_base_patch8_224 --image-size 224 --run-name a".split(),
        *"--batch-size 1024 --limit-train 1024".split(),
    )
    refused = forked_runs.finish(options, tmp_path / "log", seconds=300)
    assert refused.codes == [2]
    assert "Give --micro-batch-size" in (tmp_path / "log").read_text()
    assert not (tmp_path / "ck").exists()


def test_compiled_with_cuda_graphs(words, tmp_path):
    options = words(
        *"--compile --compile-mode reduce-overhead --model test_vit --run-name a".split()
    )
    forked_runs.finish(options, tmp_path / "log", seconds=300)
    # One for training, one for evaluation.
    assert rows(tmp_path / "ck" / "a")[-1]["train/compiled_graphs"] == 2
