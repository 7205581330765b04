"""predictions.safetensors of a run folder: what the model says of each image it was tested on."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cifar_accel.errors import BadInput
from cifar_accel.files import adapter, share, sync

FILE = "predictions.safetensors"

# The accuracy of a run on a device of another kind differs by less than this share, or one image.
OTHER_DEVICE = 0.002

# Larger logits are left out: classes of the first five alone are kept.
MOST_BYTES = 64 * 2**20


def keeps_logits(images: int, classes: int) -> bool:
    """Whether logits float16 [images, classes] are small enough to be kept."""
    return 2 * images * classes <= MOST_BYTES


@dataclass(frozen=True)
class Predictions:
    """What a model says of the images of a split, in their order."""

    # int64 [N]: the true classes, as places in `classes`.
    labels: NDArray[np.int64]
    # int64 [N, 5]: the likeliest classes, best first; fewer where there are fewer classes.
    first_five: NDArray[np.int64]
    # float16 [N, K]; None where they would be too large.
    logits: NDArray[np.float16] | None
    classes: list[str]
    # int64 [N]: the images' places in the split of the data set.
    places: NDArray[np.int64]
    # By this images are known to be the same, and in the same order.
    images: str

    @property
    def identity(self) -> tuple[str, int]:
        """Equal for the same images; with their number, for a digest in a file can be anything."""
        return self.images, len(self.labels)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """int64 [N]: the likeliest class."""
        return self.first_five[:, 0]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """bool [N]: whether that is the true one."""
        return self.predicted == self.labels


def of_outputs(
    labels: NDArray[np.int64],
    classes: list[str],
    outputs: Mapping[str, NDArray[Any]],
    fingerprint: str,
    places: NDArray[np.int64],
) -> Predictions:
    """What `outputs` (`first_five` and, it may be, `logits`) say of images of true `labels` [N].

    `fingerprint` is that of the data set, `places` int64 [N] are the images' in its split.
    """
    images = blake2b(fingerprint.encode(), digest_size=16)
    images.update(places.tobytes())
    images.update(labels.tobytes())
    return Predictions(
        labels=labels,
        first_five=outputs["first_five"].astype(np.int64),
        logits=outputs.get("logits"),
        classes=classes,
        places=places,
        images=images.hexdigest(),
    )


def write_predictions(run: Path, splits: Mapping[str, Predictions]) -> None:
    """Write those of each of `splits` ("test", "held-out") to the run folder; whole or not at all.

    Raises OSError.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for kind, predictions in splits.items():
        tensors[f"{kind}.labels"] = predictions.labels.astype(np.int32)
        tensors[f"{kind}.first_five"] = predictions.first_five.astype(np.int32)
        tensors[f"{kind}.places"] = predictions.places.astype(np.int32)
        if predictions.logits is not None:
            tensors[f"{kind}.logits"] = predictions.logits
    # The splits have the same classes.
    described = {kind: predictions.images for kind, predictions in splits.items()}
    metadata = {"images": json.dumps(described), "classes": json.dumps(predictions.classes)}
    scratch = run / f"{FILE}.tmp"
    try:
        save_file(tensors, scratch, metadata)
        share(scratch)
        sync(scratch)
        os.replace(scratch, run / FILE)
    except SafetensorError as e:
        # How safetensors reports a write that failed.
        raise OSError(str(e)) from e
    finally:
        scratch.unlink(missing_ok=True)


def read_predictions(run: Path, with_logits: bool = True) -> dict[str, Predictions]:
    """Those of each split in a run folder; {} where there is no such file.

    Logits, which are most of it, are read if they are wanted. Raises BadInput for a file that is
    not what `write_predictions` writes.
    """
    file = run / FILE
    if not file.is_file():
        return {}
    try:
        with safe_open(file, "numpy") as tensors:
            metadata = tensors.metadata()
            classes = adapter(list[str]).validate_json(metadata["classes"])
            images = adapter(dict[str, str]).validate_json(metadata["images"])
            return {
                kind: _read_split(tensors, kind, classes, images[kind], with_logits)
                for kind in images
            }
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadInput(f"{file}: is no file of predictions ({e})") from e


def _read_split(
    tensors: Any, kind: str, classes: list[str], images: str, with_logits: bool
) -> Predictions:
    """The predictions of one split in an open file."""

    def integers(name: str) -> NDArray[np.int64]:
        read: NDArray[np.int64] = tensors.get_tensor(f"{kind}.{name}").astype(np.int64)
        return read

    labels, first_five, places = map(integers, ("labels", "first_five", "places"))
    shapes = [labels.shape, first_five.shape, places.shape]
    count = labels.size
    if shapes != [(count,), (count, first_five.shape[-1]), (count,)] or not first_five.size:
        raise ValueError(f"labels, first_five and places of {shapes}")
    for values in (labels, first_five):
        if values.min() < 0 or values.max() >= len(classes):
            raise ValueError(f"a class {values.max()} of {len(classes)}")
    if places.min() < 0:
        raise ValueError(f"a place {places.min()}")
    logits = None
    if with_logits and f"{kind}.logits" in set(tensors.keys()):
        logits = tensors.get_tensor(f"{kind}.logits")
        if logits.shape != (count, len(classes)):
            raise ValueError(f"logits of {logits.shape}")
        if not np.isfinite(logits).all():
            raise ValueError("logits that are not finite")
    return Predictions(labels, first_five, logits, classes, places, images)


def predictions_of(
    run: Path, kind: str, accuracy: float, with_logits: bool = True
) -> Predictions | None:
    """Those of the `kind` images of which the run has `accuracy`; None where it has left none.

    Raises BadInput for a file that is damaged, or of another model or other images.
    """
    said = read_predictions(run, with_logits).get(kind)
    if said is None:
        return None
    share = float(said.correct.mean())
    images = len(said.labels)
    if abs(share - accuracy) * images > max(1, OTHER_DEVICE * images) + 0.5:
        raise BadInput(
            f"{run / FILE}: is not of the run's finished model: accuracy {share:.2%}, and "
            f"{accuracy:.2%} in summary.json"
        )
    return said
