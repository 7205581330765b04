"""Exact evaluation: counts are summed over all processes and every image counts once."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from cifar_accel.data.batches import Batch


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
    wide = (
        torch.float32 if accelerator.device.type == "mps" else torch.float64
    )  # mps has no float64
    sums = torch.zeros(
        3, dtype=wide, device=accelerator.device
    )  # loss, correct, correct in the first five
    seen = 0
    with torch.no_grad(), accelerator.autocast():
        for batch in batches:
            x = batch.images.contiguous(memory_format=memory_format)
            if len(x) < fill_to:  # the last batch is short
                x = torch.cat([x, x[:1].expand(fill_to - len(x), -1, -1, -1)]).contiguous(
                    memory_format=memory_format
                )
            logits = model(x)[: len(batch.labels)].float()
            ranked = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]
            loss = F.cross_entropy(logits, batch.labels, reduction="sum")
            sums += torch.stack([loss, ranked[:, 0].sum(), ranked.sum()]).to(wide)
            seen += len(batch.labels)
    model.train(was_training)
    loss_sum, correct, correct5, count = accelerator.reduce(
        torch.cat([sums, sums.new_tensor([seen])])
    ).tolist()
    assert count == images, f"evaluated {count:.0f} of {images} images"
    return {
        "loss": loss_sum / count,
        "accuracy": correct / count,
        "top5_accuracy": correct5 / count,
        "evaluated_images": int(count),
    }
