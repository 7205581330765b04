"""Models by name: what --model may be, and how one is made."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError

from cifar_accel.errors import BadInput, did_you_mean, first_line
from cifar_accel.files import read_as
from cifar_accel.models import surgery
from cifar_accel.models.weights import check_finite, load_weights
from cifar_accel.network import require_network
from cifar_accel.options.options import IMAGENET_MEAN, IMAGENET_STD, TrainingArguments
from cifar_accel.options.values import parse_keywords
from cifar_accel.records.summary import Deviation, Mean

# The report's two models. Another short name is one line here.
ALIASES = {"nfnet": "dm_nfnet_f0.dm_in1k", "vit": "vit_base_patch8_224.augreg_in21k_ft_in1k"}

# Families (the last word of timm's module) that train faster in channels-last layout, by device, as
# benchmarks/step.py measures it. All others stay contiguous.
CHANNELS_LAST = {"cpu": {"efficientnet", "nfnet", "resnet"}}

# Least share of the steps that a model with batch norm takes at the last of several sizes.
LEAST_LAST_SHARE = 0.1


def name_of(args: TrainingArguments) -> str:
    """The model's full name in timm, or local-dir:PATH."""
    return ALIASES.get(args.model, args.model)


# ---- checks before anything is made or downloaded


def check_model(args: TrainingArguments, say: Callable[[str], None]) -> None:
    """Raise BadInput for a model that does not exist or whose weights cannot be had.

    It takes a moment and comes before the data. A download of weights is announced with `say`.
    """
    name = name_of(args)
    folder = _local_folder(name)
    if not folder:
        _check_timm_name(args, name)
        if args.pretrained:
            _check_published_weights(name, say)
        return
    _read_local_config(args.model, folder)
    if args.pretrained and not (folder / "model.safetensors").is_file():
        raise BadInput(
            f"--model {args.model}: {folder} holds no model.safetensors "
            "(--no-pretrained does without)"
        )


def _local_folder(name: str) -> Path | None:
    """The folder that local-dir:PATH names; None for a name of timm's."""
    if not name.startswith("local-dir:"):
        return None
    return Path(name.removeprefix("local-dir:"))


def _check_timm_name(args: TrainingArguments, name: str) -> None:
    """Raise BadInput for an architecture, or a tag of its weights, that timm does not have."""
    # "resnet18.a1_in1k" is an architecture and which of its weights; without a tag timm chooses.
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = did_you_mean(architecture, [*ALIASES, *timm.list_models()])
        if Path(name).is_dir():
            near = f"; did you mean local-dir:{args.model}?"
        raise BadInput(f"--model {args.model}: timm {timm.__version__} has no such model{near}")

    published = timm.list_pretrained(architecture + ".*")
    if tag and name not in published:
        known = ", ".join(published) or "none"
        raise BadInput(f"--model {args.model}: has no weights '{tag}'; there are {known}")


def _check_published_weights(name: str, say: Callable[[str], None]) -> None:
    """Raise BadInput when timm has no weights for `name`, or they are on a hub out of reach."""
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None or not (config.has_weights or config.hf_hub_id):
        raise BadInput(
            f"--model {name}: timm has no weights for it; pass --no-pretrained or --checkpoint PATH"
        )
    # Weights from elsewhere than the hub are timm's to fetch.
    if not config.hf_hub_id:
        return
    for file in ("model.safetensors", "pytorch_model.bin", config.hf_hub_filename):
        # The answer is a path, None for unknown, or a mark for a file known not to exist.
        if file and isinstance(try_to_load_from_cache(config.hf_hub_id, file), str):
            return
    say(f"model: downloading the weights {config.hf_hub_id} from the Hugging Face hub")
    require_network(
        f"--model {name}: its weights {config.hf_hub_id}",
        "pass --checkpoint PATH, --model local-dir:PATH, or --no-pretrained",
    )


# ---- a local model's config.json, as far as it is read here


@dataclass(frozen=True)
class _PretrainedConfig:
    """timm's `pretrained_cfg`."""

    fixed_input_size: bool = False
    mean: tuple[Mean, Mean, Mean] = IMAGENET_MEAN
    std: tuple[Deviation, Deviation, Deviation] = IMAGENET_STD


@dataclass(frozen=True)
class _LocalConfig:
    """timm's config.json of a model folder."""

    architecture: str
    num_classes: int
    pretrained_cfg: _PretrainedConfig
    model_args: dict[str, Any] | None = None


def _read_local_config(name: str, folder: Path) -> _LocalConfig:
    """The config.json of local-dir model `name`. Raises BadInput when there is none."""
    config = read_as(_LocalConfig, folder / "config.json")
    if config is None:
        raise BadInput(
            f"--model {name}: holds no config.json in timm's form, with architecture, num_classes "
            "and pretrained_cfg (mean finite, std above 0)"
        )
    return config


# ---- making one


def build_model(
    args: TrainingArguments, num_classes: int, say: Callable[[str], None]
) -> torch.nn.Module:
    """Create the model with `num_classes` outputs, on the CPU, in float32.

    Says with `say` what --checkpoint matched.

    Raises:
        BadInput: unknown name or arguments, weights that cannot be had, do not fit or are not
            finite, an image size that the model cannot take, a model that gives no logits.
    """
    name = name_of(args)
    keywords = parse_keywords(args.model_kwargs)
    # Without it a ViT takes images of the size of its published weights only. A CNN has none.
    folder = _local_folder(name)
    if folder:
        is_fixed = _read_local_config(name, folder).pretrained_cfg.fixed_input_size
    else:
        _check_timm_name(args, name)
        published = timm.get_pretrained_cfg(name)
        is_fixed = bool(published and published.fixed_input_size)
    if is_fixed:
        keywords.setdefault("img_size", args.input_size)
        # Where it takes several, timm resamples the position embeddings in the forward pass.
        if len(args.sizes) > 1:
            keywords.setdefault("dynamic_img_size", True)
    # The initial values of all that is not loaded follow from the seed.
    torch.manual_seed(args.seed)
    model = _create(args, num_classes, keywords)
    origin = f"--model {args.model}"
    if args.checkpoint:
        say(load_weights(model, args.checkpoint))
        origin = f"--checkpoint {args.checkpoint}"
    # A CNN may fail at a small size when its maps run out of pixels.
    for size, _ in args.sizes:
        check_logits(model, size, num_classes, f"--model {args.model}")
    check_last_size(model, args)
    check_finite(model, origin)
    # Found here, and not when the first checkpoint is written.
    tensors = [tensor for tensor in model.state_dict().values() if tensor.numel()]
    if len({tensor.untyped_storage().data_ptr() for tensor in tensors}) < len(tensors):
        raise BadInput(f"--model {args.model}: its layers share weights, which cannot be saved")
    surgery.apply(model)
    return model


def _create(args: TrainingArguments, num_classes: int, keywords: dict[str, Any]) -> Any:
    """Call timm.create_model; its complaints become BadInput."""
    name = name_of(args)
    try:
        return timm.create_model(name, args.pretrained, num_classes=num_classes, **keywords)
    # An argument that the architecture does not take.
    except TypeError as e:
        if "dynamic_img_size" in str(e):
            raise BadInput(
                f"--image-size {args.image_size}: --model {args.model} takes one size only"
            ) from e
        raise BadInput(f"--model {args.model}: {first_line(e)} (see --model-kwargs)") from e
    # Values that it cannot work with; weights that are damaged, out of reach or do not fit.
    except (RuntimeError, KeyError, ValueError, AssertionError, OSError, SafetensorError) as e:
        reason = " ".join(str(e).split())[:300]
        hint = ""
        if args.pretrained and not _local_folder(name):
            hint = "; --no-pretrained or --checkpoint PATH starts without these weights"
        raise BadInput(f"--model {args.model}: cannot be made: {reason}{hint}") from e


def check_last_size(model: torch.nn.Module, args: TrainingArguments) -> None:
    """Raise BadInput where batch norm's statistics would be of a smaller size than evaluations."""
    shares = [0.0, *(share for _, share in args.sizes)]
    if has_batch_norm(model) and shares[-1] - shares[-2] < LEAST_LAST_SHARE - 1e-9:
        raise BadInput(
            f"--image-size {args.image_size}: a model with batch norm needs at least "
            f"{LEAST_LAST_SHARE:.0%} of the steps at the last size, for its statistics"
        )


def has_batch_norm(model: torch.nn.Module) -> bool:
    """Whether `model` keeps statistics of the images that it has seen."""
    batch_norm = torch.nn.modules.batchnorm._BatchNorm
    return any(isinstance(layer, batch_norm) for layer in model.modules())


def set_input_size(model: Any, image_size: int, classes: int, where: str) -> None:
    """Make `model` take images of `image_size` pixels; a ViT's position embeddings are resampled.

    Raises BadInput, which names the model as `where`, when it cannot take them.
    """
    # A CNN takes any size as it is.
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=image_size)
    check_logits(model, image_size, classes, where)


def check_logits(model: torch.nn.Module, image_size: int, classes: int, where: str) -> None:
    """Raise BadInput, which names the model as `where`, unless an image gives logits [classes]."""
    try:
        logits = _forward_one_image(model, image_size)
    except (RuntimeError, AssertionError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise BadInput(f"--image-size {image_size}: {where} cannot take it: {reason}") from e
    # A model of features gives a list of tensors.
    if getattr(logits, "shape", None) != (1, classes):
        raise BadInput(f"{where} does not give {classes} logits (see --model-kwargs)")


@torch.no_grad()
def _forward_one_image(model: torch.nn.Module, image_size: int) -> Any:
    """One forward pass on the CPU; leaves `model` in evaluation mode, so no statistics change."""
    model.eval()
    return model(torch.zeros(1, 3, image_size, image_size))


# ---- its layout and its cost


def use_channels_last(
    args: TrainingArguments, model: torch.nn.Module, device: torch.device
) -> bool:
    """Whether images and weights are kept in channels-last layout on `device`.

    As --memory-format says, else as `CHANNELS_LAST` has it for the model's family.
    """
    if args.memory_format != "auto":
        return args.memory_format == "channels_last"
    return family_of(model) in CHANNELS_LAST.get(device.type, ())


def family_of(model: torch.nn.Module) -> str:
    """The last word of timm's module: timm.models.resnet.ResNet is of the family "resnet"."""
    return type(model).__module__.rpartition(".")[2]


def forward_flops(model: torch.nn.Module, image_size: int) -> int:
    """Floating-point operations of one image's forward pass on the CPU.

    A multiplication and an addition are two. Leaves `model` in evaluation mode.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        _forward_one_image(model, image_size)
    return int(counter.get_total_flops())
