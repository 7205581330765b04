"""From encoded images to uint8 arrays: decoded once, by one process, then memory-mapped."""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cifar_accel.data.datasets import Dataset, Raw, Source, Split, find_source
from cifar_accel.errors import BadInput
from cifar_accel.files import home, sync

# Part of every cache key: raise it when the arrays' meaning changes.
CACHE_FORMAT = 1

# Images decoded ahead of the disk: a pool that maps over all of them would hold all of them.
IMAGES_IN_FLIGHT = 2048


def load_dataset(
    name: str, data_dir: str, image_size: int, say: Callable[[str], None] = print
) -> Dataset:
    """Load data set `name`, decoding it only if that was not done before.

    The first process to take the lock downloads and decodes; the others wait and then map the same
    files.

    Args:
        name: see `--dataset`.
        data_dir: folder for downloads and the decoded arrays; made when missing.
        image_size: the side that images of unequal size are brought to; those of one size stay as
            they are.
        say: called with a line before anything slow.

    Raises:
        BadInput: unknown name, missing or malformed data, no network, or a data_dir that cannot be
            written.
    """
    root = home(data_dir)
    with _disk_failures_named(data_dir):
        root.mkdir(parents=True, exist_ok=True)
        source = find_source(name, root, say)
        # The key is also the data set's fingerprint, which a resumed run compares.
        key_text = f"{CACHE_FORMAT} {source.identity()}"
        key = blake2b(key_text.encode(), digest_size=12).hexdigest()
        with FileLock(root / f"decoded-{key}.lock"):
            return _open_or_decode(source, name, root, key, image_size, say)


@contextmanager
def _disk_failures_named(data_dir: str) -> Iterator[None]:
    """Turn what the system says of a file or folder into BadInput."""
    try:
        yield
    except OSError as e:
        raise BadInput(f"--data-dir {data_dir}: {e.strerror or e}") from e


def _open_or_decode(
    source: Source, name: str, root: Path, key: str, image_size: int, say: Callable[[str], None]
) -> Dataset:
    """The data set from its decoded arrays, which are made where they are missing or damaged."""
    # Images of unequal size have a folder for each size that they were brought to.
    folder = root / f"decoded-{key}"
    resized_folder = root / f"decoded-{key}-{image_size}px"
    for made in (folder, resized_folder):
        data = _open_cache(made, name, key, say) if made.exists() else None
        if data is not None:
            return data

    # Whether all images are of one size shows only when they are decoded.
    say(f"data: decoding {name} into {folder} (once)")
    if not _decode(source, name, folder, None):
        say(f"data: the images are of unequal size; each is brought to {image_size}x{image_size}")
        folder = resized_folder
        _decode(source, name, folder, image_size)
    data = _open_cache(folder, name, key, say)
    assert data is not None, "what was just written can be read"
    return data


# ---- the decoded arrays on disk


def _open_cache(folder: Path, name: str, key: str, say: Callable[[str], None]) -> Dataset | None:
    """Map the arrays in `folder`; a damaged folder is removed, and None returned."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        classes = meta["classes"]
        train = _map_split(folder, "train", classes)
        test = _map_split(folder, "test", classes)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as e:
        say(f"data: {folder} is damaged ({e}) and is made anew")
        shutil.rmtree(folder)
        return None
    return Dataset(name, train, test, key)


def _map_split(folder: Path, split: str, classes: list[str]) -> Split:
    """Map the images of one split and read its labels. Raises ValueError where they do not fit."""
    # Copy-on-write, because torch wants writable memory; nobody writes.
    images = np.load(folder / f"{split}_images.npy", mmap_mode="c")
    labels = np.load(folder / f"{split}_labels.npy")
    if images.dtype != np.uint8 or labels.dtype != np.int64 or len(images) != len(labels):
        raise ValueError(f"the {split} images and labels do not belong together")
    return Split(images, labels, classes)


def _decode(source: Source, name: str, folder: Path, side: int | None) -> bool:
    """Write the arrays of `source` to `folder`, which appears only once it is whole.

    Without `side` the images must all be of one size, else nothing is written and False returned.
    With it, each is brought to side x side pixels.
    """
    # What a killed process may have left goes first.
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        if not _write_arrays(source, name, scratch, side):
            return False
        # Files reach the disk before the folder has its name, or a power cut could leave parts.
        for file in scratch.iterdir():
            sync(file)
        os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _write_arrays(source: Source, name: str, folder: Path, side: int | None) -> bool:
    """Write images, labels and meta.json to `folder`; False as soon as sizes turn out unequal."""
    # Images and labels. A split may lack names of the last classes, so the longer list counts.
    shape = (side, side) if side else None
    classes: list[str] = []
    labels: dict[str, NDArray[np.int64]] = {}
    for split, raw in source.read():
        if not len(raw.items):
            raise BadInput(f"--dataset {name}: the {split} split holds no image")
        if len(raw.classes) > len(classes):
            classes = raw.classes
        shape = _write_images(raw, folder / f"{split}_images.npy", shape, resizes=bool(side))
        if shape is None:
            return False
        labels[split] = np.asarray(raw.labels, np.int64)
        np.save(folder / f"{split}_labels.npy", labels[split])

    # Each label has a class.
    for split, own in labels.items():
        if own.min() < 0 or own.max() >= len(classes):
            raise BadInput(
                f"--dataset {name}: a label of the {split} split is not in 0..{len(classes) - 1}"
            )
    # Older versions wrote more keys, which are passed over.
    (folder / "meta.json").write_text(json.dumps({"name": name, "classes": classes}))
    return True


def _write_images(
    raw: Raw, path: Path, shape: tuple[int, int] | None, resizes: bool
) -> tuple[int, int] | None:
    """Decode `raw` into a .npy file uint8 [N, 3, H, W] and return (H, W).

    `shape` is the (H, W) to keep to; None: that of the first image. Images of another size are
    resized on their shorter side and cut to the centre if `resizes`, else None is returned.
    """
    if isinstance(raw.items, np.ndarray):
        np.save(path, raw.items)
        return raw.items.shape[2:]

    shape = shape or image_shape(raw, 0)
    decode = partial(_decoded, raw, shape[0] if resizes else None)
    n = len(raw.items)
    # A file on the disk that is filled as if it were an array in memory.
    out = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 3, *shape))
    # Pillow decodes without Python's lock, so threads do.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, n, IMAGES_IN_FLIGHT):
            rows = range(start, min(start + IMAGES_IN_FLIGHT, n))
            for i, image in zip(rows, pool.map(decode, rows), strict=True):
                if image.shape[:2] != shape:
                    return None
                out[i] = image.transpose(2, 0, 1)
    out.flush()
    return shape


# ---- single images


def image_shape(raw: Raw, i: int) -> tuple[int, int]:
    """(H, W) of image `i`. Raises BadInput when it is not whole."""
    if isinstance(raw.items, np.ndarray):
        return raw.items.shape[2:]
    width, height = _open_image(raw, i).size
    return height, width


def _decoded(raw: Raw, side: int | None, i: int) -> NDArray[np.uint8]:
    """Image `i` as uint8 [H, W, 3], brought to side x side pixels if there is a `side`."""
    image = _open_image(raw, i)
    if side is not None:
        image = _resize_and_cut(image, side)
    return np.asarray(image)


def _open_image(raw: Raw, i: int) -> Image.Image:
    """Image `i`, upright and in RGB. Raises BadInput when it is not whole."""
    item: Any = raw.items[i]
    # A path, or a cell of a parquet column, which may be empty.
    encoded = item if isinstance(item, Path) else io.BytesIO(item.as_py() or b"")
    try:
        with Image.open(encoded) as image:
            return _as_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise BadInput(f"--dataset: {raw.item_name(i)} is not a whole image ({e})") from e


def _as_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel, three channels."""
    if image.mode.startswith("I;16"):
        # 16-bit grey is scaled; Pillow's own conversion would clip it.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _resize_and_cut(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to `side` (bicubic, antialiased) and cut to the centre."""
    scale = side / min(image.size)
    w, h = (max(side, round(v * scale)) for v in image.size)
    left = (w - side) // 2
    top = (h - side) // 2
    resized = image.resize((w, h), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + side, top + side))
