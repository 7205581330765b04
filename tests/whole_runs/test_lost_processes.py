"""A process that dies ends the others of its run."""

import os
import signal
import subprocess
import time

import forked_runs
import psutil
import pytest
from conftest import TWO, wait_for

LONG_RUN = "--epochs 400 --run-name a --tracker none".split()


@pytest.mark.parametrize("dies", [0, 1])
def test_when_one_rank_dies_the_other_ends(words, tmp_path, dies):
    training = forked_runs.Training(words(*LONG_RUN), tmp_path / "log", 2)
    wait_for((tmp_path / "ck" / "a" / "metrics.jsonl").exists)
    began = time.monotonic()
    training.ranks[dies].kill()
    assert training.wait(60)
    print(f"{time.monotonic() - began:.1f} s")

    other = 1 - dies
    assert training.codes[other] == 1
    said = (tmp_path / "log").read_text()
    # A vote of the hosts says it in a line; an exchange of gradients fails as torch words it.
    assert "another process of this run is gone" in said or "Connection" in said


def test_when_one_rank_dies_under_torchrun(trainer, tmp_path):
    run = tmp_path / "ck" / "a"
    command = trainer.command(*LONG_RUN, launcher=TWO)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((run / "metrics.jsonl").exists)

    # The lock names the main process; kill the other one.
    main = int((run / ".lock").read_text().split()[1])
    workers = [child.pid for child in psutil.Process(process.pid).children()]
    other = next(pid for pid in workers if pid != main)
    os.kill(other, signal.SIGKILL)
    assert process.wait(60) != 0
    assert not any(psutil.pid_exists(pid) for pid in workers)
