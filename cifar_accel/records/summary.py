"""config.json and summary.json of a run folder: their content, and how they are read back."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cifar_accel.files import home, read_as, read_json, sha256
from cifar_accel.options.options import NotNegativeInt, PositiveInt, Share, TrainingArguments

# Packages whose version may change a result.
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "wandb", "numpy", "cifar_accel")

# A channel's mean and deviation, by which float32 can normalise.
Mean = Annotated[float, Field(ge=-1e6, le=1e6)]
Deviation = Annotated[float, Field(ge=1e-6, le=1e6)]


@dataclass(frozen=True, kw_only=True)
class RecordedOptions(TrainingArguments):
    """`options` of config.json: the options, and facts known only once the run was set up.

    An earlier version had fewer options; these facts every version has recorded.
    """

    run_name: str = field()
    mixed_precision: str
    classes: PositiveInt
    input_mean: tuple[Mean, Mean, Mean]
    input_std: tuple[Deviation, Deviation, Deviation]
    # "test", or "held-out" where the data set has no test images.
    tested_on: Literal["test", "held-out"] = "test"


@dataclass(frozen=True)
class Config:
    """What readers of config.json rely on."""

    options: RecordedOptions
    # Where each option came from, by name.
    provenance: dict[str, str]
    # The command line.
    command: list[str] = field(default_factory=list)
    # The later starts of the run.
    resumed: list[dict[str, Any]] = field(default_factory=list)
    # What `starting_weights` gave at the first start.
    weights: dict[str, list[str]] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What readers of summary.json rely on."""

    # "finished", "preempted" or "failed".
    status: str
    # Optimizer steps taken, and those of the whole schedule.
    steps: NotNegativeInt
    total_steps: NotNegativeInt
    # Mean over the last whole epoch; None before the first. A float32 is no larger.
    train_loss: Annotated[float | None, Field(ge=0, le=1e39)]
    # A share of 1, on the images of `tested_on`; None while these were not read.
    accuracy: Share | None = None
    # How many images that is of.
    evaluated_images: PositiveInt | None = None
    top5_accuracy: Share | None = None
    images_per_s: Annotated[float | None, Field(ge=0, le=1e12)] = None
    # Seconds of training, evaluation and saving, over all starts.
    wall_s: Annotated[float | None, Field(ge=0, le=1e9)] = None
    error: str | None = None


def read_config(run: Path) -> dict[str, Any] | None:
    """config.json of a run folder, or None where it is missing or none that a training writes."""
    file = run / "config.json"
    return read_json(file) if read_as(Config, file) else None


def read_summary(run: Path) -> dict[str, Any]:
    """summary.json of a run folder, or {} where it is missing or none that a training writes."""
    file = run / "summary.json"
    summary = read_as(Summary, file)
    if summary is None or (summary.status == "finished" and summary.accuracy is None):
        return {}
    return read_json(file)


def starting_weights(args: TrainingArguments) -> dict[str, list[str]]:
    """SHA-256 of the files here that --model local-dir and --checkpoint start from, by option."""
    files = {}
    if args.model.startswith("local-dir:"):
        folder = Path(args.model.removeprefix("local-dir:"))
        files["model"] = [folder / "config.json", folder / "model.safetensors"]
    if args.checkpoint:
        path = home(args.checkpoint)
        files["checkpoint"] = [path, path / "model/model.safetensors", path / "model.safetensors"]
    return {name: [sha256(f) for f in paths if f.is_file()] for name, paths in files.items()}


def describe_config(
    args: TrainingArguments, origin: dict[str, str], derived: dict[str, Any]
) -> dict[str, Any]:
    """The content of config.json.

    Args:
        args: the resolved options.
        origin: where each value comes from.
        derived: values known only at start (precision, processes, batch arithmetic, data).
    """
    return {
        "options": {**asdict(args), **derived},
        "provenance": {**origin, **dict.fromkeys(derived, "derived")},
        "command": _command(),
        "versions": {"python": platform.python_version(), **_installed_versions()},
        "hardware": _hardware(),
        "git": _git_state(),
    }


def _command() -> list[str]:
    """The command line, without the word `train`, which may be left out."""
    program, *words = sys.argv
    if words[:1] == ["train"]:
        words = words[1:]
    return [program, *words]


def _installed_versions() -> dict[str, str]:
    """Versions by package; one that runs from its source without being installed has none."""
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _hardware() -> dict[str, Any]:
    """Host, cores and accelerators."""
    # Loaded long since by the time a run is described; those who only read do without it.
    import torch

    gpus = []
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "gpus": gpus,
        "cpu_threads": torch.get_num_threads(),
    }


def _git_state() -> dict[str, Any] | None:
    """The commit of the package's checkout, and whether tracked files differ from it.

    None where git is missing or the package lies in no checkout.
    """
    try:
        return {
            "commit": _git("rev-parse", "HEAD"),
            "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    """What git prints in the package's folder."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
