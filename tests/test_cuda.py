"""What only a GPU can show, skipped without one.

Two ranks share a single device over gloo, for NCCL refuses that; one process takes NCCL where a
launcher has started it.
"""

import sys
from contextlib import suppress
from functools import partial

import forked_runs
import pytest
import torch
from conftest import TINY, rows, steps, summary, wait_for

from cifar_accel.records import checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

# One process, by torchrun.
LAUNCHED = (sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 1".split())
# What the GPU of a test with a limit may hold, in bytes.
LIMIT = 16 * 2**30


def limit_memory() -> None:
    """Hook: the training has `LIMIT` of the GPU, so that it fails alike on any, beside others."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT / total))


def leave_no_room_for_images() -> None:
    """Hook: nothing is free on the GPU when the images are to go there."""
    from cifar_accel.data.resident import ResidentImages

    begin = ResidentImages.__init__
    held = []

    def begin_without_room(self, *arguments):
        # No new memory, and no hole in what there is that takes 2 MiB.
        torch.cuda.set_per_process_memory_fraction(0.0)
        with suppress(torch.OutOfMemoryError):
            while True:
                held.append(torch.empty(2**21, dtype=torch.uint8, device="cuda"))
        begin(self, *arguments)

    ResidentImages.__init__ = begin_without_room


def forbid_waits(planted: bool = False) -> None:
    """Hook: each step but the first fails where the host waits for the GPU; if `planted`, it does.

    torch sees neither copies that are said not to block from memory that is not pinned, nor what
    its collectives wait for.
    """
    from cifar_accel import train
    from cifar_accel.data import resident

    take_step = train.take_step
    # Each step makes its own images: else the first one makes them for many.
    resident.CHUNK_PIXELS = {"cuda": 1}

    def take_step_without_waits(run, step, *arguments):
        # The first sets up the optimizer's state and the libraries.
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        take_step(run, step, *arguments)
        if planted:
            run.sums.values.tolist()
        torch.cuda.set_sync_debug_mode("default")

    train.take_step = take_step_without_waits


@pytest.fixture
def words(tmp_path, cache):
    """Options of a tiny training on the GPU, with more of them at the end."""
    places = ["--data-dir", cache, "--save-dir", str(tmp_path / "ck")]
    return lambda *more: [*TINY, *places, *"--device cuda --tracker none".split(), *more]


@pytest.fixture
def nccl() -> dict[str, str]:
    """The environment of a single process that torchrun has started; NCCL says that it is used."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(forked_runs._free_port())}
    return {**ranks, **place, "NCCL_DEBUG": "VERSION"}


# ---- where the host waits

# Of the report's policy, in the precision of a GPU.
STEPS = "--recipe report --max-steps 20 --log-every 10 --save-every none --run-name a".split()
BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}


@pytest.mark.parametrize("options", ["adamw", "lamb", "adamw --image-size 224"])
def test_no_step_waits_for_the_gpu(words, tmp_path, options):
    options = words(*STEPS, "--optimizer", *options.split())
    log = tmp_path / "log"
    trained = forked_runs.finish(options, log, environment=BF16, hook=forbid_waits)
    assert trained.codes == [0], log.read_text()
    assert summary(tmp_path / "ck" / "a")["steps"] == 20


def test_a_step_that_waits_is_seen(words, tmp_path):
    log = tmp_path / "log"
    failed = forked_runs.finish(words(*STEPS), log, hook=partial(forbid_waits, planted=True))
    assert failed.codes == [1]
    assert "synchronizing CUDA operation" in log.read_text()


# ---- on one process and on several


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


def test_a_step_that_is_not_finite_on_a_gpu(words, tmp_path):
    options = words(*"--run-name a --log-every 50".split())
    spoil = partial(forked_runs.spoil_images, 13, 1)
    failed = forked_runs.finish(options, tmp_path / "log", 2, hook=spoil)
    assert failed.codes == [1, 1]
    assert "step 13 is not finite" in (tmp_path / "log").read_text()


def test_over_nccl(trainer):
    options = "--device cuda --tracker none".split()
    done = trainer(*options, launcher=LAUNCHED, env={"NCCL_DEBUG": "VERSION"})
    assert "NCCL version" in done.stdout + done.stderr
    assert summary(done.run)["status"] == "finished"


def test_over_nccl_a_step_that_is_not_finite(words, tmp_path, nccl):
    options = words(*"--run-name a --log-every 50".split())
    log = tmp_path / "log"
    spoil = partial(forked_runs.spoil_images, 13, 0)
    failed = forked_runs.finish(options, log, environment=nccl, hook=spoil)
    assert failed.codes == [1]
    said = log.read_text()
    assert "NCCL version" in said and "step 13 is not finite" in said


def test_over_nccl_a_signal_stops_and_the_run_goes_on(words, tmp_path, nccl):
    run = tmp_path / "ck" / "a"
    log = tmp_path / "log"
    options = "--epochs 4000 --run-name a".split()
    training = forked_runs.Training(words(*options), log, environment=nccl)
    wait_for((run / "metrics.jsonl").exists)
    training.ranks[0].terminate()
    assert training.wait(60)
    assert training.codes == [143]
    # Without a launcher, and so without NCCL.
    stopped_at = summary(run)["steps"]
    more = str(stopped_at + 5)
    forked_runs.finish(words(*options, "--max-steps", more), log)
    assert forked_runs.resumes(log) == 1
    assert summary(run)["steps"] == stopped_at + 5


# ---- what does not fit


def test_too_large_a_batch_is_refused_before_the_first_step(words, tmp_path):
    options = words(
        *"--model vit_base_patch8_224 --image-size 224 --run-name a".split(),
        *"--batch-size 1024 --limit-train 1024".split(),
    )
    refused = forked_runs.finish(options, tmp_path / "log", seconds=300, hook=limit_memory)
    assert refused.codes == [2]
    assert "Give --micro-batch-size" in (tmp_path / "log").read_text()
    assert not (tmp_path / "ck").exists()


def test_images_that_do_not_fit_are_refused_in_one_line(words, tmp_path):
    # All images: as few as the other tests take would find a place.
    options = words(*"--limit-train 0 --limit-test 0 --run-name a".split())
    refused = forked_runs.finish(options, tmp_path / "log", hook=leave_no_room_for_images)
    assert refused.codes == [2]
    said = (tmp_path / "log").read_text()
    assert "no room on cuda" in said and "--pipeline timm keeps them on the host" in said
    assert "Traceback" not in said
    assert not (tmp_path / "ck").exists()


# ---- compiled


def test_compiled_with_cuda_graphs(words, tmp_path):
    options = words(
        *"--compile --compile-mode reduce-overhead --model test_vit --run-name a".split()
    )
    forked_runs.finish(options, tmp_path / "log", seconds=300)
    # One for training, one for evaluation.
    assert rows(tmp_path / "ck" / "a")[-1]["train/compiled_graphs"] == 2
