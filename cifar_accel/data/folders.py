"""Data sets that are folders: of parquet files as the hub has them, or of images by class."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b, file_digest
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_accel.data.datasets import Raw, Source
from cifar_accel.errors import BadInput, first_line
from cifar_accel.files import adapter

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

# What the names of parquet files, or of the folders they lie in, begin with (regular expressions).
SPLITS = {"train": "train", "test": "test", "val": "val(idation)?"}

# Names of folders that are hardly those of classes.
LOOKS_LIKE_A_SPLIT = re.compile(r"(train|test|val)(ing|idation|set|s)?\W*\d*")

# Labels without names are below this: what is larger is an id or the like.
MOST_UNNAMED_CLASSES = 100_000


# ---- folders of parquet files


def parquet_folder(path: Path, say: Callable[[str], None]) -> Source:
    """A folder in the hub's parquet layout: files, or folders, named train-* and test-*."""
    # The files of each split.
    files: dict[str, list[Path]] = {}
    left_out: Counter[str] = Counter()
    for file in visible_files(path, path.rglob("*.parquet"), left_out):
        files.setdefault(_split_of(file.relative_to(path).parts), []).append(file)
    if "test" not in files and "val" in files:
        files["test"] = files["val"]
    if "train" not in files:
        raise BadInput(f"--dataset {path}: no parquet file is named train-*.parquet")

    # Files of no split, and validation files beside a test split, are left out.
    files = {split: files[split] for split in ("train", "test") if split in files}
    shards = {split: [_shard(path, f) for f in own] for split, own in files.items()}
    first = shards["train"][0]
    for shard in chain(*shards.values()):
        if shard.kind != first.kind:
            raise BadInput(
                f"--dataset: {shard.file} ({shard.kind}) and {first.file} ({first.kind}) are not "
                "of one data set; give one of the folders"
            )
    _say_left_out(left_out, say)
    identity = partial(_digest, path, list(chain(*files.values())))
    return Source(identity, partial(_read_parquet_folder, shards))


def _split_of(parts: Sequence[str]) -> str:
    """The split that a parquet file belongs to, by a part of its relative path, or "other"."""
    for split, beginning in SPLITS.items():
        # No letter may follow: training-notes.parquet is none of the training split.
        pattern = re.compile(rf"{beginning}(?![a-z])")
        if any(pattern.match(part.lower()) for part in parts):
            return split
    return "other"


@dataclass(frozen=True)
class _Shard:
    """A parquet file, the columns of images and labels, and the classes' names, if it has them."""

    file: Path
    image: str
    label: str
    names: list[str]
    # What all files of a data set have in common, in words.
    kind: str


def _shard(root: Path, file: Path) -> _Shard:
    """What a parquet file says of itself. Raises BadInput where it cannot be used."""
    import pyarrow as pa

    with _open_parquet(file) as parquet:
        schema = parquet.schema_arrow

    # Of images the usual names come first, then any column; `bytes` is a field of a struct.
    fields = schema.empty_table().flatten().schema
    binary = [f.name for f in fields if f.type in (pa.binary(), pa.large_binary())]
    usual = [name + end for name in ("img", "image", "images") for end in ("", ".bytes")]
    others = [name for name in binary if name in schema.names or name.endswith(".bytes")]
    images = [name for name in (*usual, *others) if name in binary]
    labels = [name for name in ("fine_label", "label", "labels") if name in schema.names]
    missing = "label column (fine_label or label)"
    if not images:
        missing = "image column (bytes, or a struct with bytes)"
    if not images or not labels:
        raise BadInput(f"--dataset: {file} has no {missing}; it has {', '.join(schema.names)}")

    # Two configurations of a data set lie in folders that differ in more than the split.
    names = _class_names(schema, labels[0], file)
    folders = [f for f in file.relative_to(root).parent.parts if _split_of([f]) == "other"]
    kind = f"folder {'/'.join(folders) or '.'}, {labels[0]} {'with' if names else 'without'} names"
    return _Shard(file, images[0], labels[0], names, kind)


def _class_names(schema: Any, label: str, file: Path) -> list[str]:
    """The classes' names in the hub's own metadata; empty where there are none."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        metadata = adapter(dict[str, Any]).validate_json(text)
        feature = metadata.get("info", {}).get("features", {}).get(label, {})
        names = adapter(list[str]).validate_python(feature.get("names") or [], strict=True)
    except (ValueError, AttributeError) as e:
        place = f"info.features.{label}.names"
        raise BadInput(f"--dataset: {file}: its metadata has no list of names at {place}") from e
    if len(set(names)) < len(names):
        raise BadInput(f"--dataset: {file} gives two classes one name")
    return names


@contextmanager
def _open_parquet(file: Path) -> Iterator[Any]:
    """The opened file. What pyarrow and the system say of a damaged one becomes BadInput."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Opened here, because pyarrow takes no name that is not UTF-8.
        with file.open("rb") as stream:
            yield pq.ParquetFile(stream)
    except (pa.ArrowException, OSError) as e:
        raise BadInput(f"--dataset: {file} cannot be read as parquet ({first_line(e)})") from e


def _read_parquet_folder(shards: dict[str, list[_Shard]]) -> Iterator[tuple[str, Raw]]:
    """The splits, with the classes of the first training file."""
    import pyarrow as pa

    classes = shards["train"][0].names
    for split, own in shards.items():
        columns = [_read_shard(shard) for shard in own]
        if not any(len(labels) for _, labels in columns):
            raise BadInput(f"--dataset: {own[0].file}: the {split} split holds no image")
        # Without names the numbers are the names.
        if not classes:
            largest = max(labels.max(initial=0) for _, labels in columns)
            if largest >= MOST_UNNAMED_CLASSES:
                raise BadInput(
                    f"--dataset: {own[0].file.parent} has the label {largest}; without names of "
                    f"classes labels must be below {MOST_UNNAMED_CLASSES:,}"
                )
            classes = [str(number) for number in range(largest + 1)]
        places = [
            _places(labels, shard.names or classes, classes, shard.file)
            for shard, (_, labels) in zip(own, columns, strict=True)
        ]
        # Pieces stay pieces: together they may have more than 2 GiB.
        pieces = [piece for images, _ in columns for piece in images.chunks]
        cells = pa.chunked_array(pieces, pa.large_binary())
        rows = [(shard.file, len(labels)) for shard, labels in zip(own, places, strict=True)]
        yield split, Raw(cells, np.concatenate(places), classes, rows)


def _read_shard(shard: _Shard) -> tuple[Any, NDArray[np.int64]]:
    """Encoded images (a chunked array of large_binary) and labels, as the file has them."""
    import pyarrow as pa

    with _open_parquet(shard.file) as parquet:
        # In small batches, because pyarrow gives no more than 2 GiB of a struct at once.
        batches = list(parquet.iter_batches(256, columns=[shard.image, shard.label]))
        schema = batches[0].schema if batches else parquet.schema_arrow
        table = pa.Table.from_batches(batches, schema)
    column = table.column(shard.label)
    if not pa.types.is_integer(column.type) or column.null_count:
        raise BadInput(
            f"--dataset: column {shard.label} of {shard.file} must hold whole numbers without gaps"
        )
    images = table.flatten().column(shard.image).cast(pa.large_binary())
    return images, column.to_numpy().astype(np.int64)


# ---- folders of image files


def image_folder(path: Path, say: Callable[[str], None]) -> Source:
    """train/CLASS/*.png and test/CLASS/*.png (or val/, validation/), or without test images.

    A folder of classes without train/ is all for training.
    """
    tests = [path / n for n in ("test", "val", "validation") if (path / n).is_dir()][:1]
    train = path / "train"
    if _has_a_class_called_train(path):
        tests, train = [], path
    elif not train.is_dir():
        train = path
        for child in path.iterdir():
            if child.is_dir() and LOOKS_LIKE_A_SPLIT.fullmatch(child.name.lower()):
                raise BadInput(
                    f"--dataset {path}: has {child.name}/ and no train/; put the class folders "
                    f"into train/, or give {child.name}/ another name if it is a class"
                )
    folders = dict(zip(("train", "test"), (train, *tests), strict=False))

    # The training split's folders are the classes.
    splits: list[tuple[str, Raw]] = []
    left_out: Counter[str] = Counter()
    classes: list[str] = []
    for split, folder in folders.items():
        images = _images_by_class(folder, left_out)
        names = list(images)
        classes = classes or names
        numbers = np.repeat(np.arange(len(names)), [len(images[name]) for name in names])
        labels = _places(numbers, names, classes, folder)
        splits.append((split, Raw(list(chain(*images.values())), labels, classes)))
    _say_left_out(left_out, say)
    files = {split: list(raw.items) for split, raw in splits}
    identity = partial(_digest, path, list(chain(*files.values())))
    return Source(identity, partial(iter, splits), files)


def _has_a_class_called_train(path: Path) -> bool:
    """Whether `path` is a folder of classes, one of them called train, as CIFAR-100 has it."""
    train = path / "train"
    if not train.is_dir() or any(child.is_dir() for child in train.iterdir()):
        return False
    folders = [f.name.lower() for f in path.iterdir() if f.is_dir() and f.name[0] != "."]
    return not all(map(LOOKS_LIKE_A_SPLIT.fullmatch, folders))


def is_image(file: Path) -> bool:
    """Whether `file` is called as images are."""
    return file.suffix.lower() in IMAGE_ENDINGS


def _images_by_class(folder: Path, left_out: Counter[str]) -> dict[str, list[Path]]:
    """The image files in each class folder of `folder`. Raises BadInput for one without images."""
    images: dict[str, list[Path]] = {}
    for class_folder in sorted(f for f in folder.iterdir() if f.is_dir()):
        files = visible_files(folder, class_folder.rglob("*"), left_out)
        found = list(filter(is_image, files))
        left_out.update(file.suffix or file.name for file in set(files) - set(found))
        name = class_folder.name
        if found and name.encode(errors="replace").decode() != name:
            raise BadInput(f"--dataset {class_folder}: the name of this class is not UTF-8")
        if found:
            images[name] = found
        elif not name.startswith("."):
            raise BadInput(
                f"--dataset {class_folder}: this class folder holds no image "
                f"({', '.join(IMAGE_ENDINGS)})"
            )
    if not images:
        raise BadInput(f"--dataset {folder}: is empty; it must hold one folder of images per class")
    return images


# ---- either kind of folder


def visible_files(root: Path, paths: Iterable[Path], left_out: Counter[str]) -> list[Path]:
    """The files among `paths`, sorted; those hidden below `root` are counted in `left_out`."""
    files = []
    for path in sorted(paths):
        # A link to nothing is no folder: it is refused when it is read.
        if path.is_dir():
            continue
        hidden = [part for part in path.relative_to(root).parts if part.startswith(".")]
        if hidden:
            left_out[hidden[0]] += 1
        else:
            files.append(path)
    return files


def _places(
    labels: NDArray[np.int64], names: list[str], classes: list[str], origin: Path
) -> NDArray[np.int64]:
    """Labels, which are places in `names`, as the places of these names in `classes`."""
    place = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in names if name not in place]
    if unknown:
        raise BadInput(f"--dataset {origin}: {unknown[0]!r} is no class of the training split")
    if labels.min(initial=0) < 0 or labels.max(initial=-1) >= len(names):
        raise BadInput(f"--dataset {origin}: a label is not in 0..{len(names) - 1}")
    return np.array([place[name] for name in names], np.int64)[labels]


def _say_left_out(left_out: Counter[str], say: Callable[[str], None]) -> None:
    """Say in one line how many files are left out, and of which kinds."""
    if left_out:
        kinds = ", ".join(map(repr, sorted(left_out)[:5]))
        say(f"data: files left out, hidden or of another kind: {left_out.total():,} ({kinds})")


def _digest(root: Path, files: list[Path]) -> str:
    """Digest of the files' names and bytes."""
    digest = blake2b(digest_size=16)
    for file in files:
        # Names need not be UTF-8.
        head = f"{file.relative_to(root)}\0{file.stat().st_size}\0"
        digest.update(head.encode(errors="surrogateescape"))
        with file.open("rb") as stream:
            file_digest(stream, lambda: digest)
    return digest.hexdigest()
