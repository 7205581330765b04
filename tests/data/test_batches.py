"""The batches of both pipelines: the same on any number of processes, exact targets and labels."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import summary

from cifar_accel.data.batches import Pipeline, smooth_one_hot
from cifar_accel.data.datasets import Split
from cifar_accel.data.decode import load_dataset
from cifar_accel.data.order import Order
from cifar_accel.errors import TrainingError
from cifar_accel.options.recipes import recipe_defaults

CPU = torch.device("cpu")
MEAN = (0.5, 0.4, 0.3)
STD = (0.2, 0.25, 0.3)
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
    "sizes": replace(recipe_defaults("report"), image_size="24:0.3,32:0.6,48"),
    "timm's sizes": replace(PLAIN, image_size="24:0.3,32:0.6,48", pipeline="timm"),
    "alternating": replace(PLAIN, alternating_flip=True, reprob=0.3),
}


@pytest.fixture(scope="module")
def photos() -> Split:
    """48 images 32x32 of smooth random structure, so that resampling means something."""
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.integers(0, 256, (48, 3, 6, 6), np.uint8)).float()
    images = torch.nn.functional.interpolate(small, (32, 32), mode="bicubic").clamp(0, 255)
    return Split(images.round().byte().numpy(), np.arange(48) % 7, [str(c) for c in range(7)])


def pipeline(args, split) -> Pipeline:
    return Pipeline(args, split, CPU, MEAN, STD)


def size_of(args):
    """The images' side at a step, of a run of 10 steps; at later steps the last."""
    shares = {size: 10 * share for size, share in args.sizes}
    return lambda step: next((s for s in shares if step < shares[s]), args.input_size)


def global_batches(args, split, world=1, accumulation=1, start=0, stop=5, batch=24):
    """Images, labels and targets of each step, put together from every process."""
    parts = {step: {} for step in range(start, stop)}
    for rank in range(world):
        order = Order(args.seed, len(split), batch, world, rank, accumulation)
        stream = pipeline(args, split).training_batches(order, start, stop, size_of(args))
        for step in range(start, stop):
            for micro in range(accumulation):
                first_position = order.positions(micro)[0]
                parts[step][first_position] = next(stream)
    return [whole([parts[step][position] for position in sorted(parts[step])]) for step in parts]


def whole(batches):
    """Images, labels and targets of several batches as one."""
    images = torch.cat([b.images for b in batches])
    labels = torch.cat([b.labels for b in batches])
    return images, labels, torch.cat([b.targets for b in batches])


def assert_equal(some, others):
    """Zero tolerance."""
    for a, b in zip(some, others, strict=True):
        for mine, theirs in zip(a, b, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("world, accumulation", [(2, 1), (1, 2), (4, 1), (2, 2), (4, 3)])
def test_the_same_pixels_on_any_number_of_processes(photos, setting, world, accumulation):
    args = SETTINGS[setting]
    many = global_batches(args, photos, world, accumulation)
    assert_equal(global_batches(args, photos), many)


@pytest.mark.parametrize("setting", SETTINGS)
def test_batches_from_the_middle_are_the_rest_of_the_run(photos, setting):
    from_the_start = global_batches(SETTINGS[setting], photos, start=0, stop=9)
    from_the_middle = global_batches(SETTINGS[setting], photos, start=6, stop=9)
    assert_equal(from_the_start[6:], from_the_middle)


def test_sizes_change_pixels_and_no_draws(photos):
    args = replace(PLAIN, image_size="24:0.3,32:0.6,48", mixup=0.5)
    grown = global_batches(args, photos, stop=9)
    assert [images.shape[-1] for images, _, _ in grown] == [24] * 3 + [32] * 3 + [48] * 3
    for step, (images, labels, targets) in enumerate(grown):
        fixed = replace(args, image_size=size_of(args)(step))
        ((same_images, same_labels, same_targets),) = global_batches(
            fixed, photos, start=step, stop=step + 1
        )
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
        assert torch.equal(targets, same_targets)


def test_workers_change_nothing(photos):
    args = SETTINGS["timm"]
    assert_equal(
        global_batches(replace(args, workers=0), photos),
        global_batches(replace(args, workers=2), photos),
    )


def test_workers_end_with_the_batches(photos):
    args = replace(SETTINGS["timm"], workers=2)
    batches = pipeline(args, photos).training_batches(Order(1, 48, 24), 0, 10**9)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


def test_mixed_targets_weigh_what_is_seen(photos):
    """Each image is of one level, which tells its class: targets are shares of its pixels."""
    args = replace(PLAIN, cutmix=1.0, smoothing=0.0, crop_padding=0, hflip=0.0)
    levels = np.broadcast_to(photos.labels[:, None, None, None] * 30, photos.images.shape)
    flat = replace(photos, images=levels.astype(np.uint8))
    mixed = 0
    for images, _, targets in global_batches(args, flat, stop=4):
        for image, target in zip(images, targets, strict=True):
            seen = (image[0] * STD[0] * 255 + MEAN[0] * 255).round()
            values, counts = seen.unique(return_counts=True)
            mixed += len(values) > 1
            for value, count in zip(values, counts, strict=True):
                share = int(count) / 1024
                assert target[int(value) // 30] == pytest.approx(share, abs=1e-6)
    assert mixed > 40


def labels_in_order(split, step):
    samples = Order(PLAIN.seed, len(split), 24).samples_of(step)
    return torch.from_numpy(split.labels[samples])


def test_labels_are_the_images_own_without_mixing(photos):
    (_, labels, targets), *_ = global_batches(PLAIN, photos, start=3, stop=4)
    assert labels.tolist() == labels_in_order(photos, 3).tolist()
    assert torch.equal(targets, smooth_one_hot(labels, 7, PLAIN.smoothing))


@pytest.mark.parametrize("mixing", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_labels_are_those_of_the_larger_part_under_mixing(photos, mixing):
    args = replace(PLAIN, **mixing)
    taken_over = 0
    for step, (_, labels, targets) in enumerate(global_batches(args, photos, stop=40)):
        assert torch.equal(labels, targets.argmax(1))
        own = labels_in_order(photos, step)
        neighbours = own.view(-1, 2).flip(1).flatten()
        assert ((labels == own) | (labels == neighbours)).all()
        taken_over += (labels != own).sum().item()
    assert taken_over > 0


def test_smoothed_targets_equal_timms():
    from timm.data.mixup import one_hot

    labels = torch.tensor([0, 3, 2])
    theirs = one_hot(labels, 4, on_value=0.9 + 0.025, off_value=0.025)
    assert torch.equal(smooth_one_hot(labels, 4, 0.1), theirs)


# ---- evaluation


@pytest.mark.parametrize("height", [32, 23])
@pytest.mark.parametrize("size, crop_pct", [(32, 0.875), (32, 1.0), (48, 0.9)])
def test_test_images_equal_timms(photos, size, crop_pct, height):
    args = replace(PLAIN, image_size=size, crop_pct=crop_pct)
    photos = replace(photos, images=np.ascontiguousarray(photos.images[:, :, :height]))

    def test_images(name):
        made = Pipeline(replace(args, pipeline=name), photos, CPU, (0, 0, 0), (1, 1, 1))
        return torch.cat([batch.images for batch in made.evaluation_batches(16)]) * 255

    torch.testing.assert_close(test_images("device"), test_images("timm"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["device", "timm"])
@pytest.mark.parametrize("world", [1, 2, 3, 7, 60])
def test_every_test_image_is_evaluated_once(photos, world, name):
    args = replace(PLAIN, pipeline=name)
    split = replace(photos, labels=np.arange(48), classes=[str(i) for i in range(48)])
    batches = []
    for rank in range(world):
        batches += pipeline(args, split).evaluation_batches(5, world, rank)
    labels = torch.cat([batch.labels for batch in batches])
    assert labels[labels >= 0].tolist() == list(range(48))
    images = torch.cat([batch.images for batch in batches])[labels >= 0]
    shown = (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    assert np.array_equal(shown.round().byte().numpy(), split.images)


def test_all_ranks_evaluate_equal_batches(photos):
    shapes = set()
    for rank in range(7):
        batches = list(pipeline(PLAIN, photos).evaluation_batches(5, 7, rank))
        shapes.add((len(batches), *{batch.images.shape for batch in batches}))
    assert shapes == {(2, (4, 3, 32, 32))}


# ---- workers that fail


@pytest.fixture
def stream(photos):
    """Training batches that two workers make; the first has come."""
    args = replace(SETTINGS["timm"], workers=2, mixup=0.0)
    order = Order(args.seed, len(photos), 24)
    batches = pipeline(args, photos).training_batches(order, 0, 100)
    next(batches)
    yield batches
    batches.close()


def test_workers_that_are_killed_are_one_line(stream):
    """By the system, which has no memory left, and by a page that finds no shared memory.

    Some are in the middle of handing over a batch.
    """
    workers = multiprocessing.active_children()
    for worker, number in zip(workers, (signal.SIGKILL, signal.SIGBUS), strict=True):
        os.kill(worker.pid, number)
    with pytest.raises(TrainingError, match="^--pipeline timm: .*--workers 0$") as failure:
        for _ in stream:
            pass
    assert "\n" not in str(failure.value)


def test_a_worker_that_is_stuck_does_not_hold_up_the_end(stream):
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGSTOP)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 4
    assert not multiprocessing.active_children()


# The same command with a small /dev/shm of its own.
SMALL = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "-")


def test_workers_without_shared_memory_are_one_line(trainer):
    """As in a container, which has 64 MB of it."""
    if sys.platform != "linux" or subprocess.run([*SMALL, "true"]).returncode:
        pytest.skip("this user may not mount a tmpfs")
    done = trainer(
        *"--pipeline timm --workers 1 --image-size 128 --tracker none".split(),
        launcher=(*SMALL, sys.executable),
        check=1,
        timeout=60,
    )
    assert done.stderr.count("\n") == 1
    assert "unable to allocate shared memory" in done.stderr
    assert "--shm-size" in done.stderr and "--workers 0" in done.stderr
    assert summary(done.run)["status"] == "failed"


# ---- real images


@pytest.mark.parametrize("setting", ["report", "timm"])
def test_real_images_through_both_pipelines(cifar, cache, setting):
    train = load_dataset(cifar, cache, 32).train
    args = replace(SETTINGS[setting], workers=2, mixup=0.0)
    order = Order(1, len(train), 256)
    made = Pipeline(args, train, CPU, args.mean, args.std)
    batch = next(made.training_batches(order, 7, 8))
    assert batch.images.shape == (256, 3, 32, 32)
    assert torch.isfinite(batch.images).all()
    assert abs(batch.images.mean().item()) < 0.5
    assert batch.labels.tolist() == train.labels[order.samples_of(7)].tolist()
