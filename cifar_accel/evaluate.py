"""Exact evaluation: counts are summed over all processes and every image counts once."""

import os
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from cifar_accel import tracking
from cifar_accel.config import EvaluateArguments, TrainingArguments, home
from cifar_accel.data.cache import load_dataset
from cifar_accel.data.pipelines import Batch, Pipeline
from cifar_accel.data.sources import limit
from cifar_accel.model import shorten_convolutions
from cifar_accel.run_folder import read_config


def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    batches: Iterable[Batch],
    images: int,
    memory_format: torch.memory_format = torch.contiguous_format,
    fill_to: int = 0,
) -> dict[str, float]:
    """Loss and accuracy of `model` over a split of `images` images; all ranks enter, each with its own share.

    `model` must not be wrapped: a wrapper's forward may communicate, and the ranks have different numbers of batches.
    The host waits for the device once, at the end. A last batch shorter than `fill_to` is filled up with images that
    are not counted, so that a compiled model sees one shape.

    Returns:
        loss: mean cross-entropy. accuracy, top5_accuracy: fractions in [0, 1]. evaluated_images: how many were counted.
    """
    was_training = model.training
    model.eval()
    wide = torch.float32 if accelerator.device.type == "mps" else torch.float64  # mps has no float64
    sums = torch.zeros(3, dtype=wide, device=accelerator.device)  # loss, correct, correct in the first five
    seen = 0
    with torch.no_grad(), accelerator.autocast():
        for batch in batches:
            x = batch.images.contiguous(memory_format=memory_format)
            if len(x) < fill_to:  # the last batch is short
                x = torch.cat([x, x[:1].expand(fill_to - len(x), -1, -1, -1)]).contiguous(memory_format=memory_format)
            logits = model(x)[: len(batch.labels)].float()
            ranked = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]
            loss = F.cross_entropy(logits, batch.labels, reduction="sum")
            sums += torch.stack([loss, ranked[:, 0].sum(), ranked.sum()]).to(wide)
            seen += len(batch.labels)
    model.train(was_training)
    loss_sum, correct, correct5, count = accelerator.reduce(torch.cat([sums, sums.new_tensor([seen])])).tolist()
    assert count == images, f"evaluated {count:.0f} of {images} images"
    return {
        "loss": loss_sum / count,
        "accuracy": correct / count,
        "top5_accuracy": correct5 / count,
        "evaluated_images": int(count),
    }


def evaluate_run(args: EvaluateArguments, say: Callable[[str], None]) -> dict[str, Any]:
    """Evaluate the weights in `args.run`/model at the precision and with the test images of the run. All ranks enter.

    Raises ValueError when the folder is no run, is unfinished, or the classes differ.
    """
    path = home(args.run)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be greater than 0")
    config = read_config(path)
    if config is None:
        raise ValueError(f"{path}: is no run folder (it has no config.json of a run)")
    if not (path / "model" / "model.safetensors").is_file():
        raise ValueError(
            f"{path}: has no model/ yet, the run is not finished; the command in its config.json goes on with it"
        )
    known = {f.name for f in fields(TrainingArguments)}
    options: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in config["options"].items() if k in known
    }
    given = {"dataset": args.dataset, "data_dir": args.data_dir}
    options |= {name: value for name, value in given.items() if value is not None}
    run = replace(TrainingArguments(**options), device=args.device)
    data = load_dataset(run.dataset, run.data_dir, run.image_size, say)
    if len(data.test.classes) != config["options"]["classes"]:
        raise ValueError(
            f"--dataset {run.dataset}: has {len(data.test.classes)} classes, the run has {config['options']['classes']}"
        )
    split = limit(data.test, min(run.limit_test, len(data.test)), "--limit-test", run.seed)
    accelerator = make_accelerator(run.device, config["options"]["mixed_precision"])
    memory_format = torch.channels_last if run.memory_format == "channels_last" else torch.contiguous_format
    try:
        model: Any = timm.create_model(f"local-dir:{path / 'model'}", pretrained=True)
    except Exception as e:  # whatever a damaged file makes of the libraries
        raise ValueError(f"{path / 'model'}: cannot be read as a model ({' '.join(str(e).split())[:150]})") from e
    shorten_convolutions(model)  # as in training, so that the figures are equal to the last digit
    model.to(accelerator.device, memory_format=memory_format)
    options = config["options"]
    pipeline = Pipeline(run, split, accelerator.device, options["input_mean"], options["input_std"])
    batches = pipeline.evaluation_batches(args.batch_size, accelerator.num_processes, accelerator.process_index)
    result = evaluate(accelerator, model, batches, len(split), memory_format)
    say(f"accuracy  {result['accuracy']:.4%}  ({result['evaluated_images']:,} test images of {run.dataset})")
    say(f"top 5     {result['top5_accuracy']:.4%}\nloss      {result['loss']:.4f}")
    if accelerator.is_main_process and args.tracker != "none":
        tracker = tracking.start_tracker(
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


def make_accelerator(device: str, mixed_precision: str | None = None) -> Accelerator:
    """Accelerate on `device` (auto, cpu, cuda, mps), at the launcher's precision unless one is given. All ranks enter.

    Raises ValueError when the device is not there, cannot compute so, or the processes do not find each other.
    """
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    cpu = check_launch(device, precision)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if not cpu and int(os.environ.get("LOCAL_WORLD_SIZE", world)) > torch.cuda.device_count() > 0:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))  # several processes share a GPU, which NCCL refuses
        os.environ["LOCAL_RANK"] = str(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=handlers,
    )
    if accelerator.num_processes != world:
        raise ValueError(
            f"the launcher started {world} processes but Accelerate sees {accelerator.num_processes}: they would all "
            "write one folder; start them with torchrun, or with accelerate launch --multi_gpu"
        )
    return accelerator


def check_launch(device: str, precision: str) -> bool:
    """Whether the processor is what computes. Raises ValueError when the device is not there or cannot compute so."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if (device == "cuda" and not cuda) or (device == "mps" and not mps):
        raise ValueError(f"--device {device}: torch {torch.__version__} sees no such device on this machine")
    if device in ("cuda", "mps") and os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes"):
        raise ValueError(f"--device {device}: the accelerate config says use_cpu; change one of them")
    cpu = device == "cpu" or not (cuda or mps)
    if precision not in ("no", "fp16", "bf16"):
        raise ValueError(f"mixed precision {precision}: unknown here; launch with --mixed_precision bf16, fp16 or no")
    if precision == "fp16" and cpu:
        raise ValueError("mixed precision fp16 needs a GPU; on a CPU launch with --mixed_precision bf16 or no")
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise ValueError(
                f"the accelerate config asks for {name}: here every device holds the whole model (MULTI_GPU)"
            )
    return cpu
