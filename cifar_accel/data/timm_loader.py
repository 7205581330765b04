"""Pixels made by timm's transforms in worker processes: the other way to make them."""

import multiprocessing
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cifar_accel.data.order import MicroBatch, random_bits
from cifar_accel.errors import BadInput, TrainingError
from cifar_accel.options.options import TrainingArguments

# What one item of the loader is asked for: a MicroBatch, or the samples of an evaluation batch.
Request = TypeVar("Request")

# How torch and the system say that a worker is gone, or that batches find no shared memory.
WORKERS_FAIL = ("exited unexpectedly", "shared memory", "No space left on device")
# How long workers may take to end, in seconds. One that is stuck would take the loader ten.
SECONDS_TO_END = 1.0


class TimmImages:
    """A source of pixels (see `batches.PixelSource`) with `--workers` processes that make them."""

    def __init__(
        self,
        args: TrainingArguments,
        images: NDArray[np.uint8],
        device: torch.device,
        mean: tuple[float, ...],
    ):
        self.args = args
        self.images = images
        self.device = device
        # From a Pillow image to uint8 [3, S, S]; of training one for each size.
        self.training_transforms = {
            size: _training_transform(args, mean, size) for size, _ in args.sizes
        }
        self.evaluation_transform = _transform(args, mean, args.input_size, is_training=False)

    def training(
        self, micro_batches: Iterator[MicroBatch]
    ) -> Iterator[tuple[MicroBatch, torch.Tensor]]:
        """Each micro-batch with its augmented pixels: uint8 [n, 3, S, S]."""
        return self._in_workers(self._augmented, micro_batches)

    def evaluation(self, batches: Iterable[NDArray[np.int64]]) -> Iterator[torch.Tensor]:
        """Pixels of each batch of samples: uint8 [n, 3, S, S]."""
        for _, pixels in self._in_workers(self._centred, batches):
            yield pixels

    def _in_workers(
        self, make_pixels: Callable[[Request], torch.Tensor], requests: Iterable[Request]
    ) -> Iterator[tuple[Request, torch.Tensor]]:
        """(request, its pixels) for each of `requests`, in order; they are read ahead of time."""
        loader: Iterable[Any] = torch.utils.data.DataLoader(
            _Items(make_pixels),
            # Any iterable of indices will do. An index of ours is a whole batch, so the loader puts
            # nothing together.
            sampler=requests,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.args.workers or 0,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_signals,
            # Its own generator, so that it draws nothing from the global one.
            generator=torch.Generator(),
        )
        others = multiprocessing.active_children()
        with _told_in_one_line():
            batches = iter(loader)
            workers = [child for child in multiprocessing.active_children() if child not in others]
            if workers:
                # Torch's handler would raise for a dead worker wherever the process is by then.
                # Without it the loader finds out when it waits for the worker's batch.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                yield from batches
            finally:
                killer = threading.Timer(SECONDS_TO_END, _kill, [workers])
                killer.daemon = True
                killer.start()

    def _augmented(self, micro_batch: MicroBatch) -> torch.Tensor:
        samples = micro_batch.samples
        transform = self.training_transforms[micro_batch.size]
        bits = random_bits(self.args.seed, "sample_seed", micro_batch.epoch, samples)
        made = []
        for index, seed in zip(samples, bits.tolist(), strict=True):
            # timm draws from all three generators. They are seeded anew for each image, so neither
            # the worker nor the images before it play a part.
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
            torch.default_generator.manual_seed(seed >> 1)
            made.append(transform(self._pillow_image(index)))
        return torch.stack(made)

    def _centred(self, samples: NDArray[np.int64]) -> torch.Tensor:
        return torch.stack([self.evaluation_transform(self._pillow_image(i)) for i in samples])

    def _pillow_image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index].transpose(1, 2, 0))


class _Items(torch.utils.data.Dataset[Any]):
    """What the loader's workers hold: an index is a request, its item (request, pixels)."""

    def __init__(self, make_pixels: Callable[[Any], torch.Tensor]):
        self.make_pixels = make_pixels

    def __getitem__(self, request: Any) -> tuple[Any, torch.Tensor]:
        pixels = self.make_pixels(request)
        if torch.utils.data.get_worker_info() is not None:
            # As the loader would do it, but in a thread of its own, where a failure is lost and the
            # batch awaited for ever.
            pixels.share_memory_()
        return request, pixels


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Around a loader: workers that are gone or find no room are a TrainingError."""
    try:
        yield
    except (OSError, RuntimeError, EOFError) as e:
        # What a worker raised comes with its traceback. One that dies may do so in mid-sentence.
        text = str(e).strip().rpartition("\n")[2] or "a worker is gone"
        is_gone = isinstance(e, EOFError | ConnectionError)
        if not is_gone and not any(words in text for words in WORKERS_FAIL):
            raise
        raise TrainingError(
            f"--pipeline timm: {text}; workers need memory and shared memory (docker run "
            "--shm-size): give them more, or --workers 0"
        ) from e


def _kill(workers: list[Any]) -> None:
    """End what is left of a loader's workers, were they stopped or waiting for a dead disk."""
    for worker in workers:
        worker.kill()


def _unchanged(item: Any) -> Any:
    """In place of the loader's own conversion, which would make tensors of a request's numbers."""
    return item


def _ignore_signals(worker: int) -> None:
    """Let workers live until the training process dismisses them.

    A signal may reach the whole process group, but the training process ends in its own time.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


# ---- the transforms


def _training_transform(args: TrainingArguments, mean: tuple[float, ...], size: int) -> Any:
    """timm's training transform as the options say. Raises BadInput for a policy it cannot read."""
    _mend_posterize()
    # timm's reader of policies asserts, indexes and converts: each may fail on what the user wrote.
    try:
        transform = _transform(
            args,
            mean,
            size,
            is_training=True,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            auto_augment=None if args.aa == "none" else args.aa,
            color_jitter=args.color_jitter or None,
        )
    except (AssertionError, ValueError, KeyError, TypeError) as e:
        raise BadInput(f"--aa {args.aa}: timm cannot read this policy ({e!r})") from e
    if args.scale is None:
        # timm always crops and resizes at first: put our own crop in its place.
        transform.transforms[0] = _PillowCrop(args.crop_padding, size, args.interpolation)
    return transform


def _transform(
    args: TrainingArguments,
    mean: tuple[float, ...],
    size: int,
    is_training: bool,
    **augmentation: Any,
) -> Any:
    """timm's transform from a Pillow image to uint8 [3, S, S]."""
    from timm.data import create_transform

    return create_transform(
        size,
        is_training=is_training,
        # Leaves the image uint8: `Pipeline` normalises.
        use_prefetcher=True,
        interpolation=args.interpolation,
        # The colour that appears outside a moved image.
        mean=mean,
        crop_pct=args.crop_pct,
        **augmentation,
    )


def _mend_posterize() -> None:
    """Put our `_posterize` in the place of timm's."""
    from timm.data import auto_augment

    for name, operation in auto_augment.NAME_TO_OP.items():
        if operation is auto_augment.posterize:
            auto_augment.NAME_TO_OP[name] = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **unused: Any) -> Image.Image:
    """timm's posterize, also for the 0 bits that its policies ask for and Pillow 13 refuses."""
    # The highest bits are kept, the others cleared; the table holds one entry a level and channel.
    bits = min(max(bits_to_keep, 0), 8)
    mask = 256 - 2 ** (8 - bits)
    table = [value & mask for value in range(256)]
    return image.point(table * len(image.getbands()))


class _PillowCrop:
    """torchvision's random crop of an image padded by reflection, resized to the model's input."""

    def __init__(self, padding: int, size: int, interpolation: str):
        self.padding = padding
        self.size = (size, size)
        self.resample = Image.Resampling[interpolation.upper()]

    def __call__(self, image: Image.Image) -> Image.Image:
        from torchvision.transforms import RandomCrop

        if self.padding:
            # torchvision takes (height, width).
            height_and_width = image.size[::-1]
            crop = RandomCrop(height_and_width, padding=self.padding, padding_mode="reflect")
            image = crop(image)
        if image.size != self.size:
            image = image.resize(self.size, self.resample)
        return image
