"""The figures of a trained model: of a run's again, or on other images."""

import csv
import json
import os
import textwrap
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cifar_accel.console import print_result
from cifar_accel.data.batches import Pipeline
from cifar_accel.data.datasets import Dataset, Split
from cifar_accel.data.decode import load_images, size_to_store
from cifar_accel.data.splits import cut_splits, limit
from cifar_accel.errors import BadInput
from cifar_accel.evaluate import Outputs, evaluate
from cifar_accel.files import home
from cifar_accel.machine.memory import is_out_of_memory
from cifar_accel.machine.processes import Ranks, join_processes
from cifar_accel.models.create import set_input_size
from cifar_accel.options.options import EvaluateArguments, TrainingArguments
from cifar_accel.records.predictions import FILE as PREDICTIONS
from cifar_accel.records.predictions import (
    Predictions,
    keeps_logits,
    of_outputs,
    predictions_of,
    write_predictions,
)
from cifar_accel.records.summary import RecordedOptions, read_summary
from cifar_accel.records.trackers import TrackedRun, start_tracker, tags_of
from cifar_accel.results.calibration import confidence
from cifar_accel.use.classifier import class_names, find_model, read_classifier
from cifar_accel.use.details import details, findings
from cifar_accel.use.load import FinishedRun

# How many classes and pairs of classes are printed; JSON has all classes.
SHOWN = 5


def evaluate_run(
    args: EvaluateArguments, say: Callable[[str], None], note: Callable[[str], None]
) -> dict[str, Any]:
    """Evaluate a model: a finished run's with its test images and at its precision, or on others.

    All ranks enter. `say` gets the figures, unless JSON is printed, and `note` what else is told.

    Returns:
        status: "finished". loss, accuracy, top5_accuracy, evaluated_images: see `evaluate`. On the
        main process also what `details` gives.

    Raises:
        BadInput: no such model, weights that cannot be used, or classes the model does not know.
    """
    # What is wrong with the model is found before the data is waited for.
    judged = _find(args)
    run, options = judged.run, judged.options
    if run is None and args.tracker != "none":
        raise BadInput(f"--tracker {args.tracker}: {args.run} lies in no run folder to log beside")
    images = _images(judged, note)
    split = images.split
    if not judged.has_own_size:
        note(f"note: at {options.input_size} pixels, which is not the model's own size")

    ranks = join_processes(options.device, options.mixed_precision, note)
    figures, said = _evaluate(args, judged, split, ranks)
    result: dict[str, Any] = {"status": "finished", **figures}
    if not ranks.is_main:
        return result

    # What is printed and written is the main process's alone.
    predictions = of_outputs(split.labels, split.classes, said, images.fingerprint, split.places)
    result |= details(predictions)
    if args.json:
        print_result(json.dumps(result, indent=1))
    else:
        _say_figures(result, f"{images.kind} images of {options.dataset}", say)
    # A run of an earlier version has none, and a file may be damaged.
    if run and images.is_own and judged.has_own_size and not _has_predictions(run, images.kind):
        _write_predictions(run.folder, images.kind, predictions, note)
    if run and args.tracker != "none":
        _log(judged, run, args.tracker, images, predictions, figures, note)
    if args.predictions:
        _write_csv(home(args.predictions), predictions, images.names)
        note(f"written   {args.predictions}")
    return result


# ---- what is evaluated


@dataclass(frozen=True)
class _Judged:
    """A model, and the options by which its images are made."""

    model: Any
    # The names of its outputs.
    classes: list[str]
    options: RecordedOptions
    # The run that it is of.
    run: FinishedRun | None
    # Side in pixels of the images that it was made for.
    own_size: int
    # Whether --dataset names the images.
    is_given: bool

    @property
    def has_own_size(self) -> bool:
        """Whether its images are of the size that it was made for."""
        return self.options.input_size == self.own_size


def _find(args: EvaluateArguments) -> _Judged:
    """The model that the options name, on the CPU. Raises BadInput."""
    if args.predictions is not None:
        _check_place(args.predictions)
    folder, run = find_model(args.run)
    given: dict[str, Any] = {
        "dataset": _test_alone(args.dataset),
        "data_dir": args.data_dir,
        "image_size": args.image_size,
    }
    given = {name: value for name, value in given.items() if value is not None}
    given["device"] = args.device
    if run:
        # The run's options say how its images are made; they may lie elsewhere now.
        model: Any = run.model()
        options = replace(run.options, **given)
        names = class_names(folder)
        if args.image_size:
            set_input_size(model, args.image_size, options.classes, f"{folder}: the model")
        return _Judged(model, names, options, run, run.options.input_size, bool(args.dataset))

    # A model alone says how its images are made, and not which.
    classifier = read_classifier(folder, "cpu", run)
    if not args.dataset:
        raise BadInput(f"{args.run}: is a model without its run: give --dataset FOLDER")
    made = classifier.input
    if made["interpolation"] not in ("bilinear", "bicubic") or made["crop_mode"] != "center":
        raise BadInput(
            f"{folder}: its images are made by {made['interpolation']} and crop {made['crop_mode']}"
            "; here they are made by bilinear or bicubic and the centre"
        )
    if args.image_size:
        classes = len(classifier.classes)
        set_input_size(classifier.module, args.image_size, classes, f"{folder}: the model")
    plain = TrainingArguments(
        **{"image_size": classifier.size} | given,
        interpolation=made["interpolation"],
        crop_pct=made["crop_pct"],
    )
    options = RecordedOptions(
        **asdict(replace(plain, stored_size=size_to_store(plain))) | {"run_name": folder.name},
        mixed_precision="no",
        classes=len(classifier.classes),
        input_mean=tuple(made["mean"]),
        input_std=tuple(made["std"]),
    )
    return _Judged(classifier.module, classifier.classes, options, None, classifier.size, True)


def _test_alone(dataset: str | None) -> str | None:
    """FOLDER/test in place of a FOLDER that has test/ and no train/, which nobody trains on."""
    if dataset and os.path.isdir(home(dataset)):
        folders = [child for child in home(dataset).iterdir() if child.is_dir()]
        if [child.name for child in folders] == ["test"]:
            return str(folders[0])
    return dataset


def _check_place(file: str) -> None:
    """Raise BadInput where --predictions cannot be written to `file`, before the long work."""
    path = home(file).absolute()
    place = path if path.exists() else path.parent
    if path.is_dir() or not os.access(place, os.W_OK):
        raise BadInput(f"--predictions {file}: must be a file in a folder that can be written to")


@dataclass(frozen=True)
class _Images:
    """The images that a model is judged by."""

    # "test", "held-out", or "" where they are all that there are.
    kind: str
    # Labels are places in the model's classes.
    split: Split
    # Of the whole data set; and whether that is the run's own.
    fingerprint: str
    is_own: bool
    # What each image is called: its file, or its place in the data set's split.
    names: list[str]


def _images(judged: _Judged, say: Callable[[str], None]) -> _Images:
    """The images that the model is to be judged by. Says what is remarkable of them.

    Raises BadInput for images of a class that is not known, and where there are none.
    """
    options, known = judged.options, judged.classes
    recorded = judged.run and judged.run.config["options"].get("data_fingerprint")
    dataset = load_images(options, say)
    is_own = dataset.fingerprint == recorded or (not judged.is_given and recorded is None)
    if not is_own and not judged.is_given:
        say(f"note: the images of {options.dataset} are not those that the run was trained with")
    kind, split = _split_of(dataset, options, is_own or not judged.is_given, say)

    # Other images may count the same classes in another order, so their names decide.
    places = {name: place for place, name in enumerate(known)}
    twice = [name for name in split.classes if known.count(name) > 1]
    if twice:
        raise BadInput(f"{twice[0]!r} is the name of two of the model's classes")
    unknown = [name for name in split.classes if name not in places]
    if unknown:
        hint = ", which are numbers and no names" if unknown[0] == "0" else ""
        raise BadInput(
            f"--dataset {options.dataset}: has classes {unknown[:3]}{hint}, that the model does "
            f"not know; it knows {len(known)}, such as {known[:3]}"
        )
    if len(split.classes) < len(known):
        say(f"note: images of {len(split.classes)} of the model's {len(known)} classes")
    labels = np.array([places[name] for name in split.classes])[split.labels]
    files = dataset.files.get("test" if kind == "test" else "train")
    names = [str(files[place] if files else place) for place in split.places]
    split = replace(split, labels=labels, classes=known)
    return _Images(kind, split, dataset.fingerprint, is_own, names)


def _split_of(
    dataset: Dataset, options: RecordedOptions, as_the_run: bool, say: Callable[[str], None]
) -> tuple[str, Split]:
    """The kind of the images that count, and these: `as_the_run` was judged, or of another set.

    Raises BadInput where there are none.
    """
    if not as_the_run:
        if len(dataset.test):
            return "test", dataset.test
        say("note: no test/ in it: all images count, whether the model was trained on them or not")
        return "", dataset.train
    if len(dataset.test):
        # The set may have changed, and have fewer images than the run was limited to.
        count = min(options.limit_test, len(dataset.test))
        return "test", limit(dataset.test, count, "--limit-test", options.seed)
    if options.tested_on == "test":
        raise BadInput(f"--dataset {options.dataset}: has no test images")
    # Those that the run has not seen either.
    return "held-out", cut_splits(options, dataset, min(dataset.train.images.shape[2:]))[1]


def _evaluate(
    args: EvaluateArguments, judged: _Judged, split: Split, ranks: Ranks
) -> tuple[dict[str, float], dict[str, NDArray[Any]]]:
    """The figures over a split and, on the main process, what the model says. All ranks enter.

    As in training: with its precision, layout and input statistics, so that the figures are equal
    to the last digit on the same kind of device. Raises BadInput where there is no room.
    """
    options, model = judged.options, judged.model
    channels_last = options.memory_format == "channels_last"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    outputs = Outputs(keeps_logits(len(split), len(split.classes)))
    try:
        model.to(ranks.device, memory_format=layout)
        pipeline = Pipeline(options, split, ranks.device, options.input_mean, options.input_std)
        batches = pipeline.evaluation_batches(args.batch_size, ranks.world, ranks.rank)
        # Workers that are left behind would keep the process alive.
        with closing(batches):
            figures = evaluate(
                ranks.accelerator, model, batches, len(split), layout, outputs=outputs
            )
            tensors = outputs.of_all_ranks(ranks.accelerator, len(split))
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        elsewhere = ", or give --device cpu" if ranks.device.type != "cpu" else ""
        raise BadInput(
            f"no room on {ranks.device} for {len(split):,} images and --batch-size "
            f"{args.batch_size}; make it smaller{elsewhere}"
        ) from e
    return figures, {name: values.numpy() for name, values in tensors.items()}


# ---- what is said of it


def _say_figures(result: dict[str, Any], images: str, say: Callable[[str], None]) -> None:
    """Print the figures, a line each; `images` says of what."""
    low, high = result["accuracy_interval"]
    say(f"accuracy  {result['accuracy']:.4%}  ({result['evaluated_images']:,} {images.strip()})")
    say(f"          {low:.2%} to {high:.2%}, over other images of the kind (Wilson, 95 %)")
    say(f"top 5     {result['top5_accuracy']:.4%}")
    say(f"loss      {result['loss']:.4f}")
    if result["calibration_error"] is not None:
        say(f"ECE       {result['calibration_error']:.4f}")
    for title, key in (("classes", "classes"), ("groups", "superclasses")):
        rows = sorted(result.get(key, ()), key=lambda row: row["accuracy"])
        lowest = ", ".join(f"{row['name']} {row['accuracy']:.1%}" for row in rows[:SHOWN])
        if len(rows) > 2:
            say(_wrapped(f"{title:<8}  lowest of {len(rows)}: {lowest}"))
    pairs = (f"{c['true']} for {c['taken_for']} {c['images']:.0f}" for c in result["confused"])
    if listed := ", ".join(list(pairs)[:SHOWN]):
        say(_wrapped(f"confused  {listed}"))


def _wrapped(line: str) -> str:
    """A line of a title and a list, in as many lines as 80 columns take."""
    return textwrap.fill(line, 80, subsequent_indent=" " * 10, break_long_words=False)


def _write_csv(file: Path, predictions: Predictions, names: list[str]) -> None:
    """`image,label,prediction,probability`: a line an image. Raises BadInput."""
    sure = None if predictions.logits is None else confidence(predictions)
    classes = predictions.classes
    try:
        # Names of files need not be UTF-8.
        with open(file, "w", encoding="utf-8", errors="surrogateescape", newline="") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(["image", "label", "prediction", "probability"])
            rows = zip(names, predictions.labels, predictions.predicted, strict=True)
            for i, (name, label, taken_for) in enumerate(rows):
                probability = "" if sure is None else f"{sure[i]:.6f}"
                writer.writerow([name, classes[label], classes[taken_for], probability])
    except OSError as e:
        raise BadInput(f"--predictions {file}: {e.strerror or e}") from e


# ---- what is left in the run folder


def _has_predictions(run: FinishedRun, kind: str) -> bool:
    """Whether the run has left predictions of its `kind` images that can be used."""
    accuracy = read_summary(run.folder).get("accuracy", 0.0)
    with suppress(BadInput):
        return predictions_of(run.folder, kind, accuracy, with_logits=False) is not None
    return False


def _write_predictions(
    run: Path, kind: str, predictions: Predictions, say: Callable[[str], None]
) -> None:
    """Write predictions.safetensors to the run folder, where that is possible."""
    file = run / PREDICTIONS
    try:
        write_predictions(run, {kind: predictions})
    except OSError as e:
        say(f"warning: {file} cannot be written ({e.strerror or e})")
    else:
        say(f"written   {file}")


def _log(
    judged: _Judged,
    run: FinishedRun,
    tracker: str,
    images: _Images,
    predictions: Predictions,
    figures: dict[str, float],
    say: Callable[[str], None],
) -> None:
    """Log the figures as a run of its own beside the training in its group."""
    options = judged.options
    tracked = TrackedRun(
        project=options.project,
        name=options.run_name,
        group=options.group,
        job_type="evaluate",
        config=run.config["options"]
        | {"dataset": options.dataset, "data_fingerprint": images.fingerprint}
        | {"image_size": options.image_size},
        folder=run.folder,
        run_id=None,
        tags=tags_of(options, images.kind),
    )
    opened = start_tracker(tracker, say, tracked)
    step = read_summary(run.folder)["steps"]
    opened.show(step, partial(findings, predictions, images.split.images))
    names = {"loss": "test_loss"}
    summary = {names.get(name, name): value for name, value in figures.items()}
    opened.finish({"status": "finished", "tested_on": images.kind or "all", **summary}, 0)
