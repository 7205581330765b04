"""A finished run's test accuracy at other sizes than the one it was trained at.

    python -m benchmarks.other_size RUN [--sizes 112 128 144]

The images are made, and the model computes, as in the run's own evaluation. A ViT's position
embeddings are resampled by timm.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cifar_accel.data.batches import Pipeline
from cifar_accel.data.decode import load_images
from cifar_accel.evaluate import evaluate
from cifar_accel.machine.processes import join_processes
from cifar_accel.use.load import load_run


def accuracies(folder: Path, sizes: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Pairs of the images' side in pixels and top-1 accuracy on all test images."""
    run = load_run(folder)
    split = load_images(run.options, print).test
    ranks = join_processes(run.options.device, run.options.mixed_precision, print)
    mean, std = run.options.input_mean, run.options.input_std
    for size in (run.options.input_size, *sizes):
        model = run.model()
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=size)
        options = replace(run.options, image_size=size)
        pipeline = Pipeline(options, split, ranks.device, mean, std)
        batches = pipeline.evaluation_batches(run.options.batch_size)
        figures = evaluate(ranks.accelerator, model, batches, len(split))
        yield size, figures["accuracy"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[112, 128, 144])
    args = parser.parse_args()
    for size, accuracy in accuracies(args.run, args.sizes):
        print(f"{size} px: {accuracy:.4%}", flush=True)


if __name__ == "__main__":
    main()
