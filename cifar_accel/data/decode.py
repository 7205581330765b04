"""From encoded images to uint8 arrays: decoded once, by one process, and memory-mapped ever after."""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

CACHE_FORMAT = 1  # part of every cache key: raise it when the arrays' meaning changes


def load_dataset(
    name: str, data_dir: str, image_size: int, say: Callable[[str], None] = print
) -> Dataset:
    """Load data set `name`, decoding it only if that was not done before.

    The first process to take the lock downloads and decodes; the others wait and then map the same files.

    Args:
        name: see `--dataset`.
        data_dir: folder for downloads and the decoded arrays; made when missing.
        image_size: the side that images of unequal size are brought to (images of one size stay as they are).
        say: called with a line before anything slow.

    Raises:
        BadInput: unknown name, missing or malformed data, no network, or a data_dir that cannot be written.
    """
    root = home(data_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        source = find_source(name, root, say)
        key = blake2b(f"{CACHE_FORMAT} {source.identity()}".encode(), digest_size=12).hexdigest()
        folders = (
            root / f"decoded-{key}",
            root / f"decoded-{key}-{image_size}px",
        )  # the second: of unequal sizes
        with FileLock(root / f"decoded-{key}.lock"):
            data = next(
                (d for d in (_open_cache(f, name, key, say) for f in folders if f.exists()) if d),
                None,
            )
            if data is None:
                say(f"data: decoding {name} into {folders[0]} (once)")
                try:
                    folder = _decode(source, name, folders[0], None)
                except _UnequalSizes:
                    say(
                        f"data: the images are of unequal size; each is brought to {image_size}x{image_size}"
                    )
                    folder = _decode(source, name, folders[1], image_size)
                data = _open_cache(folder, name, key, say)
                assert data is not None, "what was just written can be read"
    except OSError as e:
        raise BadInput(f"--data-dir {data_dir}: {e.strerror or e}") from e
    return data


def _open_cache(folder: Path, name: str, key: str, say: Callable[[str], None]) -> Dataset | None:
    """Map the arrays in `folder`; a damaged folder is removed, and None returned."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return Dataset(
            name, _map_split(folder, "train", meta), _map_split(folder, "test", meta), key
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError) as e:
        say(f"data: {folder} is damaged ({e}) and is made anew")
        shutil.rmtree(folder)
        return None


def _map_split(folder: Path, split: str, meta: dict[str, Any]) -> Split:
    def array(kind: str) -> Any:  # copy-on-write: torch wants writable memory, and nobody writes
        return np.load(folder / f"{split}_{kind}.npy", mmap_mode="c")

    coarse = np.array(array("coarse")) if meta["coarse_classes"] else None
    images, labels = array("images"), np.array(array("labels"))
    if images.dtype != np.uint8 or labels.dtype != np.int64 or len(images) != len(labels):
        raise BadInput(f"the {split} images and labels do not belong together")
    return Split(images, labels, meta["classes"], coarse, meta["coarse_classes"])


class _UnequalSizes(Exception):
    """The images of a data set are not all of one size."""


def _decode(source: Source, name: str, folder: Path, side: int | None) -> Path:
    """Write the arrays of `source` to `folder`, which appears only once it is whole; returns it.

    Without `side` the images must all be of one size (raises _UnequalSizes), else each is brought to side x side.
    """
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        shape = (side, side) if side else None
        classes: list[str] = []
        coarse_classes: list[str] = []
        for split, raw in source.read():
            if not len(raw.items):
                raise BadInput(f"--dataset {name}: the {split} split holds no image")
            classes, coarse_classes = max(classes, raw.classes, key=len), raw.coarse_classes
            shape = _write_images(raw, scratch / f"{split}_images.npy", shape, resize=bool(side))
            np.save(scratch / f"{split}_labels.npy", np.asarray(raw.labels, np.int64))
            if raw.coarse_labels is not None:
                np.save(scratch / f"{split}_coarse.npy", np.asarray(raw.coarse_labels, np.int64))
        for split in ("train", "test"):
            labels = np.load(scratch / f"{split}_labels.npy")
            if labels.min() < 0 or labels.max() >= len(classes):
                raise BadInput(
                    f"--dataset {name}: a label of the {split} split is not in 0..{len(classes) - 1}"
                )
        meta = {"name": name, "classes": classes, "coarse_classes": coarse_classes}
        (scratch / "meta.json").write_text(json.dumps(meta))
        for file in scratch.iterdir():
            sync(file)
        os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _write_images(
    raw: Raw, path: Path, shape: tuple[int, int] | None, resize: bool
) -> tuple[int, int]:
    """Decode `raw` into a .npy file uint8 [N, 3, H, W], a chunk at a time; returns (H, W).

    `shape` is the (H, W) to keep to, that of the first image when None. Images of another size are resized on their
    shorter side and cut to the centre if `resize`, else _UnequalSizes is raised.
    """
    if isinstance(raw.items, np.ndarray):
        np.save(path, raw.items)
        return raw.items.shape[2:]

    def pixels(i: int) -> NDArray[np.uint8]:
        rgb = _open_image(raw, i)
        return np.asarray(_fit(rgb, side[0]) if resize else rgb)

    side = shape or image_shape(raw, 0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        out = np.lib.format.open_memmap(path, "w+", np.uint8, (len(raw.items), 3, *side))
        for i, image in enumerate(_in_chunks(pool, pixels, len(raw.items))):
            if image.shape[:2] != side:
                raise _UnequalSizes
            out[i] = image.transpose(2, 0, 1)
        out.flush()
    return side


def image_shape(raw: Raw, i: int) -> tuple[int, int]:
    """(H, W) of image `i`. Raises BadInput when it is not whole."""
    if isinstance(raw.items, np.ndarray):
        return raw.items.shape[2:]
    width, height = _open_image(raw, i).size
    return height, width


def _open_image(raw: Raw, i: int) -> Image.Image:
    item = raw.items[i]
    encoded = item if isinstance(item, Path) else io.BytesIO(item.as_py() or b"")
    try:
        with Image.open(encoded) as image:
            return _as_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise BadInput(f"--dataset: {raw.names(i)} is not a whole image ({e})") from e


def _in_chunks(
    pool: ThreadPoolExecutor, f: Callable[[int], Any], n: int, chunk: int = 2048
) -> Iterator[Any]:
    for start in range(0, n, chunk):  # pool.map alone would hold every decoded image at once
        yield from pool.map(f, range(start, min(start + chunk, n)))


def _as_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel, three channels; 16-bit grey is scaled, which PIL's own conversion would clip."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to `side` (bicubic, antialiased) and cut to the centre."""
    scale = side / min(image.size)
    w, h = (max(side, round(v * scale)) for v in image.size)
    left, top = (w - side) // 2, (h - side) // 2
    return image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
