"""Studies: many runs from one file, each in a process of its own.

A study skips what is finished and goes on after a failure. What another process trains it leaves to
that, and looks at it again when a place is free: so several studies of one file share its runs.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cifar_accel.console import BAD_INPUT, FAILED, STOPPED
from cifar_accel.errors import BadInput
from cifar_accel.launch.child import Child, signals_passed_on
from cifar_accel.launch.command import (
    check_launcher,
    command_for,
    count_gpus,
    read_launcher_config,
    variables,
)
from cifar_accel.launch.study_file import read_study
from cifar_accel.launch.study_runs import (
    StudyRun,
    accuracy_and_time,
    is_finished,
    plan_runs,
    settings_of,
    standing,
    time_left,
    user_of,
)
from cifar_accel.options.options import StudyArguments
from cifar_accel.records.summary import read_config
from cifar_accel.results.groups import group_by_seed
from cifar_accel.results.runs import read_run
from cifar_accel.results.sections import sections_of, title_of
from cifar_accel.results.tables import markdown, section_table
from cifar_accel.yaml_files import shipped_folder

# Seconds between two looks at what runs.
TICK = 0.2


def run_study(args: StudyArguments, extra: list[str], say: Callable[[str], None]) -> int:
    """Run what is not finished, with the words `extra` added to those of every run.

    Returns 0 when all runs are finished, 1 when one failed, 143 when a signal stopped the study;
    and 0 where the runs were only to be shown. Raises BadInput before the first run when the file,
    the options of any run or the number of jobs are wrong.
    """
    # All that can be known to be wrong with any run is found here.
    study = read_study(args.file)
    runs = plan_runs(args.file, study, extra, args.save_dir)
    for run in runs:
        if is_finished(run.folder, run.words):
            run.state = "finished"
    finished = in_state(runs, "finished")
    to_do = len(runs) - len(finished)
    plan = (
        f"study {study.name}: {len(finished)} of {len(runs)} runs finished, {to_do} to do; "
        f"{time_left(runs, args.jobs)}"
    )
    if args.status:
        say(plan)
        for run in runs:
            say(f"{run.folder}: {standing(run)}")
        return 0

    # The plan first.
    places = places_for(args.jobs)
    say(plan)
    if to_do:
        say(places.reason)
    if args.dry_run:
        for run in runs:
            say(f"{run.folder}: {standing(run)}\n    {shlex.join([*places.command, *run.words])}")
        return 0

    # The runs, and what came of them.
    if not Training(runs, places, args.verbose, say).train_all():
        say("study: stopped; the same command goes on from here")
        return STOPPED
    return tell_results(study.name, runs, say)


def tell_results(name: str, runs: list[StudyRun], say: Callable[[str], None]) -> int:
    """Print the table of the finished runs, what failed and what to ask next; the exit code."""
    finished = in_state(runs, "finished")
    read = [read_run(run.folder) for run in finished]
    sections = sections_of(group_by_seed([run for run in read if run and run.finished]))
    for section in sections:
        # What cannot be compared stands in tables of its own.
        if len(sections) > 1:
            say(f"\n{title_of(section)}")
        say("\n" + markdown(section_table(section)))
    say(f"\nstudy {name}: {len(finished)} of {len(runs)} runs finished")
    failed = in_state(runs, "failed")
    for run in failed:
        say(f"  failed: {run.folder} (the same command tries it again)")
    if finished:
        parent = os.path.commonpath([run.folder.absolute() for run in finished])
        say(f"  the page of all runs there: {shlex.join(['cifar-accel', 'report', parent])}")
        of_baseline = [str(run.folder) for run in finished if run.is_baseline]
        if of_baseline and settings_of(finished) > 1:
            words = ["cifar-accel", "compare", parent, "--baseline", of_baseline[0]]
            say(f"  against its baseline: {shlex.join(words)}")
        for places in offline_runs(Path(parent), [run.folder.absolute() for run in finished]):
            say(f"  to see them in wandb: wandb sync {places}")
    return FAILED if failed else 0


def offline_runs(parent: Path, folders: list[Path]) -> list[str]:
    """Where wandb keeps runs below `parent` that it did not send, as patterns for a shell."""
    has_any = [folder for folder in folders if any(folder.glob("wandb/offline-run-*"))]
    depths = {len(folder.relative_to(parent).parts) for folder in has_any}
    return [f"{shlex.quote(str(parent))}/{'*/' * n}wandb/offline-run-*" for n in sorted(depths)]


def in_state(runs: list[StudyRun], *states: str) -> list[StudyRun]:
    """The runs in one of these states."""
    return [run for run in runs if run.state in states]


# ---- where runs go


class Places(NamedTuple):
    """How the runs are started, and how many at a time."""

    # What stands before the words of a run.
    command: list[str]
    # Variables to add to the environment, for each of the runs that go at a time.
    environments: list[dict[str, str]]
    # A line for the screen.
    reason: str


def places_for(jobs: int) -> Places:
    """Places for `jobs` runs at a time: one GPU each, or a share of the cores where there is none.

    Raises BadInput for more than there are GPUs, and where the launcher's config asks for several
    processes a run.
    """
    check_launcher()
    if jobs == 1:
        start = command_for([])
        return Places(start.command, [start.environment], start.reason)

    # Several runs at a time are single processes. Nobody asked for more where the file is the one
    # of ours that fits all GPUs of this machine.
    file, _, config = read_launcher_config()
    is_ours = shipped_folder("accelerate_configs") in file.parents
    is_asked_for = os.environ.get("ACCELERATE_CONFIG_FILE") or not is_ours
    if is_asked_for and not config.needs_no_launcher:
        raise BadInput(
            f"--jobs {jobs}: {file} asks for a launcher, and several runs at a time are of one "
            "process each; leave --jobs away, or name another file by ACCELERATE_CONFIG_FILE"
        )
    command = [sys.executable, "-m", "cifar_accel"]
    shared = variables(file, config)
    reason = f"launch: {jobs} runs at a time, one process each, settings of {file}"

    gpus = gpus_here(shared)
    if 0 < len(gpus) < jobs:
        raise BadInput(
            f"--jobs {jobs}: each run takes a GPU, of which there are {len(gpus)}; give at most as "
            "many jobs"
        )
    if gpus:
        each = [{**shared, "CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:jobs]]
        return Places(command, each, f"{reason}, GPUs {', '.join(gpus[:jobs])}")
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
    shared["OMP_NUM_THREADS"] = threads
    return Places(command, [shared] * jobs, f"{reason}, OMP_NUM_THREADS {threads}")


def gpus_here(chosen: dict[str, str]) -> list[str]:
    """The GPUs to use as CUDA_VISIBLE_DEVICES names them, which may be among the `chosen`."""
    count = count_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", chosen.get("CUDA_VISIBLE_DEVICES"))
    if visible is None:
        return [str(gpu) for gpu in range(count)]
    named = [gpu.strip() for gpu in visible.split(",")]
    return [gpu for gpu in named if gpu not in ("", "-1")][:count]


# ---- the runs


class Training:
    """Trains the runs of a study that are to do.

    Of what a run prints, its complaints and on a terminal its progress bar are shown; with
    `verbose` all of it. Of several runs at a time, the complaints of one that failed.
    """

    def __init__(
        self, runs: list[StudyRun], places: Places, verbose: bool, say: Callable[[str], None]
    ):
        self.runs = runs
        self.places = places
        self.free = list(places.environments)
        self.verbose = verbose
        self.say = say
        # What runs now.
        self.running: dict[StudyRun, Child] = {}
        # The signals that came; and whether they, or a run that was stopped, end the study.
        self.signals: list[int] = []
        self.stopping = False
        self.is_waiting = False

    def train_all(self) -> bool:
        """Whether all runs came to an end. False: a signal stopped the study."""
        with signals_passed_on(self.running.values()) as self.signals:
            while in_state(self.runs, "to do", "running", "elsewhere"):
                # What has ended; whether to stop; what to start.
                for run, child in list(self.running.items()):
                    if child.process.poll() is not None:
                        self.end(run)
                if self.signals and not self.stopping:
                    self.stopping = True
                    if self.running:
                        self.say("study: stopping; what runs saves a checkpoint first")
                if not self.stopping:
                    self.start_what_can()
                elif not self.running:
                    return False
                time.sleep(TICK)
        return True

    def start_what_can(self) -> None:
        """Fill the free places, in order; what was in progress elsewhere may be there to take."""
        for run in self.runs:
            if not self.free or self.signals:
                return
            if run.state == "elsewhere" and not user_of(run.folder):
                run.state = "to do"
            if run.state == "to do" and has_its_plan(run):
                self.start(run)
        elsewhere = in_state(self.runs, "elsewhere")
        if elsewhere and not self.running and not self.is_waiting:
            self.is_waiting = True
            self.say(f"study: waiting for {len(elsewhere)} in progress elsewhere (Ctrl-C: no more)")

    def start(self, run: StudyRun) -> None:
        """Start a run in a free place, unless another process trains it or has done so."""
        user = user_of(run.folder)
        if user:
            run.state = "elsewhere"
            self.say(f"{run.folder}: in progress elsewhere, {user}")
            return
        if is_finished(run.folder, run.words):
            self.settle(run)
            return

        # Whose bar it is, or whose lines.
        if self.verbose or sys.stderr.isatty():
            self.say(f"{run.folder}: starts")
        stdout = None if self.verbose else subprocess.DEVNULL
        # Several bars would write over each other, and there is none where stderr is a file. It is
        # closed at the run's end.
        stderr = None
        if len(self.places.environments) > 1:
            stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        command = [*self.places.command, *run.words]
        child = Child(command, self.free.pop(0), run.folder, stdout, stderr)
        self.running[run] = child
        run.state = "running"
        # A signal that came before it was among those that run has not reached it.
        if self.signals:
            child.signal(signal.SIGTERM)

    def end(self, run: StudyRun) -> None:
        """See how a run ended whose process is over."""
        child = self.running.pop(run)
        self.free.append(child.environment)
        code = child.exit_code(bool(self.signals))
        # It was stopped: by hand, by the machine, or by --max-time.
        if code == STOPPED:
            run.state = "to do"
            self.stopping = True
        elif code == 0:
            self.settle(run)
        # Another process was faster.
        elif code in (FAILED, BAD_INPUT) and user_of(run.folder):
            run.state = "elsewhere"
        else:
            self.settle(run, f"failed (exit code {code})")
        # What was not shown as it came.
        if child.stderr:
            child.stderr.seek(0)
            if run.state == "failed":
                print(child.stderr.read(), end="", file=sys.stderr, flush=True)
            child.stderr.close()

    def settle(self, run: StudyRun, failure: str = "") -> None:
        """Record that a run finished, or its `failure`, and print its line."""
        run.state = "failed" if failure else "finished"
        settled = len(in_state(self.runs, "finished", "failed"))
        left = time_left(self.runs, len(self.places.environments))
        what = failure or accuracy_and_time(run)
        self.say(f"{settled} of {len(self.runs)}: {what}; {left}: {run.folder}")


def has_its_plan(run: StudyRun) -> bool:
    """Whether the run whose plan it takes over has begun, and so made it, or will not any more."""
    first = run.plan_of
    if first is None or first.state in ("finished", "failed"):
        return True
    return read_config(first.folder) is not None
