"""From encoded images to uint8 arrays: decoded once, by one process, then memory-mapped."""

import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cifar_accel.data.datasets import Dataset, Raw, Source, Split
from cifar_accel.data.sources import find_source
from cifar_accel.errors import BadInput, first_line
from cifar_accel.files import home, sha256, sync
from cifar_accel.options.options import TrainingArguments

# Part of the name of the arrays' folder: raise it when their meaning or their files change.
CACHE_VERSION = 2

# What comes of reading a folder of arrays that is not whole.
NOT_WHOLE = (OSError, ValueError, KeyError, TypeError, EOFError)

# An image uint8 [3, H, W], and (H, W) of what it was made from.
Decoded = tuple[NDArray[np.uint8], tuple[int, int]]

# Side in pixels of the largest copies, 768 KiB each, that are made without being asked for.
MOST_STORED = 512

# Images decoded ahead of the disk: a pool that maps over all of them would hold all of them.
IMAGES_IN_FLIGHT = 2048


def size_to_store(args: TrainingArguments, grows_to: int = 0) -> int:
    """Side in pixels of the copies of images of unequal size.

    No random crop enlarges one, nor does a test, as far as `MOST_STORED` allows. `grows_to` is a
    larger input that the run may still choose.
    """
    largest = max(grows_to, args.input_size)
    smallest_crop = args.scale[0] ** 0.5 if args.scale else 1.0
    needed = math.ceil(largest / min(smallest_crop, args.crop_pct))
    return max(largest, min(needed, MOST_STORED))


def load_images(args: TrainingArguments, say: Callable[[str], None]) -> Dataset:
    """The data set that the options name, in the size that they say. See `load_dataset`."""
    if args.stored_size is None:
        # A run of an earlier version, which keeps its images.
        return load_dataset(args.dataset, args.data_dir, args.input_size, say)
    most_pixels = max(MOST_STORED, args.stored_size) ** 2
    return load_dataset(args.dataset, args.data_dir, args.stored_size, say, most_pixels)


def load_dataset(
    name: str,
    data_dir: str,
    side: int,
    say: Callable[[str], None] = print,
    most_pixels: float = math.inf,
) -> Dataset:
    """Load data set `name`, decoding it only if that was not done before.

    The first process to take the lock downloads and decodes; the others wait and then map the same
    files. Where the arrays are whole already nothing is locked and nothing written.

    Images of one size stay as they are, up to `most_pixels`; others are brought to side x side
    pixels. Without test images the test split is empty. `data_dir` is made when missing, and `say`
    called with a line before anything slow, and for what is never seen of the images.

    Raises BadInput: unknown name, missing or malformed data, no network, a data_dir that is not
    writable.
    """
    root = home(data_dir)
    with system_failures_named(f"--data-dir {data_dir}"):
        root.mkdir(parents=True, exist_ok=True)
    with system_failures_named(f"--dataset {name}"):
        source = find_source(name, root, say)
        fingerprint = _fingerprint(source)

    # Copies have a folder for each size that the images were brought to.
    folder = root / f"decoded-v{CACHE_VERSION}-{fingerprint}"
    places = Places(folder, folder.with_name(f"{folder.name}-{side}px"), side, most_pixels)
    with system_failures_named(f"--data-dir {data_dir}"):
        # Another user's folder, or one that may only be read, will do if it is whole.
        opened = _open_first(places, say)
        if not opened:
            with _locked(root / f"{folder.name}.lock", say):
                # Another process may have made them meanwhile.
                opened = _open_first(places, lambda line: None)
                opened = opened or _open(_made(source, name, places, say))
    train, test, unseen = opened
    if unseen:
        say(f"data: {unseen}")
    return Dataset(name, train, test, fingerprint, source.files)


def decoded_images(
    data_dir: str, fingerprint: str, side: int | None, split: str
) -> NDArray[np.uint8] | None:
    """The images of a split as a run has seen them, uint8 [N, 3, H, W]; None where they are gone.

    They are only looked at: nothing is decoded, and nothing checked.
    """
    folder = home(data_dir) / f"decoded-v{CACHE_VERSION}-{fingerprint}"
    for made in (folder.with_name(f"{folder.name}-{side}px"), folder):
        with suppress(*NOT_WHOLE):
            images: NDArray[np.uint8] = np.load(made / f"{split}_images.npy", mmap_mode="r")
            return images
    return None


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


@dataclass(frozen=True)
class Places:
    """The folders of a data set's arrays, and what decides between them."""

    # Of images as they are, and of copies of side x side pixels.
    whole: Path
    copies: Path
    side: int
    # Images of one size are copied too if they have more pixels.
    most_pixels: float


def _open_first(places: Places, say: Callable[[str], None]) -> tuple[Split, Split, str] | None:
    """What `_open` gives for the first of the folders that is there, whole and not too large."""
    for folder in filter(Path.exists, (places.whole, places.copies)):
        try:
            opened = _open(folder)
        except NOT_WHOLE as error:
            say(f"data: {folder} is damaged ({error}) and is made anew")
            continue
        pixels = math.prod(opened[0].images.shape[2:])
        if folder == places.copies or pixels <= places.most_pixels:
            return opened
    return None


def _open(folder: Path) -> tuple[Split, Split, str]:
    """Map the arrays in `folder`: training and test split, and what is not seen of the images.

    Raises what is in NOT_WHOLE if they are not what was written.
    """
    meta = json.loads((folder / "meta.json").read_text())
    digests = meta["sha256"]
    for name, digest in digests.items():
        if sha256(folder / name) != digest:
            raise ValueError(f"{name} is not what was written")
    classes = json.loads((folder / "classes.json").read_text())

    def split(name: str) -> Split:
        # Copy-on-write, because torch wants writable memory; nobody writes.
        images = np.load(folder / f"{name}_images.npy", mmap_mode="c")
        return Split(images, np.load(folder / f"{name}_labels.npy"), classes)

    train = split("train")
    test = split("test") if "test_labels.npy" in digests else train.subset(np.arange(0))
    return train, test, meta.get("unseen") or _unseen_in_tests(*train.images.shape[2:])


def _made(source: Source, name: str, places: Places, say: Callable[[str], None]) -> Path:
    """Decode `source` into one of the folders, and return it; only then do unequal sizes show."""
    # Arrays that are whole were too large for this run; another one needs them.
    if not _is_whole(places.whole):
        say(f"data: decoding {name} into {places.whole} (once)")
        if _decode(source, name, places, places.whole):
            return places.whole
    size = f"{places.side}x{places.side}"
    say(f"data: the images are large or of unequal size; each is brought to {size}")
    _decode(source, name, places, places.copies)
    return places.copies


def _is_whole(folder: Path) -> bool:
    """Whether `folder` holds what was written there."""
    with suppress(*NOT_WHOLE):
        return bool(_open(folder))
    return False


def _decode(source: Source, name: str, places: Places, folder: Path) -> bool:
    """Write the arrays of `source` to one of `places`, `folder`; it appears only once it is whole.

    Nothing is written, and False returned, where the images should be kept as they are and cannot
    be.
    """
    # What is damaged, or a killed process may have left, goes first.
    scratch = folder.with_name(folder.name + ".tmp")
    for left in (folder, scratch):
        shutil.rmtree(left, ignore_errors=True)
    scratch.mkdir()
    try:
        side = places.side if folder == places.copies else None
        if not _write_arrays(source, name, scratch, side, places.most_pixels):
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


@dataclass
class _Seen:
    """What shows while images are decoded."""

    # What is wrong with those that are not whole, by their names.
    damaged: dict[str, str] = field(default_factory=dict)
    # (H, W) of the others before they are resized.
    shapes: list[tuple[int, int]] = field(default_factory=list)


def _write_arrays(
    source: Source, name: str, folder: Path, side: int | None, most_pixels: float
) -> bool:
    """Write arrays, classes and meta.json to `folder`.

    With `side` every image is brought to side x side pixels. Without, False is returned as soon as
    their sizes turn out to be unequal, or larger than `most_pixels`.
    """
    # Images and labels. All damaged images are found before the data set is refused.
    shape = None
    seen = _Seen()
    for split, raw in source.read():
        shape = _write_images(raw, folder / f"{split}_images.npy", shape, side, most_pixels, seen)
        if shape is None:
            return False
        # By way of memory: of a full disk np.save says only how much it wrote.
        labels = io.BytesIO()
        np.save(labels, raw.labels)
        (folder / f"{split}_labels.npy").write_bytes(labels.getvalue())
    _refuse(seen.damaged)

    # Every split has the same classes.
    (folder / "classes.json").write_text(json.dumps(raw.classes))
    meta: dict[str, Any] = {"name": name}
    meta["sha256"] = {file.name: sha256(file) for file in folder.iterdir()}
    if side is not None:
        meta["unseen"] = _unseen_in_copies(seen.shapes, side)
    (folder / "meta.json").write_text(json.dumps(meta))
    return True


def _unseen_in_copies(shapes: list[tuple[int, int]], side: int) -> str:
    """What copies of side x side pixels leave out of images of `shapes` (H, W)."""
    sides = np.array(shapes, float)
    pixels = sides.prod(1)
    cut = 1 - sides.min(1) ** 2 / pixels
    worst = "x".join(map(str, shapes[cut.argmax()][::-1]))
    kept = min(1.0, side**2 * len(shapes) / pixels.sum())
    return (
        f"copies of {side}x{side} have {kept:.0%} of the images' pixels; cut to its centre an "
        f"image loses {cut.mean():.0%} of its area on average, {cut.max():.0%} at most ({worst})"
    )


def _unseen_in_tests(h: int, w: int) -> str:
    """What a test leaves out of images that are not square; nothing of square ones."""
    cut = 1 - min(h, w) / max(h, w)
    return f"of images of {w}x{h} a test sees the centre; {cut:.0%} are cut away" if cut else ""


def _write_images(
    raw: Raw,
    path: Path,
    shape: tuple[int, ...] | None,
    side: int | None,
    most_pixels: float,
    seen: _Seen,
) -> tuple[int, ...] | None:
    """Decode `raw` into a .npy file uint8 [N, 3, H, W] and return [3, H, W]; None if it cannot be.

    `shape` is the [3, H, W] to keep to; None: that of the first whole image. What shows on the way
    goes to `seen`; `side` and `most_pixels` as in `_write_arrays`.
    """
    # Written, not mapped: where a disk is full, writing to a map ends the process.
    with open(path, "wb") as file:
        for i, decoded in enumerate(_decoded_images(raw, side)):
            if isinstance(decoded, str):
                seen.damaged[raw.item_name(i)] = decoded
                continue
            image, before = decoded
            seen.shapes.append(before)
            shape = shape or image.shape
            if image.shape != shape or (side is None and math.prod(before) > most_pixels):
                return None
            if not file.tell():
                head = {"descr": "|u1", "fortran_order": False, "shape": (len(raw.items), *shape)}
                np.lib.format.write_array_header_1_0(file, head)
            file.write(image.tobytes())
    if shape is None:
        _refuse(seen.damaged)
    return shape


def _decoded_images(raw: Raw, side: int | None) -> Iterator[Decoded | str]:
    """What `_decoded` gives for each image of `raw`, in their order."""
    if isinstance(raw.items, np.ndarray):
        yield from ((image, image.shape[1:]) for image in raw.items)
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


def _decoded(raw: Raw, side: int | None, i: int) -> Decoded | str:
    """Image `i`, cut to side x side if there is a `side`, and (H, W) before; or what is amiss."""
    try:
        image = _open_image(raw, i)
    except BadInput as damage:
        return str(damage)
    before = (image.height, image.width)
    if side is not None:
        image = _resize_and_cut(image, side)
    return np.asarray(image).transpose(2, 0, 1), before


def _open_image(raw: Raw, i: int) -> Image.Image:
    """Image `i`, upright and in RGB. Raises BadInput when it is not whole."""
    # A path, or a cell of a parquet column, which may be empty.
    item: Any = raw.items[i]
    encoded = item if isinstance(item, Path) else io.BytesIO(item.as_py() or b"")
    return open_image(encoded, f"--dataset: {raw.item_name(i)}")


def open_image(encoded: Path | io.BytesIO, name: str) -> Image.Image:
    """An encoded image, upright and in RGB; of several frames the first.

    Raises BadInput, which calls it `name`, when it is not whole.
    """
    try:
        with Image.open(encoded) as image:
            return upright_rgb(image)
    # A damaged file provokes any exception there is in Pillow.
    except Exception as e:
        raise BadInput(f"{name} is not a whole image ({first_line(e)})") from e


def upright_rgb(image: Image.Image) -> Image.Image:
    """An open image, turned as its EXIF data say, in RGB.

    Raises ValueError for 32 bits a pixel, and what Pillow raises of damaged pixels.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        # 16-bit grey is scaled; Pillow's own conversion would clip it.
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.mode in ("I", "F"):
        raise ValueError("32 bits a pixel, whose range nobody knows; give 8 or 16")
    return upright.convert("RGB")


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
