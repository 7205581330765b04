"""A trained model, ready for images: `load` reads it, from nothing but its `model/` folder."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, ValidationError

from cifar_accel.data.decode import open_image, upright_rgb
from cifar_accel.errors import BadInput, first_line
from cifar_accel.files import adapter, first_fault, home
from cifar_accel.machine.processes import chosen_device
from cifar_accel.models.create import check_logits
from cifar_accel.models.weights import CROP_MODE, load_model
from cifar_accel.records.summary import Deviation, Mean, read_config, read_summary
from cifar_accel.use.load import FinishedRun, load_run

# What an image may be given as: a file, or one that is open, or uint8 [H, W, 3].
AnyImage = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]

Side = Annotated[int, Field(gt=0, le=4096)]

# Images of a longer shape are cut to it first: resized as a whole they would not fit into memory.
LONGEST_SHAPE = 10


class Prediction(NamedTuple):
    """A class and the model's probability of it."""

    label: str
    probability: float


@dataclass(frozen=True)
class _Preparation:
    """What timm's `pretrained_cfg` says of how images are made for a model."""

    input_size: tuple[Side, Side, Side]
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Deviation, Deviation, Deviation]
    crop_pct: Annotated[float, Field(ge=0.05, le=1)] = 1.0
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] = (
        "bicubic"
    )


@dataclass(frozen=True)
class _ModelConfig:
    """timm's config.json of a model folder, as far as it is read here."""

    num_classes: int
    pretrained_cfg: _Preparation
    label_names: list[str] | dict[str, str] | None = None


@dataclass(frozen=True)
class Classifier:
    """A model with the names of its classes and the way in which images are made for it.

    `load` gives one.
    """

    # In evaluation mode, float32: images [n, 3, S, S], normalised -> logits [n, K].
    module: torch.nn.Module
    # K names.
    classes: list[str]
    # As timm has it: input_size (3, S, S), mean, std, crop_pct, crop_mode, interpolation.
    input: dict[str, Any]
    device: torch.device
    # The folder that it was read from.
    folder: Path
    # From an image in RGB to one as the model takes it.
    transform: Callable[[Image.Image], torch.Tensor]

    @property
    def size(self) -> int:
        """Side of the model's input in pixels."""
        side: int = self.input["input_size"][-1]
        return side

    def predict(
        self, images: Iterable[AnyImage] | AnyImage, top_k: int = 5, batch_size: int = 64
    ) -> list[list[Prediction]]:
        """The `top_k` likeliest classes of each image, best first; fewer where there are fewer.

        Args:
            images: files, Pillow images or uint8 [H, W, 3]; one alone is a list of one.
            top_k: how many classes of each, 1 or more.
            batch_size: images at once on the device.

        Raises:
            BadInput: a file that is missing or no whole image.
        """
        if top_k < 1 or batch_size < 1:
            raise BadInput(f"top_k {top_k}, batch_size {batch_size}: both must be 1 or more")
        alone = (str, os.PathLike, Image.Image)
        if isinstance(images, alone) or (isinstance(images, np.ndarray) and images.ndim == 3):
            images = [images]
        found: list[list[Prediction]] = []
        for batch in batches(images, batch_size):
            found += self.predict_prepared([self.prepare(image) for image in batch], top_k)
        return found

    def prepare(self, image: AnyImage) -> torch.Tensor:
        """An image as the model takes it: float32 [3, S, S], normalised. Raises BadInput.

        By timm's own test transform: the shorter side to S / crop_pct, then the centre.
        """
        prepared: torch.Tensor = self.transform(_not_too_long(_opened(image)))
        return prepared

    def predict_prepared(
        self, prepared: Sequence[torch.Tensor], top_k: int
    ) -> list[list[Prediction]]:
        """As `predict`, of images that are prepared, all at once."""
        probabilities = self.probabilities(prepared)
        # Of equal ones the first class goes before.
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        return [
            [Prediction(self.classes[c], float(row[c])) for c in classes]
            for row, classes in zip(probabilities, best, strict=True)
        ]

    @torch.inference_mode()
    def probabilities(self, prepared: Sequence[torch.Tensor]) -> NDArray[np.float32]:
        """float32 [n, K]: the model's probability of each class. The host waits for the device.

        Raises BadInput where they are no numbers.
        """
        logits = self.module(torch.stack(list(prepared)).to(self.device))
        shares: NDArray[np.float32] = logits.float().softmax(1).cpu().numpy()
        if not np.isfinite(shares).all():
            raise BadInput(f"{self.folder}: its weights are damaged: what it says is not finite")
        return shares


def load(path: str | os.PathLike[str], device: str = "auto") -> Classifier:
    """Read a trained model: a run folder, its `model/`, or any `local-dir:` model of timm.

    Args:
        path: the folder.
        device: cpu, cuda or mps; auto takes cuda, else mps, else cpu.

    Raises:
        BadInput: no such model, weights or names that are damaged, a run that is not finished, or a
            device that is not there.
    """
    folder, run = find_model(path)
    return read_classifier(folder, device, run)


def predict(
    model: str | os.PathLike[str], images: Iterable[AnyImage] | AnyImage, top_k: int = 5
) -> list[list[Prediction]]:
    """What `load(model).predict(images, top_k)` gives; who has more images later keeps `load`'s."""
    return load(model).predict(images, top_k)


def find_model(path: str | os.PathLike[str]) -> tuple[Path, FinishedRun | None]:
    """The model folder that `path` names, and the finished run that it is of.

    None stands for a model that lies in no run folder. Raises BadInput.
    """
    folder = home(os.fspath(path).removeprefix("local-dir:"))
    try:
        return _find_model(folder)
    # Of a folder that this user may not enter.
    except PermissionError as e:
        raise BadInput(f"{path}: {e.strerror} ({e.filename})") from e


def _find_model(folder: Path) -> tuple[Path, FinishedRun | None]:
    """As `find_model`, of a folder. Raises PermissionError too."""
    if not os.path.isdir(folder):
        raise BadInput(f"{folder}: no such folder")
    # A run folder, and it may be one that is damaged or has no model yet.
    if (folder / "model").is_dir() or read_config(folder):
        return folder / "model", load_run(folder)
    # A model that still lies in its finished run folder is that run's.
    above = folder.resolve().parent
    is_of_run = folder.resolve().name == "model" and read_config(above) is not None
    if is_of_run and read_summary(above).get("status") == "finished":
        return folder, load_run(above)
    return folder, None


def read_classifier(folder: Path, device: str, run: FinishedRun | None = None) -> Classifier:
    """The classifier in a model folder, which may be that of a `run`; see `load`."""
    config = _read_config(folder)
    _, height, width = config.pretrained_cfg.input_size
    module: Any = load_model(folder)
    check_logits(module, height, config.num_classes, f"{folder}: the model")
    if height != width:
        raise BadInput(f"{folder}: takes images of {width}x{height}; here they are square")
    made = timm.data.resolve_data_config({}, model=module)
    if run:
        # Earlier versions left the mode of the weights that the run began with.
        made["crop_mode"] = CROP_MODE
    chosen = chosen_device(device)
    return Classifier(
        module=module.eval().to(chosen),
        classes=class_names(folder),
        input=made,
        device=chosen,
        folder=folder,
        transform=timm.data.create_transform(**made),
    )


def _read_config(folder: Path) -> _ModelConfig:
    """The config.json of a model folder. Raises BadInput where the folder is none."""
    file = folder / "config.json"
    is_none = f"{folder}: is neither a finished run nor a model"
    if not (folder / "model.safetensors").is_file() or not file.is_file():
        raise BadInput(f"{is_none} (config.json in timm's form, and model.safetensors)")
    try:
        config: _ModelConfig = adapter(_ModelConfig).validate_json(file.read_bytes(), strict=True)
    except (OSError, ValidationError) as e:
        raise BadInput(f"{is_none} (config.json: {first_fault(e)})") from e
    return config


def class_names(folder: Path) -> list[str]:
    """The names of a model's classes: its own, ImageNet's of timm, or else numbers.

    Raises BadInput for a folder that is no model's, and for another number of names than classes.
    """
    config = _read_config(folder)
    count = config.num_classes
    names = config.label_names
    if isinstance(names, dict):
        # By the number of the class, where some have no name.
        names = [names.get(str(number), str(number)) for number in range(count)]
    if names is None:
        # timm's published models have none; it goes by the number of classes.
        subset = timm.data.infer_imagenet_subset({"num_classes": count})
        if subset is None:
            return [str(number) for number in range(count)]
        info = timm.data.ImageNetInfo(subset)
        names = [info.index_to_description(number) for number in range(count)]
    if len(names) != count:
        raise BadInput(f"{folder}/config.json: has {len(names)} label_names for {count} classes")
    return names


# ---- images


def _opened(image: AnyImage) -> Image.Image:
    """An image as it may be given, upright and in RGB. Raises BadInput."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise BadInput(f"an image must be uint8 [H, W, 3], not {image.dtype} {image.shape}")
        return Image.fromarray(image)
    if isinstance(image, str):
        return open_image(home(image), image)
    if not isinstance(image, Image.Image):
        return open_image(Path(image), os.fspath(image))
    # Open, but perhaps not read yet.
    try:
        if not min(image.size):
            raise ValueError(f"it has {image.width}x{image.height} pixels")
        return upright_rgb(image)
    except (OSError, ValueError) as e:
        raise BadInput(f"an image that is given open is not whole ({first_line(e)})") from e


def _not_too_long(image: Image.Image) -> Image.Image:
    """The centre of an image that is longer than `LONGEST_SHAPE` times its shorter side."""
    most = LONGEST_SHAPE * min(image.size)
    width, height = (min(side, most) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, in their order; the last one may be shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
