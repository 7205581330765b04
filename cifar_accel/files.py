"""Files that are whole or absent, and JSON as others may have left it."""

import json
import os
from pathlib import Path
from typing import Any

from cifar_accel.errors import BadInput


def home(path: str) -> Path:
    """`path` with `~` and `~user` filled in. Raises BadInput where there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as e:
        raise BadInput(f"{path}: {e}") from e


def alike(value: Any, kind: Any) -> bool:
    """Whether `value`, read from JSON, is of the kind of `kind`.

    For a number any number will do, for a list one as long (an empty one stands for any), for None anything.
    """
    if isinstance(kind, list | tuple):
        long = not kind or (isinstance(value, list) and len(value) == len(kind))
        return isinstance(value, list) and long and all(map(alike, value, kind))
    return kind is None or isinstance(
        value, int | float if isinstance(kind, int | float) else type(kind)
    )


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None when it is missing or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def sync(path: Path) -> None:
    """Wait until `path` (a file, or a folder's entries) is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON so that `path` holds either the old or the new text, never a part."""
    scratch = path.with_name(path.name + ".tmp")
    try:
        scratch.write_text(json.dumps(value, indent=2) + "\n")
        sync(scratch)
        os.replace(scratch, path)
    except OSError:  # a full disk has no room for a part of it either
        scratch.unlink(missing_ok=True)
        raise
