"""Resumable checkpoints: written aside and renamed into place, verified before they are loaded.

Every process holds the same weights and optimizer state, and nothing random has a state, so the
main process alone writes, and a checkpoint is whole without the others.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cifar_accel import console
from cifar_accel.errors import BadInput, first_line
from cifar_accel.files import adapter, read_as, sha256, share, sync, write_json
from cifar_accel.records.folder import Opened, is_checkpoint
from cifar_accel.records.state import State

# The format of a checkpoint folder that this version writes. It loads every earlier one too:
# 1 and 2 hold the sums of state.json as lists, without names; 1 has no time spent waiting for
# input; 2 has a flag `due` for a row that was still to be logged.
FORMAT = 3

# The sums of state.json, in the order in which formats 1 and 2 list them.
SUMS = ("loss", "correct", "images")
WINDOW = (*SUMS, "seconds", "waiting")

# The name of a whole checkpoint.
NAME = re.compile(r"step-\d{8}")

# A folder that a killed process left behind, half written or half removed.
UNFINISHED = re.compile(r"step-\d{8}(\.old)?\.tmp")

# What every checkpoint holds beside its manifest.
REQUIRED = {"model.safetensors", "optimizer.pt", "state.json"}

REMEDY = "take its folder away to go on from the one before"

# Says a line that it has not said before.
say_once = functools.cache(console.say)


@dataclass(frozen=True)
class File:
    """One file of a checkpoint, as its manifest describes it."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json: which format a checkpoint has, and its files by name."""

    format: int
    files: dict[str, File]


# ---- writing


def save_checkpoint(
    run_dir: Path,
    model: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    ema: dict[str, torch.Tensor] | None,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write checkpoints/step-XXXXXXXX/ of a run; only the main process calls it.

    A checkpoint of this step that is there already is replaced: it is damaged or from elsewhere.
    The host waits for the device, to copy the tensors.

    Args:
        run_dir: the run folder.
        model: state dict of the unwrapped model.
        optimizer: state dict of the optimizer.
        ema: state dict of the averaged weights, or None.
        state: the loop's state, JSON values; `step` is the number of optimizer steps taken.
        keep: how many checkpoints stay.

    Raises:
        OSError: it could not be written; earlier checkpoints are as they were.
    """
    parent = run_dir / "checkpoints"
    final = parent / f"step-{state['step']:08d}"
    scratch = parent / f"{final.name}.tmp"
    # A kill at any moment must leave the last good checkpoint. So the new one is written under
    # another name, gets its own in one rename once every byte of it is on the disk, and only
    # then may older ones go.
    _remove_unfinished(parent)
    scratch.mkdir(parents=True)
    try:
        _write_files(scratch, model, optimizer, ema, state)
        _write_manifest(scratch, state["step"])
        _put_in_place(scratch, final)
    finally:
        # Gone already where all went well. A full disk has no room for a part of a checkpoint.
        shutil.rmtree(scratch, ignore_errors=True)
    _rotate(run_dir, final, keep)
    return final


def _remove_unfinished(parent: Path) -> None:
    for folder in parent.glob("step-*.tmp"):
        if UNFINISHED.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _write_files(
    folder: Path,
    model: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    ema: dict[str, torch.Tensor] | None,
    state: dict[str, Any],
) -> None:
    # The host waits here, for the copies.
    weights = _on_host(model)
    averages = None if ema is None else _on_host(ema)
    with _failures_as_os_errors():
        save_file(weights, folder / "model.safetensors")
        if averages is not None:
            save_file(averages, folder / "ema.safetensors")
        torch.save(optimizer, folder / "optimizer.pt")
    (folder / "state.json").write_text(json.dumps(state, allow_nan=False))


def _on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in the host's memory, contiguous as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


@contextmanager
def _failures_as_os_errors() -> Iterator[None]:
    """torch and safetensors have errors of their own for a disk that is full."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"cannot be written ({first_line(error)})") from error


def _write_manifest(folder: Path, step: int) -> None:
    # The manifest comes last, when the bytes that it vouches for are on the disk. It is what makes
    # the folder a checkpoint.
    files = {}
    for file in sorted(folder.iterdir()):
        share(file)
        sync(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(folder / "manifest.json", {"format": FORMAT, "step": step, "files": files})
    sync(folder)


def _put_in_place(scratch: Path, final: Path) -> None:
    """Rename a whole checkpoint to its name; raises OSError where a stranger's folder has it."""
    replaced = None
    if final.exists():
        # A folder cannot be renamed onto another. What is at the place is no good checkpoint, so
        # nothing is lost by a kill between the two renames.
        replaced = _set_aside_to_remove(final)
    os.rename(scratch, final)
    # The rename itself must survive a power cut before anything older is removed.
    if not sync(final.parent):
        say_once(f"warning: {final.parent} cannot be synced: a power cut may take a checkpoint")
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _rotate(run_dir: Path, newest: Path, keep: int) -> None:
    """Remove the oldest checkpoints beyond `keep`; those after `newest` are not counted."""
    # One after `newest` is damaged, or this run would have gone on from it.
    older = [path for path in list_checkpoints(run_dir) if path.name < newest.name]
    ours = [path for path in older if is_checkpoint(path)]
    for path in ours[keep - 1 :]:
        # The new checkpoint is safe, and that is what counts.
        with suppress(OSError):
            shutil.rmtree(_set_aside_to_remove(path), ignore_errors=True)


def _set_aside_to_remove(path: Path) -> Path:
    """Take a checkpoint's name away, before its files go; returns what it is called now.

    So whatever has the name of a checkpoint is whole, also after a kill in mid-removal. Raises
    OSError for a folder that `save_checkpoint` did not write: others of such a name are left alone.
    """
    if not is_checkpoint(path):
        raise OSError(f"{path} is in the way: it is no checkpoint of this trainer")
    return path.rename(path.with_name(path.name + ".old.tmp"))


# ---- which there are


def step_of(path: Path) -> int:
    """`checkpoints/step-00000012` -> 12."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    folders = (run_dir / "checkpoints").glob("step-*")
    checkpoints = [path for path in folders if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(checkpoints, reverse=True)


def newest_valid(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; says of each newer one why it is passed over."""
    for path in list_checkpoints(run_dir):
        problem = fault(path)
        if problem is None:
            return path
        say(f"resume: {path} is passed over: {problem}")
    return None


def choose(opened: Opened, say: Callable[[str], None]) -> Path | None:
    """The whole checkpoint that a run goes on from; None for a run that begins.

    What is passed over is said, and where nothing is left to go on from. Raises BadInput where
    --resume PATH leads to no whole checkpoint.
    """
    sources = [source for source in (opened.resume_from, opened.fallback) if source]
    for source in sources:
        if not is_checkpoint(source):
            found = newest_valid(source, say)
            if found is not None:
                return found
            continue
        problem = fault(source)
        if problem is not None:
            raise BadInput(f"--resume {source}: {problem}")
        return source
    if opened.by_path:
        raise BadInput(
            f"--resume {sources[-1]}: holds no whole checkpoint; give another, or leave it out"
        )
    if sources:
        say(f"resume: {opened.path} holds no whole checkpoint: the run begins anew")
    return None


def set_later_aside(run_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, from which a run goes on anew; returns the new names."""
    later = [path for path in list_checkpoints(run_dir) if step_of(path) > step]
    return [path.rename(_unused_name(path)) for path in later]


def _unused_name(path: Path) -> Path:
    """`step-00000012.aside-1`, or the first higher number that is not taken."""
    n = 1
    while path.with_name(f"{path.name}.aside-{n}").exists():
        n += 1
    return path.with_name(f"{path.name}.aside-{n}")


# ---- reading


def fault(path: Path) -> str | None:
    """What is wrong with checkpoint folder `path`.

    None where every file of its manifest is there, with its size and SHA-256.
    """
    manifest = read_as(Manifest, path / "manifest.json")
    if manifest is None:
        return "its manifest cannot be read"
    if manifest.format > FORMAT:
        return f"was written by a newer version (format {manifest.format})"
    if not manifest.files.keys() >= REQUIRED:
        return "its manifest names no model, optimizer or state"
    for name, described in manifest.files.items():
        try:
            problem = _file_fault(path, name, described)
        except (OSError, ValueError) as error:
            # Missing, unreadable, or of a name that no file can have.
            return f"a file of its manifest cannot be read ({error})"
        if problem is not None:
            return problem
    return None


def _file_fault(folder: Path, name: str, described: File) -> str | None:
    """What is wrong with one file of a manifest, or None.

    Raises OSError or ValueError where there is no such file to read.
    """
    if Path(name).name != name:
        return f"its manifest names a file outside the folder ({name})"
    if (folder / name).stat().st_size != described.bytes:
        return f"{name} has the wrong size"
    if sha256(folder / name) != described.sha256:
        return f"{name} does not have the SHA-256 of its manifest"
    return None


def read_state(path: Path) -> State:
    """The loop's state in checkpoint folder `path`, whose `fault` is None.

    Raises BadInput when no training wrote it.
    """
    manifest = read_as(Manifest, path / "manifest.json")
    values = read_as(dict[str, Any], path / "state.json")
    if manifest and values:
        # Strictly, by the rules of JSON: there a whole number is a float too.
        text = json.dumps(upgrade(values, manifest.format))
        with suppress(ValueError):
            state: State = adapter(State).validate_json(text, strict=True)
            if state.step >= 0:
                return state
    raise BadInput(f"--resume {path}: its state.json is none that this trainer writes; {REMEDY}")


def upgrade(state: dict[str, Any], written_format: int) -> dict[str, Any]:
    """The content of a state.json of format `written_format` in the form of this version.

    Values of a wrong type stay as they are, for the reader of the types to refuse.
    """
    if written_format == FORMAT:
        return state
    # What format 1 did not have yet.
    upgraded = {"gradient_norm": 0.0, "evaluated_step": -1, **state}
    window = upgraded.get("window")
    if isinstance(window, list) and len(window) == 4:
        window = [*window, 0.0]
    upgraded["window"] = _with_names(WINDOW, window)
    upgraded["epoch"] = _with_names(SUMS, upgraded.get("epoch"))
    # A row that was still to be logged is logged whenever the window is not empty and this start's
    # options ask for a row there.
    upgraded.pop("due", None)
    return upgraded


def _with_names(names: tuple[str, ...], values: Any) -> Any:
    if isinstance(values, list) and len(values) == len(names):
        return dict(zip(names, values, strict=True))
    return values


def load_checkpoint(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: torch.nn.Module | None,
) -> None:
    """Load a checkpoint into the unwrapped model, the optimizer and the average, in place.

    All ranks enter. Raises BadInput when it was not written by this model and optimizer, or not by
    `save_checkpoint`.
    """
    try:
        model.load_state_dict(_read_tensors(path / "model.safetensors"))
        if ema is not None:
            ema.load_state_dict(_read_tensors(path / "ema.safetensors"))
        optimizer.load_state_dict(_read_tensors(path / "optimizer.pt"))
        _match_layouts(optimizer)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        # What torch raises for other names, shapes or groups.
        raise BadInput(
            f"--resume {path}: is a checkpoint of another model or optimizer ({first_line(error)})"
        ) from error


def _read_tensors(file: Path) -> Any:
    """The tensors of a file by name, or an optimizer's state dict, on the host.

    torch and safetensors run nothing that a file names. Raises BadInput where it cannot be read.
    """
    try:
        if file.suffix == ".pt":
            return torch.load(file, map_location="cpu", weights_only=True)
        return load_file(file)
    except Exception as error:
        # There is no telling what the libraries make of a stranger's bytes.
        raise BadInput(
            f"--resume {file.parent}: {file.name} cannot be read ({type(error).__name__}); {REMEDY}"
        ) from error


def _match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments the memory layout of their weights, which fused optimizers rely on.

    The weights may be channels-last now where they were contiguous in the run that saved them.
    """
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if torch.is_tensor(moment) and moment.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(moment)
