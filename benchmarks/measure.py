"""What all benchmarks share: contenders measured in turns, and a table of medians and goals."""

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar_accel import run as run_module
from cifar_accel.data.datasets import Dataset, Split
from cifar_accel.data.decode import load_dataset
from cifar_accel.machine.processes import join_processes
from cifar_accel.machine.signals import StopRequest
from cifar_accel.options.options import TrainingArguments
from cifar_accel.options.recipes import recipe_defaults
from cifar_accel.records.folder import Opened
from cifar_accel.records.state import State
from cifar_accel.records.summary import describe_config
from cifar_accel.run import Run

# ---- values and goals


@dataclass
class Row:
    """One line of the table: measured values, and what the project wants of them, if anything."""

    name: str
    unit: str
    # One a round.
    values: list[float]
    # In words, and whether the median meets it.
    goal: str = ""
    met: bool | None = None
    # What is said where there are no values.
    note: str = ""
    median: float = field(init=False)

    def __post_init__(self) -> None:
        self.median = statistics.median(self.values) if self.values else math.nan


def goal(
    name: str, values: list[float], least: float, aim: float, unit: str = "x", most: bool = False
) -> Row:
    """A row that must reach `least` (or, with `most`, stay below it) in the median."""
    median = statistics.median(values)
    if most:
        return Row(name, unit, values, f"<= {least:g}, aim {aim:g}", median <= least)
    return Row(name, unit, values, f">= {least:g}, aim {aim:g}", median >= least)


def in_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every contender once a round.

    The order changes from round to round, so that a busy moment hits none alone.
    """
    seen: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        names = list(contenders)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seen[name].append(contenders[name]())
    return seen


def ratios(over: list[float], under: list[float]) -> list[float]:
    """Ratios round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


# ---- contenders in processes of their own


class Contender:
    """A process of its own that measures once each time it is asked.

    So contenders share neither heap nor threads. The process runs `serve`.
    """

    def __init__(self, module: str, *words: str):
        # It loads and warms up from now on, beside the other contenders.
        command = [sys.executable, "-m", module, *words]
        self.name = f"{module} {' '.join(words)}"
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self) -> dict[str, float]:
        """Ask for one measurement."""
        assert self.process.stdin and self.process.stdout
        print("go", file=self.process.stdin, flush=True)
        # Anything else that the process prints is passed over.
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}")

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(measure: Callable[[], dict[str, float]]) -> None:
    """The other side of a Contender: one measurement a line on stdin."""
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


# ---- data, options and a run of ours


def images(dataset: str, data_dir: str) -> Dataset:
    """What --dataset names; `noise` is random pixels in CIFAR-100's shapes."""
    if dataset != "noise":
        return load_dataset(dataset, data_dir, 32)
    # As large as CIFAR-100, since the images lie in the device's memory.
    rng = np.random.default_rng(0)
    classes = [str(c) for c in range(100)]

    def split(n: int) -> Split:
        pixels = rng.integers(0, 256, (n, 3, 32, 32), np.uint8)
        return Split(pixels, np.arange(n) % 100, classes)

    return Dataset("noise", split(50_000), split(10_000), "noise")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks take; the data set is CIFAR_ACCEL_DATA's, else noise."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("dataset", nargs="?", default=os.environ.get("CIFAR_ACCEL_DATA") or "noise")
    made.add_argument("--data-dir", default="~/.cache/cifar_accel")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--rounds", type=int, default=5)
    return made


def our_run(args: TrainingArguments, data: Dataset) -> tuple[Run, State]:
    """What the trainer sets up for `args`, over images that are there already; prints nothing."""
    # In place of the trainer's own loading.
    run_module.load_splits = lambda args: (data, data.test)
    # Where options come from, and where a run would be written, is of no interest here.
    origin = dict.fromkeys(vars(args), "")
    opened = Opened(path=Path("unused"))
    # stdout belongs to the figures.
    with contextlib.redirect_stdout(io.StringIO()):
        ranks = join_processes(args.device)
        return run_module.set_up(args, origin, opened, ranks, StopRequest())


# ---- the table


def show(rows: list[Row], out: str | None, title: str) -> None:
    """Print the table; with `out`, also write OUT.json and OUT.md."""
    print(f"\n{title}")
    print(f"{'':<58}{'median':>12}  {'range':<22}{'n':>2}  goal")
    for row in rows:
        median, spread, n, wanted = cells(row)
        print(f"{row.name:<58}{median:>12}  {spread:<22}{n:>2}  {wanted}")
    if out:
        write(rows, out, title)


def write(rows: list[Row], out: str, title: str) -> None:
    """Write OUT.json with every value, and OUT.md with the table."""
    # Every value, so that another median or spread can be taken later.
    record = {"title": title, "rows": [asdict(row) for row in rows], **surroundings()}
    Path(out + ".json").write_text(json.dumps(record, indent=1) + "\n")
    # The same rows as on the screen, for people.
    Path(out + ".md").write_text(f"# {markdown(rows, title)}")


def surroundings() -> dict[str, Any]:
    """`versions` and `hardware`: what it was measured on, but not whose machine it was."""
    about: dict[str, Any] = describe_config(recipe_defaults("plain"), {}, {})
    hardware = {name: value for name, value in about["hardware"].items() if name != "host"}
    hardware["processor"] = processor()
    return {"versions": about["versions"], "hardware": hardware}


def markdown(rows: list[Row], title: str) -> str:
    """The title, a line on machine and versions, and the table."""
    about = surroundings()
    hardware = about["hardware"]
    cores = f"{hardware['cpu_cores']} cores ({hardware['processor']})"
    devices = ", ".join(hardware["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        title,
        "",
        f"{cores}, {devices}; {versions}",
        "",
        "| | median | range | n | goal |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join([row.name, *cells(row)])} |" for row in rows]
    return "\n".join(lines) + "\n"


def cells(row: Row) -> list[str]:
    """Median with its unit, range, number of values, and the goal with whether it is met."""
    if not row.values:
        return [row.note, "", "", ""]
    goal = row.goal
    if row.met is not None:
        goal = f"{'met' if row.met else 'MISSED'}: {goal}"
    return [
        f"{number(row.median)} {row.unit}",
        f"{number(min(row.values))} to {number(max(row.values))}",
        str(len(row.values)),
        goal,
    ]


def processor() -> str:
    """The processor's name and whether it computes bf16, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    models = [line for line in text.splitlines() if line.startswith("model name")]
    name = models[0].split(":")[1].strip() if models else "unknown"
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in text]
    return ", ".join([name, *bf16])


def number(value: float) -> str:
    """`1234.5` -> `1,234`; `0.0123` -> `0.0123`."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
