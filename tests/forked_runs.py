"""Trainings in forked processes: they start within a second, so hundreds can be killed.

A fork server that has imported the trainer forks one process for each rank. They are processes like
any other: they take signals, write the run folder and leave an exit code. What is read while the
libraries are imported (threads, the hub's address) is the fork server's; the tests that need
another start commands.

A hook is a function that is called in each forked process before it trains, and patches the trainer
there. Nothing of it reaches the tests' own process. (It is pickled on its way: a function of a
module, or a `partial` of one.)
"""

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "cifar_accel.train",
        "cifar_accel.dry_run",
        "cifar_accel.results.plots",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
    ]
)


def _be_a_rank(
    words: list[str],
    environment: dict[str, str],
    out: Path,
    err: Path,
    folder: Path,
    hook: Callable[[], None] | None,
) -> None:
    """What a forked process does: `python -m cifar_accel WORDS`, after the hook."""
    # Take the place of a process that was started by a command.
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # Standard output and standard error, by their file descriptors: libraries write there too.
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["cifar_accel", *words]
    from cifar_accel.cli import train_command

    if hook:
        hook()
    sys.exit(train_command(words))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Training:
    """One training of `world` ranks in folder `cwd`, begun at once.

    Standard output goes to `log`, at its end; so does standard error, unless it has a file `err`.
    `environment` is set beside the tests' own.
    """

    def __init__(
        self,
        words: Sequence[object],
        log: Path,
        world: int = 1,
        environment: dict[str, str] | None = None,
        hook: Callable[[], None] | None = None,
        err: Path | None = None,
        cwd: Path | str = ".",
    ):
        self.log = Path(log)
        self.ranks = []
        # Where the ranks find each other.
        port = _free_port()
        for rank in range(world):
            rank_environment = os.environ | (environment or {})
            if world > 1:
                # What torchrun sets.
                rank_environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            process = SERVER.Process(
                target=_be_a_rank,
                args=(
                    [str(word) for word in words],
                    rank_environment,
                    self.log.absolute(),
                    Path(err or log).absolute(),
                    Path(cwd).absolute(),
                    hook,
                ),
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
        """Exit codes by rank; -N where signal N ended it."""
        return [rank.exitcode for rank in self.ranks]


def finish(words, log, world=1, seconds=120.0, **settings) -> Training:
    """Train to the end; `settings` are those of `Training`."""
    training = Training(words, log, world, **settings)
    if not training.wait(seconds):
        training.kill()
        raise AssertionError(f"not done after {seconds} s\n{Path(log).read_text()}")
    return training


# ---- kills


def _kill_at_random(training: Training, run: Path, rng: random.Random, early: bool) -> bool:
    """Kill a training at a random moment; False where it ended by itself before.

    `early` is in its first second, otherwise it is soon after it saved a checkpoint.
    """

    def saved() -> set[str]:
        return {folder.name for folder in run.glob("checkpoints/step-*")}

    # Later kills wait for a checkpoint of this start; an early one may come before anything.
    if not early:
        saved_before = saved()
        end = time.monotonic() + 120
        while not training.wait(0.02) and saved() <= saved_before:
            assert time.monotonic() < end, training.log.read_text()
    if training.wait(rng.uniform(0, 1.0 if early else 0.3)):
        assert set(training.codes) == {0}, training.log.read_text()
        return False
    training.kill()
    return True


def finish_with_kills(words, log, run, kills, seed, worlds=(1,), **settings) -> int:
    """Kill a training at random moments, start it again each time, then let it end; kills done.

    Every start has the next of the numbers of ranks in `worlds`. A third of the kills fall into a
    start's first second, however far it came by then. The others follow what the start itself has
    saved, so that every later start has something to go on from, on a slow machine too.
    """
    rng = random.Random(seed)
    done = 0
    # The training may be over before it was killed so often.
    while done < kills:
        training = Training(words, log, worlds[done % len(worlds)], **settings)
        if not _kill_at_random(training, run, rng, early=done % 3 == 0):
            break
        done += 1
    # Whatever is left is trained without a kill.
    last = finish(words, log, worlds[-1], **settings)
    assert last.codes[0] == 0, Path(log).read_text()
    return done


def resumes(log) -> int:
    """How many starts went on from a checkpoint."""
    return Path(log).read_text().count("resume: from")


# ---- hooks


def die_after_row(step: int) -> None:
    """Hook: the main process is killed as soon as the row of `step` is written."""
    from cifar_accel.records.metrics import Metrics

    write = Metrics.write

    def write_and_die(self, row):
        write(self, row)
        if self.enabled and row["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Metrics.write = write_and_die


def spoil_images(step: int, rank: int) -> None:
    """Hook: one pixel of what `rank` reads for `step` is not a number."""
    from cifar_accel.data.batches import Pipeline

    training_batches = Pipeline.training_batches

    def spoilt_batches(self, order, start, *more):
        own_rank = int(os.environ.get("RANK", "0"))
        for i, batch in enumerate(training_batches(self, order, start, *more)):
            step_of_batch = start + i // order.accumulation
            if step_of_batch == step and own_rank == rank:
                batch.images[0, 0, 0, 0] = float("nan")
            yield batch

    Pipeline.training_batches = spoilt_batches
