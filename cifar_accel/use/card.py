"""README.md of a model folder: the model card that the Hugging Face hub shows."""

import json
import shlex
import textwrap
from dataclasses import asdict
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from cifar_accel.console import printable
from cifar_accel.data.sources import is_hub_id
from cifar_accel.files import last_part
from cifar_accel.models.create import ALIASES
from cifar_accel.options.options import TrainingArguments, in_words
from cifar_accel.results.statistics import wilson

FILE = "README.md"

# Where the hub has the data sets that come by a short name here.
ON_THE_HUB = {"cifar100": "uoft-cs/cifar100", "cifar10": "uoft-cs/cifar10"}

# The options that say most of how a model was trained.
TOLD = (
    "recipe epochs batch_size image_size optimizer learning_rate weight_decay layer_decay "
    "scheduler warmup_epochs smoothing mixup cutmix model_ema seed"
).split()

HOW_TO_USE = """
## Use

Images are made as `config.json` says. These three do so themselves; FOLDER is this folder.

```
cifar-accel predict FOLDER cat.png

from transformers import pipeline
pipeline("image-classification", model="FOLDER")("cat.png")

import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
```
"""


def model_card(
    model: dict[str, Any],
    classes: list[str],
    config: dict[str, Any] | None = None,
    figures: dict[str, Any] | None = None,
) -> str:
    """The card of a model, in Markdown with the hub's metadata.

    Args:
        model: its config.json, in timm's form.
        classes: the names of its outputs.
        config: what config.json of the run that trained it holds, if that is known.
        figures: accuracy, top5_accuracy, evaluated_images and tested_on, as in its summary.json.
    """
    architecture = _plain(model["architecture"])
    # Of a run that an earlier version, or nobody, evaluated there are none.
    if not figures or not figures.get("evaluated_images") or not figures.get("top5_accuracy"):
        figures = None
    # Earlier versions had fewer options.
    options = {**asdict(TrainingArguments()), **config["options"]} if config else {}
    title = architecture
    if options:
        title += f" on {_plain(last_part(options['dataset']))}"
    card = f"---\n{_metadata(architecture, options, figures)}\n---\n# {title}\n"
    if figures:
        card += _accuracy(figures)
    card += HOW_TO_USE
    if config:
        card += _training(options, config)
    return card + _classes(classes) + _limits(bool(config), model)


def _metadata(architecture: str, options: dict[str, Any], figures: dict[str, Any] | None) -> str:
    """The card's metadata in YAML; with figures, the hub shows them as results."""
    known: dict[str, Any] = {}
    if figures:
        # A folder, whose path is recorded as an absolute one, has no name anywhere else.
        dataset = ON_THE_HUB.get(options["dataset"], options["dataset"])
        if is_hub_id(dataset):
            known["datasets"] = [dataset]
        else:
            dataset = _plain(last_part(dataset))
        known["model_name"] = f"{architecture} on {dataset}"
        known["eval_results"] = [
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=figures.get("tested_on", "test"),
                metric_type="accuracy",
                metric_name=name,
                metric_value=round(figures[key], 4),
            )
            for name, key in (("top-1", "accuracy"), ("top-5", "top5_accuracy"))
        ]
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "cifar_accel"],
        **known,
    )
    return str(data.to_yaml())


def _accuracy(figures: dict[str, Any]) -> str:
    """The figures with their interval, and of what they are."""
    images = figures["evaluated_images"]
    low, high = wilson(round(figures["accuracy"] * images), images)
    return f"""
| | |
|---|---|
| top-1 accuracy | **{figures["accuracy"]:.2%}** [{low:.2%} to {high:.2%}] |
| top-5 accuracy | {figures["top5_accuracy"]:.2%} |
| measured on | {images:,} {figures.get("tested_on", "test")} images, every one once, in one view |

One run, the weights after its last step. The interval is Wilson's, of 95 %, and is for other images
of the same kind; another seed gives another model.
"""


def _training(options: dict[str, Any], config: dict[str, Any]) -> str:
    """What the model was made of, and how."""
    name = ALIASES.get(options["model"], options["model"])
    began = "random weights"
    if options["checkpoint"]:
        began = f"the weights in `{_plain(last_part(options['checkpoint']))}`"
    elif name.startswith("local-dir:"):
        began = f"the weights in `{_plain(last_part(name))}`"
    elif options["pretrained"]:
        began = f"timm's weights `{_plain(name)}`"
    told = ", ".join(f"{option} {in_words(options[option])}" for option in TOLD)
    packages = ", ".join(
        f"{name} {version}" for name, version in config.get("versions", {}).items()
    )
    words = config.get("command", [])[1:]
    command = shlex.join(["python", "-m", "cifar_accel", *_without_folders(words, options)])
    precision = {"no": "fp32"}.get(options["mixed_precision"], options["mixed_precision"])
    # The first version did not record how many images there were.
    images = f"{options['train_images']:,} training images, " if "train_images" in options else ""
    lines = [
        f"Began with {began}.",
        f"{images}in {_plain(precision)}; {_plain(told)}.",
        f"With {_plain(packages)}.",
    ]
    return f"\n## Training\n\n{_listed(lines)}\n\n```\n{printable(command)}\n```\n"


def _classes(names: list[str]) -> str:
    """The names of the classes, as JSON, in which no name can end the block."""
    quoted = [json.dumps(name) for name in names]
    lines = [", ".join(quoted[start : start + 8]) for start in range(0, len(quoted), 8)]
    listed = "[" + ",\n ".join(lines) + "]"
    return (
        f"\n## Classes\n\n{len(names):,}, in the order of the outputs:\n\n```json\n{listed}\n```\n"
    )


def _limits(is_known: bool, model: dict[str, Any]) -> str:
    """What the model is not made for."""
    side = model["pretrained_cfg"]["input_size"][-1]
    known = "Nothing is recorded of its training or its accuracy."
    if is_known:
        known = (
            "It was measured on images of the data set that it was trained on; how it does on "
            "photographs from elsewhere is not known."
        )
    lines = [
        "It knows these classes alone: whatever an image shows, it is taken for one of them.",
        f"It sees images at {side}x{side} pixels. {known}",
        "A probability is not a rate of being right unless that was checked on images like yours "
        "(`cifar-accel evaluate FOLDER --dataset IMAGES` prints the calibration error, ECE).",
        "This card grants no licence: those of the weights it began with and of the images hold.",
    ]
    return f"\n## Limits\n\n{_listed(lines)}\n"


def _listed(lines: list[str]) -> str:
    """A Markdown list, wrapped."""
    wrap = textwrap.TextWrapper(100, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(wrap.fill(f"- {line}") for line in lines)


# ---- names that others chose


def _plain(text: str) -> str:
    """`text` without what Markdown would take for markup, in one line."""
    return "".join(c for c in printable(text) if c not in "`<>|*[]\\")


def _without_folders(words: list[str], options: dict[str, Any]) -> list[str]:
    """The words of a command line with `...` for folders, which are nobody else's business."""
    told = []
    for word in words:
        # Paths may have = in them, as those of a study have.
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        # The hub's names have a slash too.
        is_of_hub = is_hub_id(value) and value == options["dataset"]
        if not is_of_hub and ("/" in value or value.startswith("~")):
            kind = "local-dir:" if value.startswith("local-dir:") else ""
            value = f"{kind}.../{last_part(value)}"
        told.append(f"{flag}{equals}{value}")
    return told
