"""Data sets: what a name, a folder or a hub id stands for, and its images still encoded.

`decode.py` decodes them. A new kind of data set is one function that makes a `Source`, and one line
in `find_source`.
"""

import json
import os
import re
import socket
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_accel.data.order import stratified_subset
from cifar_accel.errors import BadInput, did_you_mean, first_line
from cifar_accel.files import home

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

# What the names of parquet files, or of the folders they lie in, begin with (regular expressions).
SPLITS = {"train": "train", "test": "test", "val": "val(idation)?"}

# A connection of torchvision's download may be silent for so long; the whole may take longer.
NETWORK_TIMEOUT_S = 15


# ---- what a data set is


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, 3, H, W], labels int64 [N], and the names of the classes."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: NDArray[np.int64]) -> "Split":
        """The samples at `index` (a copy)."""
        return replace(self, images=self.images[index], labels=self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """A training and a test split with a fingerprint of their content."""

    name: str
    train: Split
    test: Split
    fingerprint: str


@dataclass(frozen=True)
class Raw:
    """One split before decoding."""

    # Encoded images (paths, or cells of a parquet column), or an array uint8 [N, 3, H, W].
    items: Sequence[Any] | NDArray[np.uint8]
    # Whole numbers [N], places in `classes`.
    labels: Sequence[int] | NDArray[Any]
    classes: list[str]
    # Where items that are not paths come from, for error messages.
    origin: str = ""

    def item_name(self, i: int) -> str:
        """How item `i` is called in an error message."""
        item = self.items[i]
        return str(item) if isinstance(item, Path) else f"row {i} of {self.origin}"


@dataclass(frozen=True)
class Source:
    """Where a data set lies."""

    # Gives a digest of its content, which names the decoded arrays.
    identity: Callable[[], str]
    # Gives the pairs ("train", Raw) and ("test", Raw).
    read: Callable[[], Iterator[tuple[str, Raw]]]


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
        raise BadInput(
            f"--validation-fraction {fraction:g}: leaves {len(kept)} to train on and "
            f"{len(held)} to validate"
        )
    return split.subset(kept), split.subset(held)


def find_source(name: str, root: Path, say: Callable[[str], None]) -> Source:
    """What `--dataset` names: a built-in set, an existing folder, or a hub id.

    Downloads go to the folder `root`, announced by `say`. Raises BadInput for anything else.
    """
    # Built-in names come before folders of the same name.
    builtin = {"cifar100": _cifar, "cifar10": _cifar, "digits": _digits}
    if name in builtin:
        return builtin[name](name, root, say)

    # A folder, in one of two layouts.
    path = home(name)
    if path.is_dir():
        if any(path.rglob("*.parquet")):
            return _parquet_folder(path)
        if (path / "train").is_dir():
            return _image_folder(path)
        raise BadInput(
            f"--dataset {name}: holds neither *.parquet files nor a train/ folder with one folder "
            "per class"
        )
    if path.exists():
        raise BadInput(f"--dataset {name}: is a file; give the folder that holds the data")

    # What is not on this machine can be on the hub.
    if is_hub_id(name):
        return _hub(name, root, say)
    if os.sep in name:
        raise BadInput(f"--dataset {name}: no such folder")
    raise BadInput(
        f"--dataset {name}: unknown; there are {', '.join(builtin)}, a folder or a hub id"
        f"{did_you_mean(name, builtin)}"
    )


# ---- built-in data sets


def _cifar(name: str, root: Path, say: Callable[[str], None]) -> Source:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009) through torchvision."""
    from torchvision import datasets

    kind = datasets.CIFAR100 if name == "cifar100" else datasets.CIFAR10
    return Source(partial(str, kind.tgz_md5), partial(_read_cifar, name, kind, root, say))


def _read_cifar(
    name: str, kind: Any, root: Path, say: Callable[[str], None]
) -> Iterator[tuple[str, Raw]]:
    if not (root / kind.base_folder).exists():
        say(f"data: downloading {name} from {kind.url} into {root}")
    for split in ("train", "test"):
        # torchvision checks the md5 of every file before it opens it.
        with _download_failures_named(name, kind.filename, root):
            data = kind(str(root), train=split == "train", download=True)
        images = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
        yield split, Raw(images, data.targets, data.classes)


@contextmanager
def _download_failures_named(name: str, filename: str, root: Path) -> Iterator[None]:
    """Give up a silent connection, and turn a failed download of data set `name` into BadInput."""
    socket.setdefaulttimeout(NETWORK_TIMEOUT_S)
    try:
        yield
    except (urllib.error.URLError, TimeoutError, RuntimeError) as e:
        reason = getattr(e, "reason", e)
        raise BadInput(
            f"--dataset {name}: cannot be downloaded ({reason}); put {filename} into {root}, "
            "or pass a folder in hub parquet layout"
        ) from e
    finally:
        socket.setdefaulttimeout(None)


def _digits(name: str, root: Path, say: Callable[[str], None]) -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels and 17 grey levels."""
    return Source(partial(str, f"digits {version('scikit-learn')}"), _read_digits)


def _read_digits() -> Iterator[tuple[str, Raw]]:
    # Takes two seconds, for which a start on cached arrays need not wait.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    classes = [str(digit) for digit in range(10)]
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None].repeat(3, axis=1)
    # A fifth of each class is the test split.
    test = stratified_subset(bunch.target, len(images) // 5, seed=0)
    train = np.setdiff1d(np.arange(len(images)), test)
    yield "train", Raw(images[train], bunch.target[train], classes)
    yield "test", Raw(images[test], bunch.target[test], classes)


# ---- data sets of the Hugging Face hub


def is_hub_id(name: str) -> bool:
    """Whether `name`, which is no folder here, can be a data set of the hub."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def hub_marker(root: Path, name: str) -> Path:
    """The file that says that data set `name` of the hub is here as a whole.

    A download that broke off leaves a snapshot folder too, but no marker.
    """
    return root / f"hub-{name.replace('/', '--')}.whole"


def _hub(name: str, root: Path, say: Callable[[str], None]) -> Source:
    """A data set of the hub that is stored as parquet; downloads it where it is missing."""
    from huggingface_hub import constants, snapshot_download

    from cifar_accel.network import require_network

    snapshot = partial(
        snapshot_download,
        name,
        repo_type="dataset",
        allow_patterns="*.parquet",
        cache_dir=root / "hub",
    )

    # Downloaded before, and not removed since by hand.
    marker = hub_marker(root, name)
    stored = root / "hub" / f"datasets--{name.replace('/', '--')}"
    if marker.exists() and stored.is_dir():
        return _parquet_folder(Path(snapshot(local_files_only=True)))

    require_network(f"--dataset {name}", "pass a local folder in the same layout")
    say(f"data: downloading {name} from {constants.ENDPOINT} into {root / 'hub'}")
    with _hub_failures_named(name, constants.ENDPOINT):
        folder = Path(snapshot())
    marker.touch()
    return _parquet_folder(folder)


@contextmanager
def _hub_failures_named(name: str, endpoint: str) -> Iterator[None]:
    """Turn a failed download of data set `name` into BadInput."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        yield
    except RepositoryNotFoundError as e:
        raise BadInput(
            f"--dataset {name}: neither a folder here nor a data set on {endpoint}"
        ) from e
    except Exception as e:
        # The hub's HTTP library, and with it its errors, changes from version to version.
        raise BadInput(f"--dataset {name}: cannot be downloaded ({first_line(e)})") from e


# ---- folders of parquet files


def _parquet_folder(path: Path) -> Source:
    """A folder in the hub's parquet layout: files, or folders, named train-* and test-*."""
    # The files of each split.
    files: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")):
        files.setdefault(_split_of(file.relative_to(path)), []).append(file)
    if "test" not in files and "val" in files:
        files["test"] = files["val"]
    for split in ("train", "test"):
        if split not in files:
            raise BadInput(f"--dataset {path}: no parquet file is named {split}-*.parquet")

    # Files of no split, and validation files beside a test split, are left out.
    used = {split: files[split] for split in ("train", "test")}
    identity = partial(_digest, path, used["train"] + used["test"])
    return Source(identity, partial(_read_parquet_folder, used))


def _split_of(file: Path) -> str:
    """The split that a parquet file belongs to, by a part of its relative path, or "other"."""
    words = [part.lower() for part in file.parts]
    for split, beginning in SPLITS.items():
        # No letter may follow: training-notes.parquet is none of the training split.
        pattern = re.compile(rf"{beginning}(?![a-z])")
        if any(pattern.match(word) for word in words):
            return split
    return "other"


def _read_parquet_folder(files: dict[str, list[Path]]) -> Iterator[tuple[str, Raw]]:
    for split, files_of_split in files.items():
        yield split, _read_parquet(files_of_split)


def _read_parquet(files: list[Path]) -> Raw:
    """Encoded images, labels and class names of one split's parquet files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Read the two columns that are needed.
    first = files[0]
    with _parquet_failures_named(first):
        schema = pq.read_schema(first)
        image, label = _image_and_label(schema, first)
        table = pa.concat_tables(pq.read_table(file, columns=[image, label]) for file in files)

    # Images are bytes, or structs that hold them.
    cells = table.column(image).combine_chunks()
    if pa.types.is_struct(cells.type):
        cells = cells.field("bytes")

    # Labels must be whole numbers.
    column = table.column(label)
    if not pa.types.is_integer(column.type) or column.null_count:
        raise BadInput(f"--dataset: column {label} of {first} must hold whole numbers without gaps")
    labels = column.to_numpy().astype(np.int64)

    # The classes' names are in the hub's own metadata; without it, the numbers are the names.
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(label, {})
    classes = feature.get("names") or [str(c) for c in range(labels.max(initial=-1) + 1)]
    return Raw(cells, labels, classes, origin=f"{first.name} and its sisters")


@contextmanager
def _parquet_failures_named(file: Path) -> Iterator[None]:
    """Turn what pyarrow says of a damaged file into BadInput."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as e:
        reason = first_line(e)
        raise BadInput(f"--dataset: {file} cannot be read as parquet ({reason})") from e


def _image_and_label(schema: Any, file: Path) -> tuple[str, str]:
    """Names of the image and the label column: the usual names first, then any column of images."""
    names = schema.names
    images = [c for c in ("img", "image", "images", *names) if c in names and _is_image(schema, c)]
    labels = [c for c in ("fine_label", "label", "labels") if c in names]
    missing = ""
    if not images:
        missing = "image column (bytes, or a struct with bytes)"
    elif not labels:
        missing = "label column (fine_label or label)"
    if missing:
        raise BadInput(f"--dataset: {file} has no {missing}; it has {', '.join(names)}")
    return images[0], labels[0]


def _is_image(schema: Any, column: str) -> bool:
    """Whether a column's type can hold encoded images."""
    import pyarrow as pa

    kind = schema.field(column).type
    if pa.types.is_struct(kind):
        if kind.get_field_index("bytes") < 0:
            return False
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


# ---- folders of image files


def _image_folder(path: Path) -> Source:
    """train/CLASS/*.png and test/CLASS/*.png (or val/, validation/)."""
    test_folders = [path / n for n in ("test", "val", "validation") if (path / n).is_dir()]
    if not test_folders:
        raise BadInput(
            f"--dataset {path}: has a train/ folder but no test/, val/ or validation/ folder"
        )
    train = path / "train"
    classes = sorted(f.name for f in train.iterdir() if f.is_dir())
    if not classes:
        raise BadInput(f"--dataset {train}: is empty; it must hold one folder of images per class")
    splits = {
        "train": _images_by_class(train, classes),
        "test": _images_by_class(test_folders[0], classes),
    }
    files = [*splits["train"].items, *splits["test"].items]
    return Source(partial(_digest, path, files), partial(iter, list(splits.items())))


def _images_by_class(folder: Path, classes: list[str]) -> Raw:
    """The image files in the class folders of `folder`. Raises BadInput for one without images."""
    paths: list[Path] = []
    labels: list[int] = []
    for class_folder in sorted(f for f in folder.iterdir() if f.is_dir()):
        if class_folder.name not in classes:
            raise BadInput(
                f"--dataset {class_folder}: there is no class of this name in "
                f"{folder.with_name('train')}"
            )
        found = sorted(f for f in class_folder.rglob("*") if f.suffix.lower() in IMAGE_ENDINGS)
        if not found:
            raise BadInput(
                f"--dataset {class_folder}: this class folder holds no image "
                f"({', '.join(IMAGE_ENDINGS)})"
            )
        paths += found
        labels += [classes.index(class_folder.name)] * len(found)
    if not paths:
        raise BadInput(f"--dataset {folder}: is empty; it must hold one folder of images per class")
    return Raw(paths, labels, classes)


def _digest(root: Path, files: list[Path]) -> str:
    """Digest of the files' names and bytes."""
    digest = blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.relative_to(root)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
