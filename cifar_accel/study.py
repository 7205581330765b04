"""Studies: many runs from one file, each in its own process, going on after a failure and skipping what is finished.

The file is in wandb's sweep format (`method: grid`, `parameters` with `value` or `values`), so `wandb sweep` reads it
too. A file may instead list its runs: `runs`, each a set of options laid over `parameters`.
"""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from cifar_accel.config import StudyArguments, TrainingArguments, did_you_mean
from cifar_accel.launch import command_for
from cifar_accel.run_folder import read_json


def read_study(path: str) -> tuple[str, list[dict[str, Any]]]:
    """The name of the study in `path` and the options of each of its runs. Raises ValueError naming what is wrong."""
    try:
        study = yaml.safe_load(Path(path).expanduser().read_text())
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror}") from e
    except yaml.YAMLError as e:
        raise ValueError(f"{path}: is not YAML ({' '.join(str(e).split())})") from e
    if not isinstance(study, dict) or not (study.get("parameters") or study.get("runs")):
        raise ValueError(f"{path}: needs `parameters` (as in a wandb sweep) or a list `runs`")
    if study.get("method", "grid") != "grid":
        raise ValueError(
            f"{path}: method {study['method']} needs wandb's agent (wandb sweep {path}); here only grid runs"
        )
    known = {f.name for f in fields(TrainingArguments)}
    common: dict[str, list[Any]] = {}
    for name, choice in (study.get("parameters") or {}).items():
        if not isinstance(choice, dict) or not ({"value", "values"} & choice.keys()):
            raise ValueError(f"{path}: parameter {name} needs `value` or `values`")
        common[name] = list(choice["values"]) if "values" in choice else [choice["value"]]
    rows = study.get("runs") or [{}]
    for name in [*common, *(n for row in rows for n in row)]:
        if name not in known:
            raise ValueError(f"{path}: there is no option {name}{did_you_mean(name, known)}")
    grid = [dict(zip(common, values, strict=True)) for values in itertools.product(*common.values())]
    name = str(study.get("name") or Path(path).stem)
    return name, [{"group": name, **point, **row} for row in rows for point in grid]


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

    Raises ValueError before the first run when the file or the options of any run are wrong.
    """
    from cifar_accel.cli import parse_training

    name, runs = read_study(args.file)
    commands = []
    for options in runs:
        words = [*as_flags(options | ({"save_dir": args.save_dir} if args.save_dir else {})), *extra]
        resolved, _ = parse_training(words)
        commands.append((Path(resolved.save_dir).expanduser() / str(resolved.run_name), words))
    paths = [path for path, _ in commands]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice:
        raise ValueError(f"{args.file}: two runs would write {twice}; give each a run_name")
    results = []
    for i, (path, words) in enumerate(commands, 1):
        say(f"\nstudy {name}, run {i} of {len(commands)}: {path}")
        summary, config = read_json(path / "summary.json") or {}, read_json(path / "config.json") or {}
        if summary.get("status") == "finished" and config.get("command", [])[1:] == words:
            say(f"finished before: accuracy {summary['accuracy']:.2%}")
            results.append((path, 0))
            continue
        command, environment, reason = command_for(words)
        say(reason)
        code = _run(command, environment)
        results.append((path, code))
        if code == 143 or (path / "PREEMPTED").exists():
            say("study: stopped; the same command goes on from here")
            return 143
        if code:
            say(f"study: this run failed (exit code {code}); going on with the next")
    failed = [path for path, code in results if code]
    say(f"\nstudy {name}: {len(results) - len(failed)} of {len(results)} runs finished")
    for path in failed:
        say(f"  failed: {path} (the same command tries it again)")
    return 1 if failed else 0


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run `command`, pass signals on to it, and return its exit code (128 + n when signal n killed it)."""
    process = subprocess.Popen(command, env=os.environ | environment)
    handlers = {}

    def forward(number: int, frame: Any) -> None:
        if number != signal.SIGINT or not sys.stdin.isatty():  # a terminal's Ctrl-C reaches the child by itself
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        handlers[number] = signal.signal(number, forward)
    try:
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
