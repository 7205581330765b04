"""The figures of a finished run again, from its folder."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cifar_accel.data.batches import Pipeline
from cifar_accel.data.datasets import Split
from cifar_accel.data.decode import load_images
from cifar_accel.data.splits import cut_splits, limit
from cifar_accel.errors import BadInput
from cifar_accel.evaluate import evaluate
from cifar_accel.files import home
from cifar_accel.machine.processes import join_processes
from cifar_accel.options.options import EvaluateArguments
from cifar_accel.records.summary import RecordedOptions
from cifar_accel.records.trackers import TrackedRun, start_tracker
from cifar_accel.use.load import load_run


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
    kind, split = _test_images(options, known, recorded, say)

    # As in training: its precision, layout and input statistics, so that the figures are equal to
    # the last digit on the same kind of device.
    ranks = join_processes(options.device, options.mixed_precision)
    channels_last = options.memory_format == "channels_last"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(ranks.device, memory_format=layout)
    pipeline = Pipeline(options, split, ranks.device, options.input_mean, options.input_std)
    batches = pipeline.evaluation_batches(args.batch_size, ranks.world, ranks.rank)
    # Workers that are left behind would keep the process alive.
    with closing(batches):
        figures = evaluate(ranks.accelerator, model, batches, len(split), layout)

    # The main process alone prints.
    images = f"{figures['evaluated_images']:,} {kind} images of {options.dataset}"
    say(f"accuracy  {figures['accuracy']:.4%}  ({images})")
    say(f"top 5     {figures['top5_accuracy']:.4%}")
    say(f"loss      {figures['loss']:.4f}")
    if ranks.is_main and args.tracker != "none":
        # A run of its own beside the training in its group.
        tracked = TrackedRun(
            project=options.project,
            name=options.run_name,
            group=options.group,
            job_type="evaluate",
            config=run.config["options"],
            folder=run.folder,
            run_id=None,
        )
        tracker = start_tracker(args.tracker, say, tracked)
        tracker.finish({f"test/{name}": value for name, value in figures.items()}, 0)
    return {"status": "finished", **figures}


def _test_images(
    options: RecordedOptions, known: list[str], recorded: str | None, say: Callable[[str], None]
) -> tuple[str, Split]:
    """What the run is judged by, "test" or "held-out" images, and these.

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
    return kind, limit(replace(test, labels=labels), count, "--limit-test", options.seed)
