"""The processes of a run: how they find each other, and what they do together, on Accelerate."""

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from cifar_accel.console import is_main_process, say
from cifar_accel.errors import BadInput, PeerLost, first_line
from cifar_accel.machine import environment

# What torch says once in each rank about an argument that Accelerate has no other name for, and
# about kernels of 1x1 in channels-last layout.
HARMLESS = ("`broadcast_buffers` is deprecated", "Grad strides do not match bucket view strides")
# How long a process waits for the others, in seconds. A killed process closes its connections; a
# dead host or a pulled cable tells nobody, and only this ends the others.
LONG_WAIT = 600.0
# Between two steps, where no process does anything alone.
SHORT_WAIT = 90.0
# The devices wait longer than the hosts by this factor: hosts that give up say so in a line, while
# NCCL ends the process.
DEVICES_WAIT = 1.2


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
        # The launcher's. The loop divides the loss itself; Accelerate must not do it a second time.
        self.accumulation = accelerator.gradient_accumulation_steps
        accelerator.gradient_accumulation_steps = 1
        # Accelerate's group, and one of its own for the hosts, which NCCL cannot be.
        self.devices: Any = torch.distributed.group.WORLD
        self.hosts: Any = None
        self.patient = False
        if self.world > 1:
            self.hosts = torch.distributed.new_group(backend="gloo")
            self.be_patient()

    def be_patient(self, patient: bool = True) -> None:
        """From here on wait long for the others, or only as long as they may take for a step.

        All ranks enter. Before they wait briefly they meet, so that nobody is elsewhere still.
        Raises PeerLost.
        """
        if self.hosts is None or patient == self.patient:
            return
        if not patient:
            self.wait_for_all()
        self.patient = patient
        wait = timedelta(seconds=LONG_WAIT if patient else SHORT_WAIT)
        self.hosts.set_timeout(wait)
        self.devices.set_timeout(wait * DEVICES_WAIT)

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
        return self.gather(value)[0]

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

    def take_main_buffers(self, module: torch.nn.Module) -> None:
        """Give every rank the main process's buffers (batch norm's statistics). All ranks enter."""
        if self.world > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)


@contextmanager
def peers_expected() -> Iterator[None]:
    """Around what processes do together: PeerLost where torch says that another of them is gone."""
    try:
        yield
    except RuntimeError as e:
        # gloo's errors are of no kind of their own; they begin with [file:line] of its source.
        text = first_line(e)
        if not isinstance(e, torch.distributed.DistError) and "gloo/" not in text:
            raise
        reason = text.rpartition("] ")[2].partition(". ")[0][:120]
        raise PeerLost(
            f"another process of this run is gone ({reason}); the same command goes on"
        ) from e


def join_processes(
    device: str, mixed_precision: str | None = None, say: Callable[[str], None] = say
) -> Ranks:
    """Join the launcher's other processes, on `device` (auto, cpu, cuda, mps). All ranks enter.

    The precision is the launcher's, unless one is given. Raises BadInput when the device is not
    there, cannot compute so, or the processes do not find each other.
    """
    # Before the first process group, which would already warn.
    for text in HARMLESS:
        warnings.filterwarnings("ignore", message=text)
    for name in environment.NUMBERS:
        environment.whole_number(name)

    # What can be refused is refused before anybody waits for anybody.
    precision = mixed_precision or environment.mixed_precision()
    check_device(device, precision)
    cpu = chosen_device(device).type == "cpu"
    world = environment.whole_number("WORLD_SIZE")
    missing = [name for name in environment.LAUNCHER_VARIABLES if name not in os.environ]
    if world > 1 and missing:
        raise BadInput(
            f"WORLD_SIZE says {world} processes, but {', '.join(missing)} is not set: "
            "start with a launcher, or unset WORLD_SIZE"
        )
    local_world = environment.whole_number("LOCAL_WORLD_SIZE", world)
    if world > 1:
        find_first_host(several=world > local_world)
        say(f"processes: waiting for all {world}")

    # Gradients live in the buckets that are exchanged: no copy.
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    gpus = torch.cuda.device_count()
    if not cpu and local_world > gpus > 0:
        # Several processes share a GPU, which NCCL refuses.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
        os.environ["LOCAL_RANK"] = str(environment.whole_number("LOCAL_RANK", 0) % gpus)
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
            f"{accelerator.num_processes}: start them with torchrun or accelerate launch "
            "--multi_gpu"
        )
    return Ranks(accelerator)


def find_first_host(several: bool) -> None:
    """See that MASTER_ADDR and MASTER_PORT are a place to meet; raises BadInput where they are not.

    Where there are `several` hosts, gloo is told the interface that leads there: else it takes the
    one that this host's own name stands for, which often is the loopback.
    """
    # torchrun has opened the port already.
    has_opened = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_main_process() and not has_opened:
        port = environment.whole_number("MASTER_PORT")
        environment.check_port(port, "MASTER_PORT", "name another one in all processes")
    host = os.environ["MASTER_ADDR"]
    try:
        family, kind, _, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        # Finds the way and sends nothing.
        with socket.socket(family, kind) as probe:
            probe.connect(there)
            own = probe.getsockname()[0]
    except OSError as e:
        raise BadInput(f"MASTER_ADDR {host}: {e.strerror}; it must be the first host") from e
    if several and "GLOO_SOCKET_IFNAME" not in os.environ:
        for name, addresses in psutil.net_if_addrs().items():
            if own in [address.address for address in addresses]:
                os.environ["GLOO_SOCKET_IFNAME"] = name


def chosen_device(device: str) -> torch.device:
    """What --device means on this machine. Raises BadInput when it is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if environment.is_set("ACCELERATE_USE_CPU"):
        there = {"cpu": True}
    # auto: the first kind that is there. What was asked for by name must be there.
    if device == "auto":
        device = next(kind for kind in there if there[kind])
    if not there.get(device):
        raise BadInput(
            f"--device {device}: torch {torch.__version__} sees no such device on this machine, "
            "or the accelerate config says use_cpu"
        )
    return torch.device(device)


def check_device(device: str, precision: str) -> None:
    """Raise BadInput when the device is not there, or cannot compute so."""
    chosen = chosen_device(device).type
    # Accelerate takes the device that this names, whether or not it is there.
    named = os.environ.get("ACCELERATE_TORCH_DEVICE", chosen)
    if named.partition(":")[0] != chosen:
        raise BadInput(f"ACCELERATE_TORCH_DEVICE={named}: this run is on {chosen}; unset it")
    if precision not in ("no", "fp16", "bf16"):
        raise BadInput(f"mixed precision {precision}: unknown here; there are bf16, fp16 and no")
    if precision == "fp16" and chosen == "cpu":
        raise BadInput("mixed precision fp16 needs a GPU; launch with --mixed_precision bf16 or no")
    # Accelerate passes over these plugins on a CPU without a word.
    for name in environment.SHARDING:
        if environment.is_set(f"ACCELERATE_USE_{name}"):
            raise BadInput(f"the accelerate config asks for {name}: there is MULTI_GPU alone here")
