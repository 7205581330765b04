"""Models: aliases, timm.create_model, local weights, starting checkpoints, and the saved form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import timm.optim
import torch
from safetensors import SafetensorError

from cifar_accel.errors import BadInput, did_you_mean
from cifar_accel.files import alike, read_json
from cifar_accel.models.surgery import shorten_convolutions
from cifar_accel.models.weights import load_weights
from cifar_accel.network import require_network
from cifar_accel.options.options import TrainingArguments
from cifar_accel.options.values import parse_keywords

# The report's two models. Another short name is one line here.
ALIASES = {"nfnet": "dm_nfnet_f0.dm_in1k", "vit": "vit_base_patch8_224.augreg_in21k_ft_in1k"}


# Families (timm's module) that train faster in channels-last layout, by device; benchmarks/step.py measures it. Those
# that are not here stay contiguous.
CHANNELS_LAST = {
    "cpu": {"efficientnet", "nfnet", "resnet"},
}


def check_model(args: TrainingArguments, say: Callable[[str], None]) -> None:
    """Raise BadInput for a model that does not exist or whose weights cannot be had; comes before the data.

    Announces a download of weights with `say`.
    """
    name = ALIASES.get(args.model, args.model)
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise BadInput(
                f"--model {args.model}: {folder} holds no config.json; give a folder in timm's local-dir form"
            )
        if args.pretrained and not (folder / "model.safetensors").is_file():
            raise BadInput(
                f"--model {args.model}: {folder} holds no model.safetensors (--no-pretrained does without)"
            )
        _read_local_config(args.model, folder)
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        if Path(name).is_dir():
            raise BadInput(
                f"--model {args.model}: is a folder; did you mean local-dir:{args.model}?"
            )
        known = [*ALIASES, *timm.list_models()]
        raise BadInput(
            f"--model {args.model}: timm {timm.__version__} has no such model{did_you_mean(architecture, known)}"
        )
    tags = [m.partition(".")[2] for m in timm.list_pretrained(architecture + ".*")]
    if tag and tag not in tags:
        raise BadInput(
            f"--model {args.model}: {architecture} has no weights '{tag}'; there are {', '.join(tags) or 'none'}"
        )
    if args.pretrained:
        _announce_download(name, say)


def build_model(
    args: TrainingArguments, num_classes: int, say: Callable[[str], None] = print
) -> torch.nn.Module:
    """Create the model with `num_classes` outputs, on the CPU, in float32.

    Raises:
        BadInput: unknown name or arguments, weights that cannot be had or do not fit.
    """
    name = ALIASES.get(args.model, args.model)
    local = name.startswith("local-dir:")
    keywords = parse_keywords(args.model_kwargs)
    if _fixed_input_size(name):
        keywords.setdefault("img_size", args.image_size)
    torch.manual_seed(args.seed)  # the initial values of what is not loaded
    try:
        model = timm.create_model(
            name, pretrained=args.pretrained, num_classes=num_classes, **keywords
        )
    except TypeError as e:  # an argument that the architecture does not take
        raise BadInput(
            f"--model {args.model}: {str(e).splitlines()[0]} (see --model-kwargs)"
        ) from e
    except (RuntimeError, KeyError, ValueError, AssertionError, OSError, SafetensorError) as e:
        reason = " ".join(str(e).split())[:300]
        hint = (
            ""
            if local or not args.pretrained
            else "; --no-pretrained or --checkpoint PATH starts without these weights"
        )
        raise BadInput(f"--model {args.model}: cannot be made: {reason}{hint}") from e
    if args.checkpoint:
        say(load_weights(model, args.checkpoint))
    _check_input_size(model, args)
    shorten_convolutions(model)
    return model


def use_channels_last(
    args: TrainingArguments, model: torch.nn.Module, device: torch.device
) -> bool:
    """Whether images and weights are kept in channels-last layout: as the options say, else by `CHANNELS_LAST`."""
    if args.memory_format == "auto":
        return type(model).__module__.rpartition(".")[2] in CHANNELS_LAST.get(device.type, ())
    return args.memory_format == "channels_last"


def forward_flops(model: torch.nn.Module, image_size: int) -> int:
    """Floating-point operations of one image's forward pass (a multiplication and an addition are two)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    return int(counter.get_total_flops())


def _check_input_size(model: torch.nn.Module, args: TrainingArguments) -> None:
    """Raise BadInput when the model cannot take an image of --image-size; one image on the CPU tells."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, args.image_size, args.image_size))
    except (RuntimeError, AssertionError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise BadInput(
            f"--image-size {args.image_size}: --model {args.model} cannot take it: {reason}"
        ) from e


def _fixed_input_size(name: str) -> bool:
    """Whether the architecture takes `img_size` (a ViT does, a CNN does not)."""
    if name.startswith("local-dir:"):
        config = _read_local_config(name, Path(name.removeprefix("local-dir:")))
        return bool(config["pretrained_cfg"].get("fixed_input_size"))
    return bool(timm.get_pretrained_cfg_value(name, "fixed_input_size"))


def _read_local_config(name: str, folder: Path) -> dict[str, Any]:
    """The config.json of a local-dir model. Raises BadInput when it is none in timm's form."""
    config = read_json(folder / "config.json")
    kinds = {"architecture": "", "num_classes": 0, "pretrained_cfg": {}}
    sound = alike(config, {}) and all(alike(config.get(key), kind) for key, kind in kinds.items())
    sound = sound and alike(config.get("model_args") or {}, {})
    if not sound or not all(
        alike(config["pretrained_cfg"].get(key, [0.5] * 3), [0.5] * 3) for key in ("mean", "std")
    ):
        raise BadInput(
            f"--model {name}: its config.json needs architecture, num_classes and pretrained_cfg in timm's form"
        )
    return dict(config)


def _announce_download(name: str, say: Callable[[str], None]) -> None:
    """Say where the weights come from; raise BadInput when there are none or the hub is out of reach."""
    from huggingface_hub import try_to_load_from_cache

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not (cfg.has_weights or cfg.hf_hub_id):
        raise BadInput(
            f"--model {name}: timm has no weights for it; pass --no-pretrained or --checkpoint PATH"
        )
    files = ("model.safetensors", "pytorch_model.bin", cfg.hf_hub_filename)
    if cfg.hf_hub_id and not any(
        isinstance(try_to_load_from_cache(cfg.hf_hub_id, f), str) for f in files if f
    ):
        remedy = "pass --checkpoint PATH, --model local-dir:PATH, or --no-pretrained"
        say(f"model: downloading the weights {cfg.hf_hub_id} from the Hugging Face hub")
        require_network(f"--model {name}: its weights {cfg.hf_hub_id}", remedy)


def name_of(args: TrainingArguments) -> str:
    """The model's full name in timm."""
    return ALIASES.get(args.model, args.model)
