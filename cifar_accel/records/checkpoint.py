"""Resumable checkpoints: write aside -> fsync -> manifest -> rename -> rotate; verify before loading.

Every process holds the same weights and optimizer state and nothing random has state, so the main process alone writes
and a checkpoint is whole without the others.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cifar_accel.errors import BadInput
from cifar_accel.files import sync, write_json
from cifar_accel.records.folder import is_checkpoint

FORMAT = 2  # 1: before a stop inside an evaluation; every format ever released is loaded by a test


NAME = re.compile(r"step-\d{8}")


LEFT = re.compile(r"step-\d{8}(\.old)?\.tmp")  # by a kill


REMEDY = "take its folder away to go on from the one before"


def save_checkpoint(
    run_dir: Path,
    model: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    ema: dict[str, torch.Tensor] | None,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write checkpoints/step-XXXXXXXX/ of `run_dir`; only the main process calls it.

    The folder appears by a rename once every byte is on the disk, and only then are older ones beyond `keep` removed,
    so a kill at any moment leaves the last good checkpoint. The host waits here for the device, to copy the tensors.

    Args:
        run_dir: the run folder.
        model: state dict of the unwrapped model.
        optimizer: state dict of the optimizer.
        ema: state dict of the averaged weights, or None.
        state: the loop's state, JSON values; `step` is the number of finished optimizer steps.
        keep: how many checkpoints stay.

    Raises:
        OSError: it could not be written; earlier checkpoints are as they were.
    """
    parent = run_dir / "checkpoints"
    final = parent / f"step-{state['step']:08d}"
    scratch = parent / f"{final.name}.tmp"
    for left in parent.glob("step-*.tmp"):
        if LEFT.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        save_file(_flat(model), scratch / "model.safetensors")
        torch.save(optimizer, scratch / "optimizer.pt")
        if ema is not None:
            save_file(_flat(ema), scratch / "ema.safetensors")
        (scratch / "state.json").write_text(json.dumps(state))
        files = {}
        for file in sorted(scratch.iterdir()):
            sync(file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        write_json(
            scratch / "manifest.json", {"format": FORMAT, "step": state["step"], "files": files}
        )
        sync(scratch)
        if (
            final.exists()
        ):  # left by an earlier attempt; what is whole is not worth a moment without it
            if (
                fault(final) is None
                and sha256(final / "model.safetensors") == files["model.safetensors"]["sha256"]
            ):
                shutil.rmtree(scratch)
                return final
            _remove(final)
        os.rename(scratch, final)
        sync(parent)
    except BaseException as e:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(
            e, RuntimeError | SafetensorError
        ):  # how torch and safetensors report a write that failed
            raise OSError(f"cannot be written ({str(e).splitlines()[0]})") from e
        raise
    older = [path for path in list_checkpoints(run_dir) if path.name < final.name and is_ours(path)]
    for old in older[keep - 1 :]:
        with suppress(OSError):  # the new one is safe, that is what counts
            _remove(old)
    return final


def _remove(path: Path) -> None:
    """Take a checkpoint away, its name first: what has a checkpoint's name is whole, also after a kill.

    Raises OSError for a folder that is none of this trainer's.
    """
    if not is_ours(path):
        raise OSError(f"{path} is in the way: it is no checkpoint of this trainer")
    aside = path.with_name(path.name + ".old.tmp")
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _flat(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def is_ours(path: Path) -> bool:
    """Whether `save_checkpoint` wrote folder `path`: whatever else may have the name of a checkpoint is left alone."""
    return (path / "manifest.json").is_file()


def set_later_aside(run_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, from which a run goes on anew; returns what they are called now."""
    renamed = []
    for path in list_checkpoints(run_dir):
        if step_of(path) > step:
            aside = next(
                p
                for n in itertools.count(1)
                if not (p := path.with_name(f"{path.name}.aside-{n}")).exists()
            )
            renamed.append(path.rename(aside))
    return renamed


def step_of(path: Path) -> int:
    """`checkpoints/step-00000012` -> 12."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    folders = (run_dir / "checkpoints").glob("step-*")
    return sorted((f for f in folders if NAME.fullmatch(f.name) and f.is_dir()), reverse=True)


def fault(path: Path) -> str | None:
    """What is wrong with checkpoint folder `path`, or None when every file is there with its size and SHA-256."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] > FORMAT:
            return f"was written by a newer version (format {manifest['format']})"
        for name, entry in manifest["files"].items():
            if Path(name).name != name:
                return f"its manifest names a file outside the folder ({name})"
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has the wrong size"
            if sha256(path / name) != entry["sha256"]:
                return f"{name} does not have the SHA-256 of its manifest"
        if not {"model.safetensors", "optimizer.pt", "state.json"} <= manifest["files"].keys():
            return "its manifest names no model, optimizer or state"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"its manifest or a file cannot be read ({e})"
    return None


def newest_valid(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; says of each newer one why it is passed over."""
    for path in list_checkpoints(run_dir):
        problem = fault(path)
        if problem is None:
            return path
        say(f"resume: {path} is passed over: {problem}")
    return None


def choose(sources: Iterable[Path | None], say: Callable[[str], None]) -> Path | None:
    """The first of `sources` (run or checkpoint folders) that has a whole checkpoint gives it.

    Raises BadInput for a checkpoint folder that is not whole.
    """
    for source in filter(None, sources):
        if is_checkpoint(source):
            if problem := fault(source):
                raise BadInput(f"--resume {source}: {problem}")
            return source
        if found := newest_valid(source, say):
            return found
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The loop's state in checkpoint folder `path`."""
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


def load_checkpoint(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: torch.nn.Module | None,
) -> None:
    """Load checkpoint folder `path` into the unwrapped model, the optimizer and the average, in place; all ranks enter.

    Raises BadInput when it was not written by this model and optimizer, or not by `save_checkpoint`.
    """
    found: dict[str, Any] = {}
    for name in (
        "model.safetensors",
        "optimizer.pt",
        *(["ema.safetensors"] if ema is not None else []),
    ):
        try:
            found[name] = _read(path / name)
        except OSError as e:
            raise BadInput(f"--resume {path}: {name}: {e.strerror or e}") from e
        except MemoryError:
            raise
        except Exception as e:  # whatever bytes that a stranger put there make of the libraries
            raise BadInput(
                f"--resume {path}: {name} cannot be read ({type(e).__name__}); {REMEDY}"
            ) from e
    try:
        model.load_state_dict(found["model.safetensors"])
        if ema is not None:
            ema.load_state_dict(found["ema.safetensors"])
        optimizer.load_state_dict(found["optimizer.pt"])
        for (
            parameter,
            moments,
        ) in optimizer.state.items():  # fused kernels need the weights' own layout
            for name, moment in moments.items():
                if torch.is_tensor(moment) and moment.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(moment)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadInput(
            f"--resume {path}: is a checkpoint of another model or optimizer ({str(e).splitlines()[0]})"
        ) from e


def _read(file: Path) -> Any:
    """Tensors by name, or an optimizer's state dict; torch runs nothing that a file names."""
    if file.suffix == ".pt":
        return torch.load(file, map_location="cpu", weights_only=True)
    return load_file(file)


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
