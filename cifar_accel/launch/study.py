"""Studies: many runs from one file, each in its own process, going on after a failure and skipping what is finished.

The file is in wandb's sweep format (`method: grid`, `parameters` with `value` or `values`), so `wandb sweep` reads it
too. A file may instead list its runs: `runs`, each a set of options laid over `parameters`.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from cifar_accel.errors import BadInput, did_you_mean
from cifar_accel.files import home
from cifar_accel.launch.child import run_child
from cifar_accel.launch.command import command_for
from cifar_accel.options.options import StudyArguments, TrainingArguments
from cifar_accel.records.summary import read_config, read_summary


def read_study(path: str) -> tuple[str, list[dict[str, Any]]]:
    """The name of the study in `path` and the options of each of its runs. Raises BadInput naming what is wrong."""
    try:
        study = yaml.safe_load(home(path).read_text())
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}") from e
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as e:
        raise BadInput(f"{path}: is not YAML ({' '.join(str(e).split())})") from e
    if not isinstance(study, dict) or not (study.get("parameters") or study.get("runs")):
        raise BadInput(f"{path}: needs `parameters` (as in a wandb sweep) or a list `runs`")
    if study.get("method", "grid") != "grid":
        raise BadInput(
            f"{path}: method {study['method']} needs wandb's agent (wandb sweep {path}); here only grid runs"
        )
    parameters, rows = study.get("parameters") or {}, study.get("runs") or [{}]
    if not isinstance(parameters, dict) or not (
        isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    ):
        raise BadInput(
            f"{path}: `parameters` must be a table, and `runs` a list of tables of options"
        )
    known = {f.name for f in fields(TrainingArguments)}
    common: dict[str, list[Any]] = {}
    for name, choice in parameters.items():
        if not isinstance(choice, dict) or not (
            "value" in choice or isinstance(choice.get("values"), list)
        ):
            raise BadInput(f"{path}: parameter {name} needs `value` or a list `values`")
        common[name] = choice["values"] if "values" in choice else [choice["value"]]
    for name in [*common, *(n for row in rows for n in row)]:
        if name not in known:
            raise BadInput(f"{path}: there is no option {name}{did_you_mean(str(name), known)}")
    grid = [
        dict(zip(common, values, strict=True)) for values in itertools.product(*common.values())
    ]
    name = str(study.get("name") or Path(path).stem)
    return name, [{"group": name, **point, **row} for row in rows for point in grid]


def name_runs(runs: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Run names that differ: where several runs would have one name, the options in which they differ are appended."""
    out = []
    for run, name in zip(runs, names, strict=True):
        same = [other for other, n in zip(runs, names, strict=True) if n == name]
        varied = [
            k for k in run if any(other.get(k) != run[k] for other in same) and k != "run_name"
        ]
        out.append(name + "".join(f"-{k}={run[k]}".replace("/", "_") for k in varied))
    return out


def as_flags(options: dict[str, Any]) -> Iterator[str]:
    """Options as command-line words."""
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            yield flag if value else "--no-" + flag[2:]
        elif isinstance(value, list):
            yield from (flag, *map(str, value))
        else:
            yield f"{flag}={'none' if value is None else value}"


def run_study(args: StudyArguments, extra: list[str], say: Callable[[str], None]) -> int:
    """Run what is not finished; returns 0 when all runs are, 1 when one failed, 143 when a signal stopped the study.

    Raises BadInput before the first run when the file or the options of any run are wrong.
    """
    from cifar_accel.options.parsing import parse_training

    name, runs = read_study(args.file)
    words = [
        [*as_flags(run | ({"save_dir": args.save_dir} if args.save_dir else {})), *extra]
        for run in runs
    ]
    resolved = [parse_training(w)[0] for w in words]
    if any(r.dry_run for r in resolved):
        raise BadInput(
            "--dry-run looks at one run, not at a study: give it to python -m cifar_accel"
        )
    commands = []
    names = name_runs(runs, [str(r.run_name) for r in resolved])
    for w, r, run_name in zip(words, resolved, names, strict=True):
        given = [] if run_name == r.run_name else [f"--run-name={run_name}"]
        commands.append((home(r.save_dir) / run_name, [*w, *given]))
    paths = [path for path, _ in commands]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice:
        raise BadInput(f"{args.file}: two runs are the same and would both write {twice}")
    results = []
    for i, (path, options) in enumerate(commands, 1):
        say(f"\nstudy {name}, run {i} of {len(commands)}: {path}")
        summary, config = read_summary(path), read_config(path) or {}
        if summary.get("status") == "finished" and config.get("command", [])[1:] == options:
            say(f"finished before: accuracy {summary['accuracy']:.2%}")
            results.append((path, 0))
            continue
        command, environment, reason = command_for(options)
        say(reason)
        code = run_child(command, environment, path)
        results.append((path, code))
        if code == 143:
            say("study: stopped; the same command goes on from here")
            return 143
        if code:
            say(f"study: this run failed (exit code {code}); going on with the next")
    failed = [path for path, code in results if code]
    say(f"\nstudy {name}: {len(results) - len(failed)} of {len(results)} runs finished")
    for path in failed:
        say(f"  failed: {path} (the same command tries it again)")
    return 1 if failed else 0
