"""Exact evaluation: counts are summed over all processes, and every image counts once."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from cifar_accel.data.batches import Batch
from cifar_accel.errors import Diverged


def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    batches: Iterable[Batch],
    images: int,
    memory_format: torch.memory_format = torch.contiguous_format,
    name: str = "the evaluation",
) -> dict[str, float]:
    """Loss and accuracy of `model` over a split of `images` images.

    All ranks enter, each with its own share in equally many batches of one size, filled up with
    images of label -1, which do not count. The host waits for the device once, at the end.

    Args:
        model: the bare model; a wrapper's forward would communicate.
        batches: this rank's batches; images float32 [b, 3, S, S], labels int64 [b].
        name: what an error calls it.

    Returns:
        loss: mean cross-entropy. accuracy, top5_accuracy: fractions in [0, 1].
        evaluated_images: how many were counted.

    Raises:
        Diverged: the loss is not finite.
    """
    # Put back after the last batch; after a stop or a failure nobody trains on.
    was_training = model.training
    model.eval()
    # mps has no float64.
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    # Loss, correct answers, correct among the first five, images.
    sums = torch.zeros(4, dtype=dtype, device=accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        for batch in batches:
            logits = model(batch.images.contiguous(memory_format=memory_format)).float()
            # A label of -1 is in no ranking, and the loss ignores it.
            first_five = logits.topk(min(5, logits.shape[1])).indices
            hits = first_five == batch.labels[:, None]
            loss = F.cross_entropy(logits, batch.labels, reduction="sum", ignore_index=-1)
            counted = (batch.labels >= 0).sum()
            sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), counted]).to(dtype)
    model.train(was_training)

    # The only wait: the sums of all ranks.
    loss_sum, correct, correct_in_five, count = accelerator.reduce(sums).tolist()
    assert count == images, f"evaluated {count:.0f} of {images} images"
    if not math.isfinite(loss_sum):
        raise Diverged(
            f"{name} is not finite: loss {loss_sum} over {images:,} images; weights or batch "
            "norm's statistics are not finite, or too large to compute with"
        )
    return {
        "loss": loss_sum / count,
        "accuracy": correct / count,
        "top5_accuracy": correct_in_five / count,
        "evaluated_images": int(count),
    }
