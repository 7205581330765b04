"""Out of memory: what fits instead is found by trying."""

import re
import resource
from functools import partial

import forked_runs
import psutil
from conftest import rows, sha256, summary, without_clock

from cifar_accel.machine.memory import is_out_of_memory


def little_memory(mib: int) -> None:
    """Hook: no more than `mib` of address space beyond what there is once the model is made."""
    from cifar_accel import train

    set_up = train.set_up

    def set_up_and_limit(*args):
        made = set_up(*args)
        limit = psutil.Process().memory_info().vms + mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        return made

    train.set_up = set_up_and_limit


def test_out_of_memory_names_what_fits(words, tmp_path):
    """The advice is followed until it trains.

    It may take more than once: a limit on addresses, unlike one on memory, also counts what is only
    set aside.
    """
    options = "--image-size 96 --batch-size 128 --run-name a --tracker none --epochs 1".split()
    size = 128
    while True:
        log = tmp_path / f"log-{size}"
        micro = ("--micro-batch-size", str(size))
        training = forked_runs.finish(
            words(*options, *micro), log, hook=partial(little_memory, 560)
        )
        # Until the advice was good.
        if training.codes != [1]:
            break

        said = log.read_text()
        assert f"out of memory on cpu with {size} images at once" in said
        assert "Traceback" not in said
        assert "the global batch stays 128" in said
        # What fits, in the words of the advice: a smaller part of the same global batch.
        advice = r"(\d+) fit. Give --micro-batch-size (\d+): (\d+) accumulation steps"
        found = re.search(advice, said)
        assert found, said
        fitting, given, accumulation = map(int, found.groups())
        assert fitting == given < size
        assert given * accumulation == 128
        size = given

    assert training.codes == [0]
    assert 8 <= size <= 64
    assert summary(tmp_path / "ck" / "a")["status"] == "finished"


def test_what_is_not_supported_is_not_a_lack_of_memory():
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    unsupported = "could not create a primitive descriptor for a matmul primitive"
    assert not is_out_of_memory(RuntimeError(unsupported))


def try_memory() -> None:
    """Hook: do before the first step what a GPU's start does."""
    from cifar_accel import train, trial

    set_up = train.set_up

    def set_up_and_try(*args):
        run, state = set_up(*args)
        assert trial.step_fits(run, run.plan.order.micro_batch_size)
        return run, state

    train.set_up = set_up_and_try


def test_the_trial_for_memory_changes_nothing(words, tmp_path):
    """Not the weights, not batch norm's statistics, not the ranks' synchrony.

    On two ranks with DDP's static graph.
    """
    options = "--model test_efficientnet --tracker none --epochs 2".split()
    for name, hook in (("plain", None), ("tried", try_memory)):
        forked_runs.finish(words(*options, "--run-name", name), tmp_path / name, 2, hook=hook)
    plain = tmp_path / "ck" / "plain"
    tried = tmp_path / "ck" / "tried"
    assert sha256(plain) == sha256(tried)
    assert without_clock(rows(plain)) == without_clock(rows(tried))
