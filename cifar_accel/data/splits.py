"""Which images a run trains on, is evaluated on, and is judged by."""

from dataclasses import replace

import numpy as np

from cifar_accel.data.datasets import Dataset, Split
from cifar_accel.data.order import stratified_subset
from cifar_accel.errors import BadInput
from cifar_accel.options.options import TrainingArguments

# A data set cut as the options say, and the split that is evaluated while training.
Splits = tuple[Dataset, Split]


def cut_splits(args: TrainingArguments, dataset: Dataset, side: int) -> Splits:
    """`dataset` cut as the options say, and the split that is evaluated while training.

    `side` is the images' shorter side in pixels. Raises BadInput when it cannot be cut so.
    """
    # Limits first, so that held-out images are a share of what is left.
    train = limit(dataset.train, args.limit_train, "--limit-train", args.seed)
    test = dataset.test
    held_out = None
    if args.validation_fraction:
        train, held_out = hold_out(train, args.validation_fraction, args.seed)
    if not len(test):
        if held_out is None:
            raise BadInput(
                f"--dataset {args.dataset}: has no test images; --validation-fraction 0.2 holds "
                "out a fifth of each class, and the result is of these"
            )
        # Where nothing else is left to test on.
        test, held_out = held_out, None
    test = limit(test, args.limit_test, "--limit-test", args.seed)
    if args.crop_padding >= side:
        raise BadInput(
            f"--crop-padding {args.crop_padding}: must be smaller than the images' side of {side} "
            "pixels"
        )
    return replace(dataset, train=train, test=test), test if held_out is None else held_out


def limit(split: Split, n: int, flag: str, seed: int) -> Split:
    """A seeded stratified subset of `n` images; the whole split for 0.

    Raises BadInput, naming `flag`, when there are fewer images.
    """
    if n > len(split):
        raise BadInput(f"{flag} {n}: there are only {len(split):,} images")
    if n in (0, len(split)):
        return split
    return split.subset(stratified_subset(split.labels, n, seed))


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Cut `split` by class into a part to train on and a `fraction` to validate on.

    Raises BadInput when either would be empty.
    """
    held = stratified_subset(split.labels, round(len(split) * fraction), seed)
    kept = np.setdiff1d(np.arange(len(split)), held)
    if not len(held) or not len(kept):
        parts = f"{len(kept)} to train on and {len(held)} to validate"
        raise BadInput(f"--validation-fraction {fraction:g}: leaves {parts}")
    return split.subset(kept), split.subset(held)
