"""The processes of a run: how they find each other, and what they do together, on Accelerate."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from cifar_accel.console import say
from cifar_accel.errors import BadInput, PeerLost

# What torch says once in each rank about an argument that Accelerate has no other name for, and
# about kernels of 1x1 in channels-last layout.
HARMLESS = ("`broadcast_buffers` is deprecated", "Grad strides do not match bucket view strides")
# What every launcher of several processes sets.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Plugins that cut one model over several devices.
SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


class Ranks:
    """All processes of a run, seen from one of them.

    What the hosts agree on goes over gloo, between hosts alone: nobody waits for a device.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.world = accelerator.num_processes
        self.rank = accelerator.process_index
        self.is_main = bool(accelerator.is_main_process)
        self.device = accelerator.device
        # A group of its own for the hosts, which NCCL cannot be.
        self.hosts: Any = None
        if self.world > 1:
            self.hosts = torch.distributed.new_group(backend="gloo")

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, true when it is true on any rank. All ranks enter. Raises PeerLost."""
        if self.hosts is None:
            return list(flags)
        # The largest of zeros and ones is a one if any is.
        votes = torch.tensor(flags, dtype=torch.int32)
        with peers_expected():
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, group=self.hosts)
        return [bool(vote) for vote in votes]

    def from_main(self, value: Any) -> Any:
        """The main process's `value`, which must be picklable. All ranks enter. Raises PeerLost."""
        if self.hosts is None:
            return value
        shared = [value]
        with peers_expected():
            torch.distributed.broadcast_object_list(shared, group=self.hosts)
        return shared[0]

    def gather(self, value: Any) -> list[Any]:
        """`value` of each rank, by rank; it must be picklable. All ranks enter. Raises PeerLost."""
        if self.hosts is None:
            return [value]
        values: list[Any] = [None] * self.world
        with peers_expected():
            torch.distributed.all_gather_object(values, value, group=self.hosts)
        return values

    def wait_for_all(self) -> None:
        """Wait until all ranks have come here. All ranks enter. Raises PeerLost."""
        self.any(False)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all ranks, on the device. All ranks enter."""
        total: torch.Tensor = self.accelerator.reduce(tensor)
        return total

    def take_main_buffers(self, module: torch.nn.Module) -> None:
        """Give every rank the main process's buffers (batch norm's statistics). All ranks enter."""
        if self.world > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)


@contextmanager
def peers_expected() -> Iterator[None]:
    """Around what the hosts do together: when it fails, another of them is gone."""
    try:
        yield
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:120]
        raise PeerLost(
            f"another process of this run is gone ({reason}); the same command goes on"
        ) from e


def join_processes(device: str, mixed_precision: str | None = None) -> Ranks:
    """Join the launcher's other processes, on `device` (auto, cpu, cuda, mps). All ranks enter.

    The precision is the launcher's, unless one is given. Raises BadInput when the device is not
    there, cannot compute so, or the processes do not find each other.
    """
    # Before the first process group, which would already warn.
    for text in HARMLESS:
        warnings.filterwarnings("ignore", message=text)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        say(f"processes: waiting for all {world}")
    return Ranks(make_accelerator(device, world, mixed_precision))


def make_accelerator(device: str, world: int, mixed_precision: str | None = None) -> Accelerator:
    """Accelerate over `world` processes. All ranks enter. Raises BadInput, as `join_processes`."""
    # What can be refused is refused before anybody waits for anybody.
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    cpu = check_device(device, precision)
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if world > 1 and missing:
        raise BadInput(
            f"WORLD_SIZE says {world} processes, but {', '.join(missing)} is not set: "
            "start with a launcher, or unset WORLD_SIZE"
        )

    # Gradients live in the buckets that are exchanged: no copy.
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    gpus = torch.cuda.device_count()
    if not cpu and local_world > gpus > 0:
        # Several processes share a GPU, which NCCL refuses.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
        os.environ["LOCAL_RANK"] = str(int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    # Schedules are functions of the step and are never handed to Accelerate.
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=handlers,
    )
    # Without a usable backend Accelerate takes every process for a run of its own.
    if accelerator.num_processes != world:
        raise BadInput(
            f"the launcher started {world} processes but Accelerate sees "
            f"{accelerator.num_processes}: they would all write one folder; start them with "
            "torchrun, or with accelerate launch --multi_gpu"
        )
    return accelerator


def is_set(variable: str) -> bool:
    """Whether an environment variable says yes, in any of the ways that Accelerate takes."""
    return os.environ.get(variable, "").lower() in ("true", "1", "yes")


def chosen_device(device: str) -> torch.device:
    """What --device means on this machine. Raises BadInput when it is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    # What was asked for by name must be there.
    if device != "auto" and not there[device]:
        raise BadInput(
            f"--device {device}: torch {torch.__version__} sees no such device on this machine"
        )
    if is_set("ACCELERATE_USE_CPU"):
        if device in ("cuda", "mps"):
            raise BadInput(
                f"--device {device}: the accelerate config says use_cpu; change one of them"
            )
        return torch.device("cpu")
    # auto: the first kind that is there.
    if device != "auto":
        return torch.device(device)
    return torch.device(next(kind for kind in there if there[kind]))


def check_device(device: str, precision: str) -> bool:
    """Whether the processor is what computes. Raises BadInput when the device cannot compute so."""
    cpu = chosen_device(device).type == "cpu"
    if precision not in ("no", "fp16", "bf16"):
        raise BadInput(
            f"mixed precision {precision}: unknown here; "
            "launch with --mixed_precision bf16, fp16 or no"
        )
    if precision == "fp16" and cpu:
        raise BadInput(
            "mixed precision fp16 needs a GPU; on a CPU launch with --mixed_precision bf16 or no"
        )
    # Accelerate passes over these plugins on a CPU without a word.
    for name in SHARDING:
        if is_set(f"ACCELERATE_USE_{name}"):
            raise BadInput(
                f"the accelerate config asks for {name}: here every device holds the whole model "
                "(MULTI_GPU)"
            )
    return cpu
