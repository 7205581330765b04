"""A CUDA device that is not there: tensors with its name, which hold nothing and compute nothing.

torch's fake tensors have a device, a shape and a dtype, so what mixes two devices fails as it would
on a GPU. `Watch` counts where the host would wait for the device. What neither can show is in
docs/gpu.md.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import cifar_accel

aten = torch.ops.aten
PACKAGE = str(Path(cifar_accel.__file__).parent)
# What mixed precision is for. Attention's products are not seen: on a GPU they are one kernel.
PRODUCTS = (aten.convolution, aten.mm, aten.addmm)


class Watch(TorchDispatchMode):
    """Counts where the host would wait for the device, and the dtypes of a model's products."""

    def __init__(self):
        super().__init__()
        # (what the host waits for, the function of the package that does): how often.
        self.waits: Counter[tuple[str, str]] = Counter()
        self.products: Counter[torch.dtype] = Counter()
        # What the host reads where it asks the device for a number.
        self.number = 0.0
        # Most bytes that the device takes in one tensor from the host.
        self.room = 2**40

    def note(self, what: str) -> None:
        """The host waits here."""
        self.waits[what, innermost(PACKAGE)] += 1

    def reading(self, number: float, function: Callable) -> Callable:
        """`function`, in which the host reads `number`."""

        def called(*arguments):
            self.number = number
            result = function(*arguments)
            self.number = 0.0
            return result

        return called

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operator = function.overloadpacket
        # Pinning asks for a driver.
        if operator is aten._pin_memory:
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        # It has no kernel for shapes alone.
        if operator is aten._fused_sgd_:
            return None
        if operator is aten._local_scalar_dense:
            if is_cuda(args[0]):
                self.note("number")
                return bool(self.number) if args[0].dtype == torch.bool else self.number
            # What optimizers keep on the host are numbers of steps.
            return 1.0
        if operator in (aten._to_copy, aten.copy_):
            self._note_copy(operator, args, kwargs)
        if operator in (aten.index, aten.index_put, aten.index_put_) and is_cuda(args[0]):
            for index in args[1]:
                # Only the device knows how much a mask takes; a host's index is uploaded.
                if index is not None and (index.dtype == torch.bool or not is_cuda(index)):
                    self.note("mask or host index")
        if operator in PRODUCTS and innermost("timm"):
            self.products.update(tensor.dtype for tensor in tree_leaves(args) if is_cuda(tensor))
        return function(*args, **kwargs)

    def _note_copy(self, operator, args, kwargs) -> None:
        if operator is aten.copy_:
            target, source = args[:2]
            there = target.device
            runs_on = args[2:] == (True,)
        else:
            source = args[0]
            there = torch.device(kwargs.get("device") or source.device)
            runs_on = kwargs.get("non_blocking", False) and hasattr(source, "is_pinned_here")
        if is_cuda(source) and there.type == "cpu":
            self.note("download")
        if not is_cuda(source) and there.type == "cuda":
            if source.nbytes > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if not runs_on:
                self.note("upload")


def is_cuda(value: object) -> bool:
    """Whether `value` is a tensor on the device."""
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def innermost(folder: str) -> str:
    """`module.function` of the innermost call from a file in `folder`; empty if there is none."""
    frame = sys._getframe()
    while frame := frame.f_back:
        code = frame.f_code
        if folder in code.co_filename:
            return f"{Path(code.co_filename).stem}.{code.co_name}"
    return ""


@contextmanager
def pretended() -> Iterator[Watch]:
    """torch believes in one CUDA device, on which nothing is computed."""
    watch = Watch()
    fake = FakeTensorMode()

    def read(tensor: torch.Tensor) -> list:
        # One wait for all numbers of a tensor.
        watch.note("numbers")
        return np.full(tuple(tensor.shape), watch.number).tolist()

    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device: "pretended",
        "is_bf16_supported": lambda: True,
        "max_memory_allocated": lambda device: 0,
        "default_generators": (torch.default_generator,),
    }
    with (
        mock.patch.multiple("torch.cuda", **answers),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        # timm's average has a generator on the device.
        mock.patch("torch.Generator", lambda device: torch.default_generator),
        mock.patch.object(torch.nn.Module, "to", _move),
        mock.patch.object(FakeTensor, "tolist", read),
        # Else fake tensors ask the driver for a context.
        mock.patch.object(FakeTensorMode, "avoid_device_init", True),
        # Copies of a model are of the same kind.
        mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True),
        mock.patch("torch.from_numpy", really(torch.from_numpy, fake.from_tensor)),
        fake,
        watch,
    ):
        yield watch


def really(make: Callable, then: Callable = lambda made: made) -> Callable:
    """`make` with real tensors on the CPU, and `then` of what it gives."""

    def made(*arguments):
        with _disable_current_modes():
            real = make(*arguments)
        return then(real)

    return made


def give_gradients(parameters: list[torch.nn.Parameter], monkeypatch) -> None:
    """Let a backward pass give each parameter a gradient. autograd itself asks for a driver."""

    def backward(loss):
        for parameter in parameters:
            gradient = torch.empty_like(parameter)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    monkeypatch.setattr(torch.Tensor, "backward", backward)


def _move(module: torch.nn.Module, device, memory_format=None) -> torch.nn.Module:
    """Module.to, which cannot turn real parameters into fake ones."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is None or is_cuda(value):
                    continue
                moved = torch.empty(value.shape, dtype=value.dtype, device=device)
                if isinstance(value, torch.nn.Parameter):
                    moved = torch.nn.Parameter(moved, value.requires_grad)
                held[name] = moved
    return module
