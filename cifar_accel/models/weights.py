"""Weights in and out: starting weights in any form, and the saved form."""

import copy
from pathlib import Path
from typing import Any

import timm
import timm.optim
import torch
from safetensors.torch import load_file

from cifar_accel.errors import BadInput
from cifar_accel.files import home
from cifar_accel.options.options import TrainingArguments
from cifar_accel.records import checkpoint


def read_weights(path: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Read a state dict from a run folder, a model or checkpoint folder, a .safetensors or a .pth file.

    Nothing that could run code is unpickled. Raises BadInput when the file is missing or cannot be read so.
    """
    file = home(path)
    if file.is_dir():
        inside = [file / "model" / "model.safetensors", file / "model.safetensors"]
        steps = [
            p / "model.safetensors"
            for p in checkpoint.list_checkpoints(file)
            if checkpoint.fault(p) is None
        ]
        found = [f for f in inside if f.is_file()] + steps[:1]
        if not found:
            raise BadInput(
                f"--checkpoint {path}: this folder holds no model.safetensors (nor model/, nor a whole checkpoint)"
            )
        file = found[0]
    if not file.is_file():
        raise BadInput(f"--checkpoint {path}: no such file or folder")
    try:
        if file.suffix == ".safetensors":
            return file, load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a damaged or hostile file provokes
        raise BadInput(
            f"--checkpoint {file}: cannot be read safely as weights ({str(e).splitlines()[0][:120]})"
        ) from e
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and _is_weight(v) for k, v in state.items()
    ):
        raise BadInput(
            f"--checkpoint {file}: holds no table of dense real tensors by name (a state dict)"
        )
    for prefix in ("module.", "_orig_mod."):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return file, state


def _is_weight(value: Any) -> bool:
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return plain and not value.is_complex() and not value.is_meta


def load_weights(model: torch.nn.Module, path: str) -> str:
    """Load `path` (see `read_weights`) into `model` in place and return a line that says what matched.

    A classifier of another size keeps its new values. Raises BadInput when anything else is missing or does not fit.
    """
    file, state = read_weights(path)
    own = model.state_dict()
    head = {
        name for name in own if name.startswith(tuple(f"{p}." for p in _classifier_names(model)))
    }
    wrong = [
        k for k, v in own.items() if k in state and state[k].shape != v.shape and k not in head
    ]
    missing = [k for k in own if k not in state and k not in head]
    if wrong or missing:
        what = (
            f"{wrong[0]} has shape {_shape(state[wrong[0]])}, the model's is {_shape(own[wrong[0]])}"
            if wrong
            else (
                f"{len(missing)} of the model's {len(own)} tensors are not in it, first {missing[0]}"
            )
        )
        raise BadInput(f"--checkpoint {file}: does not fit --model: {what}")
    matched = {k: state[k] for k, v in own.items() if k in state and state[k].shape == v.shape}
    model.load_state_dict(matched, strict=False)
    fresh = [k for k in own if k not in matched]
    unused = [k for k in state if k not in own]
    return (
        f"model: {len(matched)} of {len(own)} tensors from {file}"
        + (f"; new: {', '.join(fresh)}" if fresh else "")
        + (f"; not used: {len(unused)}, first {unused[0]}" if unused else "")
    )


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _classifier_names(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def classifier_parameters(model: Any) -> set[torch.nn.Parameter]:
    """The parameters of the final classifier, found by name in timm's configuration."""
    prefixes = tuple(f"{name}." for name in _classifier_names(model))
    return {p for name, p in model.named_parameters() if name.startswith(prefixes)}


def input_statistics(
    args: TrainingArguments, model: Any
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and deviations for images in [0, 1]: the options', else the model's own."""
    cfg = model.pretrained_cfg
    return tuple(args.mean or cfg.get("mean")), tuple(args.std or cfg.get("std"))


def save_model(model: Any, folder: Path, args: TrainingArguments, classes: list[str]) -> None:
    """Write `folder` so that `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the model back."""
    mean, std = input_statistics(args, model)
    data_config = dict(
        input_size=(3, args.image_size, args.image_size),
        mean=mean,
        std=std,
        crop_pct=args.crop_pct,
        interpolation=args.interpolation,
    )
    if any(
        not t.is_contiguous() for t in model.state_dict().values()
    ):  # safetensors takes the usual layout only
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={"label_names": classes},
        safe_serialization=True,
        data_config=data_config,
    )
