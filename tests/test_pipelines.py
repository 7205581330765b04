from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_accel.data import augment
from cifar_accel.data.batches import Pipeline, smooth_one_hot
from cifar_accel.data.datasets import Split
from cifar_accel.data.decode import load_dataset
from cifar_accel.data.order import Order
from cifar_accel.options.recipes import recipe_defaults

CPU, MEAN, STD = torch.device("cpu"), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def photos() -> Split:
    """48 images 32x32 of smooth random structure, so that resampling means something."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (48, 3, 6, 6), np.uint8)
    images = torch.nn.functional.interpolate(
        torch.from_numpy(small).float(), (32, 32), mode="bicubic"
    ).clamp(0, 255)
    return Split(images.round().byte().numpy(), np.arange(48) % 7, [str(c) for c in range(7)])


def pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image.transpose(1, 2, 0))


PLAIN = replace(recipe_defaults("plain"), workers=0)
SETTINGS = {
    "plain": PLAIN,
    "everything": replace(
        PLAIN,
        scale=(0.3, 1.0),
        crop_padding=0,
        vflip=0.5,
        color_jitter=0.4,
        reprob=0.5,
        mixup=0.8,
        cutmix=1.0,
        mixup_prob=0.8,
    ),
    "larger": replace(PLAIN, image_size=48, mixup=0.2),
    "report": recipe_defaults("report"),
    "timm": replace(recipe_defaults("report"), pipeline="timm", workers=0),
    "alternating": replace(PLAIN, alternating_flip=True, reprob=0.3),
}


def draw(args, n=48, epoch=0):
    return augment.draw(args, np.full(n, epoch), np.arange(n), (32, 32))


def global_batches(args, split, world, accumulation, start=0, stop=5, batch=12):
    """Images and targets of each step, put together from every process."""
    whole = {}
    for rank in range(world):
        order = Order(args.seed, len(split), batch, world, rank, accumulation)
        stream = Pipeline(args, split, CPU, MEAN, STD).training_batches(order, start, stop)
        for step in range(start, stop):
            for micro in range(accumulation):
                whole[step, tuple(order.positions(micro))] = next(stream)
    steps = [[whole[key] for key in sorted(whole) if key[0] == step] for step in range(start, stop)]
    return [tuple(torch.cat([b[i] for b in parts]) for i in range(3)) for parts in steps]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("world, accumulation", [(2, 1), (1, 2), (4, 1), (2, 2), (4, 3)])
def test_the_same_pixels_on_any_number_of_processes(photos, setting, world, accumulation):
    """Zero tolerance."""
    one, many = (
        global_batches(SETTINGS[setting], photos, w, a) for w, a in ((1, 1), (world, accumulation))
    )
    for (x, labels, targets), (x2, labels2, targets2) in zip(one, many, strict=True):
        assert torch.equal(labels, labels2) and torch.equal(targets, targets2)
        assert torch.equal(x, x2)


@pytest.mark.parametrize("setting", SETTINGS)
def test_batches_from_the_middle_are_the_rest_of_the_run(photos, setting):
    whole, rest = (global_batches(SETTINGS[setting], photos, 1, 1, start, 9) for start in (0, 6))
    for a, b in zip(whole[6:], rest, strict=True):
        assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


def test_workers_change_nothing(photos):
    none, two = (global_batches(replace(SETTINGS["timm"], workers=n), photos, 1, 1) for n in (0, 2))
    assert all(
        torch.equal(u, v) for a, b in zip(none, two, strict=True) for u, v in zip(a, b, strict=True)
    )


def test_epochs_and_samples_are_augmented_differently(photos):
    a, b = (draw(SETTINGS["everything"], epoch=epoch) for epoch in (0, 1))
    assert len(np.unique(a.box, axis=0)) > 40 and not np.array_equal(a.box, b.box)
    assert not np.array_equal(a.hflip, b.hflip) and not np.array_equal(a.hflip, a.vflip)


def test_padded_crop_and_flips_equal_numpy(photos):
    args = replace(PLAIN, vflip=0.5)
    draws = draw(args)
    out = augment.augment(torch.from_numpy(photos.images), draws, 32, "bilinear").numpy()
    assert (
        len(set(map(tuple, draws.shift))) > 20 and draws.shift.min() == 0 and draws.shift.max() == 8
    )
    for i, image in enumerate(photos.images):
        padded = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode="reflect")
        y, x = draws.shift[i]
        expected = padded[:, y : y + 32, x : x + 32]
        expected = expected[:, :, ::-1] if draws.hflip[i] else expected
        expected = expected[:, ::-1] if draws.vflip[i] else expected
        assert np.array_equal(out[i], expected)


def test_crop_boxes_are_distributed_as_timms(photos):
    from timm.data.transforms import RandomResizedCropAndInterpolation

    ours = draw(replace(PLAIN, scale=(0.08, 1.0)), 4000).box
    theirs = np.array(
        [
            RandomResizedCropAndInterpolation.get_params(
                pil(photos.images[0]), (0.08, 1), (3 / 4, 4 / 3)
            )
            for _ in range(4000)
        ]
    )
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
        grid = np.arange(33)
        distance = (
            np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max()
            / 4000
        )
        assert distance < 1.95 * (2 / 4000) ** 0.5, (
            f"Kolmogorov-Smirnov distance {distance} in column {column}"
        )


def test_flips_alternate():
    args = replace(PLAIN, alternating_flip=True)
    first, second, third = (draw(args, 4000, epoch).hflip for epoch in range(3))
    assert (
        np.array_equal(first, ~second)
        and np.array_equal(first, third)
        and 1850 < first.sum() < 2150
    )


@pytest.mark.parametrize("size, crop_pct", [(32, 0.875), (32, 1.0), (48, 0.9)])
def test_test_images_equal_timms(photos, size, crop_pct):
    args = replace(PLAIN, image_size=size, crop_pct=crop_pct)
    ours, theirs = (
        torch.cat(
            [
                b.images
                for b in Pipeline(
                    replace(args, pipeline=p), photos, CPU, (0, 0, 0), (1, 1, 1)
                ).evaluation_batches(20)
            ]
        )
        * 255
        for p in ("device", "timm")
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 60])
def test_every_test_image_is_evaluated_once(photos, world):
    split = replace(photos, labels=np.arange(48), classes=[str(i) for i in range(48)])
    seen = [
        b.labels
        for rank in range(world)
        for b in Pipeline(PLAIN, split, CPU, MEAN, STD).evaluation_batches(5, world, rank)
    ]
    assert torch.cat(seen).tolist() == list(range(48))


def test_erasing_sets_rectangles_to_the_mean(photos):
    x = torch.ones(48, 3, 32, 32)
    augment.erase(x, 0.5, 1, np.zeros(48, np.int64), np.arange(48))
    hit = (x == 0).flatten(1).any(1)
    assert 10 < hit.sum() < 38
    for image in x[hit]:
        rows, columns = (image[0] == 0).any(1).sum(), (image[0] == 0).any(0).sum()
        assert (image[0] == 0).sum() == rows * columns
        assert 0.01 < rows * columns / 1024 < 0.4


def test_mixed_targets_weigh_what_is_seen(photos):
    args = replace(PLAIN, cutmix=1.0, smoothing=0.0, crop_padding=0, hflip=0.0)
    flat = replace(
        photos,
        images=np.broadcast_to(photos.labels[:, None, None, None] * 30, photos.images.shape).astype(
            np.uint8
        ),
    )
    for x, _, targets in global_batches(args, flat, 1, 1, 0, 4):
        for image, target in zip(x, targets, strict=True):
            values, counts = (
                (image[0] * STD[0] * 255 + MEAN[0] * 255).round().unique(return_counts=True)
            )
            for value, count in zip(values, counts, strict=True):
                assert target[int(value) // 30] == pytest.approx(int(count) / 1024, abs=1e-6)


def test_smoothed_targets_equal_timms():
    from timm.data.mixup import one_hot

    labels = torch.tensor([0, 3, 2])
    assert torch.equal(
        smooth_one_hot(labels, 4, 0.1), one_hot(labels, 4, on_value=0.9 + 0.025, off_value=0.025)
    )


def test_real_images_through_both_pipelines(cifar, cache):
    train = load_dataset(cifar, cache, 32).train
    args = replace(SETTINGS["timm"], workers=2)
    order = Order(1, len(train), 256)
    means = []
    for setting in (args, SETTINGS["report"]):
        batch = next(
            Pipeline(setting, train, CPU, args.mean, args.std).training_batches(order, 7, 8)
        )
        assert batch.images.shape == (256, 3, 32, 32) and torch.isfinite(batch.images).all()
        assert torch.equal(batch.labels, torch.from_numpy(train.labels)[order_of(order, 7)])
        means.append(batch.images.mean().item())
    assert all(abs(m) < 0.5 for m in means)


def order_of(order, step):
    from cifar_accel.data.order import permutation

    return order.global_batch(
        step, permutation(order.seed, step // order.steps_per_epoch, order.samples)
    )
