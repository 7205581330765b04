"""Every check and measurement that needs a GPU, in one table; benchmarks/gpu.sh starts it.

    python -m benchmarks.gpu [DATASET] [--minutes 9] [--only WORD ...] [--out FILE]
    python -m benchmarks.gpu --device cpu --tiny

Each part is a process of its own with a time limit of its own. One that fails or is cut leaves a
row that says so, and the rest goes on; what no longer fits into --minutes is left out, and a row
says that too. --tiny is the rehearsal: every part at toy size. The exit code is 1 if a part failed.
"""

import argparse
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import pipeline, step
from benchmarks.all import EPOCHS, SIZES, epochs
from benchmarks.baseline import NAMES
from benchmarks.measure import Row, cells, images, markdown, parser

ROOT = Path(__file__).parents[1]
# Forks processes that have torch and timm loaded; it never touches the device itself.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["benchmarks.all", "benchmarks.baseline"])
# A part that has less than this many seconds left is not begun.
LEAST = 15
# A family each, as CHANNELS_LAST of cifar_accel/models/create.py has them.
FAMILIES = [*NAMES.values(), "resnet50", "tf_efficientnet_lite0", "convnext_tiny"]
# Ways to run a step, and the options that ask for them.
WAYS: dict[str, dict[str, object]] = {
    "eager": {},
    "compiled": {"compile": True},
    "CUDA graphs": {"compile": True, "compile_mode": "reduce-overhead"},
}


@dataclass(frozen=True)
class Part:
    """One part: the most seconds it may take, and a function that a process can be given."""

    name: str
    seconds: float
    rows: Callable[[], Iterable[Row]]
    needs_gpu: bool = False


# ---- what is checked and measured


def tests(given: argparse.Namespace) -> Iterator[Row]:
    """The tests that are for a GPU: each failure as soon as it is known, then counts by file."""
    # Without the options of pyproject.toml, which ask for a plugin that may be missing.
    files = ["tests/test_cuda.py", "tests/test_cuda_without_gpu.py"]
    command = [sys.executable, "-m", "pytest", *files, "-v", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-o", "addopts="]
    if given.tiny:
        command += ["-k", "test_cuda.py or blocks"]
    # Four at once share the GPU; none of the tests takes all of its memory.
    elif find_spec("xdist"):
        command += ["-n", "4"]

    counts: dict[str, Counter[str]] = {file: Counter() for file in files}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as pytest:
        for line in pytest.stdout or ():
            print(line, end="", flush=True)
            # One line a test tells how far it is in percent; name and outcome are in either order.
            test = re.search(r"(tests/\w+\.py)::(\w+(\[[^\]]*\])?)", line)
            outcome = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
            if not test or not outcome or "%]" not in line:
                continue
            counts[test[1]][outcome[1].lower()] += 1
            if outcome[1] in ("FAILED", "ERROR"):
                yield Row(test[2], "", [], note=outcome[1].lower())
    # All have run. What was cut before has its failures alone.
    for file, outcomes in counts.items():
        told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        yield Row(file, "", [], note=told or "no test ran")
    if pytest.returncode:
        sys.exit(f"pytest ended with exit code {pytest.returncode}")


def input_rate(given: argparse.Namespace, policy: str) -> list[Row]:
    """The device pipeline and timm's loader."""
    split = images(given.dataset, given.data_dir).train
    share = 0.01 if given.tiny else 1.0
    return pipeline.measure(split, policy, torch.device(given.device), given.rounds, share)


def step_time(
    given: argparse.Namespace, model: str, way: str, options: dict[str, object]
) -> Iterator[Row]:
    """The trainer's own step; the first round, which may compile, is not measured."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if given.device == "cuda" else "no"
    batch = 16 if given.tiny else step.BATCH
    data = images(given.dataset, given.data_dir)
    run, measure = step.our_loop(data, given.device, model=model, batch_size=batch, **options)
    if options and not run.model.compiled:
        sys.exit("--compile does not work here")
    # The host waits for the device at the end of each.
    first = measure()
    milliseconds = [measure() / step.STEPS * 1e3 for _ in range(given.rounds)]
    label = f"step of {model} on {given.device}, batch {batch}: {way}"
    yield Row(label, "ms", milliseconds)
    if options:
        yield Row(f"{label}, the first {step.STEPS} steps", "s", [first])


def batch_sizes(given: argparse.Namespace, model: str, sizes: list[int]) -> Iterator[Row]:
    """A bare step of `model` in bf16, by the images that a device takes in it."""
    device = torch.device(given.device)
    for size in sizes:
        measure = step.training_step(model, device, torch.contiguous_format, True, size)
        # The first round is not measured.
        measure()
        milliseconds = [size / measure() * 1e3 for _ in range(given.rounds)]
        yield Row(f"bare step of {model} on {device}, local batch {size}", "ms", milliseconds)


def layouts(given: argparse.Namespace, model: str) -> list[Row]:
    """Both memory formats in both precisions."""
    return step.formats(model, torch.device(given.device), given.rounds)


def epoch(given: argparse.Namespace, model: str, sizes: tuple[int, int]) -> list[Row]:
    """Epochs of the report's loop and of ours."""
    words = (given.dataset, given.data_dir, given.device, given.rounds)
    return epochs(*words, [model], sizes)


def parts(given: argparse.Namespace) -> list[Part]:
    """All parts, by worth: the last ones may find no time."""
    # The models of a step, of an epoch, and of a bare step; those of layouts.
    small, large = step.MODEL, "nfnet"
    trained, bare, families = list(EPOCHS["cuda"]), list(NAMES.values()), FAMILIES
    sizes, batches = SIZES["cuda"], [2**power for power in range(9)]
    if given.tiny:
        large = "test_nfnet"
        trained, bare, families = [large], [small], [small]
        sizes, batches = (256, 64), [1, 2]

    def steps(model: str, way: str, seconds: float) -> Part:
        rows = partial(step_time, given, model, way, WAYS[way])
        # A processor could compile too, but takes half a minute for it.
        return Part(f"step of {model}, {way}", seconds, rows, needs_gpu=way != "eager")

    made = [
        Part("tests", 240, partial(tests, given)),
        Part("input, report policy", 60, partial(input_rate, given, "report")),
        steps(small, "eager", 40),
        steps(small, "CUDA graphs", 90),
        steps(small, "compiled", 60),
        steps(large, "eager", 60),
    ]
    made += [Part(f"epoch of {m}", 90, partial(epoch, given, m, sizes)) for m in trained]
    made += [steps(large, "CUDA graphs", 120)]
    made += [Part(f"batches of {m}", 60, partial(batch_sizes, given, m, batches)) for m in bare]
    made += [Part(f"layouts of {m}", 60, partial(layouts, given, m)) for m in families]
    return [
        *made,
        steps(large, "compiled", 120),
        Part("input, plain policy", 60, partial(input_rate, given, "plain")),
    ]


# ---- how it is run


def work(rows: Callable[[], Iterable[Row]], found: Path, log: Path) -> None:
    """What a part's process does: write each row to `found` as it comes, all output to `log`."""
    # With all processes that it starts, it can be ended at once.
    os.setsid()
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    with found.open("w") as file:
        for row in rows():
            facts = asdict(row)
            del facts["median"]
            print(json.dumps(facts), file=file, flush=True)


def run_part(part: Part, seconds: float, folder: Path) -> tuple[list[Row], bool]:
    """The rows of a part within `seconds`, and whether it failed; then the last row says how."""
    found, log = folder / "rows", folder / "log"
    for file in (found, log):
        file.write_text("")
    process = SERVER.Process(target=work, args=(part.rows, found, log))
    process.start()
    process.join(seconds)
    code = process.exitcode
    # Whatever it has left behind, too.
    process.kill()
    assert process.pid
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # Those that it had written by then.
    rows = [Row(**json.loads(line)) for line in found.read_text().splitlines()]
    if code == 0:
        return rows, False

    # What it said last, in a cell of the table, and the end of its output on the screen.
    output = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    output = [line for line in output if line]
    last = output[-1][:150].replace("|", "/") if output else "no output"
    how = f"cut after {seconds:.0f} s" if code is None else f"failed with exit code {code}"
    print("\n".join(output[-40:]), flush=True)
    return [*rows, Row(part.name, "", [], note=f"{how}: {last}")], True


def main() -> None:
    """Run the parts, and print the table whatever became of them."""
    # What counts against --minutes begins with the process's start, as well as can be told here.
    began = time.monotonic()
    options = parser(__doc__)
    options.set_defaults(rounds=3)
    options.add_argument("--tiny", action="store_true", help="the rehearsal: toy sizes, one round")
    options.add_argument("--minutes", type=float, default=9.0, help="the most that all may take")
    options.add_argument("--only", nargs="+", metavar="WORD", help="parts whose name has a WORD")
    options.add_argument("--out", type=Path, help="also write the table to OUT, part by part")
    given = options.parse_args()
    if given.tiny:
        given.rounds = 1
        # Threads that share few cores with others wait for each other.
        os.environ.setdefault("OMP_NUM_THREADS", "1")

    # Part by part, each with what is left of the time.
    name = given.dataset.rsplit("/", 1)[-1]
    title = f"## `benchmarks/gpu.sh` on {given.device}, {name}"
    if given.tiny:
        title += ": a rehearsal, its figures mean nothing"
    rows: list[Row] = []
    any_failed = False
    for part in parts(given):
        if given.only and not any(word in part.name for word in given.only):
            continue
        left = 60 * given.minutes - (time.monotonic() - began)
        if part.needs_gpu and given.device != "cuda":
            new = [Row(part.name, "", [], note="needs a GPU")]
        elif left < LEAST:
            new = [Row(part.name, "", [], note=f"left out: {given.minutes:g} minutes are over")]
        else:
            print(f"{part.name}: at most {min(part.seconds, left):.0f} s", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                new, failed = run_part(part, min(part.seconds, left), Path(folder))
            any_failed = any_failed or failed
        rows += new
        for row in new:
            print(f"  {row.name}: {' '.join(cells(row))}", flush=True)
        print(f"  after {time.monotonic() - began:.0f} s", flush=True)
        # Also what is cut from outside leaves what was measured by then.
        if given.out:
            given.out.write_text(markdown(rows, title))
    print(f"\n{markdown(rows, title)}", end="", flush=True)
    sys.exit(any_failed)


if __name__ == "__main__":
    main()
