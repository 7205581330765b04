"""Gradients: their norm, clipping, and the watch over what is not finite."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from cifar_accel.models.weights import classifier_parameters
from cifar_accel.options.options import TrainingArguments


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """L2 norm over the gradients of `parameters`, which lie on one device: float []."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(
        torch.stack(torch._foreach_norm(gradients))
    )  # half the time of get_total_norm


def clip_gradients(model: torch.nn.Module, norm: torch.Tensor, args: TrainingArguments) -> None:
    """Clip the gradients of `model`, whose norm is `norm`, in place; adaptive clipping spares the classifier."""
    if args.clip_mode == "agc":
        spared = classifier_parameters(model)
        clip_adaptively(
            [p for p in model.parameters() if p not in spared and p.grad is not None],
            args.clip_grad,
        )
    elif args.clip_mode == "value":
        torch.nn.utils.clip_grad_value_(model.parameters(), args.clip_grad)
    else:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), args.clip_grad, norm)


@torch.no_grad()
def clip_adaptively(parameters: list[torch.nn.Parameter], ratio: float, eps: float = 1e-3) -> None:
    """Adaptive gradient clipping (Brock et al. 2021), in place: gradients at most `ratio` of their weights, by norms.

    A unit is a row of the first dimension, or all of a vector. The same as timm's `adaptive_clip_grad`, with the
    arithmetic on norms in one call for all parameters.
    """

    def norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        over = [tuple(range(1, t.ndim)) or None for t in tensors]
        return [
            torch.linalg.vector_norm(t, dim=d, keepdim=True)
            for t, d in zip(tensors, over, strict=True)
        ]

    gradients: list[torch.Tensor] = [p.grad for p in parameters if p.grad is not None]
    shares, sizes = norms(list(parameters)), norms(gradients)
    torch._foreach_clamp_min_(shares, eps)
    torch._foreach_mul_(shares, ratio)
    torch._foreach_clamp_min_(sizes, 1e-6)
    torch._foreach_div_(shares, sizes)
    torch._foreach_clamp_max_(shares, 1.0)
    torch._foreach_mul_(gradients, shares)


class FiniteGuard:
    """Watches each step's gradient norm and loss; from the first not finite on, updates are withheld.

    On an accelerator nobody waits: a fused optimizer withholds them itself, by the flag that a gradient scaler would
    set (`found_inf`), and the host reads what happened when it waits anyway. With any other optimizer, and on a CPU,
    where that costs nothing, the host looks at every step. With a gradient scaler, which passes over steps for its own
    reasons, only the loss is judged and nothing is withheld.
    """

    def __init__(
        self,
        optimizer: Any,
        device: torch.device,
        scaled: bool,
        step: int,
        on_host: bool | None = None,
    ):
        self.start, self.scaled = step, scaled
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        fused = all(group.get("fused") for group in optimizer.param_groups)
        self.on_host = (
            (device.type == "cpu" or not (fused or scaled)) if on_host is None else on_host
        )
        self.last: Any = (0.0, 0.0)  # norm and loss of the last step, or of the first bad one
        self.bad: Any = False  # whether a step was bad
        self.good: Any = 0  # steps before it
        if not self.on_host:
            self.last, self.bad = torch.zeros(2, device=device), torch.zeros((), device=device)
            self.good = torch.zeros((), dtype=torch.int64, device=device)
            if not scaled:
                optimizer.found_inf, optimizer.grad_scale = self.bad, None

    def allows(self, norm: torch.Tensor | None, losses: list[torch.Tensor]) -> bool:
        """Note one step, by its norm and its micro-batches' losses; without a norm the gradients are looked through.

        False when its update must not be applied and the optimizer cannot know that itself.
        """
        if self.on_host:
            if not self.bad:
                loss = sum(loss.item() for loss in losses) / len(losses)
                if norm is None and not (math.isfinite(loss) and self._gradients_are_finite()):
                    norm = gradient_norm(self.parameters)
                self.last = (0.0 if norm is None else norm.item(), loss)
                self.bad = not all(map(math.isfinite, self.last[int(self.scaled) :]))
                self.good += not self.bad
            return self.scaled or not self.bad
        assert norm is not None, "off the host a norm is cheaper than a look"
        now = torch.stack([norm.float(), torch.stack(losses).float().mean()])
        self.last = torch.where(self.bad > 0, self.last, now)
        self.bad.copy_(torch.maximum(self.bad, (~now[int(self.scaled) :].isfinite()).any()))
        self.good += self.bad == 0
        return True

    def _gradients_are_finite(self) -> bool:
        """On the CPU, by the kernel of gradient scalers: a quarter of the norm's time."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        found = torch.zeros(())
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.ones(()))
        return not found.item()

    def report(self) -> torch.Tensor:
        """float32 [1, 4]: whether a step was bad, the first such, and its (else the last) norm and loss."""
        step = self.start + self.good
        if self.on_host:
            return torch.tensor([[float(self.bad), step, *self.last]])
        return torch.cat([torch.stack([self.bad, step.float()]), self.last])[None]
