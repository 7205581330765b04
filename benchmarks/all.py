"""Everything that is measured, in one table.

    python -m benchmarks.all [DATASET] [--rounds 5] [--out benchmarks/results-cpu]

DATASET is anything that --dataset takes (unset: CIFAR_ACCEL_DATA, else random images of CIFAR-100's
shapes). Prints one table; with --out also OUT.json and OUT.md. Every ratio is of two things
measured in turns in one process tree. On a GPU the epochs are of the report's own two models, on a
CPU of three small ones and of a tenth of the images.
"""

from collections.abc import Iterable

import torch

from benchmarks import pipeline, step
from benchmarks.measure import Contender, Row, goal, images, in_turns, parser, ratios, show

# Models by device, and our precision for each: the faster one by `step --formats`.
EPOCHS = {
    "cpu": {"test_nfnet": "bf16", "tf_efficientnet_lite0": "no", "resnet18": "bf16"},
    "cuda": {"nfnet": "bf16", "vit": "bf16"},
}
# How many times the report's speed an epoch of ours must reach, and should, by device.
GOALS = {"cpu": (2, 4), "cuda": (4, 8)}
# Training and test images of an epoch: half of CIFAR-100 on a GPU, a tenth on a CPU.
SIZES = {"cpu": (5120, 1024), "cuda": (25_600, 5120)}


def epochs(
    dataset: str,
    data_dir: str,
    device: str,
    rounds: int,
    models: Iterable[str],
    sizes: tuple[int, int],
) -> list[Row]:
    """Whole epochs of `sizes` images and their evaluation, ours over the report's loop."""
    train, test = sizes
    words = ["--data-dir", data_dir, "--device", device, "--train", str(train), "--test", str(test)]
    rows = []
    for model in models:
        precision = EPOCHS[device][model]
        # Each side is a process of its own.
        report = Contender("benchmarks.baseline", "report", model, dataset, *words)
        ours = Contender(
            "benchmarks.baseline", "ours", model, dataset, *words, "--precision", precision
        )
        seen = in_turns(
            {
                "report": lambda side=report: side()["seconds"],
                "ours": lambda side=ours: side()["seconds"],
            },
            rounds,
        )
        report.close()
        ours.close()

        # Two rows of seconds, and one of what their ratio must be.
        label = f"epoch of {model} on {device}"
        our_precision = "fp32" if precision == "no" else precision
        over = ratios(seen["report"], seen["ours"])
        rows += [
            Row(f"{label}: the report's loop", "s", seen["report"]),
            Row(f"{label}: ours, {our_precision}", "s", seen["ours"]),
            goal(f"{label}: the report's over ours", over, *GOALS[device]),
        ]
    return rows


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--out", help="write OUT.json and OUT.md")
    given = options.parse_args()
    data = images(given.dataset, given.data_dir)
    device = torch.device(given.device)

    # In order of size: the input alone, the step, whole epochs.
    rows = []
    for policy in ("report", "plain"):
        print(f"input: {policy} policy", flush=True)
        rows += pipeline.measure(data.train, policy, device, given.rounds)
    print("step and memory", flush=True)
    rows += step.measure(data, given.dataset, given.data_dir, given.device, given.rounds)
    print("epochs", flush=True)
    words = (given.dataset, given.data_dir, given.device, given.rounds)
    rows += epochs(*words, EPOCHS[given.device], SIZES[given.device])

    name = given.dataset.rsplit("/", 1)[-1]
    show(rows, given.out, f"cifar_accel on {given.device}, {name}")


if __name__ == "__main__":
    main()
