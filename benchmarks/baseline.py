"""Epochs of the report's own loop and loader, or of ours, each in a process of its own.

    python -m benchmarks.baseline report|ours MODEL DATASET
                                  [--train N] [--test N] [--device D] [--precision P]

The report's side: timm's create_loader with PIL workers, timm's Mixup and loss, AdamW with amsgrad,
fp32, `.item()` every step, evaluation through a second loader. Ours: the project's own functions
under the report's recipe. An epoch is `N` training images in batches of 256 and the evaluation of
the test images; each process runs one before it is measured.

`benchmarks.all` asks for epochs: every line on stdin asks for one and is answered by one line of
JSON, {"seconds", "peak_mib"}.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace

import timm
import torch
from timm.loss import SoftTargetCrossEntropy

from benchmarks.measure import images, our_run, serve
from benchmarks.pipeline import Pictures
from cifar_accel import train
from cifar_accel.data.datasets import Dataset
from cifar_accel.data.splits import limit
from cifar_accel.machine.speed import peak_memory_mib
from cifar_accel.options.options import IMAGENET_MEAN, IMAGENET_STD
from cifar_accel.options.recipes import recipe_defaults
from cifar_accel.records.meters import Clock

# Of the report's recipe, as of ours.
BATCH = 256
# timm's names of the report's two models.
NAMES = {"nfnet": "dm_nfnet_f0", "vit": "vit_base_patch8_224"}


def reports_epoch(
    model_name: str, data: Dataset, device: torch.device, workers: int
) -> Callable[[], None]:
    """The report's loop."""
    # timm's loaders, with its prefetcher where there is CUDA.
    on_gpu = device.type == "cuda"
    common = {
        "input_size": (3, 32, 32),
        "batch_size": BATCH,
        "num_workers": workers,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "pin_memory": on_gpu,
        "device": device,
        "use_prefetcher": on_gpu,
        "persistent_workers": workers > 0,
    }
    training = timm.data.create_loader(
        Pictures(data.train),
        is_training=True,
        vflip=0.5,
        hflip=0.5,
        color_jitter=0.0,
        auto_augment="rand-m15-n2",
        interpolation="bilinear",
        **common,
    )
    testing = timm.data.create_loader(
        Pictures(data.test), is_training=False, crop_pct=0.875, **common
    )

    # Mixing, model, optimizer and loss.
    classes = len(data.train.classes)
    mixing = timm.data.Mixup(0.8, prob=0.7, label_smoothing=0.1, num_classes=classes)
    size = {"img_size": 32} if "vit" in model_name else {}
    name = NAMES.get(model_name, model_name)
    model = timm.create_model(name, num_classes=classes, **size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, weight_decay=1e-2, amsgrad=True)
    criterion = SoftTargetCrossEntropy()

    def epoch() -> None:
        model.train()
        for x, y in training:
            x, y = mixing(x.to(device), y.to(device))
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            # The host waits here in every step.
            loss.item()
        model.eval()
        correct = 0
        with torch.no_grad():
            for x, y in testing:
                correct += (model(x.to(device)).argmax(1) == y.to(device)).sum().item()

    return epoch


def our_epoch(
    model_name: str, data: Dataset, device: torch.device, precision: str
) -> Callable[[], None]:
    """Our loop, by its own parts: take_step and evaluate_split."""
    # Precision is the launcher's, which tells by the environment.
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    args = replace(
        recipe_defaults("report"),
        model=model_name,
        pretrained=False,
        device=device.type,
        warmup_epochs=5.0,
    )
    run, state = our_run(args, data)
    micro_batches = run.data.train.training_batches(run.plan.order, 0, run.plan.total_steps)
    clock = Clock(state)

    def epoch() -> None:
        run.model.module.train()
        for _ in range(run.plan.steps_per_epoch):
            train.take_step(run, state.step, micro_batches, clock)
            state.step += 1
        # The host waits here.
        train.collect(run, state)
        train.evaluate_split(run, run.data.evaluation, "the evaluation")

    return epoch


def main() -> None:
    """Serve epochs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("side", choices=["report", "ours"])
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--data-dir", default="~/.cache/cifar_accel")
    parser.add_argument("--train", type=int, default=0)
    parser.add_argument("--test", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="no", help="of our side; the report's is fp32")
    workers = min(8, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=workers, help="of the report's side")
    given = parser.parse_args()

    device = torch.device(given.device)
    data = images(given.dataset, given.data_dir)
    data = replace(
        data, train=limit(data.train, given.train, "", 0), test=limit(data.test, given.test, "", 0)
    )
    if given.side == "report":
        epoch = reports_epoch(given.model, data, device, given.workers)
    else:
        epoch = our_epoch(given.model, data, device, given.precision)

    def measure() -> dict[str, float]:
        began = time.perf_counter()
        epoch()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - began, "peak_mib": peak_memory_mib(device)}

    # The first epoch is not measured.
    measure()
    serve(measure)


if __name__ == "__main__":
    main()
