"""Everything that is measured, in one table.

    python -m benchmarks.all [DATASET] [--rounds 5] [--out benchmarks/results-cpu]

DATASET is anything that --dataset takes (unset: CIFAR_ACCEL_DATA, else random images of CIFAR-100's
shapes). Prints one table; with --out also OUT.json and OUT.md. Every ratio is of two things
measured in turns in one process tree. On a GPU the epochs are of the report's own two models, on a
CPU of three small ones and of a tenth of the images.
"""

import torch

from benchmarks import pipeline, step
from benchmarks.measure import Contender, Row, goal, images, in_turns, parser, ratios, show

# Models and our precision for each (the faster one by `step --formats`), by device.
EPOCHS = {
    "cpu": {"test_nfnet": "bf16", "tf_efficientnet_lite0": "no", "resnet18": "bf16"},
    "cuda": {"nfnet": "bf16", "vit": "bf16"},
}
GOALS = {"cpu": (2, 4), "cuda": (4, 8)}


def epochs(dataset: str, data_dir: str, device: str, rounds: int) -> list[Row]:
    """Whole epochs with their evaluation, ours over the report's loop."""
    rows = []
    train, test = (5120, 1024) if device == "cpu" else (25_600, 5120)
    words = ("--data-dir", data_dir, "--device", device, "--train", str(train), "--test", str(test))
    for model, precision in EPOCHS[device].items():
        sides = {
            "the report's loop": Contender("benchmarks.baseline", "report", model, dataset, *words),
            "ours": Contender(
                "benchmarks.baseline", "ours", model, dataset, *words, "--precision", precision
            ),
        }
        seen = in_turns(
            {k: lambda side=side: side()["seconds"] for k, side in sides.items()}, rounds
        )
        for side in sides.values():
            side.close()
        label = f"epoch of {model} on {device}"
        ours = f"ours, {'fp32' if precision == 'no' else precision}"
        rows += [Row(f"{label}: {ours if k == 'ours' else k}", "s", v) for k, v in seen.items()]
        rows.append(
            goal(
                f"{label}: the report's over ours",
                ratios(seen["the report's loop"], seen["ours"]),
                *GOALS[device],
            )
        )
    return rows


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--out", help="write OUT.json and OUT.md")
    given = options.parse_args()
    data = images(given.dataset, given.data_dir)
    device = torch.device(given.device)
    rows = []
    for policy in ("report", "plain"):
        print(f"input: {policy} policy", flush=True)
        rows += pipeline.measure(data.train, policy, device, given.rounds)
    print("step and memory", flush=True)
    rows += step.measure(data, given.dataset, given.data_dir, given.device, given.rounds)
    print("epochs", flush=True)
    rows += epochs(given.dataset, given.data_dir, given.device, given.rounds)
    show(rows, given.out, f"cifar_accel on {given.device}, {given.dataset.rsplit('/', 1)[-1]}")


if __name__ == "__main__":
    main()
