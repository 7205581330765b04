"""What all benchmarks share: contenders measured in turns, and a table of medians, spreads and goals."""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

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


@dataclass
class Row:
    """One line of the table: measured values, and what the project wants of them (empty: nothing)."""

    name: str
    unit: str
    values: list[float]
    goal: str = ""
    met: bool | None = None
    median: float = field(init=False)

    def __post_init__(self) -> None:
        self.median = statistics.median(self.values)


def in_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every contender once a round, in changing order, so that a busy moment hits none alone."""
    seen: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        names = list(contenders)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seen[name].append(contenders[name]())
    return seen


def ratios(over: list[float], under: list[float]) -> list[float]:
    """Ratios round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def goal(
    name: str, values: list[float], least: float, aim: float, unit: str = "x", most: bool = False
) -> Row:
    """A row that must reach `least` (or, with `most`, stay below it) in the median."""
    median = statistics.median(values)
    sign = "<=" if most else ">="
    return Row(
        name,
        unit,
        values,
        f"{sign} {least:g}, aim {aim:g}",
        median <= least if most else median >= least,
    )


class Contender:
    """A process of its own that measures once each time it is asked: contenders share neither heap nor threads."""

    def __init__(self, module: str, *words: str):
        command = [sys.executable, "-m", module, *words]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.name = f"{module} {' '.join(words)}"

    def __call__(self) -> dict[str, float]:
        """Ask for one measurement."""
        assert self.process.stdin and self.process.stdout
        print("go", file=self.process.stdin, flush=True)
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


def images(dataset: str, data_dir: str) -> Dataset:
    """What --dataset names; `noise` stands in for CIFAR-100 where there is none: same shapes, random pixels."""
    if dataset != "noise":
        return load_dataset(dataset, data_dir, 32)
    rng = np.random.default_rng(0)

    def split(n: int) -> Split:
        return Split(
            rng.integers(0, 256, (n, 3, 32, 32), np.uint8),
            np.arange(n) % 100,
            [str(c) for c in range(100)],
        )

    return Dataset("noise", split(50_000), split(10_000), "noise")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks take. The data set is CIFAR-100 from CIFAR_ACCEL_DATA, else noise."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("dataset", nargs="?", default=os.environ.get("CIFAR_ACCEL_DATA") or "noise")
    made.add_argument("--data-dir", default="~/.cache/cifar_accel")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--rounds", type=int, default=5)
    return made


def our_run(args: TrainingArguments, data: Dataset) -> tuple[Run, State]:
    """What the trainer sets up for `args`, over images that are there already; it prints nothing."""
    run_module.load_splits = lambda args: (data, data.test)
    origin = dict.fromkeys(vars(args), "")
    opened = Opened(path=Path("unused"))
    # stdout belongs to the figures.
    with contextlib.redirect_stdout(io.StringIO()):
        ranks = join_processes(args.device)
        return run_module.set_up(args, origin, opened, ranks, StopRequest())


def show(rows: list[Row], out: str | None, title: str) -> None:
    """Print the table; with `out`, also write OUT.json and OUT.md."""
    about = describe_config(recipe_defaults("plain"), {}, {})
    lines = [f"{'':<58}{'median':>12}  {'range':<22}{'n':>2}  goal"]
    marks = {True: "met", False: "MISSED", None: ""}
    cells = []
    for r in rows:
        low, high = (number(f(r.values)) for f in (min, max))
        spread, median = f"{low} to {high}", f"{number(r.median)} {r.unit}"
        lines.append(
            f"{r.name:<58}{median:>12}  {spread:<22}{len(r.values):>2}  {r.goal} {marks[r.met]}"
        )
        cells.append(
            f"| {r.name} | {median} | {spread} | {len(r.values)} | {r.goal} {marks[r.met]} |"
        )
    print("\n".join(["", title, *lines]))
    if out:
        record = {"title": title, "rows": [asdict(r) for r in rows]}
        machine = {k: v for k, v in about["hardware"].items() if k != "host"} | {
            "processor": processor()
        }
        record |= {"versions": about["versions"], "hardware": machine}
        Path(out + ".json").write_text(json.dumps(record, indent=1) + "\n")
        versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
        table = ["| | median | range | n | goal |", "|---|---|---|---|---|", *cells]
        devices = ", ".join(machine["gpus"]) or "no GPU"
        line = f"{machine['cpu_cores']} cores ({machine['processor']}), {devices}; {versions}"
        Path(out + ".md").write_text("\n".join([f"# {title}", "", line, "", *table, ""]))


def processor() -> str:
    """The processor's name and whether it computes bf16, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = next(
        (line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")),
        "unknown",
    )
    return ", ".join([name, *(f for f in ("avx512_bf16", "amx_bf16") if f in text)])


def number(value: float) -> str:
    """`1234.5` -> `1,234`; `0.0123` -> `0.0123`."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
