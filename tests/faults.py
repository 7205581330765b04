"""Trainings in forked processes: they start within a second, so that hundreds can be killed and continued.

A fork server that has imported the trainer forks one process for each rank. They are processes like any other: they
take signals, write the run folder and leave an exit code. What imports take is tried by the tests that start commands.
"""

import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["cifar_accel.train", "cifar_accel.report", "cifar_accel.memory"])


def _rank(words: list[str], environment: dict[str, str], log: Path, hook: Callable[[], None] | None) -> None:
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["cifar_accel", *words]
    from cifar_accel.cli import train_command

    if hook:
        hook()
    sys.exit(train_command(words))


class Training:
    """One training of `world` ranks; `hook` runs in each before it begins."""

    def __init__(self, words, log, world=1, environment=None, hook=None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.log, self.ranks = Path(log), []
        for rank in range(world):
            about = dict(environment or {})
            if world > 1:
                about |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
                about |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            process = SERVER.Process(target=_rank, args=([str(w) for w in words], about, self.log, hook))
            process.start()
            self.ranks.append(process)

    def wait(self, seconds: float) -> bool:
        """Whether all ranks ended by themselves within `seconds`."""
        end = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(0.0, end - time.monotonic()))
        return all(rank.exitcode is not None for rank in self.ranks)

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()

    @property
    def codes(self) -> list[int | None]:
        """Exit codes by rank."""
        return [rank.exitcode for rank in self.ranks]


def finish(words, log, world=1, seconds=120.0, **about) -> Training:
    """Train to the end."""
    training = Training(words, log, world, **about)
    if not training.wait(seconds):
        training.kill()
        raise AssertionError(f"not done after {seconds} s\n{Path(log).read_text()}")
    return training


def _killed(training: Training, saved: Callable[[], set[str]], rng: random.Random, early: bool) -> bool:
    """Kill it in its first second (`early`), or soon after its first checkpoint; False where it ended by itself."""
    before, end = saved(), time.monotonic() + 120
    while not early and not training.wait(0.02) and saved() <= before:
        assert time.monotonic() < end, training.log.read_text()
    if training.wait(rng.uniform(0, 1.0 if early else 0.3)):
        assert set(training.codes) == {0}, training.log.read_text()
        return False
    training.kill()
    return True


def finish_with_kills(words, log, run, kills, seed, worlds=(1,), **about) -> int:
    """Kill the training of run folder `run` `kills` times at random moments, on changing numbers of ranks, then let it
    end; kills done. A third of them fall into a start's first second, however far it came by then; the others follow
    what the start itself has saved, so that every later start has something to go on from, on a slow machine too."""
    rng, done = random.Random(seed), 0
    while done < kills:
        training = Training(words, log, worlds[done % len(worlds)], **about)
        if not _killed(training, lambda: {p.name for p in run.glob("checkpoints/step-*")}, rng, done % 3 == 0):
            break
        done += 1
    assert finish(words, log, worlds[-1], **about).codes[0] == 0, Path(log).read_text()
    return done


def resumes(log) -> int:
    """How many starts went on from a checkpoint."""
    return Path(log).read_text().count("resume: from")
