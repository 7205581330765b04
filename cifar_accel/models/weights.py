"""Weights in and out: starting weights in any form, and the saved form."""

import copy
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file

from cifar_accel.errors import BadInput, first_line
from cifar_accel.files import home, read_json
from cifar_accel.models import surgery
from cifar_accel.options.options import TrainingArguments
from cifar_accel.records import checkpoint

# ---- starting weights


def read_weights(path: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Read starting weights in any form, without unpickling anything that could run code.

    Args:
        path: a run folder, a model or checkpoint folder, a .safetensors or a .pth file.

    Returns:
        The file that was read, and its tensors by name, on the CPU.

    Raises:
        BadInput: the file is missing, cannot be read safely, or holds no state dict.
    """
    file = _find_weights(path)
    if file.suffix == ".safetensors":
        return file, _load_tensors(file)

    # Trainers wrap a state dict in a table with other things; an average goes before the weights.
    state = _load_tensors(file)
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not _is_state_dict(state):
        raise BadInput(
            f"--checkpoint {file}: holds no table of dense real tensors by name (a state dict)"
        )

    # What DataParallel and torch.compile put before each name.
    for prefix in ("module.", "_orig_mod."):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return file, state


def _find_weights(path: str) -> Path:
    """The file that --checkpoint PATH names: `path` itself, or the weights in that folder."""
    file = home(path)
    if file.is_dir():
        return _find_in_folder(file, path)
    if not file.is_file():
        raise BadInput(f"--checkpoint {path}: no such file or folder")
    return file


def _find_in_folder(folder: Path, path: str) -> Path:
    """The weights in a run folder, or in a model or checkpoint folder."""
    for file in (folder / "model" / "model.safetensors", folder / "model.safetensors"):
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


def _load_tensors(file: Path) -> Any:
    """What a file of weights holds. Raises BadInput when it cannot be read without running code."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    # A damaged or hostile file provokes any exception there is in the libraries.
    except Exception as e:
        reason = first_line(e)[:120]
        raise BadInput(f"--checkpoint {file}: cannot be read safely as weights ({reason})") from e


def _is_state_dict(value: Any) -> bool:
    """Whether `value` is a table of dense real tensors by name."""
    if not isinstance(value, dict):
        return False
    return all(isinstance(name, str) and _is_weight(entry) for name, entry in value.items())


def _is_weight(value: Any) -> bool:
    """Whether `value` is a dense real tensor with data."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return not value.is_complex() and not value.is_meta


def load_weights(model: torch.nn.Module, path: str) -> str:
    """Load `path` (see `read_weights`) into `model` in place; returns a line on what matched.

    A classifier of another size keeps its new values. Raises BadInput when anything else is missing
    or has another shape.
    """
    file, state = read_weights(path)
    own = model.state_dict()
    head = {name for name in own if name.startswith(_classifier_prefixes(model))}
    matched = {
        name: state[name]
        for name, tensor in own.items()
        if name in state and state[name].shape == tensor.shape
    }

    # Only the classifier may have another shape than the file's, or not be in it at all.
    for name in own:
        if name in state and name not in matched and name not in head:
            shapes = f"{list(state[name].shape)}, the model's is {list(own[name].shape)}"
            raise BadInput(f"--checkpoint {file}: does not fit --model: {name} has shape {shapes}")
    missing = [name for name in own if name not in state and name not in head]
    if missing:
        raise BadInput(
            f"--checkpoint {file}: does not fit --model: {len(missing)} of the model's {len(own)} "
            f"tensors are not in it, first {missing[0]}"
        )
    model.load_state_dict(matched, strict=False)

    # What was new to the model, or to the file.
    line = f"model: {len(matched)} of {len(own)} tensors from {file}"
    fresh = [name for name in own if name not in matched]
    if fresh:
        line += f"; new: {', '.join(fresh)}"
    unused = [name for name in state if name not in own]
    if unused:
        line += f"; not used: {len(unused)}, first {unused[0]}"
    return line


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
    mean = args.mean or config.get("mean")
    std = args.std or config.get("std")
    return tuple(mean), tuple(std)


# ---- the saved form


def save_model(model: Any, folder: Path, args: TrainingArguments, classes: list[str]) -> None:
    """Write `folder` in timm's local-dir form: config.json and model.safetensors.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the model back. `classes` are the
    names of its outputs.
    """
    # How images must be made for it; timm's transforms follow this.
    mean, std = input_statistics(args, model)
    data_config = {
        "input_size": (3, args.image_size, args.image_size),
        "mean": mean,
        "std": std,
        "crop_pct": args.crop_pct,
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
    # The number of classes stands beside them already, and transformers takes it once only.
    config = read_json(folder / "config.json")
    config.get("model_args", {}).pop("num_classes", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


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
