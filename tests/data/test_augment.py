"""Crops, flips, erasing and mixing, compared with numpy, timm and torchvision."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_accel.data import augment
from cifar_accel.data.draws import draw_policy
from cifar_accel.data.order import Mixing
from cifar_accel.options.policy import read_policy
from cifar_accel.options.recipes import recipe_defaults

PLAIN = recipe_defaults("plain")


def draw(args, n=48, epoch=0) -> augment.Draws:
    return augment.draw(args, None, np.full(n, epoch), np.arange(n), (32, 32), 32)


def test_epochs_and_samples_are_augmented_differently():
    args = replace(PLAIN, scale=(0.3, 1.0), crop_padding=0, vflip=0.5)
    first = draw(args, epoch=0)
    second = draw(args, epoch=1)
    assert len(np.unique(first.box, axis=0)) > 40
    assert not np.array_equal(first.box, second.box)
    assert not np.array_equal(first.hflip, second.hflip)
    assert not np.array_equal(first.hflip, first.vflip)


def test_padded_crop_and_flips_equal_numpy():
    draws = draw(replace(PLAIN, vflip=0.5))
    assert len(np.unique(draws.shift, axis=0)) > 20
    assert draws.shift.min() == -4
    assert draws.shift.max() == 4
    images = np.random.default_rng(0).integers(0, 256, (48, 3, 32, 32), np.uint8)
    out = augment.augment(torch.from_numpy(images), draws, 32, "bilinear").numpy()
    for i, image in enumerate(images):
        padded = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode="reflect")
        y, x = draws.shift[i] + 4
        expected = padded[:, y : y + 32, x : x + 32]
        if draws.hflip[i]:
            expected = expected[:, :, ::-1]
        if draws.vflip[i]:
            expected = expected[:, ::-1]
        assert np.array_equal(out[i], expected)


def test_crop_boxes_are_distributed_as_timms():
    from timm.data.transforms import RandomResizedCropAndInterpolation as TimmsCrop

    n = 4000
    ours = draw(replace(PLAIN, scale=(0.08, 1.0)), n).box
    image = Image.new("RGB", (32, 32))
    theirs = [TimmsCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(n)]
    # Kolmogorov-Smirnov for each of y0, x0, height and width.
    grid = np.arange(33)
    for a, b in zip(np.sort(ours, 0).T, np.sort(theirs, 0).T, strict=True):
        difference = np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")
        assert np.abs(difference).max() / n < 1.95 * (2 / n) ** 0.5


def test_operations_are_of_the_size_that_images_become():
    """Crop and resizing come before them: images are moved by shares of what they are then."""
    policy = read_policy("rand-m9-n3-mstd0.5")
    epoch, index = np.zeros(200, np.int64), np.arange(200)
    program = augment.draw(PLAIN, policy, epoch, index, (32, 32), 48).program
    expected = draw_policy(policy, PLAIN.seed, epoch, index, (48, 48))
    assert np.array_equal(program.arguments, expected.arguments)
    other = draw_policy(policy, PLAIN.seed, epoch, index, (32, 32))
    assert not np.array_equal(program.arguments, other.arguments)


def test_a_box_that_never_fits_is_the_largest_in_the_centre():
    """In an image 32 wide and 8 high, a box of aspect 0.5 cannot hold 90 % of the area."""
    args = replace(PLAIN, scale=(0.9, 1.0), ratio=(0.3, 0.5), crop_padding=0)
    box = augment.draw(args, None, np.zeros(5, np.int64), np.arange(5), (8, 32), 32).box
    assert box.tolist() == [[0, 14, 8, 4]] * 5


def test_flips_alternate():
    args = replace(PLAIN, alternating_flip=True)
    first, second, third = (draw(args, 4000, epoch).hflip for epoch in range(3))
    assert 1850 < first.sum() < 2150
    assert np.array_equal(first, ~second)
    assert np.array_equal(first, third)


def test_erasing_sets_rectangles_to_the_mean():
    x = torch.ones(48, 3, 32, 32)
    augment.erase(x, 0.5, 1, 0, np.arange(48))
    erased = (x == 0).flatten(1).any(1)
    assert 10 < erased.sum() < 38
    for image in x[erased]:
        hit = image[0] == 0
        area = hit.any(1).sum() * hit.any(0).sum()
        assert hit.sum() == area
        assert 0.01 < area / 1024 < 0.4
        assert torch.equal(image[1], image[0])


def test_images_are_mixed_with_their_neighbours():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    mixed, kept = augment.mix(images, Mixing(0.75))
    assert kept == 0.75
    assert mixed[:, 0, 0, 0].tolist() == [0.25, 0.75, 2.25, 2.75]


def test_an_odd_batch_cannot_be_mixed():
    with pytest.raises(AssertionError):
        augment.mix(torch.zeros(3, 3, 8, 8), Mixing(0.75))


@pytest.mark.parametrize(
    "lam, y, x", [(0.3, 5, 30), (0.9, 0, 0), (0.5, 16, 16), (0.01, 31, 2), (0.999, 3, 3)]
)
def test_mixing_boxes_are_timms(lam, y, x, monkeypatch):
    """CutMix's square for the same share and centre."""
    from timm.data.mixup import cutmix_bbox_and_lam

    centre = iter([y, x])
    monkeypatch.setattr(np.random, "randint", lambda *unused, size=None: next(centre))
    (y0, y1, x0, x1), theirs = cutmix_bbox_and_lam((1, 3, 32, 32), lam)
    expected = torch.zeros(3, 32, 32)
    expected[:, y0:y1, x0:x1] = 1

    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
    mixed, kept = augment.mix(images, Mixing(lam, (y / 32, x / 32)))
    assert kept == pytest.approx(theirs)
    assert torch.equal(mixed[0], expected)
    assert torch.equal(mixed[1], 1 - expected)
