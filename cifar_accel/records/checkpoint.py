"""Resumable checkpoints: written aside and renamed into place, verified before they are loaded.

Every process holds the same weights and optimizer state, and nothing random has a state, so the
main process alone writes, and a checkpoint is whole without the others.
"""

import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
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
# input; 2 has a flag `due`, which means nothing any more.
FORMAT = 3

# The sums of state.json, in the order in which formats 1 and 2 list them.
SUMS = {
    "window": ("loss", "correct", "images", "seconds", "waiting"),
    "epoch": ("loss", "correct", "images"),
}

# The names of whole checkpoints. A killed process may leave one with .tmp behind it, half written,
# or with .old.tmp, half removed.
NAMES = "step-" + 8 * "[0-9]"

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
    for leftover in (*parent.glob(f"{NAMES}.tmp"), *parent.glob(f"{NAMES}.old.tmp")):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        _write_files(scratch, model, optimizer, ema, state)
        _put_in_place(scratch, final)
    finally:
        # Gone already where all went well. A full disk has no room for a part of a checkpoint.
        shutil.rmtree(scratch, ignore_errors=True)
    _rotate(run_dir, final, keep)
    return final


def _write_files(
    folder: Path,
    model: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    ema: dict[str, torch.Tensor] | None,
    state: dict[str, Any],
) -> None:
    """Write all files of a checkpoint; raises OSError where there is no room."""
    # The host waits here, for the copies.
    weights = {"model.safetensors": _on_host(model)}
    if ema is not None:
        weights["ema.safetensors"] = _on_host(ema)
    try:
        for name, tensors in weights.items():
            save_file(tensors, folder / name)
        torch.save(optimizer, folder / "optimizer.pt")
    except (RuntimeError, SafetensorError) as error:
        # Errors of their own for a disk that is full.
        raise OSError(f"cannot be written ({first_line(error)})") from error
    (folder / "state.json").write_text(json.dumps(state, allow_nan=False))

    # The manifest comes last, when the bytes that it vouches for are on the disk. It is what makes
    # the folder a checkpoint.
    files = {}
    for file in sorted(folder.iterdir()):
        share(file)
        sync(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    manifest = {"format": FORMAT, "step": state["step"], "files": files}
    write_json(folder / "manifest.json", manifest)
    sync(folder)


def _on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in the host's memory, contiguous as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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
    named = (run_dir / "checkpoints").glob(NAMES)
    return sorted((path for path in named if path.is_dir()), reverse=True)


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
    for source in opened.sources:
        if is_checkpoint(source):
            problem = fault(source)
            if problem is not None:
                raise BadInput(f"--resume {source}: {problem}")
            return source
        found = newest_valid(source, say)
        if found is not None:
            return found
    if opened.by_path:
        named = opened.sources[-1]
        raise BadInput(
            f"--resume {named}: holds no whole checkpoint; give another, or leave it out"
        )
    if opened.sources:
        say(f"resume: {opened.path} holds no whole checkpoint: the run begins anew")
    return None


def set_later_aside(run_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, from which a run goes on anew; returns the new names."""
    aside = []
    for path in list_checkpoints(run_dir):
        if step_of(path) > step:
            # The first number that is not taken.
            names = (path.with_name(f"{path.name}.aside-{n}") for n in itertools.count(1))
            aside.append(path.rename(next(name for name in names if not name.exists())))
    return aside


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
    try:
        for name, described in manifest.files.items():
            if Path(name).name != name:
                return f"its manifest names a file outside the folder ({name})"
            if (path / name).stat().st_size != described.bytes:
                return f"{name} has the wrong size"
            if sha256(path / name) != described.sha256:
                return f"{name} does not have the SHA-256 of its manifest"
    except (OSError, ValueError) as error:
        # Missing, unreadable, or of a name that no file can have.
        return f"a file of its manifest cannot be read ({error})"
    return None


def read_state(path: Path) -> State:
    """The loop's state in checkpoint folder `path`, whose `fault` is None.

    Raises BadInput when no training wrote it.
    """
    values = read_as(dict[str, Any], path / "state.json")
    if values:
        # Strictly, by the rules of JSON: there a whole number is a float too.
        with suppress(ValueError):
            state: State = adapter(State).validate_json(json.dumps(upgrade(values)), strict=True)
            return state
    raise BadInput(f"--resume {path}: its state.json is none that this trainer writes; {REMEDY}")


def upgrade(state: dict[str, Any]) -> dict[str, Any]:
    """The content of a state.json, with names for the sums that formats 1 and 2 list.

    What is no such list stays as it is, for the reader of the types to judge.
    """
    upgraded = dict(state)
    for key, names in SUMS.items():
        sums = state.get(key)
        # All of them, or without the last, `waiting` of format 1, which has a default.
        if isinstance(sums, list) and len(names) - len(sums) in (0, 1):
            upgraded[key] = dict(zip(names, sums, strict=False))
    return upgraded


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
