"""Trainings in forked processes: they start within a second, so that hundreds can be killed and continued.

A fork server that has imported the trainer forks one process for each rank. They are processes like any other: they
take signals, write the run folder and leave an exit code. What is read while the libraries are imported (threads, the
hub's address) is the fork server's; the tests that need another start commands.
"""

import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

PLOTTING = ("matplotlib.figure", "matplotlib.backends.backend_agg")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["cifar_accel.train", "cifar_accel.dry_run", "cifar_accel.results.charts", *PLOTTING]
)


def _rank(
    words: list[str],
    environment: dict[str, str],
    files: tuple[Path, Path],
    folder: Path,
    hook: Callable[[], None] | None,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["cifar_accel", *words]
    from cifar_accel.cli import train_command

    if hook:
        hook()
    sys.exit(train_command(words))


class Training:
    """One training of `world` ranks in folder `cwd`; `hook` runs in each before it begins, `err` is the log's."""

    def __init__(self, words, log, world=1, environment=None, hook=None, err=None, cwd="."):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.log, self.ranks = Path(log), []
        for rank in range(world):
            about = dict(os.environ) | (environment or {})
            if world > 1:
                about |= dict(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(world),
                    LOCAL_WORLD_SIZE=str(world),
                )
                about |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            files, folder = (self.log.absolute(), Path(err or log).absolute()), Path(cwd).absolute()
            process = SERVER.Process(
                target=_rank, args=([str(w) for w in words], about, files, folder, hook)
            )
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


def _killed(
    training: Training, saved: Callable[[], set[str]], rng: random.Random, early: bool
) -> bool:
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
        if not _killed(
            training, lambda: {p.name for p in run.glob("checkpoints/step-*")}, rng, done % 3 == 0
        ):
            break
        done += 1
    assert finish(words, log, worlds[-1], **about).codes[0] == 0, Path(log).read_text()
    return done


def resumes(log) -> int:
    """How many starts went on from a checkpoint."""
    return Path(log).read_text().count("resume: from")
