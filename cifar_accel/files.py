"""Files that are whole or absent, and JSON as others may have left it."""

import errno
import functools
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter

from cifar_accel.errors import BadInput

T = TypeVar("T")

# What a file system answers that cannot sync a folder, as network and FUSE ones may.
NO_FOLDER_SYNC = {errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOSYS, errno.ENOTSUP}


def home(path: str) -> Path:
    """`path` with `~` and `~user` filled in. Raises BadInput where there is no such home folder."""
    filled_in = os.path.expanduser(path)
    # The standard library leaves a user that it does not know as it is.
    if filled_in.startswith("~"):
        raise BadInput(f"{path}: there is no such home directory; a file of that name is ./{path}")
    return Path(filled_in)


def last_part(name: str) -> str:
    """What follows the last slash: the folder of a path, the name of a hub id."""
    return name.rstrip("/").rpartition("/")[2]


@functools.cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """What checks values of type `kind`; made once, since that takes milliseconds."""
    return TypeAdapter(kind)


def read_as(kind: type[T], path: Path) -> T | None:
    """The value of a JSON file as `kind`, or None where the file is missing or holds no such value.

    `kind` is any type that pydantic knows. A dataclass takes its fields by name: keys that it does
    not have are ignored, and fields that the file does not have take their defaults.
    Types are strict, as far as JSON has them: an integer passes for a float and a list for a tuple,
    but the text "3" or `true` for no number. NaN and Infinity are floats, as Python writes them.
    """
    try:
        return adapter(cast(Any, kind)).validate_json(path.read_bytes(), strict=True)
    # pydantic's ValidationError is a ValueError; BadInput is what sizes that cannot be read are.
    except (OSError, ValueError, BadInput):
        return None


def first_fault(error: Exception) -> str:
    """The first key that is wrong and how, in a line, of what pydantic or the system complains."""
    return " ".join(str(error).split()).partition(" [type=")[0][:200]


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None when it is missing or not whole."""
    return read_as(Any, path)


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def share(file: Path) -> None:
    """Give `file` the rights of its folder; safetensors keeps what it writes to its owner alone."""
    # The folder's follow from the umask. A file system without rights has none to give.
    with suppress(OSError):
        file.chmod(file.parent.stat().st_mode & 0o666)


def sync(path: Path) -> bool:
    """Wait until `path` (a file, or a folder's entries) is on the disk.

    False for a folder on a file system that cannot do this for folders.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in NO_FOLDER_SYNC and path.is_dir():
            return False
        raise
    finally:
        os.close(descriptor)
    return True


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, as `write_text` does.

    Raises ValueError for numbers that JSON does not have: NaN and infinities.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 so that `path` holds either the old or the new one, never a part."""
    scratch = path.with_name(path.name + ".tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        # The text must be on the disk before its name is, or a power cut leaves an empty file.
        sync(scratch)
        os.replace(scratch, path)
    finally:
        # Gone already after the replacement. A full disk has no room for a part either.
        scratch.unlink(missing_ok=True)
