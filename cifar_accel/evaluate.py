"""Exact evaluation: counts are summed over all processes, and every image counts once."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from cifar_accel.data.batches import Batch
from cifar_accel.errors import Diverged


class Outputs:
    """What a model says of the images of a split; on the device until the ranks put it together.

    Args:
        keep_logits: whether logits are kept beside the likeliest classes.
    """

    def __init__(self, keep_logits: bool):
        self.keep_logits = keep_logits
        self.batches: dict[str, list[torch.Tensor]] = {}

    def add(self, logits: torch.Tensor, first_five: torch.Tensor) -> None:
        """Keep logits float32 [b, K] as float16, and likeliest classes int64 [b, min(5, K)]."""
        kept = {"first_five": first_five.int()}
        if self.keep_logits:
            # Beyond this is infinity.
            most = torch.finfo(torch.float16).max
            kept["logits"] = logits.clamp(-most, most).half()
        for name, values in kept.items():
            self.batches.setdefault(name, []).append(values)

    def of_all_ranks(self, accelerator: Accelerator, images: int) -> dict[str, torch.Tensor]:
        """`first_five` int32 [N, min(5, K)] and `logits` float16 [N, K], in the order of the split.

        All ranks enter, and the main process alone gets them, on the host, which waits.
        """
        on_host = {}
        for name, batches in self.batches.items():
            # Ranks have contiguous parts; places beyond the last image fill up the last one's.
            gathered = accelerator.gather(torch.cat(batches))
            if accelerator.is_main_process:
                on_host[name] = gathered[:images].cpu()
        return on_host


def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    batches: Iterable[Batch],
    images: int,
    memory_format: torch.memory_format = torch.contiguous_format,
    name: str = "the evaluation",
    outputs: Outputs | None = None,
) -> dict[str, float]:
    """Loss and accuracy of `model` over a split of `images` images.

    All ranks enter, each with its own share in equally many batches of one size, filled up with
    images of label -1, which do not count. The host waits for the device once, at the end.

    Args:
        model: the bare model; a wrapper's forward would communicate.
        batches: this rank's batches; images float32 [b, 3, S, S], labels int64 [b].
        name: what an error calls it.
        outputs: gets what the model says of each of this rank's images.

    Returns:
        loss: mean cross-entropy. accuracy, top5_accuracy: in [0, 1]. evaluated_images: their count.

    Raises:
        Diverged: the loss is not finite.
    """
    # Put back after the last batch.
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
            if outputs is not None:
                outputs.add(logits, first_five)
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
