"""Studies: many runs from one file, each in a process of its own.

A study skips what is finished and goes on after a failure. Its file is in wandb's sweep format
(`method: grid`, `parameters` with `value` or `values`), so `wandb sweep` reads it too. A file may
instead list its runs: `runs`, each a table of options laid over `parameters`.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cifar_accel.console import STOPPED
from cifar_accel.errors import BadInput, did_you_mean
from cifar_accel.files import home
from cifar_accel.launch.child import run_child
from cifar_accel.launch.command import check_launcher, command_for
from cifar_accel.launch.yaml_files import read_yaml
from cifar_accel.options.options import StudyArguments, TrainingArguments
from cifar_accel.options.parsing import parse_training
from cifar_accel.records.summary import read_config, read_summary

# Most runs of a study. To look through their options takes minutes.
MOST_RUNS = 10_000

# Options of one run by name, as a study file gives them.
Options = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What a study file says: its name, and the options of each of its runs."""

    name: str
    runs: list[Options]


def run_study(args: StudyArguments, extra: list[str], say: Callable[[str], None]) -> int:
    """Run what is not finished, with the words `extra` added to those of every run.

    Returns 0 when all runs are finished, 1 when one failed, 143 when a signal stopped the study.
    Raises BadInput before the first run when the file or the options of any run are wrong.
    """
    # All that can be known to be wrong with any run is found here.
    study = read_study(args.file)
    runs = study.runs
    if args.save_dir:
        runs = [{**options, "save_dir": args.save_dir} for options in runs]
    planned = plan_runs(args.file, runs, extra)
    check_launcher()

    # One run after the other. Only a signal ends the study early.
    failed = []
    for number, (folder, words) in enumerate(planned.items(), 1):
        say(f"\nstudy {study.name}, run {number} of {len(planned)}: {folder}")
        if is_finished(folder, words):
            say(f"finished before: accuracy {read_summary(folder)['accuracy']:.2%}")
            continue
        start = command_for(words)
        say(start.reason)
        code = run_child(start.command, start.environment, folder)
        if code == STOPPED:
            say("study: stopped; the same command goes on from here")
            return STOPPED
        if code != 0:
            say(f"study: this run failed (exit code {code}); going on with the next")
            failed.append(folder)

    say(f"\nstudy {study.name}: {len(planned) - len(failed)} of {len(planned)} runs finished")
    for folder in failed:
        say(f"  failed: {folder} (the same command tries it again)")
    return 1 if failed else 0


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


# ---- the file


def read_study(path: str) -> Study:
    """The study in the file `path`. Raises BadInput for what is wrong in the file."""
    content = read_yaml(home(path))
    # What kind of file it is.
    if not isinstance(content, dict) or not (content.get("parameters") or content.get("runs")):
        raise BadInput(f"{path}: needs `parameters` (as in a wandb sweep) or a list `runs`")
    method = content.get("method", "grid")
    if method != "grid":
        raise BadInput(
            f"{path}: method {method} needs wandb's agent (wandb sweep {path}); here only grid runs"
        )

    # Either may be left out: no parameters are one empty point of a grid, no runs one empty run.
    parameters = content.get("parameters") or {}
    rows = content.get("runs") or [{}]
    is_list_of_tables = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not isinstance(parameters, dict) or not is_list_of_tables:
        raise BadInput(
            f"{path}: `parameters` must be a table, and `runs` a list of tables of options"
        )
    values = {name: _values_of(path, name, choice) for name, choice in parameters.items()}
    known = {field.name for field in fields(TrainingArguments)}
    for option in itertools.chain(values, *rows):
        if option not in known:
            raise BadInput(f"{path}: there is no option {option}{did_you_mean(str(option), known)}")
    if len(rows) * math.prod(map(len, values.values())) > MOST_RUNS:
        raise BadInput(f"{path}: more than {MOST_RUNS:,} runs; make several studies of it")

    # Every run of the list, at every point of the grid; what a run says itself wins.
    name = str(content.get("name") or Path(path).stem)
    grid = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    runs = [{"group": name, **point, **row} for row in rows for point in grid]
    return Study(name, runs)


def _values_of(path: str, name: str, choice: Any) -> list[Any]:
    """The values that a parameter of a sweep takes, one after the other."""
    if isinstance(choice, dict):
        values = choice.get("values")
        if isinstance(values, list) and values:
            return values
        if "value" in choice:
            return [choice["value"]]
    raise BadInput(f"{path}: parameter {name} needs `value` or a list `values` that is not empty")


# ---- its runs


def plan_runs(path: str, runs: list[Options], extra: list[str]) -> dict[Path, list[str]]:
    """The words of each run by its folder.

    Raises BadInput when the options of a run are wrong, or when two runs are the same.
    """
    # Read as a training will read them: a wrong one is told before the first run starts, and what
    # was left to the program, such as the run's name, is known.
    words = [[*as_flags(options), *extra] for options in runs]
    resolved = [parse_training(of_run)[0] for of_run in words]
    if any(args.dry_run for args in resolved):
        raise BadInput(
            "--dry-run looks at one run, not at a study: give it to python -m cifar_accel"
        )

    # A run says its name in its words only where it is not the name that it has by itself.
    planned: dict[Path, list[str]] = {}
    names = name_runs(runs, [str(args.run_name) for args in resolved])
    for of_run, args, name in zip(words, resolved, names, strict=True):
        folder = home(args.save_dir) / name
        if folder in planned:
            raise BadInput(f"{path}: two runs are the same and would both write {folder}")
        named = [] if name == args.run_name else [f"--run-name={name}"]
        planned[folder] = of_run + named
    share_plans(planned, resolved)
    return planned


def share_plans(planned: dict[Path, list[str]], resolved: list[TrainingArguments]) -> None:
    """Let runs of --budget that differ by their seed alone take over the plan of the first."""
    firsts: dict[TrainingArguments, Path] = {}
    for (folder, words), args in zip(planned.items(), resolved, strict=True):
        setting = replace(args, seed=0, run_name=None)
        first = firsts.setdefault(setting, folder)
        if args.budget and first != folder:
            words.append(f"--plan-of={first}")


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
