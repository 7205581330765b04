"""Whether two versions of the trainer give the same runs, bit for bit.

    python -m tools.same_run OLD [NEW] [--only WORD] [--keep FOLDER]

OLD and NEW (unset: this working tree) are commits or folders of checkouts. Each case is a tiny
training on both: of digits, and of real CIFAR-100 where CIFAR_ACCEL_DATA names it. Compared are the
weights by SHA-256, every value of every row and of summary.json but clocks and memory, and the exit
codes. Prints a line a case and each difference below it; exit code 0 when all are equal.

Idea: torchtitan's `loss_compare --assert-equal`; here bits are equal by design, so nothing is
close.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLOCKS = {
    "time_s",
    "wall_s",
    "images_per_s",
    "train/images_per_s",
    "train/input_share",
    "train/peak_memory_mib",
}

DIGITS = (
    "--dataset digits --model test_nfnet --no-pretrained --recipe digits --limit-train 256 "
    "--limit-test 100 --batch-size 32 --epochs 3 --learning-rate 3e-3 --log-every 3 --tracker none"
)
CIFAR = (
    "--dataset {data} --model test_vit --no-pretrained --limit-train 256 --limit-test 100 "
    "--batch-size 32 --epochs 2 --learning-rate 1e-3 --log-every 3 --tracker none"
)


@dataclass(frozen=True)
class Start:
    """One start of a training: more options, and what happens to it.

    `kill_after` is a checkpoint at whose sight every rank is killed; `stop_in_evaluation` the
    number of the evaluation batch in which rank 0 sends itself SIGTERM.
    """

    words: str = ""
    kill_after: int | None = None
    stop_in_evaluation: int | None = None


@dataclass(frozen=True)
class Case:
    """A run folder and the starts that fill it, one after the other."""

    words: str
    starts: tuple[Start, ...] = (Start(),)
    base: str = DIGITS
    processes: int = 1
    precision: str = "no"


MIXED = "--mixup 0.8 --cutmix 1.0 --model-ema --model-ema-decay 0.9"
CASES = {
    "digits": Case(""),
    "sgdm, linear decay, weights kept": Case(
        "--optimizer sgdm --scheduler linear_decay --save-epochs 1"
    ),
    "two processes": Case("", processes=2),
    "accumulation": Case("--micro-batch-size 8"),
    "two processes and accumulation": Case("--micro-batch-size 4", processes=2),
    "mixing and average": Case(MIXED),
    "mixing, two processes, accumulation": Case(f"{MIXED} --micro-batch-size 8", processes=2),
    "agc": Case("--clip-grad 0.01 --clip-mode agc --optimizer lion --learning-rate 3e-4"),
    "clipping by norm": Case("--clip-grad 1.0 --bce-loss"),
    "batch norm on two processes": Case("--model test_efficientnet", processes=2),
    "dropout": Case("--model test_vit --model-kwargs drop_rate=0.2 drop_path_rate=0.1"),
    "timm's pipeline": Case("--pipeline timm --workers 2 --hflip 0.5 --aa rand-m9-n2"),
    "bf16": Case("", precision="bf16"),
    "held-out images": Case("--validation-fraction 0.2"),
    "cut and allowed further": Case(
        "", (Start("--max-steps 10"), Start("--max-steps 13"), Start("--max-steps 16"), Start())
    ),
    "killed and resumed": Case("--save-every 3steps", (Start(kill_after=6), Start())),
    "killed and resumed in bf16, two processes": Case(
        f"{MIXED} --save-every 3steps",
        (Start(kill_after=6), Start()),
        processes=2,
        precision="bf16",
    ),
    "stopped in an evaluation": Case(
        "--micro-batch-size 8", (Start(stop_in_evaluation=5), Start())
    ),
    "stopped in the second evaluation, two processes": Case(
        "--micro-batch-size 8", (Start(stop_in_evaluation=9), Start()), processes=2
    ),
    "no such option": Case("--no-such-option 1"),
    "a batch that is too large": Case("--batch-size 512"),
    "cifar": Case("", base=CIFAR),
    "cifar, the other pipeline": Case("--pipeline timm --workers 2", base=CIFAR),
    "cifar, everything at once": Case(
        "--reprob 0.25 --cutmix 1.0 --model-ema --micro-batch-size 8 --save-every 5steps",
        (Start(kill_after=5), Start()),
        base=CIFAR,
        processes=2,
        precision="bf16",
    ),
    "cifar, plain": Case(
        "--recipe plain --alternating-flip --color-jitter 0.4 --image-size 48 "
        "--interpolation bicubic",
        base=CIFAR,
    ),
}

# Runs in a process of its own with one version on its path. Reads starts as JSON lines, forks a
# process for each rank (the libraries are loaded once) and answers with the exit codes.
RUNNER = r"""
import json, os, signal, socket, sys, time
from pathlib import Path
import torch, timm, accelerate
import cifar_accel.train, cifar_accel.cli

def stop_in(batch):
    topk, calls = torch.Tensor.topk, [0]     # nothing but an evaluation calls it
    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return topk(*args, **kwargs)
    torch.Tensor.topk = counted

def rank_process(job, rank, port):
    os.environ["ACCELERATE_MIXED_PRECISION"] = job["precision"]
    if job["processes"] > 1:
        world = str(job["processes"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    if job["stop_in_evaluation"] and rank == 0:
        stop_in(job["stop_in_evaluation"])
    sys.argv = ["cifar_accel", *job["words"]]
    try:
        code = cifar_accel.cli.train_command(job["words"])
    except SystemExit as e:
        code = e.code
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code or 0)

for line in sys.stdin:
    job = json.loads(line)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in range(job["processes"]):
        pid = os.fork()
        if not pid:
            rank_process(job, rank, port)
        ranks.append(pid)
    if job["kill_after"] is not None:
        mark = Path(job["run"], "checkpoints", f"step-{job['kill_after']:08d}")
        end = time.monotonic() + 120
        while not mark.exists() and time.monotonic() < end:
            time.sleep(0.005)
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    print(json.dumps(codes), flush=True)
"""


@contextmanager
def checkout(version: str) -> Iterator[Path]:
    """The folder of `version`: itself if it is one, else a worktree that goes with this context."""
    if Path(version).is_dir():
        yield Path(version).resolve()
        return
    with tempfile.TemporaryDirectory() as place:
        folder = str(Path(place, "checkout"))
        subprocess.run(
            ["git", "worktree", "add", "--detach", "--quiet", folder, version], check=True
        )
        try:
            yield Path(folder)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], check=True)


class Side:
    """One version, with a process that has loaded it, and a folder for its runs."""

    def __init__(self, version: Path, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        environment = os.environ | {
            "PYTHONPATH": str(version),
            "OMP_NUM_THREADS": "1",  # bits depend on the number of threads
        }
        environment.pop("RANK", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment,
        )

    def begin(self, number: int, case: Case, start: Start) -> None:
        """Ask for one start of a case."""
        run = f"case-{number}"
        words = (
            case.base.format(data=os.environ.get("CIFAR_ACCEL_DATA"))
            + f" {case.words} {start.words}"
        )
        places = f" --data-dir {self.folder / 'data'} --save-dir {self.folder} --run-name {run}"
        job = {
            "words": (words + places).split(),
            "run": str(self.folder / run),
            "log": str(self.folder / f"{run}.log"),
            "processes": case.processes,
            "precision": case.precision,
            "kill_after": start.kill_after,
            "stop_in_evaluation": start.stop_in_evaluation,
        }
        assert self.process.stdin
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def end(self) -> list[int]:
        """Wait for what was begun; the exit codes by rank."""
        assert self.process.stdout
        codes: list[int] = json.loads(self.process.stdout.readline())
        return codes

    def result(self, number: int) -> dict[str, Any]:
        """Everything that is compared of a case's run folder."""
        run = self.folder / f"case-{number}"
        found: dict[str, Any] = {}
        for file in sorted(run.glob("model*/model.safetensors")):
            name = f"{file.parent.name} weights"
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        if (run / "metrics.jsonl").exists():
            for line in (run / "metrics.jsonl").read_text().splitlines():
                row = json.loads(line)
                # A step that is logged twice must not hide the first.
                step = f"step {row['step']}"
                while f"{step}: step" in found:
                    step += " again"
                found |= {f"{step}: {key}": value for key, value in row.items()}
        if (run / "summary.json").exists():
            summary = json.loads((run / "summary.json").read_text())
            found |= {f"summary: {k}": v for k, v in summary.items()}
        return {key: value for key, value in found.items() if key.partition(": ")[2] not in CLOCKS}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each key whose value is not the same on both sides."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, "nothing"), new.get(key, "nothing")
        if a != b:
            both = isinstance(a, float) and isinstance(b, float)
            share = f" (by {abs(a - b) / max(abs(a), abs(b)):.1e} of it)" if both else ""
            lines.append(f"{key}: {a} -> {b}{share}")
    return lines


def compare(sides: tuple[Side, Side], only: str) -> int:
    """Run every case on both sides, the two beside each other; the number of cases that differ."""
    different = 0
    for number, (name, case) in enumerate(CASES.items()):
        if only not in name or (case.base == CIFAR and not os.environ.get("CIFAR_ACCEL_DATA")):
            continue
        codes = []
        for start in case.starts:
            for side in sides:
                side.begin(number, case, start)
            codes.append([side.end() for side in sides])
        lines = [f"exit codes {a} -> {b}" for a, b in codes if a != b]
        lines += differences(*(side.result(number) for side in sides))
        shown = " then ".join(str(old) for old, _ in codes)
        print(f"{'DIFFERENT' if lines else 'same':<10}{name}: exit codes {shown}", flush=True)
        for line in lines[:12]:
            print(f"          {line}", flush=True)
        if len(lines) > 12:
            print(f"          and {len(lines) - 12} more")
        different += bool(lines)
    return different


def main() -> int:
    """Compare two versions."""
    parser = argparse.ArgumentParser(description="Whether two versions give the same runs.")
    parser.add_argument("old", help="a commit, or the folder of a checkout")
    parser.add_argument("new", nargs="?", default=".", help="the same; unset: this working tree")
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    parser.add_argument("--keep", help="keep the runs in this folder")
    given = parser.parse_args()
    with (
        checkout(given.old) as old,
        checkout(given.new) as new,
        tempfile.TemporaryDirectory() as scratch,
    ):
        folder = Path(given.keep or scratch).resolve()
        sides = Side(old, folder / "old"), Side(new, folder / "new")
        different = compare(sides, given.only)
    print(f"{different} cases differ" if different else "all that ran are equal")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
