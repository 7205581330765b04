"""The decoded data sets of a data folder, listed and removed: `cifar-accel cache`."""

import json
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from cifar_accel.data.decode import NOT_WHOLE, system_failures_named
from cifar_accel.files import home
from cifar_accel.options.options import CacheArguments

# A folder of arrays, or what a killed process left of one. Its first part is what is locked.
FOLDER = re.compile(r"(decoded-(?:v(\d+)-)?[0-9a-f]{24})(?:-\d+px)?(?:\.tmp)?")


def list_caches(args: CacheArguments, say: Callable[[str], None]) -> None:
    """Say a line for each decoded data set, and remove those that nobody uses if so asked.

    Raises BadInput for what cannot be read or removed.
    """
    root = home(args.data_dir)
    total = 0.0
    with system_failures_named(f"--data-dir {args.data_dir}"):
        folders = [(path, FOLDER.fullmatch(path.name)) for path in sorted(root.glob("decoded-*/"))]
        for path, name in folders:
            if name is None:
                continue
            # What it is, before it may be gone.
            size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
            total += size
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
            line = f"{size:10,.1f} MB, version {name[2] or 1}, {made}: {_content(path)}"
            # Nobody makes it, as long as its lock is ours.
            if args.clear:
                with suppress(Timeout), FileLock(root / f"{name[1]}.lock", timeout=0) as lock:
                    shutil.rmtree(path)
                    Path(lock.lock_file).unlink()
                line += "; left, for a process makes it" if path.exists() else "; removed"
            say(line)
    say(f"{total:10,.1f} MB in all, in {root}")


def _content(folder: Path) -> str:
    """What the arrays in `folder` are, in words; its name if they are not whole."""
    with suppress(*NOT_WHOLE):
        name = json.loads((folder / "meta.json").read_text())["name"]
        # It may come from another user, and is no message to the terminal.
        name = "".join(filter(str.isprintable, name))
        shapes = [np.load(file, mmap_mode="r").shape for file in folder.glob("*_images.npy")]
        (_, _, height, width), *_ = shapes
        return f"{name}, {sum(shape[0] for shape in shapes):,} images of {width}x{height}"
    return f"{folder.name}, not whole"
