"""Weights in and out: starting weights in any form, and the saved form."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed

from cifar_accel.errors import BadInput, first_line
from cifar_accel.files import home, read_json
from cifar_accel.models import surgery
from cifar_accel.options.options import TrainingArguments
from cifar_accel.records import checkpoint

# ---- starting weights


def read_weights(path: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Read starting weights in any form, without unpickling anything that could run code.

    `path` is a run folder, a model or checkpoint folder, a .safetensors or a .pth file. Returns the
    file that was read, and its tensors by name, on the CPU; an average goes before the weights.
    Raises BadInput when it is missing, cannot be read safely, or holds no state dict.
    """
    file = _find_weights(path)
    try:
        # timm unwraps what trainers put around a state dict, and before its names.
        state = timm.models.load_state_dict(str(file), weights_only=True)
    # A damaged or hostile file provokes any exception there is in the libraries.
    except Exception as e:
        reason = first_line(e)[:120]
        raise BadInput(f"--checkpoint {file}: cannot be read safely as weights ({reason})") from e
    if not all(map(_is_weight, state.values())):
        raise BadInput(
            f"--checkpoint {file}: holds no table of dense real tensors by name (a state dict)"
        )
    return file, state


def _find_weights(path: str) -> Path:
    """The file that --checkpoint PATH names: `path` itself, or the weights in that folder."""
    folder = home(path)
    if not folder.exists():
        raise BadInput(f"--checkpoint {path}: no such file or folder")
    for file in (folder, folder / "model" / "model.safetensors", folder / "model.safetensors"):
        if file.is_file():
            return file
    # An unfinished run has checkpoints, the newest first. A damaged one is passed over.
    for resumable in checkpoint.list_checkpoints(folder):
        if checkpoint.fault(resumable) is None:
            return resumable / "model.safetensors"
    raise BadInput(
        f"--checkpoint {path}: this folder holds no model.safetensors "
        "(nor model/, nor a whole checkpoint)"
    )


def _is_weight(value: Any) -> bool:
    """Whether `value` is a dense real tensor with data."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return not value.is_complex() and not value.is_meta


def load_weights(model: torch.nn.Module, path: str) -> str:
    """Load `path` (see `read_weights`) into `model` in place; returns a line on what matched.

    A classifier of another size keeps its new values, and position embeddings are resampled. Raises
    BadInput when anything else is missing or has another shape.
    """
    file, state = read_weights(path)
    own = model.state_dict()
    resampled = _fit_positions(model, state, own)
    matched = {n: t for n, t in state.items() if n in own and t.shape == own[n].shape}
    fresh = [name for name in own if name not in matched]

    # Only the classifier may have another shape than the file's, or not be in it at all.
    unfit = [name for name in fresh if not name.startswith(_classifier_prefixes(model))]
    for name in unfit:
        if name in state:
            shapes = f"{list(state[name].shape)}, the model's is {list(own[name].shape)}"
            raise BadInput(f"--checkpoint {file}: does not fit --model: {name} has shape {shapes}")
    if unfit:
        raise BadInput(
            f"--checkpoint {file}: does not fit --model: {len(unfit)} of the model's {len(own)} "
            f"tensors are not in it, first {unfit[0]}"
        )
    model.load_state_dict(matched, strict=False)

    # What was new to the model, or to the file.
    line = f"model: {len(matched)} of {len(own)} tensors from {file}{resampled}"
    if fresh:
        line += f"; new: {', '.join(fresh)}"
    unused = [name for name in state if name not in own]
    if unused:
        line += f"; not used: {len(unused)}, first {unused[0]}"
    return line


def _fit_positions(model: Any, state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> str:
    """Resample a ViT's position embeddings in `state` to the grid of `model`, as timm does it.

    Returns a word on it; "" where there is nothing to do, or where they are no square grid.
    """
    theirs, ours = state.get("pos_embed"), own.get("pos_embed")
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if theirs is None or ours is None or grid is None or theirs.shape == ours.shape:
        return ""
    # [1, tokens, width], of which the first may be of no patch.
    if theirs.ndim != 3 or theirs.shape[::2] != ours.shape[::2]:
        return ""
    before = ours.shape[1] - math.prod(grid)
    side = math.isqrt(max(0, theirs.shape[1] - before))
    if not side or side**2 != theirs.shape[1] - before:
        return ""
    state["pos_embed"] = resample_abs_pos_embed(theirs, grid, num_prefix_tokens=before)
    return f"; pos_embed resampled from {side}x{side} to {grid[0]}x{grid[1]}"


def check_finite(model: torch.nn.Module, where: str) -> None:
    """Raise BadInput, beginning with `where`, for a parameter or buffer that is not finite."""
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise BadInput(f"{where}: its weights are damaged: {name} is not finite")


# ---- what timm's configuration says of a model


def _classifier_prefixes(model: Any) -> tuple[str, ...]:
    """What the names of the final classifier's parameters begin with; a distilled ViT has two."""
    modules = model.pretrained_cfg.get("classifier") or ()
    if isinstance(modules, str):
        modules = (modules,)
    return tuple(f"{module}." for module in modules)


def classifier_parameters(model: Any) -> set[torch.nn.Parameter]:
    """The parameters of the final classifier, found by name in timm's configuration."""
    prefixes = _classifier_prefixes(model)
    return {parameter for name, parameter in model.named_parameters() if name.startswith(prefixes)}


def input_statistics(
    args: TrainingArguments, model: Any
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and deviations for images in [0, 1]: the options', else the model's own."""
    # timm's configuration has those with which the weights were trained.
    config = model.pretrained_cfg
    return tuple(args.mean or config["mean"]), tuple(args.std or config["std"])


# ---- the saved form

# How timm cuts a test image to a square: what `Pipeline` does too.
CROP_MODE = "center"


def save_model(model: Any, folder: Path, args: TrainingArguments, classes: list[str]) -> None:
    """Write `folder` in timm's local-dir form: config.json and model.safetensors.

    `classes` are the names of the model's outputs.
    """
    # How images must be made for it; timm's transforms follow this.
    mean, std = input_statistics(args, model)
    data_config = {
        "input_size": (3, args.input_size, args.input_size),
        "mean": mean,
        "std": std,
        "crop_pct": args.crop_pct,
        # Some published weights were tested on squeezed images.
        "crop_mode": CROP_MODE,
        "interpolation": args.interpolation,
    }
    # safetensors takes the contiguous layout only, and the model in training keeps its own.
    if not all(tensor.is_contiguous() for tensor in model.state_dict().values()):
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={"label_names": classes},
        safe_serialization=True,
        data_config=data_config,
    )
    config = for_transformers(read_json(folder / "config.json"))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def for_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config.json with its number of classes once; transformers trips over it twice."""
    arguments = dict(config.get("model_args") or {})
    arguments.pop("num_classes", None)
    return config | {"model_args": arguments}


def load_model(folder: Path) -> torch.nn.Module:
    """The model that `save_model` wrote to `folder`, on the CPU, changed as in training.

    Raises BadInput when the folder cannot be read as one, or the weights are not finite.
    """
    try:
        model: torch.nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    # A damaged file provokes any exception there is in the libraries.
    except Exception as e:
        reason = " ".join(str(e).split())[:150]
        raise BadInput(f"{folder}: cannot be read as a model ({reason})") from e
    check_finite(model, str(folder))
    surgery.apply(model)
    return model
