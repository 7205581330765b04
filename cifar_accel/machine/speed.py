"""What is known of a device's speed and memory, what only changes speed, and traces."""

import ctypes
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cifar_accel.errors import first_line

# Dense peak of one device in FLOP/s by a part of its name, in bf16 or fp16 with fp32 sums, from the
# makers' data sheets (without sparsity). A device that is not here gets no MFU.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 80GB HBM3": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak in FLOP/s at `precision` (bf16 or fp16), or None where it is not known."""
    if device.type != "cuda" or precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    # An L40 is no L4, and of an RTX 4090 there are slower ones with a word more.
    model = r"\b{}\b(?! (?:Ti|D|Laptop)\b)"
    return next(
        (peak for part, peak in PEAK_FLOPS.items() if re.search(model.format(part), name)), None
    )


def peak_memory_mib(device: torch.device) -> float:
    """Most memory held so far in MiB: by tensors on a CUDA device, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage, which counts what the parent process held when it started this one.
        words = status.read_text().partition("VmHWM:")[2].split()
        return int(words[0]) / 2**10
    # Bytes on a Mac, KiB elsewhere.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, for training on a CPU.

    Every step allocates the same activations again. By default glibc returns large ones to the
    kernel, which then clears each page anew: a third of a small model's step on a virtual machine,
    and half of a larger one's (benchmarks/RESULTS.md). Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h: all blocks lie in the heap, which never
        # shrinks.
        mallopt(-4, 0)
        mallopt(-1, -1)


def compile_model(
    model: torch.nn.Module, mode: str, device: torch.device, say: Callable[[str], None]
) -> bool:
    """Compile `model` in place for static shapes; False, after a warning, where that fails here."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    # Whatever the missing compiler or triton raises.
    except Exception as e:
        reason = first_line(e)[:150]
        say(f"warning: --compile does not work here and is left out ({reason})")
        return False
    if mode == "reduce-overhead" and device.type != "cuda":
        say("warning: without CUDA graphs --compile-mode reduce-overhead is the default mode")
        mode = "default"
    # The trial's own graph is not counted.
    torch._dynamo.utils.counters.clear()
    model.compile(mode=mode, dynamic=False)
    return True


def compiled_graphs() -> int:
    """Graphs that torch.compile has made: one for each size in training, and one for evaluation."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Profiler:
    """A trace of `steps` optimizer steps, after 3 of warm-up, for ui.perfetto.dev; and a table."""

    def __init__(self, folder: Path, steps: int, say: Callable[[str], None]):
        self.folder = folder
        self.say = say
        self.profile: Any = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=0, warmup=3, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self.profile.start()

    def step(self) -> None:
        """One optimizer step is done."""
        self.profile.step()

    def close(self) -> None:
        """Write what was traced, when the training ended before all steps were."""
        self.profile.stop()

    def _write(self, profile: Any) -> None:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        trace = self.folder / "trace.json.gz"
        try:
            self.folder.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(trace))
            table = profile.key_averages().table(f"self_{kind}_time_total", row_limit=40)
            (self.folder / "operators.txt").write_text(table)
        except OSError as e:
            self.say(f"warning: no profile in {self.folder} ({e.strerror or e}); training goes on")
        else:
            self.say(f"profile: {trace} (open it in ui.perfetto.dev) and operators.txt beside it")
