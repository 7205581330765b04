"""The figures of a finished run again, from its folder."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import timm
import timm.optim
import torch

from cifar_accel.data.batches import Pipeline
from cifar_accel.data.datasets import limit
from cifar_accel.data.decode import load_dataset
from cifar_accel.errors import BadInput
from cifar_accel.evaluate import evaluate
from cifar_accel.files import home
from cifar_accel.machine.processes import make_accelerator
from cifar_accel.models.surgery import shorten_convolutions
from cifar_accel.options.options import EvaluateArguments, TrainingArguments
from cifar_accel.records import trackers
from cifar_accel.records.summary import read_config


def evaluate_run(args: EvaluateArguments, say: Callable[[str], None]) -> dict[str, Any]:
    """Evaluate the weights in `args.run`/model at the precision and with the test images of the run. All ranks enter.

    Raises BadInput when the folder is no run, is unfinished, or the classes differ.
    """
    path = home(args.run)
    if args.batch_size < 1:
        raise BadInput(f"--batch-size {args.batch_size}: must be greater than 0")
    config = read_config(path)
    if config is None:
        raise BadInput(f"{path}: is no run folder (it has no config.json of a run)")
    if not (path / "model" / "model.safetensors").is_file():
        raise BadInput(
            f"{path}: has no model/ yet, the run is not finished; the command in its config.json goes on with it"
        )
    known = {f.name for f in fields(TrainingArguments)}
    options: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in config["options"].items()
        if k in known
    }
    given = {"dataset": args.dataset, "data_dir": args.data_dir}
    options |= {name: value for name, value in given.items() if value is not None}
    run = replace(TrainingArguments(**options), device=args.device)
    data = load_dataset(run.dataset, run.data_dir, run.image_size, say)
    if len(data.test.classes) != config["options"]["classes"]:
        raise BadInput(
            f"--dataset {run.dataset}: has {len(data.test.classes)} classes, the run has {config['options']['classes']}"
        )
    split = limit(data.test, min(run.limit_test, len(data.test)), "--limit-test", run.seed)
    accelerator = make_accelerator(run.device, config["options"]["mixed_precision"])
    memory_format = (
        torch.channels_last if run.memory_format == "channels_last" else torch.contiguous_format
    )
    try:
        model: Any = timm.create_model(f"local-dir:{path / 'model'}", pretrained=True)
    except Exception as e:  # whatever a damaged file makes of the libraries
        raise BadInput(
            f"{path / 'model'}: cannot be read as a model ({' '.join(str(e).split())[:150]})"
        ) from e
    shorten_convolutions(model)  # as in training, so that the figures are equal to the last digit
    model.to(accelerator.device, memory_format=memory_format)
    options = config["options"]
    pipeline = Pipeline(run, split, accelerator.device, options["input_mean"], options["input_std"])
    batches = pipeline.evaluation_batches(
        args.batch_size, accelerator.num_processes, accelerator.process_index
    )
    result = evaluate(accelerator, model, batches, len(split), memory_format)
    say(
        f"accuracy  {result['accuracy']:.4%}  ({result['evaluated_images']:,} test images of {run.dataset})"
    )
    say(f"top 5     {result['top5_accuracy']:.4%}\nloss      {result['loss']:.4f}")
    if accelerator.is_main_process and args.tracker != "none":
        tracker = trackers.start_tracker(
            args.tracker,
            say,
            project=run.project,
            name=run.run_name,
            group=run.group,
            job_type="evaluate",
            config=options,
            folder=path,
            run_id=None,
        )
        tracker.finish({f"test/{name}": value for name, value in result.items()}, 0)
    return {"status": "finished", **result}
