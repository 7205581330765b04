"""Data sets: what a name, a folder or a hub id stands for, and its images still encoded; `cache.py` decodes them.

A new kind of data set is one function that yields a `Raw` split by split, and one line in `find_source`.
"""

import json
import os
import re
import socket
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_accel.data.order import stratified_subset
from cifar_accel.errors import BadInput, did_you_mean
from cifar_accel.files import home

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


SPLITS = {
    "train": "train",
    "test": "test",
    "val": "val(idation)?",
}  # what file and folder names begin with


NETWORK_TIMEOUT_S = 15


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, 3, H, W], labels int64 [N], and what the labels mean."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: list[str]
    coarse_labels: NDArray[np.int64] | None = None
    coarse_classes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: NDArray[np.int64]) -> "Split":
        """The samples at `index` (a copy)."""
        coarse = None if self.coarse_labels is None else self.coarse_labels[index]
        return replace(
            self, images=self.images[index], labels=self.labels[index], coarse_labels=coarse
        )


@dataclass(frozen=True)
class Dataset:
    """A training and a test split with a fingerprint of their content."""

    name: str
    train: Split
    test: Split
    fingerprint: str


@dataclass
class Raw:
    """One split before decoding: `items` are encoded images (bytes or paths), or already an array [N, 3, H, W]."""

    items: Sequence[Any] | NDArray[np.uint8]
    labels: Sequence[int] | NDArray[Any]
    classes: list[str]
    names: Callable[[int], str] = str  # how item i is called in an error message
    coarse_labels: Sequence[int] | NDArray[Any] | None = None
    coarse_classes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """Where a data set lies: `identity()` is a digest of its content, `read()` yields (split name, Raw)."""

    identity: Callable[[], str]
    read: Callable[[], Iterator[tuple[str, Raw]]]


def limit(split: Split, n: int, flag: str, seed: int) -> Split:
    """A seeded stratified subset of `n` images; the whole split for 0. Raises BadInput when there are fewer."""
    if n > len(split):
        raise BadInput(f"{flag} {n}: there are only {len(split):,} images")
    return split if n in (0, len(split)) else split.subset(stratified_subset(split.labels, n, seed))


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Cut `split` into a training and a validation part, by class. Raises BadInput when either would be empty."""
    held = stratified_subset(split.labels, round(len(split) * fraction), seed)
    kept = np.setdiff1d(np.arange(len(split)), held)
    if not len(held) or not len(kept):
        raise BadInput(
            f"--validation-fraction {fraction:g}: leaves {len(kept)} to train on and {len(held)} to validate"
        )
    return split.subset(kept), split.subset(held)


def find_source(name: str, root: Path, say: Callable[[str], None]) -> Source:
    """What `--dataset` names: a built-in set, an existing folder, or a hub id. Raises BadInput for anything else."""
    builtin = {"cifar100": _cifar, "cifar10": _cifar, "digits": _digits}
    if name in builtin:
        return builtin[name](name, root, say)
    path = home(name)
    if path.is_dir():
        if any(path.rglob("*.parquet")):
            return _parquet(path)
        if (path / "train").is_dir():
            return _image_folder(path)
        raise BadInput(
            f"--dataset {name}: holds neither *.parquet files nor a train/ folder with one folder per class"
        )
    if path.exists():
        raise BadInput(f"--dataset {name}: is a file; give the folder that holds the data")
    if is_hub_id(name):
        return _hub(name, root, say)
    if os.sep in name:
        raise BadInput(f"--dataset {name}: no such folder")
    raise BadInput(
        f"--dataset {name}: unknown; there are {', '.join(builtin)}, a folder or a hub id{did_you_mean(name, builtin)}"
    )


# ---- one function per kind of data set


def _cifar(name: str, root: Path, say: Callable[[str], None]) -> Source:
    """CIFAR-10 or -100 (Krizhevsky 2009) through torchvision, which checks the md5 of every file before it opens it."""
    from torchvision import datasets

    kind = {"cifar100": datasets.CIFAR100, "cifar10": datasets.CIFAR10}[name]

    def read() -> Iterator[tuple[str, Raw]]:
        socket.setdefaulttimeout(
            NETWORK_TIMEOUT_S
        )  # of a silent connection, not of the whole download
        try:
            if not (root / kind.base_folder).exists():
                say(f"data: downloading {name} from {kind.url} into {root}")
            for train in (True, False):
                data = kind(str(root), train=train, download=True)
                raw = Raw(
                    np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)),
                    data.targets,
                    data.classes,
                )
                if name == "cifar100":
                    _add_coarse(
                        raw, Path(data.root, kind.base_folder), "train" if train else "test"
                    )
                yield ("train" if train else "test"), raw
        except (urllib.error.URLError, TimeoutError, RuntimeError) as e:
            raise BadInput(
                f"--dataset {name}: cannot be downloaded ({getattr(e, 'reason', e)}); put {kind.filename} into {root}, "
                "or pass a folder in hub parquet layout"
            ) from e
        finally:
            socket.setdefaulttimeout(None)

    return Source(lambda: kind.tgz_md5, read)


def _add_coarse(raw: Raw, folder: Path, split: str) -> None:
    """CIFAR-100's 20 super-classes, which torchvision leaves out; the files passed its md5 check just before."""
    import pickle

    with open(folder / split, "rb") as rows, open(folder / "meta", "rb") as names:
        raw.coarse_labels = pickle.load(rows, encoding="latin1")["coarse_labels"]
        raw.coarse_classes = pickle.load(names, encoding="latin1")["coarse_label_names"]


def _digits(name: str, root: Path, say: Callable[[str], None]) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8, 17 grey levels; a fifth of each class is the test split."""

    def read() -> Iterator[tuple[str, Raw]]:
        from sklearn.datasets import (
            load_digits,
        )  # two seconds, which a start on cached arrays need not wait

        bunch = load_digits()
        images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None].repeat(3, axis=1)
        test = stratified_subset(bunch.target, len(images) // 5, seed=0)
        for split, index in (("train", np.setdiff1d(np.arange(len(images)), test)), ("test", test)):
            yield split, Raw(images[index], bunch.target[index], [str(d) for d in range(10)])

    return Source(lambda: f"digits {version('scikit-learn')}", read)


def is_hub_id(name: str) -> bool:
    """Whether `name`, which is no folder here, can be a data set of the hub."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def hub_marker(root: Path, name: str) -> Path:
    """Says that data set `name` of the hub is whole: a download that broke off leaves a snapshot folder too."""
    return root / f"hub-{name.replace('/', '--')}.whole"


def _hub(name: str, root: Path, say: Callable[[str], None]) -> Source:
    """A data set of the Hugging Face hub that is stored as parquet."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    from cifar_accel.network import require_network

    def fetch(local: bool) -> Path:
        return Path(
            snapshot_download(
                name,
                repo_type="dataset",
                allow_patterns="*.parquet",
                cache_dir=root / "hub",
                local_files_only=local,
            )
        )

    whole = hub_marker(root, name)
    try:
        if whole.exists():
            return _parquet(fetch(local=True))
    except LocalEntryNotFoundError:
        pass
    require_network(f"--dataset {name}", "pass a local folder in the same layout")
    say(f"data: downloading {name} from {constants.ENDPOINT} into {root / 'hub'}")
    try:
        folder = fetch(local=False)
    except RepositoryNotFoundError as e:
        raise BadInput(
            f"--dataset {name}: neither a folder here nor a data set on {constants.ENDPOINT}"
        ) from e
    except Exception as e:  # the hub's HTTP library, and so its errors, changes with its version
        raise BadInput(f"--dataset {name}: cannot be downloaded ({str(e).splitlines()[0]})") from e
    whole.touch()
    return _parquet(folder)


def _parquet(path: Path) -> Source:
    """A folder in the hub's parquet layout: files named train-* and test-* (or folders of these names)."""
    files: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")):
        words = [part.lower() for part in file.relative_to(path).parts]
        hits = [
            s for s, name in SPLITS.items() if any(re.match(rf"{name}(?![a-z])", w) for w in words)
        ]
        files.setdefault(hits[0] if hits else "other", []).append(file)
    if "test" not in files and "val" in files:
        files["test"] = files.pop("val")
    for split in ("train", "test"):
        if split not in files:
            raise BadInput(f"--dataset {path}: no parquet file is named {split}-*.parquet")

    def read() -> Iterator[tuple[str, Raw]]:
        for split in ("train", "test"):
            yield split, _read_parquet(files[split])

    return Source(lambda: _digest(path, [f for s in ("train", "test") for f in files[s]]), read)


def _read_parquet(files: list[Path]) -> Raw:
    """Encoded images, labels and class names of one split's parquet files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(files[0])
        columns = {f.name: f.type for f in schema}
        image = next(
            (c for c in ("img", "image", "images", *columns) if _holds_images(columns.get(c))), None
        )
        label = next((c for c in ("fine_label", "label", "labels") if c in columns), None)
        if image is None or label is None:
            what = (
                "image column (bytes, or a struct with bytes)"
                if image is None
                else "label column (fine_label or label)"
            )
            raise BadInput(f"--dataset: {files[0]} has no {what}; it has {', '.join(columns)}")
        coarse = "coarse_label" if label == "fine_label" and "coarse_label" in columns else None
        table = pa.concat_tables(
            pq.read_table(f, columns=[c for c in (image, label, coarse) if c]) for f in files
        )
    except pa.ArrowException as e:
        raise BadInput(
            f"--dataset: {files[0]} cannot be read as parquet ({str(e).splitlines()[0]})"
        ) from e
    features = (
        json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        .get("info", {})
        .get("features", {})
    )
    cells = table.column(image).combine_chunks()
    cells = cells.field("bytes") if pa.types.is_struct(cells.type) else cells

    def integers(column: str) -> NDArray[np.int64]:
        if not pa.types.is_integer(columns[column]) or table.column(column).null_count:
            raise BadInput(
                f"--dataset: column {column} of {files[0]} must hold whole numbers without gaps"
            )
        return table.column(column).to_numpy().astype(np.int64)

    def class_names(column: str, labels: NDArray[np.int64]) -> list[str]:
        return features.get(column, {}).get("names") or [
            str(c) for c in range(labels.max(initial=-1) + 1)
        ]

    labels = integers(label)
    raw = Raw(
        cells,
        labels,
        class_names(label, labels),
        names=lambda i: f"row {i} of {files[0].name} and its sisters",
    )
    if coarse:
        coarse_labels = integers(coarse)
        raw.coarse_labels, raw.coarse_classes = coarse_labels, class_names(coarse, coarse_labels)
    return raw


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if kind is not None and pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image_folder(path: Path) -> Source:
    """train/CLASS/*.png and test/CLASS/*.png (or val/, validation/)."""
    test = next((path / n for n in ("test", "val", "validation") if (path / n).is_dir()), None)
    if test is None:
        raise BadInput(
            f"--dataset {path}: has a train/ folder but no test/, val/ or validation/ folder"
        )
    classes = sorted(f.name for f in (path / "train").iterdir() if f.is_dir())
    if not classes:
        raise BadInput(
            f"--dataset {path / 'train'}: is empty; it must hold one folder of images per class"
        )
    files: dict[str, list[tuple[Path, int]]] = {}
    for split, folder in (("train", path / "train"), ("test", test)):
        files[split] = []
        for kind in sorted(f for f in folder.iterdir() if f.is_dir()):
            if kind.name not in classes:
                raise BadInput(
                    f"--dataset {kind}: there is no class of this name in {path / 'train'}"
                )
            images = sorted(f for f in kind.rglob("*") if f.suffix.lower() in IMAGE_ENDINGS)
            if not images:
                raise BadInput(
                    f"--dataset {kind}: this class folder holds no image ({', '.join(IMAGE_ENDINGS)})"
                )
            files[split] += [(f, classes.index(kind.name)) for f in images]
        if not files[split]:
            raise BadInput(
                f"--dataset {folder}: is empty; it must hold one folder of images per class"
            )

    def read() -> Iterator[tuple[str, Raw]]:
        for split, rows in files.items():
            paths = [f for f, _ in rows]
            yield (
                split,
                Raw(paths, [label for _, label in rows], classes, names=partial(_nth, paths)),
            )

    return Source(lambda: _digest(path, [f for rows in files.values() for f, _ in rows]), read)


def _nth(paths: list[Path], i: int) -> str:
    return str(paths[i])


def _digest(root: Path, files: list[Path]) -> str:
    """Digest of the files' names and bytes."""
    digest = blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.relative_to(root)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
