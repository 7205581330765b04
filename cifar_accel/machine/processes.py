"""The processes of a run, on Accelerate."""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
)

from cifar_accel.errors import BadInput
from cifar_accel.options.options import TrainingArguments
from cifar_accel.records.folder import Opened


def make_accelerator(device: str, mixed_precision: str | None = None) -> Accelerator:
    """Accelerate on `device` (auto, cpu, cuda, mps), at the launcher's precision unless one is given. All ranks enter.

    Raises BadInput when the device is not there, cannot compute so, or the processes do not find each other.
    """
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    cpu = check_launch(device, precision)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if not cpu and int(os.environ.get("LOCAL_WORLD_SIZE", world)) > torch.cuda.device_count() > 0:
        handlers.append(
            InitProcessGroupKwargs(backend="gloo")
        )  # several processes share a GPU, which NCCL refuses
        os.environ["LOCAL_RANK"] = str(
            int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        )
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=handlers,
    )
    if accelerator.num_processes != world:
        raise BadInput(
            f"the launcher started {world} processes but Accelerate sees {accelerator.num_processes}: they would all "
            "write one folder; start them with torchrun, or with accelerate launch --multi_gpu"
        )
    return accelerator


def check_launch(device: str, precision: str) -> bool:
    """Whether the processor is what computes. Raises BadInput when the device is not there or cannot compute so."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if (device == "cuda" and not cuda) or (device == "mps" and not mps):
        raise BadInput(
            f"--device {device}: torch {torch.__version__} sees no such device on this machine"
        )
    if device in ("cuda", "mps") and os.environ.get("ACCELERATE_USE_CPU", "false").lower() in (
        "true",
        "1",
        "yes",
    ):
        raise BadInput(f"--device {device}: the accelerate config says use_cpu; change one of them")
    cpu = device == "cpu" or not (cuda or mps)
    if precision not in ("no", "fp16", "bf16"):
        raise BadInput(
            f"mixed precision {precision}: unknown here; launch with --mixed_precision bf16, fp16 or no"
        )
    if precision == "fp16" and cpu:
        raise BadInput(
            "mixed precision fp16 needs a GPU; on a CPU launch with --mixed_precision bf16 or no"
        )
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise BadInput(
                f"the accelerate config asks for {name}: here every device holds the whole model (MULTI_GPU)"
            )
    return cpu


def start_processes(
    args: TrainingArguments, opened: Opened | None, say: Callable[[str], None]
) -> tuple[Opened, Accelerator]:
    """Join the other processes and learn from the main one what to do with the run folder. All ranks enter.

    Raises BadInput when the device is not there or the processes do not find each other.
    """
    # Said once by each rank: of an argument that Accelerate has no other name for, and of 1x1 kernels in channels-last.
    for text in (
        "`broadcast_buffers` is deprecated",
        "Grad strides do not match bucket view strides",
    ):
        warnings.filterwarnings("ignore", message=text)
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        say(f"processes: waiting for all {world}")
    accelerator = make_accelerator(args.device)
    shared = broadcast_object_list([opened and replace(opened, lock=None)])[0]
    if shared is None:
        raise BadInput(
            "RANK is set and is not 0, but WORLD_SIZE says one process: start with a launcher, or unset it"
        )
    return shared, accelerator
