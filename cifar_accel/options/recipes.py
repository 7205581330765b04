"""Recipes: sets of defaults that flags override."""

from typing import Any

from cifar_accel.errors import BadInput, did_you_mean
from cifar_accel.options.options import IMAGENET_MEAN, IMAGENET_STD, TrainingArguments

# What each recipe changes in the defaults of TrainingArguments. A new recipe is one entry here.
RECIPES: dict[str, dict[str, Any]] = {
    # The course report's setting: AdamW with amsgrad, timm's m15 augmentation, both flips, Mixup by
    # batches, a border of the test images cut away. Two slips of its scheduler are mended. Its
    # warm-up repeated the first epoch and its rate peaked at 4.52e-4; here the rate warms up to
    # --learning-rate and falls from there, step by step.
    "report": dict(
        aa="rand-m15-n2",
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=0.5,
        vflip=0.5,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        crop_pct=0.875,
        mixup=0.8,
        mixup_prob=0.7,
        smoothing=0.1,
        amsgrad=True,
    ),
    # What most CIFAR papers do: a crop of the image padded by reflection, a horizontal flip, label
    # smoothing, weight decay on weights only.
    "plain": dict(
        crop_padding=4,
        hflip=0.5,
        smoothing=0.1,
        decay_all=False,
    ),
    # ImageNet weights on small images, resized. What follows from the model
    # (models/finetune.py) and the images (run.py) stands here for small ones; flags override it.
    "finetune": dict(
        image_size=128,
        crop_padding=4,
        hflip=0.5,
        smoothing=0.1,
        epochs=10,
        batch_size=128,
        learning_rate=1e-3,
        weight_decay=0.05,
        decay_all=False,
    ),
    # Small pictures of signs, where a flip changes the meaning.
    "digits": dict(
        smoothing=0.1,
        decay_all=False,
    ),
}

# What a start derives from the model and the images, where no flag says it. A run that goes on
# keeps what its first start derived.
DERIVED_LATE = frozenset(
    "image_size epochs warmup_epochs stored_size crop_padding learning_rate layer_decay "
    "interpolation cutmix mixup_prob model_kwargs clip_grad clip_mode model_ema_decay".split()
)

# Those of them that --budget chooses.
PLANNED = frozenset({"image_size", "epochs", "warmup_epochs"})


def recipe_defaults(name: str) -> TrainingArguments:
    """The defaults under recipe `name`. Raises BadInput when there is none of that name."""
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise BadInput(f"--recipe {name}: unknown; there are {known}{did_you_mean(name, RECIPES)}")
    return TrainingArguments(recipe=name, **RECIPES[name])
