"""config.json and summary.json of a run folder."""

import os
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cifar_accel.files import alike, read_json
from cifar_accel.options.options import TrainingArguments

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "wandb", "numpy", "cifar_accel")


def describe_config(
    args: TrainingArguments, origin: dict[str, str], derived: dict[str, Any]
) -> dict[str, Any]:
    """The content of config.json.

    Args:
        args: the resolved options.
        origin: where each value comes from.
        derived: values known only at start (precision, processes, batch arithmetic, data), with their origin.
    """
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except ImportError:
            continue
    return {
        "options": {**asdict(args), **derived},
        "provenance": {**origin, **dict.fromkeys(derived, "derived")},
        "command": [sys.argv[0], *(sys.argv[2:] if sys.argv[1:2] == ["train"] else sys.argv[1:])],
        "versions": {"python": platform.python_version(), **installed},
        "hardware": _hardware(),
        "git": _git_state(),
    }


def _hardware() -> dict[str, Any]:
    """Host, cores and accelerators; torch is loaded by the time a run is described."""
    import torch

    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "gpus": gpus,
        "cpu_threads": torch.get_num_threads(),
    }


def _git_state() -> dict[str, Any] | None:
    """Commit of the package's checkout and whether it differs from it; None when it is not a checkout."""

    def git(*words: str) -> str:
        where = str(Path(__file__).parent)
        done = subprocess.run(
            ["git", "-C", where, *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def read_config(run: Path) -> dict[str, Any] | None:
    """What config.json of a run folder holds, or None where it is missing or none that a training writes."""
    config = read_json(run / "config.json")
    if (
        not alike(config, {})
        or not alike(config.get("options"), {})
        or not alike(config.get("provenance"), {})
    ):
        return None
    always = {
        "run_name": "",
        "mixed_precision": "no",
        "classes": 0,
        "input_mean": [0.0] * 3,
        "input_std": [1.0] * 3,
    }
    kinds, options = {**asdict(TrainingArguments()), **always}, config["options"]
    sound = options.keys() >= always.keys()  # an earlier version had fewer options
    sound &= all(alike(options[name], kind) for name, kind in kinds.items() if name in options)
    lists = {"command": str, "resumed": dict}
    sound &= all(alike(config.get(name, []), []) for name in lists)
    sound = sound and all(
        isinstance(item, kind) for name, kind in lists.items() for item in config.get(name, [])
    )
    return config if sound else None


def read_summary(run: Path) -> dict[str, Any]:
    """What summary.json of a run folder holds, or {} where it is missing or none that a training writes."""
    summary = read_json(run / "summary.json")
    if not alike(summary, {}):
        return {}
    kinds: dict[str, Any] = {"status": "", "steps": 0, "total_steps": 0, "train_loss": None}
    if summary.get("status") == "finished":
        kinds["accuracy"] = 0.0
    return (
        summary
        if all(name in summary and alike(summary[name], kind) for name, kind in kinds.items())
        else {}
    )
