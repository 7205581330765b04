"""From encoded images to uint8 arrays: decoded once, by one process, then memory-mapped."""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cifar_accel.data.datasets import Dataset, Raw, Source, Split, find_source
from cifar_accel.errors import BadInput
from cifar_accel.files import home, sha256, sync

# Part of the name of the arrays' folder: raise it when their meaning or their files change.
CACHE_VERSION = 2

# What comes of reading a folder of arrays that is not whole.
NOT_WHOLE = (OSError, ValueError, KeyError, TypeError, EOFError)

# Images decoded ahead of the disk: a pool that maps over all of them would hold all of them.
IMAGES_IN_FLIGHT = 2048


def load_dataset(
    name: str, data_dir: str, image_size: int, say: Callable[[str], None] = print
) -> Dataset:
    """Load data set `name`, decoding it only if that was not done before.

    The first process to take the lock downloads and decodes; the others wait and then map the same
    files. Where the arrays are whole already nothing is locked and nothing written.

    Images of unequal size are brought to the side `image_size`; those of one size stay as they are.
    `data_dir` is made when missing, and `say` called with a line before anything slow. Raises
    BadInput: unknown name, missing or malformed data, no network, a data_dir that is not writable.
    """
    root = home(data_dir)
    with system_failures_named(f"--data-dir {data_dir}"):
        root.mkdir(parents=True, exist_ok=True)
    with system_failures_named(f"--dataset {name}"):
        source = find_source(name, root, say)
        fingerprint = _fingerprint(source)

    # Images of unequal size have a folder for each size that they were brought to.
    folder = root / f"decoded-v{CACHE_VERSION}-{fingerprint}"
    resized = folder.with_name(f"{folder.name}-{image_size}px")
    with system_failures_named(f"--data-dir {data_dir}"):
        # Another user's folder, or one that may only be read, will do if it is whole.
        splits = _open_first(folder, resized, say)
        if not splits:
            with _locked(root / f"{folder.name}.lock", say):
                # Another process may have made them meanwhile.
                splits = _open_first(folder, resized, lambda line: None)
                splits = splits or _open(_made(source, name, folder, resized, image_size, say))
    return Dataset(name, *splits, fingerprint)


def _fingerprint(source: Source) -> str:
    # Resumed runs compare it, older ones too: what is hashed never changes.
    return blake2b(f"1 {source.identity()}".encode(), digest_size=12).hexdigest()


@contextmanager
def system_failures_named(option: str) -> Iterator[None]:
    """Turn what the system says of a file or folder into BadInput, which names `option`."""
    try:
        yield
    except OSError as e:
        file = f" ({e.filename})" if e.filename else ""
        raise BadInput(f"{option}: {e.strerror or e}{file}") from e


@contextmanager
def _locked(file: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock `file`; a line says that another process has it."""
    lock = FileLock(file)
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        say(f"data: waiting for another process that decodes it; if there is none, remove {file}")
        held = lock.acquire()
    with held:
        try:
            yield
        finally:
            # A file that stays keeps out other users, and a system without locks waits for it.
            with suppress(OSError):
                file.unlink()


# ---- the decoded arrays on disk


def _open_first(
    folder: Path, resized: Path, say: Callable[[str], None]
) -> tuple[Split, Split] | None:
    """Training and test split from the first of the folders that is there and whole."""
    for made in filter(Path.exists, (folder, resized)):
        try:
            return _open(made)
        except NOT_WHOLE as error:
            say(f"data: {made} is damaged ({error}) and is made anew")
    return None


def _open(folder: Path) -> tuple[Split, Split]:
    """Map the arrays in `folder`. Raises what is in NOT_WHOLE if they are not what was written."""
    digests = json.loads((folder / "meta.json").read_text())["sha256"]
    for name, digest in digests.items():
        if sha256(folder / name) != digest:
            raise ValueError(f"{name} is not what was written")
    classes = json.loads((folder / "classes.json").read_text())

    def split(name: str) -> Split:
        # Copy-on-write, because torch wants writable memory; nobody writes.
        images = np.load(folder / f"{name}_images.npy", mmap_mode="c")
        return Split(images, np.load(folder / f"{name}_labels.npy"), classes)

    return split("train"), split("test")


def _made(
    source: Source, name: str, folder: Path, resized: Path, side: int, say: Callable[[str], None]
) -> Path:
    """Decode `source` into one of the folders, and return it; only then do unequal sizes show."""
    say(f"data: decoding {name} into {folder} (once)")
    if _decode(source, name, folder, None):
        return folder
    say(f"data: the images are of unequal size; each is brought to {side}x{side}")
    _decode(source, name, resized, side)
    return resized


def _decode(source: Source, name: str, folder: Path, side: int | None) -> bool:
    """Write the arrays of `source` to `folder`, which appears only once it is whole.

    Without `side` the images must all be of one size, else nothing is written and False returned.
    With it, each is brought to side x side pixels.
    """
    # What is damaged, or a killed process may have left, goes first.
    scratch = folder.with_name(folder.name + ".tmp")
    for left in (folder, scratch):
        shutil.rmtree(left, ignore_errors=True)
    scratch.mkdir()
    try:
        if not _write_arrays(source, name, scratch, side):
            return False
        # They would stand for files that are not there any more, or were never all there at once.
        if _fingerprint(source) not in folder.name:
            raise BadInput(f"--dataset {name}: its files changed while they were read; start again")
        # Files reach the disk before the folder has its name, or a power cut could leave parts.
        for file in scratch.iterdir():
            sync(file)
        os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _write_arrays(source: Source, name: str, folder: Path, side: int | None) -> bool:
    """Write arrays, classes and meta.json to `folder`; False as soon as sizes turn out unequal."""
    # Images and labels. All damaged images are found before the data set is refused.
    shape = None
    damaged: dict[str, str] = {}
    for split, raw in source.read():
        shape = _write_images(raw, folder / f"{split}_images.npy", shape, side, damaged)
        if shape is None:
            return False
        # By way of memory: of a full disk np.save says only how much it wrote.
        labels = io.BytesIO()
        np.save(labels, raw.labels)
        (folder / f"{split}_labels.npy").write_bytes(labels.getvalue())
    _refuse(damaged)

    # Every split has the same classes.
    (folder / "classes.json").write_text(json.dumps(raw.classes))
    digests = {file.name: sha256(file) for file in folder.iterdir()}
    (folder / "meta.json").write_text(json.dumps({"name": name, "sha256": digests}))
    return True


def _write_images(
    raw: Raw, path: Path, shape: tuple[int, ...] | None, side: int | None, damaged: dict[str, str]
) -> tuple[int, ...] | None:
    """Decode `raw` into a .npy file uint8 [N, 3, H, W] and return [3, H, W]; None if they differ.

    `shape` is the [3, H, W] to keep to; None: that of the first whole image. What is wrong with
    images that are not whole goes to `damaged`, by their names.
    """
    # Written, not mapped: where a disk is full, writing to a map ends the process.
    with open(path, "wb") as file:
        for i, image in enumerate(_decoded_images(raw, side)):
            if isinstance(image, str):
                damaged[raw.item_name(i)] = image
                continue
            shape = shape or image.shape
            if image.shape != shape:
                return None
            if not file.tell():
                head = {"descr": "|u1", "fortran_order": False, "shape": (len(raw.items), *shape)}
                np.lib.format.write_array_header_1_0(file, head)
            file.write(image.tobytes())
    if shape is None:
        _refuse(damaged)
    return shape


def _decoded_images(raw: Raw, side: int | None) -> Iterator[NDArray[np.uint8] | str]:
    """What `_decoded` gives for each image of `raw`, in their order."""
    if isinstance(raw.items, np.ndarray):
        yield from raw.items
        return
    # Pillow decodes without Python's lock, so threads do.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = range(len(raw.items))
        for start in range(0, len(rows), IMAGES_IN_FLIGHT):
            ahead = rows[start : start + IMAGES_IN_FLIGHT]
            yield from pool.map(partial(_decoded, raw, side), ahead)


def _refuse(damaged: dict[str, str]) -> None:
    """Raise BadInput if there are images that are not whole, and name them."""
    if len(damaged) == 1:
        raise BadInput(*damaged.values())
    if damaged:
        names = ", ".join(list(damaged)[:10])
        rest = f" and {len(damaged) - 10:,} more" if len(damaged) > 10 else ""
        raise BadInput(f"--dataset: {len(damaged):,} images are not whole: {names}{rest}")


# ---- single images


def image_shape(raw: Raw, i: int) -> tuple[int, int]:
    """(H, W) of image `i`. Raises BadInput when it is not whole."""
    if isinstance(raw.items, np.ndarray):
        return raw.items.shape[2:]
    return _open_image(raw, i).size[::-1]


def _decoded(raw: Raw, side: int | None, i: int) -> NDArray[np.uint8] | str:
    """Image `i` as uint8 [3, H, W], cut to side x side if there is a `side`; or what is amiss."""
    try:
        image = _open_image(raw, i)
    except BadInput as damage:
        return str(damage)
    if side is not None:
        image = _resize_and_cut(image, side)
    return np.asarray(image).transpose(2, 0, 1)


def _open_image(raw: Raw, i: int) -> Image.Image:
    """Image `i`, upright and in RGB. Raises BadInput when it is not whole."""
    # A path, or a cell of a parquet column, which may be empty.
    item: Any = raw.items[i]
    encoded = item if isinstance(item, Path) else io.BytesIO(item.as_py() or b"")
    try:
        with Image.open(encoded) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                # 16-bit grey is scaled; Pillow's own conversion would clip it.
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            if upright.mode in ("I", "F"):
                raise ValueError("32 bits a pixel, whose range nobody knows; give 8 or 16")
            return upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise BadInput(f"--dataset: {raw.item_name(i)} is not a whole image ({e})") from e


def _resize_and_cut(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to `side` (bicubic, antialiased) and cut to the centre."""
    scale = side / min(image.size)
    w, h = (max(side, round(v * scale)) for v in image.size)
    left = (w - side) // 2
    top = (h - side) // 2
    if max(image.size) > 10 * min(image.size):
        # The same, up to rounding, without the memory that 65,000 x 1 would take as a whole.
        x, y = image.width / w, image.height / h
        box = (left * x, top * y, (left + side) * x, (top + side) * y)
        return image.resize((side, side), Image.Resampling.BICUBIC, box)
    resized = image.resize((w, h), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + side, top + side))
