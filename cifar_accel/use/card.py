"""README.md of a model folder: the model card that the Hugging Face hub shows."""

import json
import os
import shlex
import textwrap
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from cifar_accel.console import printable
from cifar_accel.data.datasets import is_hub_id
from cifar_accel.options.options import in_words
from cifar_accel.records.summary import RecordedOptions
from cifar_accel.results.statistics import wilson

FILE = "README.md"

# Where the hub has the data sets that come by a short name here.
ON_THE_HUB = {"cifar100": "uoft-cs/cifar100", "cifar10": "uoft-cs/cifar10"}

# The options that say most of how a model was trained.
TOLD = (
    "recipe epochs image_size batch_size optimizer learning_rate weight_decay layer_decay "
    "scheduler warmup_epochs smoothing mixup cutmix model_ema seed"
).split()

HOW_TO_USE = """
## Use

Images are made as `config.json` says: the shorter side to S / crop_pct, the centre, mean and
deviation. These three do so themselves; FOLDER is this folder.

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
    options: RecordedOptions | None = None,
    config: dict[str, Any] | None = None,
    figures: dict[str, Any] | None = None,
) -> str:
    """The card of a model, in Markdown with the hub's metadata.

    Args:
        model: its config.json, in timm's form.
        options: those of the run that trained it, if that is known.
        config: what that run's config.json holds.
        figures: accuracy, top5_accuracy and evaluated_images, as `evaluate` gives them.
    """
    architecture = _plain(model["architecture"])
    title = architecture
    if options:
        title += f" on {_plain(_last_part(options.dataset))}"
    card = f"---\n{_metadata(architecture, options, figures)}\n---\n# {title}\n"
    if options and figures:
        card += _accuracy(options, figures)
    card += HOW_TO_USE
    if options:
        card += _training(options, config or {})
    return card + _classes(model) + _limits(options, model)


def _metadata(
    architecture: str, options: RecordedOptions | None, figures: dict[str, Any] | None
) -> str:
    """The card's metadata in YAML; with figures, the hub shows them as results."""
    known: dict[str, Any] = {}
    if options and figures:
        dataset = ON_THE_HUB.get(options.dataset, options.dataset)
        # A folder here has no name anywhere else.
        if is_hub_id(dataset) and not os.path.isdir(options.dataset):
            known["datasets"] = [dataset]
        else:
            dataset = _plain(_last_part(dataset))
        known["model_name"] = f"{architecture} on {dataset}"
        known["eval_results"] = [
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=options.tested_on,
                metric_type=kind,
                metric_name=name,
                metric_value=round(figures[key], 4),
            )
            for kind, name, key in (
                ("accuracy", "top-1", "accuracy"),
                ("accuracy", "top-5", "top5_accuracy"),
            )
        ]
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "cifar_accel"],
        **known,
    )
    return str(data.to_yaml())


def _accuracy(options: RecordedOptions, figures: dict[str, Any]) -> str:
    """The figures with their interval, and of what they are."""
    images = figures["evaluated_images"]
    low, high = wilson(round(figures["accuracy"] * images), images)
    return f"""
| | |
|---|---|
| top-1 accuracy | **{figures["accuracy"]:.2%}** [{low:.2%} to {high:.2%}] |
| top-5 accuracy | {figures["top5_accuracy"]:.2%} |
| measured on | {images:,} {options.tested_on} images, every one once, in one view |

One run, the weights after its last step. The interval is Wilson's, of 95 %, and is for other images
of the same kind; another seed gives another model.
"""


def _training(options: RecordedOptions, config: dict[str, Any]) -> str:
    """What the model was made of, and how."""
    began = "random weights"
    if options.checkpoint:
        began = f"`{_plain(_last_part(options.checkpoint))}`"
    elif options.pretrained:
        began = f"the published weights of `{_plain(_last_part(options.model))}`"
    told = ", ".join(f"{name} {in_words(getattr(options, name))}" for name in TOLD)
    versions = config.get("versions", {})
    packages = ", ".join(f"{name} {versions[name]}" for name in versions)
    program, *words = config.get("command") or [""]
    command = shlex.join(["python", "-m", "cifar_accel", *map(_without_folders, words)])
    facts = config.get("options", {})
    precision = "fp32" if options.mixed_precision == "no" else options.mixed_precision
    lines = [
        f"Began with {began}.",
        f"{facts.get('train_images', 0):,} training images, {facts.get('total_steps', 0):,} steps "
        f"in {_plain(precision)}.",
        f"{_plain(told)}.",
        f"With {_plain(packages)}.",
    ]
    return f"\n## Training\n\n{_listed(lines)}\n\n```\n{printable(command)}\n```\n"


def _classes(model: dict[str, Any]) -> str:
    """The names of the classes, as JSON, in which no name can end the block."""
    names = model.get("label_names") or []
    if not names:
        return f"\n## Classes\n\n{model['num_classes']:,}, without names here.\n"
    quoted = [json.dumps(name) for name in names]
    lines = [", ".join(quoted[start : start + 8]) for start in range(0, len(quoted), 8)]
    listed = "[" + ",\n ".join(lines) + "]"
    return (
        f"\n## Classes\n\n{len(names):,}, in the order of the outputs:\n\n```json\n{listed}\n```\n"
    )


def _limits(options: RecordedOptions | None, model: dict[str, Any]) -> str:
    """What the model is not made for."""
    side = model["pretrained_cfg"]["input_size"][-1]
    known = "Nothing is recorded of its training or its accuracy."
    if options:
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


def _last_part(name: str) -> str:
    """The name without its folders, which are nobody else's business; hub ids stay."""
    return name if is_hub_id(name) and not os.path.exists(name) else Path(name).name


def _without_folders(word: str) -> str:
    """A word of a command line with `...` for the folders of an absolute path in it."""
    flag, equals, value = word.partition("=")
    if not equals:
        flag, value = "", word
    head, is_local, path = value.rpartition("local-dir:")
    if path.startswith(("/", "~")):
        path = f".../{Path(path).name}"
    return f"{flag}{equals}{head}{is_local}{path}"
