"""Which images are trained on, held out, and tested on."""

import numpy as np
import pytest
from conftest import image_folder, parquet_folder

from cifar_accel.data.decode import load_dataset
from cifar_accel.data.splits import cut_splits, hold_out, limit
from cifar_accel.errors import BadInput
from cifar_accel.options.options import TrainingArguments


def test_limits(cache):
    train = load_dataset("digits", cache, 32).train
    small = limit(train, 100, "--limit-train", 1)
    assert len(small) == 100
    assert np.bincount(small.labels).min() >= 9
    assert limit(train, 0, "--limit-train", 1) is train
    with pytest.raises(BadInput, match="--limit-train 1439: there are only 1,438 images"):
        limit(train, 1439, "--limit-train", 1)


def test_held_out_images_are_not_trained_on(cache):
    train = load_dataset("digits", cache, 32).train
    numbered = np.arange(len(train))
    train = train.subset(numbered)
    train.images[:, 0, 0, 0] = numbered % 256
    train.images[:, 0, 0, 1] = numbered // 256
    kept, held = hold_out(train, 0.2, 1)
    assert np.bincount(held.labels).min() >= 27
    both = np.concatenate([kept.images, held.images])[:, 0, 0, :2].astype(int)
    assert sorted(both[:, 0] + 256 * both[:, 1]) == numbered.tolist()


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_neither_part_may_be_empty(cache, fraction):
    with pytest.raises(BadInput, match="--validation-fraction"):
        hold_out(load_dataset("digits", cache, 32).train, fraction, 1)


# ---- data sets without test images


def folder_of_classes(root):
    """CLASS/*.png alone."""
    return image_folder(root / "all", splits=("train",)) / "train"


def training_folder(root):
    """train/CLASS/*.png alone."""
    return image_folder(root, splits=("train",))


def training_files(root):
    """train-*.parquet alone."""
    (parquet_folder(root) / "test-00000-of-00001.parquet").unlink()
    return root


@pytest.mark.parametrize("make", [folder_of_classes, training_folder, training_files])
def test_without_test_images_those_held_out_are_the_test(tmp_path, make):
    folder = str(make(tmp_path / "data"))
    whole = load_dataset(folder, str(tmp_path / "cache"), 32)
    assert len(whole.train) in (6, 12) and not len(whole.test)
    again = load_dataset(folder, str(tmp_path / "cache"), 32, lambda line: pytest.fail(line))
    assert not len(again.test)

    args = TrainingArguments(dataset=folder, validation_fraction=1 / 3)
    cut, evaluated = cut_splits(args, whole, 32)
    assert cut.test is evaluated
    classes = len(whole.train.classes)
    assert np.bincount(cut.test.labels).tolist() == [len(whole.train) // classes // 3] * classes
    assert len(cut.train) + len(cut.test) == len(whole.train)
    seen = {image.tobytes() for image in cut.train.images}
    assert not seen & {image.tobytes() for image in cut.test.images}


def test_without_test_images_some_must_be_held_out(tmp_path):
    folder = str(folder_of_classes(tmp_path))
    whole = load_dataset(folder, str(tmp_path / "cache"), 32)
    with pytest.raises(BadInput, match="has no test images; --validation-fraction 0.2 holds out"):
        cut_splits(TrainingArguments(dataset=folder), whole, 32)


def test_limit_test_limits_what_is_tested_on(tmp_path):
    folder = str(folder_of_classes(tmp_path))
    whole = load_dataset(folder, str(tmp_path / "cache"), 32)
    args = TrainingArguments(dataset=folder, validation_fraction=2 / 3, limit_test=2)
    cut, evaluated = cut_splits(args, whole, 32)
    assert len(cut.test) == 2 and cut.test is evaluated
