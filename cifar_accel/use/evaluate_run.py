"""The figures of a finished run again, from its folder."""

from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cifar_accel.data.batches import Pipeline
from cifar_accel.data.datasets import Split
from cifar_accel.data.decode import load_images
from cifar_accel.data.splits import cut_splits, limit
from cifar_accel.errors import BadInput
from cifar_accel.evaluate import Outputs, evaluate
from cifar_accel.files import home
from cifar_accel.machine.processes import join_processes
from cifar_accel.options.options import EvaluateArguments
from cifar_accel.records.predictions import FILE as PREDICTIONS
from cifar_accel.records.predictions import (
    keeps_logits,
    of_outputs,
    predictions_of,
    write_predictions,
)
from cifar_accel.records.summary import RecordedOptions, read_summary
from cifar_accel.records.trackers import TrackedRun, start_tracker
from cifar_accel.use.load import FinishedRun, load_run


def evaluate_run(args: EvaluateArguments, say: Callable[[str], None]) -> dict[str, Any]:
    """Evaluate the weights of a finished run with its test images, at its precision.

    All ranks enter.

    Returns:
        status: "finished". loss, accuracy, top5_accuracy, evaluated_images: see `evaluate`.

    Raises:
        BadInput: no finished run, weights that cannot be used, or classes the model does not know.
    """
    # What is wrong with the folder is found before the data is waited for.
    run = load_run(home(args.run))
    # Its images may lie elsewhere now.
    dataset = args.dataset or run.options.dataset
    data_dir = args.data_dir or run.options.data_dir
    options = replace(run.options, device=args.device, dataset=dataset, data_dir=data_dir)
    model: Any = run.model()
    known = list(model.pretrained_cfg.get("label_names") or ())
    recorded = None if args.dataset else run.config["options"].get("data_fingerprint")
    kind, split, fingerprint = _test_images(options, known, recorded, say)

    # As in training: its precision, layout and input statistics, so that the figures are equal to
    # the last digit on the same kind of device.
    ranks = join_processes(options.device, options.mixed_precision)
    channels_last = options.memory_format == "channels_last"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(ranks.device, memory_format=layout)
    pipeline = Pipeline(options, split, ranks.device, options.input_mean, options.input_std)
    batches = pipeline.evaluation_batches(args.batch_size, ranks.world, ranks.rank)
    outputs = Outputs(keeps_logits(len(split), len(split.classes)))
    # Workers that are left behind would keep the process alive.
    with closing(batches):
        figures = evaluate(ranks.accelerator, model, batches, len(split), layout, outputs=outputs)
        tensors = outputs.of_all_ranks(ranks.accelerator, len(split))

    # The main process alone prints.
    images = f"{figures['evaluated_images']:,} {kind} images of {options.dataset}"
    say(f"accuracy  {figures['accuracy']:.4%}  ({images})")
    say(f"top 5     {figures['top5_accuracy']:.4%}")
    say(f"loss      {figures['loss']:.4f}")
    # A run of an earlier version has none, and a file may be damaged.
    file = run.folder / PREDICTIONS
    is_its_own = not args.dataset and recorded in (None, fingerprint)
    if ranks.is_main and is_its_own and not _has_predictions(run, kind):
        try:
            said = {name: values.numpy() for name, values in tensors.items()}
            predictions = of_outputs(split.labels, known, said, fingerprint, split.places)
            write_predictions(run.folder, {kind: predictions})
            say(f"written   {file}")
        except OSError as e:
            say(f"warning: {file} cannot be written ({e.strerror or e})")
    if ranks.is_main and args.tracker != "none":
        _log(run, args.tracker, figures, say)
    return {"status": "finished", **figures}


def _has_predictions(run: FinishedRun, kind: str) -> bool:
    """Whether the run has left predictions of its `kind` images that can be used."""
    accuracy = read_summary(run.folder).get("accuracy", 0.0)
    with suppress(BadInput):
        return predictions_of(run.folder, kind, accuracy, with_logits=False) is not None
    return False


def _log(
    run: FinishedRun, tracker: str, figures: dict[str, float], say: Callable[[str], None]
) -> None:
    """Log the figures as a run of its own beside the training in its group."""
    tracked = TrackedRun(
        project=run.options.project,
        name=run.options.run_name,
        group=run.options.group,
        job_type="evaluate",
        config=run.config["options"],
        folder=run.folder,
        run_id=None,
    )
    started = start_tracker(tracker, say, tracked)
    started.finish({f"test/{name}": value for name, value in figures.items()}, 0)


def _test_images(
    options: RecordedOptions, known: list[str], recorded: str | None, say: Callable[[str], None]
) -> tuple[str, Split, str]:
    """What the run is judged by, "test" or "held-out" images, these, and their set's fingerprint.

    Their labels are places in the model's classes `known`. Says so where the images' fingerprint is
    not the one that is `recorded`. Raises BadInput for images of a class that is not known, and
    where there are none.
    """
    dataset = load_images(options, say)
    test = dataset.test
    if not len(test):
        if options.tested_on == "test":
            raise BadInput(f"--dataset {options.dataset}: has no test images")
        # Those that the run has not seen either.
        _, test = cut_splits(options, dataset, min(dataset.train.images.shape[2:]))
    if recorded not in (None, dataset.fingerprint):
        say(f"note: the images of {options.dataset} are not those that the run was trained with")
    # Other images may count the same classes in another order, so their names decide.
    places = {name: place for place, name in enumerate(known)}
    unknown = [name for name in test.classes if name not in places]
    if unknown:
        hint = ", which are numbers and no names" if unknown[0] == "0" else ""
        raise BadInput(
            f"--dataset {options.dataset}: has classes {unknown[:3]}{hint}, that the run's model "
            f"does not know; it knows {len(known)}, such as {known[:3]}"
        )
    labels = np.array([places[name] for name in test.classes])[test.labels]
    # Another data set may have fewer images than the run was limited to.
    count = min(options.limit_test, len(test))
    kind = "test" if len(dataset.test) else "held-out"
    test = replace(test, labels=labels, classes=known)
    return kind, limit(test, count, "--limit-test", options.seed), dataset.fingerprint
