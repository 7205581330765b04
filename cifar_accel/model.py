"""Models: aliases, timm.create_model, local weights, starting checkpoints, and the saved form."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cifar_accel import checkpoint
from cifar_accel.config import TrainingArguments, did_you_mean, home, parse_keywords
from cifar_accel.hub import require_network
from cifar_accel.run_folder import alike, read_json

# The report's two models. Another short name is one line here.
ALIASES = {"nfnet": "dm_nfnet_f0.dm_in1k", "vit": "vit_base_patch8_224.augreg_in21k_ft_in1k"}


# Families (timm's module) that train faster in channels-last layout, by device; benchmarks/step.py measures it. Those
# that are not here stay contiguous.
CHANNELS_LAST = {
    "cpu": {"efficientnet", "nfnet", "resnet"},
}


def check_model(args: TrainingArguments, say: Callable[[str], None]) -> None:
    """Raise ValueError for a model that does not exist or whose weights cannot be had; comes before the data.

    Announces a download of weights with `say`.
    """
    name = ALIASES.get(args.model, args.model)
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"--model {args.model}: {folder} holds no config.json; give a folder in timm's local-dir form"
            )
        if args.pretrained and not (folder / "model.safetensors").is_file():
            raise ValueError(
                f"--model {args.model}: {folder} holds no model.safetensors (--no-pretrained does without)"
            )
        _read_local_config(args.model, folder)
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        if Path(name).is_dir():
            raise ValueError(f"--model {args.model}: is a folder; did you mean local-dir:{args.model}?")
        known = [*ALIASES, *timm.list_models()]
        raise ValueError(
            f"--model {args.model}: timm {timm.__version__} has no such model{did_you_mean(architecture, known)}"
        )
    tags = [m.partition(".")[2] for m in timm.list_pretrained(architecture + ".*")]
    if tag and tag not in tags:
        raise ValueError(
            f"--model {args.model}: {architecture} has no weights '{tag}'; there are {', '.join(tags) or 'none'}"
        )
    if args.pretrained:
        _announce_download(name, say)


def build_model(args: TrainingArguments, num_classes: int, say: Callable[[str], None] = print) -> torch.nn.Module:
    """Create the model with `num_classes` outputs, on the CPU, in float32.

    Raises:
        ValueError: unknown name or arguments, weights that cannot be had or do not fit.
    """
    name = ALIASES.get(args.model, args.model)
    local = name.startswith("local-dir:")
    keywords = parse_keywords(args.model_kwargs)
    if _fixed_input_size(name):
        keywords.setdefault("img_size", args.image_size)
    torch.manual_seed(args.seed)  # the initial values of what is not loaded
    try:
        model = timm.create_model(name, pretrained=args.pretrained, num_classes=num_classes, **keywords)
    except TypeError as e:  # an argument that the architecture does not take
        raise ValueError(f"--model {args.model}: {str(e).splitlines()[0]} (see --model-kwargs)") from e
    except (RuntimeError, KeyError, ValueError, AssertionError, OSError, SafetensorError) as e:
        reason = " ".join(str(e).split())[:300]
        hint = (
            ""
            if local or not args.pretrained
            else "; --no-pretrained or --checkpoint PATH starts without these weights"
        )
        raise ValueError(f"--model {args.model}: cannot be made: {reason}{hint}") from e
    if args.checkpoint:
        say(load_weights(model, args.checkpoint))
    _check_input_size(model, args)
    shorten_convolutions(model)
    return model


def use_channels_last(args: TrainingArguments, model: torch.nn.Module, device: torch.device) -> bool:
    """Whether images and weights are kept in channels-last layout: as the options say, else by `CHANNELS_LAST`."""
    if args.memory_format == "auto":
        return type(model).__module__.rpartition(".")[2] in CHANNELS_LAST.get(device.type, ())
    return args.memory_format == "channels_last"


class _CentreConv2d(torch.nn.Conv2d):
    """A convolution that, on a map of one pixel, multiplies with its kernel's centre alone: the rest meets padding."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if input.shape[-2:] != (1, 1):
            return super()._conv_forward(input, weight, bias)
        centre = weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2]
        return torch.nn.functional.linear(input.flatten(1), centre, bias)[:, :, None, None]


def shorten_convolutions(model: torch.nn.Module) -> None:
    """Let every dense convolution that keeps a map's size skip the padding around a map of one pixel, in place.

    A network of stride 32 has such maps at 32 pixels, and 8 of 9 products of its last 3x3 kernels are with zeros.
    """
    for layer in model.modules():
        if type(layer) is torch.nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros":
            around = tuple(d * (k - 1) / 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
            if layer.padding == around != (0, 0):
                layer.__class__ = _CentreConv2d


def forward_flops(model: torch.nn.Module, image_size: int) -> int:
    """Floating-point operations of one image's forward pass (a multiplication and an addition are two)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    return int(counter.get_total_flops())


def _check_input_size(model: torch.nn.Module, args: TrainingArguments) -> None:
    """Raise ValueError when the model cannot take an image of --image-size; one image on the CPU tells."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, args.image_size, args.image_size))
    except (RuntimeError, AssertionError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"--image-size {args.image_size}: --model {args.model} cannot take it: {reason}") from e


def _fixed_input_size(name: str) -> bool:
    """Whether the architecture takes `img_size` (a ViT does, a CNN does not)."""
    if name.startswith("local-dir:"):
        config = _read_local_config(name, Path(name.removeprefix("local-dir:")))
        return bool(config["pretrained_cfg"].get("fixed_input_size"))
    return bool(timm.get_pretrained_cfg_value(name, "fixed_input_size"))


def _read_local_config(name: str, folder: Path) -> dict[str, Any]:
    """The config.json of a local-dir model. Raises ValueError when it is none in timm's form."""
    config = read_json(folder / "config.json")
    kinds = {"architecture": "", "num_classes": 0, "pretrained_cfg": {}}
    sound = alike(config, {}) and all(alike(config.get(key), kind) for key, kind in kinds.items())
    sound = sound and alike(config.get("model_args") or {}, {})
    if not sound or not all(alike(config["pretrained_cfg"].get(key, [0.5] * 3), [0.5] * 3) for key in ("mean", "std")):
        raise ValueError(
            f"--model {name}: its config.json needs architecture, num_classes and pretrained_cfg in timm's form"
        )
    return dict(config)


def _announce_download(name: str, say: Callable[[str], None]) -> None:
    """Say where the weights come from; raise ValueError when there are none or the hub is out of reach."""
    from huggingface_hub import try_to_load_from_cache

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not (cfg.has_weights or cfg.hf_hub_id):
        raise ValueError(f"--model {name}: timm has no weights for it; pass --no-pretrained or --checkpoint PATH")
    files = ("model.safetensors", "pytorch_model.bin", cfg.hf_hub_filename)
    if cfg.hf_hub_id and not any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, f), str) for f in files if f):
        remedy = "pass --checkpoint PATH, --model local-dir:PATH, or --no-pretrained"
        say(f"model: downloading the weights {cfg.hf_hub_id} from the Hugging Face hub")
        require_network(f"--model {name}: its weights {cfg.hf_hub_id}", remedy)


def read_weights(path: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Read a state dict from a run folder, a model or checkpoint folder, a .safetensors or a .pth file.

    Nothing that could run code is unpickled. Raises ValueError when the file is missing or cannot be read so.
    """
    file = home(path)
    if file.is_dir():
        inside = [file / "model" / "model.safetensors", file / "model.safetensors"]
        steps = [p / "model.safetensors" for p in checkpoint.list_checkpoints(file) if checkpoint.fault(p) is None]
        found = [f for f in inside if f.is_file()] + steps[:1]
        if not found:
            raise ValueError(
                f"--checkpoint {path}: this folder holds no model.safetensors (nor model/, nor a whole checkpoint)"
            )
        file = found[0]
    if not file.is_file():
        raise ValueError(f"--checkpoint {path}: no such file or folder")
    try:
        if file.suffix == ".safetensors":
            return file, load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a damaged or hostile file provokes
        raise ValueError(
            f"--checkpoint {file}: cannot be read safely as weights ({str(e).splitlines()[0][:120]})"
        ) from e
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(k, str) and _is_weight(v) for k, v in state.items()):
        raise ValueError(f"--checkpoint {file}: holds no table of dense real tensors by name (a state dict)")
    for prefix in ("module.", "_orig_mod."):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return file, state


def _is_weight(value: Any) -> bool:
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return plain and not value.is_complex() and not value.is_meta


def load_weights(model: torch.nn.Module, path: str) -> str:
    """Load `path` (see `read_weights`) into `model` in place and return a line that says what matched.

    A classifier of another size keeps its new values. Raises ValueError when anything else is missing or does not fit.
    """
    file, state = read_weights(path)
    own = model.state_dict()
    head = {name for name in own if name.startswith(tuple(f"{p}." for p in _classifier_names(model)))}
    wrong = [k for k, v in own.items() if k in state and state[k].shape != v.shape and k not in head]
    missing = [k for k in own if k not in state and k not in head]
    if wrong or missing:
        what = (
            f"{wrong[0]} has shape {_shape(state[wrong[0]])}, the model's is {_shape(own[wrong[0]])}"
            if wrong
            else (f"{len(missing)} of the model's {len(own)} tensors are not in it, first {missing[0]}")
        )
        raise ValueError(f"--checkpoint {file}: does not fit --model: {what}")
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


def input_statistics(args: TrainingArguments, model: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
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
    if any(not t.is_contiguous() for t in model.state_dict().values()):  # safetensors takes the usual layout only
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    timm.models.save_for_hf(
        model, str(folder), model_config={"label_names": classes}, safe_serialization=True, data_config=data_config
    )
