"""Time and memory of many models under the recipe `finetune`: a few steps each, without weights.

    python -m benchmarks.models [MODEL ...] [--size 128] [--batch 16]

Each model is a process of its own and is timed as --budget does it, on black images, in fp32 and in
bf16; the faster one counts. Prints a Markdown table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from cifar_accel.data.datasets import Dataset, Split
from cifar_accel.machine.processes import join_processes
from cifar_accel.machine.signals import StopRequest
from cifar_accel.machine.speed import peak_memory_mib
from cifar_accel.models.create import build_model, forward_flops
from cifar_accel.models.finetune import fit_to_model
from cifar_accel.options.recipes import recipe_defaults
from cifar_accel.timing import Start, time_side

# Small to large, of the usual families; a ViT's patches are those of its name.
MODELS = """
    mobilenetv3_small_100 mobilenetv3_large_100 mobilenetv2_100 ghostnet_100 mobileone_s0
    tf_efficientnet_lite0 efficientnet_b0 efficientnet_b2 tf_efficientnetv2_s
    regnetx_004 regnety_016 repvgg_a0 resnet18 resnet26d resnet50 resnet101 densenet121
    convnext_atto convnext_nano convnext_tiny edgenext_x_small
    nf_resnet50 eca_nfnet_l0 dm_nfnet_f0
    deit_tiny_patch16_224 vit_tiny_patch16_224 deit_small_patch16_224 vit_small_patch32_224
    vit_base_patch32_224 vit_base_patch16_224 vit_base_patch8_224 deit3_small_patch16_224
""".split()
CLASSES = 100
# Steps are timed for so long.
SECONDS = 5.0


def measure(model: str, size: int, batch: int) -> dict[str, float]:
    """Figures of `model` at the precision of the environment."""
    args = replace(
        recipe_defaults("finetune"),
        model=model,
        run_name="none",
        warmup_epochs=0.0,
        image_size=size,
        batch_size=batch,
        pretrained=False,
    )
    origin = dict.fromkeys(vars(args), "recipe") | {"image_size": "flag"}
    args, origin = fit_to_model(args, origin)
    module = build_model(args, CLASSES, lambda line: None)
    figures = {
        "parameters": sum(p.numel() for p in module.parameters()),
        "gmac": forward_flops(module, size) / 2e9,
    }
    del module
    # Nobody writes them, so they take no memory.
    images = np.zeros((64 * batch, 3, 32, 32), np.uint8)
    split = Split(images, np.arange(len(images)) % CLASSES, [str(c) for c in range(CLASSES)])
    splits = (Dataset("black", split, split, ""), split)
    ranks = join_processes("auto")
    with tempfile.TemporaryDirectory() as folder:
        start = Start(Path(folder), ranks, StopRequest(), splits)
        speed = time_side(args, origin, start, size, SECONDS)
    return figures | {
        "step_s": speed.steps[size],
        # Of an evaluation, by image.
        "image_s": speed.evaluations[size] / len(images),
        "mib": peak_memory_mib(ranks.device),
    }


def in_a_process(model: str, precision: str, size: int, batch: int) -> dict[str, float]:
    """What `measure` gives in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.models", "--one", model]
    words += ["--size", str(size), "--batch", str(batch)]
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": precision}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def line_of(model: str, precision: str, row: dict[str, float], batch: int) -> str:
    """A line of the table. An epoch has 50,000 images and is evaluated on 10,000."""
    epoch = 50_000 / batch * row["step_s"] + 10_000 * row["image_s"]
    cells = [
        model,
        f"{row['parameters'] / 1e6:.1f}",
        f"{row['gmac']:.2f}",
        precision,
        f"{batch / row['step_s']:.1f}",
        f"{epoch / 60:.0f}",
        f"{row['mib']:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--one", help="a model to measure in this process")
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(chosen.one, chosen.size, chosen.batch)))
    else:
        print("| model | M parameters | GMAC | precision | images/s | min an epoch | MiB, fp32 |")
        print("|---|---|---|---|---|---|---|")
        for model in chosen.models or MODELS:
            fp32, bf16 = (
                in_a_process(model, precision, chosen.size, chosen.batch)
                for precision in ("no", "bf16")
            )
            faster = {"fp32": fp32, "bf16": bf16}
            precision = min(faster, key=lambda name: faster[name]["step_s"])
            row = faster[precision] | {"mib": fp32["mib"]}
            print(line_of(model, precision, row, chosen.batch), flush=True)
