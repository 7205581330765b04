"""Files that are whole or absent, and JSON as others may have left it."""

import functools
import json
import os
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter

from cifar_accel.errors import BadInput

T = TypeVar("T")


def home(path: str) -> Path:
    """`path` with `~` and `~user` filled in. Raises BadInput where there is no such home folder."""
    filled_in = os.path.expanduser(path)
    # The standard library leaves a user that it does not know as it is.
    if filled_in.startswith("~"):
        raise BadInput(f"{path}: there is no such home directory; a file of that name is ./{path}")
    return Path(filled_in)


@functools.cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """What checks values of type `kind`; made once, since that takes milliseconds."""
    return TypeAdapter(kind)


def read_as(kind: type[T], path: Path) -> T | None:
    """The value of a JSON file as `kind`, or None where the file is missing or holds no such value.

    Args:
        kind: a dataclass, or any other type that pydantic knows, such as dict[str, float]. A
            dataclass takes its fields by name; keys that it does not have are ignored, and fields
            that the file does not have take their defaults.
        path: the file.

    Types are strict, as far as JSON has them: an integer passes for a float and a list for a tuple,
    but the text "3" or `true` for no number. NaN and Infinity are floats, as Python writes them.
    """
    try:
        return adapter(cast(Any, kind)).validate_json(path.read_bytes(), strict=True)
    except (OSError, ValueError):  # pydantic's ValidationError is a ValueError
        return None


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None when it is missing or not whole."""
    return read_as(Any, path)


def sync(path: Path) -> None:
    """Wait until `path` (a file, or a folder's entries) is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON so that `path` holds either the old or the new text, never a part."""
    scratch = path.with_name(path.name + ".tmp")
    try:
        scratch.write_text(json.dumps(value, indent=2) + "\n")
        # The text must be on the disk before its name is, or a power cut leaves an empty file.
        sync(scratch)
        os.replace(scratch, path)
    finally:
        # Gone already after the replacement. A full disk has no room for a part either.
        scratch.unlink(missing_ok=True)
