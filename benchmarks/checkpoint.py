"""What a checkpoint costs: size, seconds to write and to verify, and its share of an epoch.

    python -m benchmarks.checkpoint [DATASET] [--rounds 5]
                                    [--models test_nfnet tf_efficientnet_lite0]

An epoch is that of the whole training set at the speed of 5 measured steps; one checkpoint is
written in each.
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
from cifar_accel.records.meters import Clock


def measure(name: str, data: Dataset, device: str, rounds: int) -> None:
    """Print one line for model `name`."""
    # The run as the trainer sets it up, at its first step.
    args = replace(
        recipe_defaults("plain"), model=name, pretrained=False, device=device, warmup_epochs=0.0
    )
    run, state = our_run(args, data)
    micro_batches = run.data.train.training_batches(run.plan.order, 0, run.plan.total_steps)
    clock = Clock(state)
    run.model.module.train()

    def seconds_a_step(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            train.take_step(run, state.step, micro_batches, clock)
            state.step += 1
        # The host waits here.
        train.collect(run, state)
        return (time.perf_counter() - began) / steps

    # The first steps make the optimizer's moments.
    seconds_a_step(5)
    step = seconds_a_step(5)

    written, verified = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            # Each checkpoint has a folder of its own; the oldest is removed, as in a training.
            state.step += 1
            began = time.perf_counter()
            weights = run.model.module.state_dict()
            optimizer = run.optimizer.optimizer.state_dict()
            path = checkpoint.save_checkpoint(
                Path(folder), weights, optimizer, None, asdict(state), 2
            )
            written.append(time.perf_counter() - began)

            # What a resume does before it trusts a checkpoint.
            began = time.perf_counter()
            assert checkpoint.fault(path) is None
            verified.append(time.perf_counter() - began)
        size = sum(file.stat().st_size for file in path.iterdir())

    # One checkpoint for each epoch.
    epoch = step * run.plan.steps_per_epoch
    save = statistics.median(written)
    spread = f"{min(written):.3f} to {max(written):.3f}, n={rounds}"
    print(
        f"{name:<26}{size / 2**20:8.1f} MiB   written in {save:.3f} s ({spread}), verified in "
        f"{statistics.median(verified):.3f} s; a step takes {step:.3f} s, an epoch {epoch:.0f} s: "
        f"{save / (epoch + save):.2%} of training at one an epoch"
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
