"""What a name, a folder or a hub id stands for: where a data set comes from.

A new kind of data set is one function that makes a `Source`, and one line in `find_source`.
"""

import os
import re
import socket
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cifar_accel.data.datasets import Raw, Source
from cifar_accel.data.folders import image_folder, is_image, parquet_folder, visible_files
from cifar_accel.data.order import stratified_subset
from cifar_accel.errors import BadInput, did_you_mean, first_line
from cifar_accel.files import home

# A connection of torchvision's download may be silent for so long; the whole may take longer.
NETWORK_TIMEOUT_S = 15


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
        if visible_files(path, path.rglob("*.parquet"), Counter()):
            return parquet_folder(path, say)
        if (path / "train").is_dir() or any(map(is_image, path.glob("*/*"))):
            return image_folder(path, say)
        raise BadInput(
            f"--dataset {name}: holds neither *.parquet files nor a train/ folder, nor a folder "
            "with images for each class"
        )

    # What is not on this machine can be on the hub.
    if is_hub_id(name) and not path.exists():
        return _hub(name, root, say)
    if os.sep in name or path.exists():
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
        yield split, Raw(images, np.asarray(data.targets, np.int64), data.classes)


@contextmanager
def _download_failures_named(name: str, filename: str, root: Path) -> Iterator[None]:
    """Give up a silent connection, and turn a failed download of data set `name` into BadInput."""
    socket.setdefaulttimeout(NETWORK_TIMEOUT_S)
    try:
        yield
    except (urllib.error.URLError, TimeoutError, RuntimeError) as e:
        reason = getattr(e, "reason", e)
        remedy = f"put {filename} into {root}, or pass a folder in hub parquet layout"
        raise BadInput(f"--dataset {name}: cannot be downloaded ({reason}); {remedy}") from e
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
        return parquet_folder(Path(snapshot(local_files_only=True)), say)

    require_network(f"--dataset {name}", "pass a local folder in the same layout")
    say(f"data: downloading {name} from {constants.ENDPOINT} into {root / 'hub'}")
    with _hub_failures_named(name, constants.ENDPOINT):
        folder = Path(snapshot())
    marker.touch()
    return parquet_folder(folder, say)


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
