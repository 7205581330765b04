"""Data sets: their splits, decoded or still encoded, and what a source of one gives."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, 3, H, W], labels int64 [N], and the names of the classes."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: list[str]
    # int64 [N]: of a part, the samples' places in the whole; None: this is the whole.
    part: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def places(self) -> NDArray[np.int64]:
        """int64 [N]: the samples' places in the split of the data set."""
        return np.arange(len(self)) if self.part is None else self.part

    def subset(self, index: NDArray[np.int64]) -> "Split":
        """The samples at `index` (a copy)."""
        part = self.places[index]
        return replace(self, images=self.images[index], labels=self.labels[index], part=part)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, which may be empty, with a fingerprint of their content."""

    name: str
    train: Split
    test: Split
    fingerprint: str
    # The images' files by split, "train" and "test", where each image is one.
    files: dict[str, list[Path]] = field(default_factory=dict)


@dataclass(frozen=True)
class Raw:
    """One split before decoding. Both splits of a data set have the same classes."""

    # Encoded images (paths, or cells of a parquet column), or an array uint8 [N, 3, H, W].
    items: Sequence[Any] | NDArray[np.uint8]
    # int64 [N], places in `classes`.
    labels: NDArray[np.int64]
    classes: list[str]
    # The files that hold cells, one after the other, with the number of rows in each.
    files: Sequence[tuple[Path, int]] = ()

    def item_name(self, i: int) -> str:
        """How item `i`, which is encoded, is called in an error message."""
        for file, rows in self.files:
            if i < rows:
                return f"row {i} of {file}"
            i -= rows
        return str(self.items[i])


@dataclass(frozen=True)
class Source:
    """Where a data set lies."""

    # Gives a digest of its content, which names the decoded arrays.
    identity: Callable[[], str]
    # Gives the pairs ("train", Raw) and, where there are test images, ("test", Raw).
    read: Callable[[], Iterator[tuple[str, Raw]]]
    # The images' files by split, where each image is one.
    files: dict[str, list[Path]] = field(default_factory=dict)
