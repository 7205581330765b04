"""Seconds to answer and to the first step, and peak memory, of whole processes.

    python -m benchmarks.start DATASET [--rounds 5]

DATASET is CIFAR-100 in any form that --dataset takes; it is decoded before anything is timed.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

# What a training imports of other projects.
LIBRARIES = (
    "import torch, torchvision, timm, accelerate, numpy, PIL, safetensors, tqdm; "
    "import timm.optim, timm.data"
)
# Runs a command and prints the peak resident memory of it and its children in KiB.
PEAK_KIB = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], capture_output=True, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def seconds(words: list[str]) -> float:
    """Wall seconds of a whole process, whatever its exit code."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *words], capture_output=True)
    return time.perf_counter() - started


def peak_mib(words: list[str]) -> float:
    """Peak resident memory of a whole process in MiB, the largest of it and its children."""
    command = [sys.executable, "-c", PEAK_KIB, sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def contenders(train: list[str]) -> dict[str, Callable[[], float]]:
    """What is timed, by name; `train` are the words of a training without its length."""
    first_step = [*train, *"--max-steps 1 --limit-test 100".split()]
    # A resume is of the run that was resumed before, and one step longer.
    again = "--limit-test 100 --save-every 1steps --run-name again --resume auto --max-steps"
    steps = itertools.count(1)

    def resume() -> float:
        return seconds([*train, *again.split(), str(next(steps))])

    # Decode the data set, and make the run that is resumed.
    subprocess.run([sys.executable, *first_step], check=True, capture_output=True)
    resume()
    return {
        "--help": lambda: seconds("-m cifar_accel --help".split()),
        "a wrong flag": lambda: seconds("-m cifar_accel --modle vit".split()),
        "a value out of range": lambda: seconds("-m cifar_accel --epochs 0".split()),
        "an unknown model": lambda: seconds([*first_step, "--model", "nfnett"]),
        "one step, 100 test images, to the exit": lambda: seconds(first_step),
        "a resume, one step, 100 test images, to the exit": resume,
    }


def main() -> None:
    """Measure and print a table and one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset")
    parser.add_argument("--data-dir", default="~/.cache/cifar_accel")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()

    # Times first, then memory, each of whole processes.
    measured = {}
    with tempfile.TemporaryDirectory() as scratch:
        train = [
            *"-m cifar_accel --recipe plain --model test_nfnet --no-pretrained".split(),
            *"--batch-size 256 --tracker none --save-every none --resume never".split(),
            *("--dataset", given.dataset, "--data-dir", given.data_dir, "--save-dir", scratch),
        ]
        for name, measure in contenders(train).items():
            measured[name] = [measure() for _ in range(given.rounds)]
        # The trainer's own memory is what it needs beyond the libraries.
        libraries = [peak_mib(["-c", LIBRARIES]) for _ in range(3)]
        whole = [peak_mib([*train, "--max-steps", "40"]) for _ in range(3)]

    # What is for people, then all values in one line.
    for name, values in measured.items():
        spread = f"{min(values):.2f} to {max(values):.2f}, n={len(values)}"
        print(f"{name:<42}{statistics.median(values):6.2f} s   ({spread})")
    least = statistics.median(libraries)
    peak = statistics.median(whole)
    print(f"{'peak memory of importing the libraries':<42}{least:6,.0f} MiB")
    steps = "... of 40 steps and 10,000 test images"
    print(f"{steps:<42}{peak:6,.0f} MiB ({peak - least:+,.0f} MiB)")
    figures = {"seconds": measured, "libraries_mib": libraries, "run_mib": whole}
    print(json.dumps(figures | {"cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
