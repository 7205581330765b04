"""The run folder: whether a command starts, continues or refuses, its lock, config.json and summary.json.

Imports nothing heavy, so that a refusal comes before torch is loaded.
"""

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cifar_accel.errors import BadInput
from cifar_accel.files import home
from cifar_accel.options.options import VOLATILE, TrainingArguments, flag
from cifar_accel.records.summary import read_config, read_summary


@dataclass
class Opened:
    """What to do with the run folder `path`.

    `resume_from` is a run or checkpoint folder to go on from, or None, and `fallback` another for where it holds no
    whole checkpoint; `finished` holds the summary of a run that has nothing left to do; `stale` says that it holds
    another run, which did nothing yet; `lock` is held as long as this object lives; `created` are the folders made for
    it.
    """

    path: Path
    resume_from: Path | None = None
    fallback: Path | None = None
    finished: dict[str, Any] | None = None
    stale: bool = False
    lock: FileLock | None = None
    created: list[Path] = field(default_factory=list)

    def discard(self) -> None:
        """Leave no trace of a run that was refused before it began."""
        if (self.path / "config.json").exists():
            return
        if self.lock is not None:
            for name in (
                ".owner",
                ".lock",
            ):  # before the release: a lock that another process waits for must stay
                (self.path / name).unlink(missing_ok=True)
            self.lock.release()
        for folder in self.created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def open_run(args: TrainingArguments, precision: str, say: Callable[[str], None]) -> Opened:
    """Decide what to do with SAVE_DIR/RUN_NAME and take its lock; only the main process calls it.

    Raises:
        BadInput: the folder cannot be written, is in use, holds a run of another configuration, or --resume PATH
            holds no checkpoint.
    """
    path = folder_of(args)
    opened = Opened(path, created=[f for f in (path, *path.parents) if not f.exists()])
    try:
        _make(path, args)
        opened.lock = _lock(path)
        look_inside(opened, args, precision, say)
        if opened.stale:
            (path / "config.json").unlink()
    except BaseException:
        opened.discard()
        raise
    return opened


def look_inside(
    opened: Opened, args: TrainingArguments, precision: str, say: Callable[[str], None]
) -> None:
    """Set `resume_from`, `finished` or `stale` of `opened` by what the folder, or --resume PATH, holds; writes nothing.

    Raises BadInput as `open_run` does.
    """
    path, explicit = opened.path, args.resume not in ("auto", "never")
    source = path
    if explicit:
        opened.resume_from = source = _find_resume(home(args.resume))
        source = source.parent.parent if is_checkpoint(source) else source
        if source.resolve() != path.resolve() and (
            (path / "config.json").exists() or _has_work(path)
        ):
            own = read_config(path)
            if own is None or own["options"].get("resume") != args.resume:
                raise BadInput(
                    f"--resume {args.resume}: {path} holds another run already; give a --run-name of its own"
                )
            explicit, source = False, path  # this very command began it: it goes on where it stands
            opened.resume_from, opened.fallback = path, opened.resume_from
    config = read_config(source)
    if config is None:
        if _has_work(path) and not explicit:
            raise BadInput(
                f"--resume {args.resume}: {path} holds a run, but no config.json that says which; give another "
                "--run-name, or --resume never"
            )
        return
    changed = changed_options(config, args, precision)
    if changed and args.resume in ("auto", "never") and not _has_work(path):
        opened.stale = (
            True  # it ended before its first log line: there is nothing to go on with or to lose
        )
        return
    if changed:
        raise BadInput(
            f"--resume {args.resume}: {source} holds a run of another configuration ({'; '.join(changed)}); "
            "give the same options, another --run-name, or --resume never"
        )
    summary = read_summary(path)
    if summary.get("status") == "finished" and not explicit and not _more_steps(args, summary):
        opened.finished = summary
        say(
            f"run: {path} is finished (step {summary['steps']:,}, accuracy {summary['accuracy']:.2%}); "
            "to train it anew, give --resume never"
        )
    elif opened.resume_from is None:
        opened.resume_from = path


def _has_work(path: Path) -> bool:
    """Whether a run folder holds a logged step or a checkpoint."""
    metrics = path / "metrics.jsonl"
    return (metrics.exists() and metrics.stat().st_size > 0) or any(
        (path / "checkpoints").glob("step-*")
    )


def _more_steps(args: TrainingArguments, summary: dict[str, Any]) -> bool:
    """Whether a run that --max-steps cut short is now allowed further."""
    return summary["steps"] < min(args.max_steps or summary["total_steps"], summary["total_steps"])


def folder_of(args: TrainingArguments) -> Path:
    """SAVE_DIR/RUN_NAME; with --resume never, RUN_NAME-2, -3, ... if something is there."""
    assert args.run_name is not None
    path = home(args.save_dir) / args.run_name
    n, fresh = 1, path
    while args.resume == "never" and fresh.exists() and any(fresh.iterdir()):
        n += 1
        fresh = path.with_name(f"{path.name}-{n}")
    return fresh


def _make(path: Path, args: TrainingArguments) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as e:
        where = e.filename or path
        reason = (
            "is a file"
            if isinstance(e, FileExistsError | NotADirectoryError)
            else (e.strerror or str(e))
        )
        raise BadInput(
            f"--save-dir {args.save_dir}: cannot write a run there: {where}: {reason}"
        ) from e


def _lock(path: Path) -> FileLock:
    """Take the folder's lock, which the system drops when this process ends, however it ends."""
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = (
            (path / ".owner").read_text().strip()
            if (path / ".owner").exists()
            else "another process"
        )
        raise BadInput(
            f"--run-name: {path} is in use by {owner}; wait for it, or give another --run-name"
        ) from None
    (path / ".owner").write_text(f"process {os.getpid()} on {platform.node()}\n")
    return lock


def _find_resume(path: Path) -> Path:
    if not path.is_dir():
        raise BadInput(
            f"--resume {path}: no such folder; give auto, never, or a run or checkpoint folder"
        )
    if not (path / "checkpoints").is_dir() and not is_checkpoint(path):
        raise BadInput(
            f"--resume {path}: holds no checkpoint (neither a run folder nor a checkpoints/step-* folder)"
        )
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint folder and not a run folder."""
    return (path / "manifest.json").is_file()


def changed_options(config: dict[str, Any], args: TrainingArguments, precision: str) -> list[str]:
    """Options that differ between a recorded run and this command and change what is computed, as `flag old -> new`."""
    old = config["options"]
    new = json.loads(json.dumps({**asdict(args), "mixed_precision": precision}))
    names = [n for n in new if n not in VOLATILE and n in old and old[n] != new[n]]
    return [f"{flag(n)} {old[n]} -> {new[n]}" for n in names]
