"""What a checkpoint costs: its size, the seconds to write and to verify it, and its share of an epoch.

    python -m benchmarks.checkpoint [DATASET] [--rounds 5] [--models test_nfnet tf_efficientnet_lite0]

An epoch is that of the whole training set at the speed of 5 measured steps; one checkpoint is written in each.
"""

import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.measure import images, our_run, parser
from cifar_accel import train
from cifar_accel.data.datasets import Dataset
from cifar_accel.options.recipes import recipe_defaults
from cifar_accel.records import checkpoint


def measure(name: str, data: Dataset, device: str, rounds: int) -> None:
    """Print one line for model `name`."""
    args = replace(
        recipe_defaults("plain"), model=name, pretrained=False, device=device, warmup_epochs=0.0
    )
    run, state = our_run(args, data)
    batches = run.train.training_batches(run.order, 0, 10**9)
    sums, clock = train.Sums(run.accelerator), train.Clock(state)
    run.model.train()

    def steps(n: int) -> float:
        began = time.perf_counter()
        for _ in range(n):
            train.optimizer_step(run, state.step, 5e-4, batches, sums, clock)
            state.step += 1
        sums.move_to(state)
        return (time.perf_counter() - began) / n

    steps(5)
    step = steps(5)
    written, verified = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            state.step += 1
            began = time.perf_counter()
            weights, optimizer = run.module.state_dict(), run.optimizer.optimizer.state_dict()
            path = checkpoint.save_checkpoint(
                Path(folder), weights, optimizer, None, asdict(state), 2
            )
            written.append(time.perf_counter() - began)
            began = time.perf_counter()
            assert checkpoint.fault(path) is None
            verified.append(time.perf_counter() - began)
        size = sum(file.stat().st_size for file in path.iterdir())
    epoch, save = step * run.order.steps_per_epoch, statistics.median(written)
    print(
        f"{name:<26}{size / 2**20:8.1f} MiB   written in {save:.3f} s ({min(written):.3f} to {max(written):.3f}, "
        f"n={rounds}), verified in {statistics.median(verified):.3f} s; a step takes {step:.3f} s, an epoch "
        f"{epoch:.0f} s: {save / (epoch + save):.2%} of training at one an epoch"
    )


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["test_nfnet", "tf_efficientnet_lite0"])
    given = options.parse_args()
    data = images(given.dataset, given.data_dir)
    for name in given.models:
        measure(name, data, given.device, given.rounds)


if __name__ == "__main__":
    main()
