"""Gradients: their norm, clipping, and the watch over what is not finite."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from cifar_accel.models.weights import classifier_parameters
from cifar_accel.options.options import TrainingArguments

# ---- norm and clipping


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """L2 norm over the gradients of `parameters`, which lie on one device: float []."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    # The norm of the tensors' norms takes half the time of torch's get_total_norm.
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def clip_gradients(model: torch.nn.Module, norm: torch.Tensor, args: TrainingArguments) -> None:
    """Clip the gradients of the bare `model` in place, as --clip-mode says.

    `norm`, float [], is the L2 norm over all of them. Adaptive clipping spares the classifier.
    """
    if args.clip_mode == "agc":
        spared = classifier_parameters(model)
        clip_adaptively([p for p in model.parameters() if p not in spared], args.clip_grad)
    elif args.clip_mode == "value":
        torch.nn.utils.clip_grad_value_(model.parameters(), args.clip_grad)
    else:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), args.clip_grad, norm)


@torch.no_grad()
def clip_adaptively(parameters: list[torch.nn.Parameter], ratio: float, eps: float = 1e-3) -> None:
    """Adaptive gradient clipping (Brock et al. 2021): limit gradients to `ratio` of their weights.

    Norms are compared unit by unit: a unit is a row of the first dimension, or all of a vector.
    `eps` is the smallest norm that weights count as, so that zeros can leave zero. In place, and
    bit for bit timm's `adaptive_clip_grad`, in a fifth of its operator calls (benchmarks/LOG.md).
    Parameters without a gradient stay.
    """
    parameters = [p for p in parameters if p.grad is not None]
    gradients: list[Any] = [p.grad for p in parameters]
    # By parameter: the largest norm each unit may have, then the factor that brings it there.
    factors = _unit_norms(list(parameters))
    torch._foreach_clamp_min_(factors, eps)
    torch._foreach_mul_(factors, ratio)
    norms = _unit_norms(gradients)
    torch._foreach_clamp_min_(norms, 1e-6)
    torch._foreach_div_(factors, norms)
    torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(gradients, factors)


def _unit_norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """L2 norms of the units of each tensor, [n, 1, ...] for [n, ...] and one for a vector."""
    norms = []
    for tensor in tensors:
        # Of a vector over its only dimension.
        dimensions = tuple(range(1, tensor.ndim)) or None
        norms.append(torch.linalg.vector_norm(tensor, dim=dimensions, keepdim=True))
    return norms


# ---- what is not finite


class Watch:
    """Remembers the first step whose loss or gradient norm is not finite.

    The host never waits for the device to note a step: an accelerator keeps the record itself, and
    `report` gives it out. On a CPU, where reading a number waits for nothing, the record is made of
    Python numbers, and `note` computes a norm itself only where gradients are not finite.

    Args:
        parameters: those that are trained.
        device: where they lie.
        scaled: a gradient scaler passes over steps whose norm is not finite: judge the loss alone.
        step: number of the step that is noted first.
        on_host: where the record is kept (unset: on the host for a CPU).
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        device: torch.device,
        scaled: bool,
        step: int,
        on_host: bool | None = None,
    ):
        self.parameters = parameters
        self.device = device
        self.scaled = scaled
        self.step = step
        self.on_host = device.type == "cpu" if on_host is None else on_host
        # float32 counts steps exactly up to 2**24, float64 beyond any run; mps has no float64.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        # Whether a step was bad (0 or 1), then number, norm and loss of the first bad step, or of
        # the last step while all are good.
        self.record: Any = torch.tensor([0.0, step, 0.0, 0.0], dtype=self.dtype, device=device)

    def note(self, losses: list[torch.Tensor], norm: torch.Tensor | None) -> None:
        """Note one step: the losses of its micro-batches and its gradient norm, each float [].

        On a CPU the norm may be None: then the gradients themselves are looked through.
        """
        if self.on_host:
            self._note_on_host(losses, norm)
        else:
            self._note_on_device(losses, norm)
        self.step += 1

    def _note_on_host(self, losses: list[torch.Tensor], norm: torch.Tensor | None) -> None:
        seen_bad_step = self.record[0]
        if seen_bad_step:
            return
        loss = sum(loss.item() for loss in losses) / len(losses)
        is_bad = not math.isfinite(loss)
        if norm is None and (is_bad or not self._gradients_are_finite()):
            norm = gradient_norm(self.parameters)
        # 0 where all is well and nobody has asked for the norm.
        norm_value = 0.0 if norm is None else norm.item()
        if not self.scaled:
            is_bad = is_bad or not math.isfinite(norm_value)
        self.record = [float(is_bad), self.step, norm_value, loss]

    def _gradients_are_finite(self) -> bool:
        # The kernel of gradient scalers takes a quarter of the norm's time (benchmarks/LOG.md).
        # It also multiplies by a scale, here 1, which changes no bit.
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        found = torch.zeros(())
        scale = torch.ones(())
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, scale)
        return not found.item()

    @torch.no_grad()
    def _note_on_device(self, losses: list[torch.Tensor], norm: torch.Tensor | None) -> None:
        assert norm is not None, "an accelerator has the norm of every step"
        loss = torch.stack(losses).float().mean()
        judged = loss if self.scaled else torch.stack([loss, norm.float()])
        is_bad = ~judged.isfinite().all()
        # Filled on the device: a tensor of a host's number would be a copy, which waits.
        step = torch.full((), self.step, dtype=self.dtype, device=self.device)
        latest = torch.stack([value.to(self.dtype) for value in (is_bad, step, norm, loss)])
        self.record = torch.where(self.record[0] > 0, self.record, latest)

    def report(self) -> torch.Tensor:
        """The record, float64 (on mps float32) [1, 4] on the device: bad, step, norm, loss."""
        return torch.as_tensor(self.record, dtype=self.dtype, device=self.device)[None]
