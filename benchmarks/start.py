"""Seconds to answer and to the first step, and peak memory, of the installed trainer; whole processes, real runs.

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

LIBRARIES = "import torch, torchvision, timm, accelerate, numpy, PIL, safetensors, tqdm; import timm.optim, timm.data"


def seconds(words: list[str]) -> float:
    """Wall seconds of a whole process, whatever its exit code."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *words], capture_output=True)
    return time.perf_counter() - started


def peak_mib(words: list[str]) -> float:
    """Peak resident memory of a whole process in MiB, the largest of it and its children."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], capture_output=True, check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, sys.executable, *words],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout) / 1024


def main() -> None:
    """Measure and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("--data-dir", default="~/.cache/cifar_accel")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        train = (
            f"-m cifar_accel --dataset {given.dataset} --data-dir {given.data_dir} --recipe plain --model test_nfnet "
            f"--no-pretrained --batch-size 256 --tracker none --save-every none --save-dir {scratch} --resume never"
        ).split()
        first_step = [*train, "--max-steps", "1", "--limit-test", "100"]
        subprocess.run([sys.executable, *first_step], check=True, capture_output=True)
        steps = itertools.count(1)

        def resume() -> float:
            words = [
                *train,
                "--limit-test",
                "100",
                "--save-every",
                "1steps",
                "--run-name",
                "again",
                "--resume",
                "auto",
            ]
            return seconds([*words, "--max-steps", str(next(steps))])

        resume()
        table = {
            "--help": lambda: seconds(["-m", "cifar_accel", "--help"]),
            "a wrong flag": lambda: seconds(["-m", "cifar_accel", "--modle", "vit"]),
            "a value out of range": lambda: seconds(["-m", "cifar_accel", "--epochs", "0"]),
            "an unknown model": lambda: seconds([*first_step, "--model", "nfnett"]),
            "one step, 100 test images, to the exit": lambda: seconds(first_step),
            "a resume, one step, 100 test images, to the exit": resume,
        }
        measured = {
            name: [measure() for _ in range(given.rounds)] for name, measure in table.items()
        }
        libraries = [peak_mib(["-c", LIBRARIES]) for _ in range(3)]
        whole = [peak_mib([*train, "--max-steps", "40"]) for _ in range(3)]
    for name, values in measured.items():
        print(
            f"{name:<42}{statistics.median(values):6.2f} s   ({min(values):.2f} to {max(values):.2f}, n={len(values)})"
        )
    extra = statistics.median(whole) - statistics.median(libraries)
    print(f"{'peak memory of importing the libraries':<42}{statistics.median(libraries):6,.0f} MiB")
    print(
        f"{'... of 40 steps and 10,000 test images':<42}{statistics.median(whole):6,.0f} MiB ({extra:+,.0f} MiB)"
    )
    print(
        json.dumps(
            {
                "seconds": measured,
                "libraries_mib": libraries,
                "run_mib": whole,
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
