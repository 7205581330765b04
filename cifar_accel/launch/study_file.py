"""The file of a study: what it says is checked, and becomes the options of each run.

The format is that of wandb's sweeps (`method: grid`, `parameters` with `value` or `values`), so
that an agent of wandb reads the file too. Our own are `runs`, a list of tables of options that are
laid over `parameters`, `seeds` and `baseline`.
"""

import itertools
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cifar_accel.errors import BadInput, did_you_mean
from cifar_accel.files import home
from cifar_accel.options.options import TrainingArguments
from cifar_accel.yaml_files import read_yaml

# Most runs of a study. To look through their options takes minutes.
MOST_RUNS = 10_000

# What is read in a study's file (`published` by a report), and what only wandb's server or its
# agents read there.
READ = {"name", "method", "parameters", "runs", "seeds", "baseline", "published"}
AGENTS = {"program", "command", "project", "entity", "description", "metric"}

# What would change which runs there are, and is served by wandb alone.
UNSERVED = {"early_terminate", "run_cap", "controller", "scheduler"}

# Options of one run by name, as a study file gives them.
Options = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What a study file says."""

    name: str
    # The options of each run.
    runs: list[Options]
    # A part of the name of the runs that the others are compared with.
    baseline: str | None = None


def read_study(path: str) -> Study:
    """The study in the file `path`. Raises BadInput for what is wrong in the file."""
    content = read_yaml(home(path))
    # What kind of file it is.
    if not isinstance(content, dict) or not (content.get("parameters") or content.get("runs")):
        raise BadInput(f"{path}: needs `parameters` (as in a wandb sweep) or a list `runs`")
    _check_known(f"{path}: there is no key", content, READ | AGENTS | UNSERVED)

    # Either may be left out: no parameters are one empty point of a grid, no runs one empty run.
    parameters = content.get("parameters") or {}
    rows = content.get("runs") or [{}]
    is_list_of_tables = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not isinstance(parameters, dict) or not is_list_of_tables:
        raise BadInput(
            f"{path}: `parameters` must be a table, and `runs` a list of tables of options"
        )
    _check_served(path, content, parameters)
    known = [field.name for field in fields(TrainingArguments)]
    _check_known(f"{path}: there is no option", itertools.chain(parameters, *rows), known)

    # The values of each option in the grid.
    values = {name: _values_of(path, name, choice) for name, choice in parameters.items()}
    if "seeds" in content:
        has_seed = any("seed" in options for options in (values, *rows))
        values["seed"] = _seeds(path, content["seeds"], has_seed)
    if len(rows) * math.prod(map(len, values.values())) > MOST_RUNS:
        raise BadInput(f"{path}: more than {MOST_RUNS:,} runs; make several studies of it")

    # Every run of the list, at every point of the grid; what a run says itself wins.
    name = str(content.get("name") or Path(path).stem)
    grid = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    runs = [{"group": name, **point, **row} for row in rows for point in grid]
    return Study(name, runs, _baseline(path, content))


def _check_known(complaint: str, names: Iterable[Any], known: Collection[str]) -> None:
    """Raise BadInput, which begins with `complaint`, for the first of the names not in `known`."""
    for name in names:
        if name not in known:
            raise BadInput(f"{complaint} {name}{did_you_mean(str(name), known)}")


def _check_served(path: str, content: Options, parameters: Options) -> None:
    """Raise BadInput, which names all that only wandb's agents can do."""
    unserved = sorted(UNSERVED & set(content))
    method = content.get("method", "grid")
    if method != "grid":
        unserved.insert(0, f"method {method}")
    # A choice between given values is a distribution too.
    for name, choice in parameters.items():
        if isinstance(choice, dict):
            kind = choice.get("distribution", "categorical")
            served = {"value", "values"}
            if kind in ("categorical", "constant"):
                served.add("distribution")
            unserved += [f"{key} of {name}" for key in choice if key not in served]
    if unserved:
        raise BadInput(
            f"{path}: {', '.join(unserved)}: needs wandb's agent (wandb sweep {path}); here only "
            "grids of `value` and `values` run"
        )


def _values_of(path: str, name: str, choice: Any) -> list[Any]:
    """The values that a parameter of a sweep takes, one after the other."""
    if isinstance(choice, dict):
        values = choice.get("values")
        if isinstance(values, list) and values:
            return values
        if "value" in choice:
            return [choice["value"]]
    raise BadInput(f"{path}: parameter {name} needs `value` or a list `values` that is not empty")


def _seeds(path: str, count: Any, has_seed: bool) -> list[int]:
    """`seeds: 3` -> [1, 2, 3]; `has_seed` says whether the file gives an option `seed` too."""
    if has_seed:
        raise BadInput(f"{path}: `seeds` and an option seed both give seeds; leave one of them out")
    # To Python, `true` is the number 1.
    if type(count) is not int or not 1 <= count <= MOST_RUNS:
        raise BadInput(f"{path}: seeds {count}: must be a number from 1 to {MOST_RUNS:,}")
    return list(range(1, count + 1))


def _baseline(path: str, content: Options) -> str | None:
    """The baseline that the file names, if it does."""
    baseline = content.get("baseline")
    if baseline is None:
        return None
    if not isinstance(baseline, str) or not baseline:
        raise BadInput(f"{path}: baseline {baseline}: must be a part of a run's name")
    return baseline
