"""The runs of a study: the words and the folder of each, how it stands, and how long it takes."""

import fcntl
import statistics
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cifar_accel.console import in_time
from cifar_accel.errors import BadInput
from cifar_accel.files import home
from cifar_accel.launch.study_file import Options, Study
from cifar_accel.options.options import TrainingArguments
from cifar_accel.options.parsing import parse_training
from cifar_accel.records.folder import LOCK
from cifar_accel.records.summary import read_config, read_summary

# The options that the time of an epoch follows from.
TIMED_BY = ("model", "image_size", "dataset", "limit_train", "pipeline", "budget")


@dataclass(eq=False)
class StudyRun:
    """One run of a study, and how it stands."""

    folder: Path
    # The words that train it, and the options that they give.
    words: list[str]
    args: TrainingArguments
    # Whether the file's baseline is in its name.
    is_baseline: bool = False
    # The run whose plan of --budget it takes over.
    plan_of: "StudyRun | None" = None
    # "elsewhere": another process trains it.
    state: Literal["to do", "running", "elsewhere", "finished", "failed"] = "to do"


# ---- words and folders


def plan_runs(
    path: str, study: Study, extra: list[str], save_dir: str | None = None
) -> list[StudyRun]:
    """The runs of the study in the file `path`, with the words `extra` added to those of every run.

    `save_dir` replaces the file's. Raises BadInput when the options of a run are wrong, when two
    runs are the same, or when the baseline is in the names of no setting or of several.
    """
    options = study.runs
    if save_dir:
        options = [{**of_run, "save_dir": save_dir} for of_run in options]
    # Read as a training will read them: a wrong one is told before the first run starts, and what
    # was left to the program, such as the run's name, is known.
    words = [[*as_flags(of_run), *extra] for of_run in options]
    resolved = [parse_training(of_run)[0] for of_run in words]
    if any(args.dry_run for args in resolved):
        raise BadInput(
            "--dry-run looks at one run, not at a study: give it to python -m cifar_accel; "
            f"cifar-accel study {path} --dry-run prints the commands"
        )

    # A run says its name in its words only where it is not the name that it has by itself.
    baseline = study.baseline
    planned: dict[Path, StudyRun] = {}
    names = name_runs(options, [str(args.run_name) for args in resolved])
    for of_run, args, name in zip(words, resolved, names, strict=True):
        folder = home(args.save_dir) / name
        if folder in planned:
            raise BadInput(f"{path}: two runs are the same and would both write {folder}")
        named = [] if name == args.run_name else [f"--run-name={name}"]
        is_baseline = baseline is not None and baseline in name
        planned[folder] = StudyRun(folder, of_run + named, args, is_baseline)
    runs = list(planned.values())
    settings = settings_of([run for run in runs if run.is_baseline])
    if baseline and settings != 1:
        found = f"{settings} settings have that in their names"
        if not settings:
            found = f"no run has that in its name, as {names[0]}"
        raise BadInput(f"{path}: baseline {baseline}: {found}")
    share_plans(runs)
    return runs


def settings_of(runs: list[StudyRun]) -> int:
    """How many settings there are: runs that differ in the seed alone are of one."""
    return len({replace(run.args, seed=0, run_name=None) for run in runs})


def share_plans(runs: list[StudyRun]) -> None:
    """Let runs of --budget that differ by their seed alone take over the plan of the first."""
    firsts: dict[TrainingArguments, StudyRun] = {}
    for run in runs:
        setting = replace(run.args, seed=0, run_name=None)
        first = firsts.setdefault(setting, run)
        if run.args.budget and first is not run:
            run.plan_of = first
            run.words.append(f"--plan-of={first.folder}")


def name_runs(runs: list[Options], names: list[str]) -> list[str]:
    """Names that differ: where several runs would have one, what differs between them is added."""
    longer = []
    for run, name in zip(runs, names, strict=True):
        same_name = [other for other, its in zip(runs, names, strict=True) if its == name]
        varied = [key for key in run if any(other.get(key) != run[key] for other in same_name)]
        # A slash would make a folder within the folder.
        parts = [f"-{key}={run[key]}".replace("/", "_") for key in varied if key != "run_name"]
        longer.append(name + "".join(parts))
    return longer


def as_flags(options: Options) -> Iterator[str]:
    """Options as command-line words."""
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            yield flag
        elif value is False:
            yield "--no-" + flag.removeprefix("--")
        elif value is None:
            yield f"{flag}=none"
        elif isinstance(value, list):
            yield flag
            yield from map(str, value)
        else:
            yield f"{flag}={value}"


# ---- how a run stands


def is_finished(folder: Path, words: list[str]) -> bool:
    """Whether `folder` holds the very run that `words` train, finished."""
    command = (read_config(folder) or {}).get("command", [])
    summary = read_summary(folder)
    # The first word is the program's path, which depends on how it was started.
    if command[1:] != words or summary.get("status") != "finished":
        return False
    # These words began it. Others, by hand, may have ended it earlier than they would.
    is_whole: bool = summary["steps"] == summary["total_steps"]
    return is_whole or any(word.startswith("--max-steps") for word in words)


def user_of(folder: Path) -> str | None:
    """The process that trains in a run folder, in words, or None. Writes nothing.

    None too where this cannot be told: a training that is started all the same says why not.
    """
    # An OSError is of a folder that nobody has locked yet, or of a file system without locks.
    with suppress(OSError), open(folder / LOCK, errors="replace") as file:
        # A shared lock is refused as long as a training holds its own. It ends with the file.
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return " ".join(file.read().split()) or "another process"
    return None


def standing(run: StudyRun) -> str:
    """How a run stands by what its folder says, in a few words."""
    summary = read_summary(run.folder)
    if run.state == "finished":
        return f"finished, {accuracy_and_time(run)}"
    user = user_of(run.folder)
    if user:
        return f"in progress elsewhere, {user}"
    if summary.get("status") == "finished":
        return "finished by other words, or cut short"
    if summary.get("status") == "failed":
        return f"failed, {summary.get('error') or 'without a word'}"
    if read_config(run.folder):
        return "to do, begun before"
    return "to do"


def accuracy_and_time(run: StudyRun) -> str:
    """Accuracy and time of a finished run, as far as it says them."""
    accuracy = read_summary(run.folder).get("accuracy")
    told = [] if accuracy is None else [f"accuracy {accuracy:.2%}"]
    seconds = seconds_of(run)
    if seconds is not None:
        told.append(in_time(seconds))
    return ", ".join(told) or "without figures"


# ---- time


def seconds_of(run: StudyRun) -> float | None:
    """How long a run took, as its summary says; None where it does not."""
    seconds: float | None = read_summary(run.folder).get("wall_s")
    return seconds


def time_left(runs: list[StudyRun], jobs: int) -> str:
    """How long the runs that are left will take, `jobs` at a time, by those that are finished.

    Of equal models, sizes and data an epoch takes as long.
    """
    # Seconds of an epoch by kind, one of each finished run.
    epochs: dict[tuple[object, ...], list[float]] = {}
    for run in runs:
        seconds = seconds_of(run) if run.state == "finished" else None
        if seconds is not None:
            epochs.setdefault(_kind(run), []).append(seconds / run.args.epochs)

    left = [run for run in runs if run.state not in ("finished", "failed")]
    if not left:
        return "nothing left"
    known = [run for run in left if _kind(run) in epochs]
    if not known:
        return "time left not known yet"
    seconds = sum(statistics.mean(epochs[_kind(run)]) * run.args.epochs for run in known)
    text = f"about {in_time(seconds / min(jobs, len(known)))} left"
    unknown = len(left) - len(known)
    return f"{text}, and {unknown} of a kind that is not timed yet" if unknown else text


def _kind(run: StudyRun) -> tuple[object, ...]:
    return tuple(getattr(run.args, name) for name in TIMED_BY)
