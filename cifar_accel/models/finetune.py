"""What the recipe `finetune` makes of a model, where no flag says otherwise.

Its fixed part is in options/recipes.py, and what follows from the images in run.py. How much each
ingredient gives is in docs/accuracy.md.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from cifar_accel.errors import BadInput
from cifar_accel.models.create import build_model, family_of, has_batch_norm
from cifar_accel.options.options import TrainingArguments
from cifar_accel.options.resolve import Origin, check_effects, with_derived

# Sides of the input, in the order in which they are tried: some models take few of them, or the
# size of their weights alone.
SIDES = (128, 112, 144, 160, 192, 224, 240, 256, 288, 299, 336, 384, 448)
# A model with more parameters, or a longer run, is regularised.
MOST_PARAMETERS = 8e6
LONG_RUN = 25

# AdamW's learning rate of models with batch norm, over that of others (docs/accuracy.md).
BATCH_NORM_RATE = 2.0

# Layer decay of families other than the usual: 1 for models with batch norm, 0.8 for others.
LAYER_DECAY = {"nfnet": 0.9}


def fit_to_model(args: TrainingArguments, origin: Origin) -> tuple[TrainingArguments, Origin]:
    """Options as they hold for the model, and where each value comes from; to be called once.

    Raises BadInput where the model cannot be made at any size.
    """
    args, origin, model = _at_a_size_it_takes(args, origin)

    family = family_of(model)
    is_normalised = has_batch_norm(model)

    # As its weights were trained.
    own = model.pretrained_cfg.get("interpolation")
    values: dict[str, Any] = {"interpolation": own if own in ("bilinear", "bicubic") else "bicubic"}

    # How fast it learns, and how much slower early layers do. What batch norm has normalised bears
    # more, and needs no such care. With other optimizers than adamw that was not tried.
    values["layer_decay"] = LAYER_DECAY.get(family, 1.0 if is_normalised else 0.8)
    if is_normalised and args.optimizer == "adamw" and origin["learning_rate"] == "recipe":
        values["learning_rate"] = BATCH_NORM_RATE * args.learning_rate

    # NFNets diverge without adaptive clipping (Brock et al. 2021).
    is_ours = origin["clip_grad"] != "flag" and (
        origin["clip_mode"] != "flag" or args.clip_mode == "agc"
    )
    if family == "nfnet" and is_ours:
        values |= {"clip_grad": 0.01, "clip_mode": "agc"}
    args, origin = with_derived(args, origin, values)

    parameters = sum(p.numel() for p in model.parameters())
    if parameters > MOST_PARAMETERS or args.epochs > LONG_RUN:
        args, origin = regularised(args, origin)
    check_effects(args, origin)
    return args, origin


def regularised(args: TrainingArguments, origin: Origin) -> tuple[TrainingArguments, Origin]:
    """The options of a large model, or a long run, which learns the images by heart."""
    if "flag" not in (origin["mixup"], origin["cutmix"]):
        args, origin = with_derived(args, origin, {"cutmix": 1.0, "mixup_prob": 0.5})
    return _with_drop_path(args, origin)


def is_of_batch_norm(args: TrainingArguments) -> bool:
    """Whether the model that the options name has batch norm. Raises BadInput."""
    return has_batch_norm(_made(args))


def sizes_taken(args: TrainingArguments, choices: Iterable[str | int]) -> list[str | int]:
    """Those of `choices`, texts of --image-size, that the model takes."""
    taken = []
    for choice in choices:
        with suppress(BadInput):
            _made(replace(args, image_size=choice))
            taken.append(choice)
    return taken


def _made(args: TrainingArguments) -> Any:
    """The model, with weights only where they lie in a folder here. Raises BadInput."""
    is_here = args.pretrained and args.model.startswith("local-dir:")
    bare = replace(args, pretrained=is_here, checkpoint=None)
    return build_model(bare, 10, lambda line: None)


def _at_a_size_it_takes(
    args: TrainingArguments, origin: Origin
) -> tuple[TrainingArguments, Origin, Any]:
    """The options with an input size that the model takes, their origin, and the model."""
    # A flag has chosen one.
    if origin["image_size"] != "recipe":
        return args, origin, _made(args)
    for side in SIDES:
        try:
            model = _made(replace(args, image_size=side))
        except BadInput as e:
            failure = e
        else:
            args, origin = with_derived(args, origin, {"image_size": side})
            return args, origin, model
    raise failure


def _with_drop_path(args: TrainingArguments, origin: Origin) -> tuple[TrainingArguments, Origin]:
    """The options with stochastic depth, where the model has it."""
    # Whoever knows the model's arguments has chosen; and once is enough.
    if origin["model_kwargs"] in ("flag", "derived"):
        return args, origin
    words = (*args.model_kwargs, "drop_path_rate=0.1")
    try:
        _made(replace(args, model_kwargs=words))
    except BadInput:
        return args, origin
    return replace(args, model_kwargs=words), origin | {"model_kwargs": "derived"}
