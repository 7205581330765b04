"""The decoded data sets of a data folder, listed and removed: `cifar-accel cache`."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from cifar_accel.data.decode import NOT_WHOLE, system_failures_named
from cifar_accel.files import home
from cifar_accel.options.options import CacheArguments

# A folder of decoded arrays, or what a killed process left of one. Its first part has the lock.
FOLDER = re.compile(r"(decoded-(?:v(\d+)-)?[0-9a-f]{24})(?:-\d+px)?(?:\.tmp)?")


def list_caches(args: CacheArguments, say: Callable[[str], None]) -> None:
    """Say a line for each decoded data set, and remove those that nobody uses if so asked.

    Raises BadInput for what cannot be read or removed.
    """
    with system_failures_named(f"--data-dir {args.data_dir}"):
        root = home(args.data_dir)
        found = [(path, FOLDER.fullmatch(path.name)) for path in sorted(root.glob("decoded-*/"))]
        total = 0
        for path, name in found:
            # A folder of somebody else's.
            if name is None:
                continue
            size = sum(file.stat().st_size for file in path.iterdir())
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
            line = (
                f"{size / 1e6:10,.1f} MB, version {name[2] or 1}, {made}, {path.name}: "
                f"{_content(path)}"
            )
            if args.clear:
                line += _remove(path, root / f"{name[1]}.lock")
            say(line)
            total += size
        say(f"{total / 1e6:10,.1f} MB of decoded images in {root}")


def _content(folder: Path) -> str:
    """What the arrays in `folder` are, in words."""
    try:
        name = json.loads((folder / "meta.json").read_text())["name"]
        # It may come from another user, and is no message to the terminal.
        name = "".join(c for c in name if c.isprintable())
        shapes = [np.load(file, mmap_mode="r").shape for file in folder.glob("*_images.npy")]
        _, _, height, width = shapes[0]
    except (*NOT_WHOLE, IndexError):
        return "not whole"
    return f"{name}, {sum(shape[0] for shape in shapes):,} images of {width}x{height}"


def _remove(folder: Path, lock_file: Path) -> str:
    """Remove a folder of arrays that no process is making; says what was done."""
    try:
        held = FileLock(lock_file).acquire(timeout=0)
    except Timeout:
        return "; left, for a process holds its lock"
    with held:
        shutil.rmtree(folder)
        lock_file.unlink()
    return "; removed"
