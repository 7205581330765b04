"""The run folder: whether a command starts, continues or refuses a run, and the folder's lock.

Imports nothing heavy, so that a refusal comes before torch is loaded.
"""

import json
import os
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from cifar_accel.errors import BadInput
from cifar_accel.files import home, read_as
from cifar_accel.options.options import VOLATILE, TrainingArguments, flag
from cifar_accel.options.recipes import DERIVED_LATE
from cifar_accel.records.summary import Config, read_config, read_summary, starting_weights

# The file that is locked while a run writes its folder; it says which process that is.
LOCK = ".lock"

# The folders that a run writes in its own.
WRITTEN = re.compile(r"(model|model-epoch-\d+)(\.tmp)?|checkpoints|wandb|profile")


@dataclass
class Opened:
    """What to do with the run folder `path`: start anew (nothing is set), go on, or leave it."""

    path: Path
    # Run or checkpoint folders to go on from; the first that holds a whole checkpoint is taken.
    sources: list[Path] = field(default_factory=list)
    # Whether --resume PATH asks for a checkpoint, without which there is nothing to do.
    by_path: bool = False
    # config.json of the run that goes on, where it has work that must fit.
    config: dict[str, Any] | None = None
    # Where each option of this command comes from, by name; what is not here, from a flag.
    origin: dict[str, str] = field(default_factory=dict)
    # Options that the first start of the run that goes on derived, and that hold for it.
    derived: dict[str, Any] = field(default_factory=dict)
    # The summary of a run that has nothing left to do.
    finished: dict[str, Any] | None = None
    # Held as long as this object lives.
    lock: FileLock | None = None
    # Folders that were made for the run, innermost first.
    created: list[Path] = field(default_factory=list)

    @property
    def starts_anew(self) -> bool:
        """Whether the run begins at step 0."""
        return not self.sources and self.finished is None

    def discard(self) -> None:
        """Leave no trace of a run that was refused before it began."""
        if (self.path / "config.json").exists():
            return
        # What can no longer be removed stays: that is not why the run ends.
        with suppress(OSError):
            if self.lock is not None:
                # Before the release: a lock that another process waits for must stay.
                (self.path / LOCK).unlink(missing_ok=True)
                self.lock.release()
            for folder in self.created:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


def open_run(
    args: TrainingArguments,
    precision: str,
    say: Callable[[str], None],
    origin: dict[str, str] | None = None,
) -> Opened:
    """Decide what to do with SAVE_DIR/RUN_NAME and take its lock; only the main process calls it.

    `origin` says by field where the options come from (unset: all from flags). Raises BadInput when
    the folder cannot be written, is in use, or holds another run, or when --resume PATH holds no
    checkpoint.
    """
    path = folder_of(args)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    opened = Opened(path, origin=origin or {}, created=missing)
    try:
        opened.lock = _make_and_lock(path, args)
        look_inside(opened, args, precision, say)
    except BaseException:
        opened.discard()
        raise
    if opened.starts_anew and read_config(path) is not None:
        # It is of another run, that did nothing: this one must not go on with its tracker's id.
        (path / "config.json").unlink()
    return opened


def folder_of(args: TrainingArguments) -> Path:
    """SAVE_DIR/RUN_NAME; with --resume never, RUN_NAME-2, -3, ... if something is there.

    Raises BadInput where another run would write there, or this one in another's folder.
    """
    assert args.run_name is not None
    path = home(args.save_dir) / args.run_name
    fresh = path
    n = 1
    while args.resume == "never" and fresh.exists() and any(fresh.iterdir()):
        n += 1
        fresh = path.with_name(f"{path.name}-{n}")
    _check_place(fresh, args)
    return fresh


def _check_place(path: Path, args: TrainingArguments) -> None:
    """Raise BadInput where the run in `path` and one above or below it would write one folder."""
    path = Path(os.path.realpath(path))
    # Folders that may hold another run, with the folder of the outer run that the inner one is in.
    others = [(folder, path.relative_to(folder).parts[0]) for folder in path.parents]
    others += [(folder, folder.name) for folder in path.glob("*")]
    for folder, name in others:
        if WRITTEN.fullmatch(name) and read_config(folder) is not None:
            raise BadInput(
                f"--run-name {args.run_name}: a run in {path} and the one in {folder} would both "
                f"write the folder {name}; give another --run-name"
            )


# ---- the lock


def _make_and_lock(path: Path, args: TrainingArguments) -> FileLock:
    """Make the run folder and take its lock, which the system drops however this process ends."""
    lock_file = path / LOCK
    lock = FileLock(lock_file)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Where a file system has no locks, filelock keeps a record of its own in the file. If its
        # process is found dead at the first look, the next finds it gone.
        lock.acquire(timeout=0.2)
        if not isinstance(lock, SoftFileLock):
            lock_file.write_text(f"process {os.getpid()} on {platform.node()}\n")
    except Timeout:
        # Such a record has lines: process, host and more.
        owner = " on ".join(lock_file.read_text().splitlines()[:2]) or "another process"
        ways = "wait for it, or give another --run-name"
        if isinstance(lock, SoftFileLock):
            ways += f"; if it is gone, remove {lock_file}"
        raise BadInput(f"--run-name: {path} is in use by {owner}; {ways}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "is a file"
        where = error.filename or path
        raise BadInput(
            f"--save-dir {args.save_dir}: cannot write a run there: {where}: {reason}"
        ) from error
    return lock


# ---- what the folder holds


def look_inside(
    opened: Opened, args: TrainingArguments, precision: str, say: Callable[[str], None]
) -> None:
    """Set what `opened` says of the run to go on with; writes nothing.

    Raises BadInput as `open_run` does.
    """
    # --resume never: `folder_of` gave a folder with nothing in it.
    if args.resume == "never":
        return
    # --resume auto: what is in the folder goes on.
    if args.resume == "auto":
        _go_on_in_place(opened, args, precision, say)
        return
    opened.by_path = True
    source = home(args.resume)
    config = read_config(opened.path)
    began_there = config is not None and config["options"].get("resume") == args.resume
    # A run that has gone on from there needs it no longer.
    if began_there and _has_work(opened.path) and not source.is_dir():
        _go_on_in_place(opened, args, precision, say)
        return
    if not source.is_dir():
        raise BadInput(
            f"--resume {source}: no such folder; give auto, never, or a run or checkpoint folder"
        )
    if not (source / "checkpoints").is_dir() and not is_checkpoint(source):
        raise BadInput(f"--resume {source}: is no run folder and no checkpoints/step-* folder")
    source_run = source.parent.parent if is_checkpoint(source) else source
    is_free = not (opened.path / "config.json").exists() and not _has_work(opened.path)
    # --resume PATH, the folder holding nothing or being the one at PATH: go on, or back, to PATH.
    if is_free or source_run.resolve() == opened.path.resolve():
        _check_same_options(opened, source_run, args, precision)
        opened.config = read_config(source_run)
        if opened.config is None:
            say(f"resume: no config.json tells the options of {source}, so they are not compared")
        opened.sources = [source]
        return
    # --resume PATH, the folder holding a run that began at PATH: this very command began it. It may
    # have been killed before its first checkpoint.
    if began_there:
        _go_on_in_place(opened, args, precision, say)
        if not opened.finished:
            opened.sources.append(source)
        return
    # --resume PATH, the folder holding any other run.
    raise BadInput(
        f"--resume {args.resume}: {opened.path} holds another run already; "
        "give a --run-name of its own"
    )


def _go_on_in_place(
    opened: Opened, args: TrainingArguments, precision: str, say: Callable[[str], None]
) -> None:
    """Go on with what the run folder holds, if it holds anything."""
    path = opened.path
    config = read_config(path)
    # An empty folder, or one whose run cannot be told.
    if config is None:
        if _has_work(path):
            raise BadInput(
                f"--resume {args.resume}: {path} holds a run, but no config.json that says which; "
                "give another --run-name, or --resume never"
            )
        return
    # Another run that ended before its first row: there is nothing to go on with, or to lose.
    derived = derived_by(path, opened.origin)
    changed = changed_options(config, replace(args, **derived), precision)
    if args.resume == "auto" and changed and not _has_work(path):
        return
    # An unfinished or a finished run, of these options or others.
    _check_same_options(opened, path, args, precision)
    summary = read_summary(path)
    if not _is_finished(summary, args):
        opened.config = config if _has_work(path) else None
        opened.sources = [path]
        return
    # Nobody reads the images of a finished run, so there is no telling whether they are the same.
    trained_on = config["options"]["dataset"]
    if args.dataset != trained_on:
        raise BadInput(
            f"--dataset {args.dataset}: the run in {path} is finished, on {trained_on}; give that, "
            "or another --run-name"
        )
    opened.finished = summary
    say(
        f"run: {path} is finished (step {summary['steps']:,}, accuracy {summary['accuracy']:.2%}); "
        "to train it anew, give --resume never"
    )


def derived_by(run: Path, origin: dict[str, str]) -> dict[str, Any]:
    """Options that the first start of the run in `run` derived, and that no flag gives now."""
    config = read_as(Config, run / "config.json")
    if config is None:
        return {}
    return {
        name: getattr(config.options, name)
        for name in DERIVED_LATE
        if config.provenance.get(name) == "derived" and origin.get(name, "flag") != "flag"
    }


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint folder and not a run folder."""
    return (path / "manifest.json").is_file()


def _has_work(path: Path) -> bool:
    """Whether a run folder holds a logged row or a checkpoint."""
    metrics = path / "metrics.jsonl"
    has_rows = metrics.exists() and metrics.stat().st_size > 0
    return has_rows or any((path / "checkpoints").glob("step-*"))


def _is_finished(summary: dict[str, Any], args: TrainingArguments) -> bool:
    """Whether a run has nothing left to do: one that --max-steps cut short may be allowed more."""
    if summary.get("status") != "finished":
        return False
    total_steps: int = summary["total_steps"]
    allowed = min(args.max_steps or total_steps, total_steps)
    return summary["steps"] >= allowed


def _check_same_options(opened: Opened, run: Path, args: TrainingArguments, precision: str) -> None:
    """Raise BadInput where `run` computes something else than this command; keep what it derived.

    A checkpoint folder that lies in no run folder has no options to compare with.
    """
    config = read_config(run)
    derived = derived_by(run, opened.origin)
    args = replace(args, **derived)
    changed = [] if config is None else changed_options(config, args, precision)
    if not changed:
        opened.derived = derived
        return
    ways = "give the same options, another --run-name, or --resume never"
    more_epochs = any(change.startswith("--epochs ") for change in changed)
    if more_epochs and read_summary(run).get("status") == "finished":
        ways += f"; to train on from its weights: --checkpoint {run} --run-name NEW --epochs N"
    raise BadInput(
        f"--resume {args.resume}: {run} holds a run of another configuration "
        f"({'; '.join(changed)}); {ways}"
    )


def changed_options(config: dict[str, Any], args: TrainingArguments, precision: str) -> list[str]:
    """The options of a recorded run that this command changes, as `--flag old -> new`.

    Without those that change where or how it runs and not what it computes.
    """
    old = config["options"]
    # As JSON holds them, in which a tuple is a list.
    new = json.loads(json.dumps({**asdict(args), "mixed_precision": precision}))
    changed = []
    for name, value in new.items():
        # An earlier version had fewer options.
        if name in VOLATILE or name not in old or old[name] == value:
            continue
        if not _has_moved(name, config, args):
            changed.append(f"{flag(name)} {old[name]} -> {value}")
    return changed


def _has_moved(name: str, config: dict[str, Any], args: TrainingArguments) -> bool:
    """Whether option `name` only says where the same data or weights lie now."""
    # Folders of images are compared once they are read, by `check_images`.
    if name == "dataset":
        return home(args.dataset).is_dir()
    recorded = config.get("weights", {}).get(name)
    return bool(recorded) and recorded == starting_weights(args).get(name)


def check_images(opened: Opened, dataset: str, fingerprint: str) -> None:
    """Raise BadInput where the run that goes on was trained on other images than `dataset` holds.

    `fingerprint` is that of `dataset`.
    """
    old = opened.config["options"] if opened.config else {}
    if old.get("data_fingerprint", fingerprint) != fingerprint:
        raise BadInput(
            f"--dataset {dataset}: holds other images than {old['dataset']} did, on which this run "
            "was trained; give those, another --run-name, or --resume never"
        )
