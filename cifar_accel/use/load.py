"""A finished run, read back from its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cifar_accel.errors import BadInput
from cifar_accel.files import read_as, read_json
from cifar_accel.models.weights import load_model
from cifar_accel.records.summary import Config, RecordedOptions


@dataclass(frozen=True)
class FinishedRun:
    """A run whose weights are saved."""

    folder: Path
    # The run's options, and what was recorded beside them (classes, precision, input statistics).
    options: RecordedOptions
    # All that config.json holds.
    config: dict[str, Any]

    def model(self) -> torch.nn.Module:
        """The run's weights, on the CPU, in the model as it was trained.

        Raises BadInput when they cannot be read.
        """
        return load_model(self.folder / "model")


def load_run(folder: Path) -> FinishedRun:
    """The run in `folder`, of this or an earlier version. Its weights are not read yet.

    Raises BadInput when the folder is none of a run, or the run is not finished.
    """
    file = folder / "config.json"
    recorded = read_as(Config, file)
    if recorded is None:
        raise BadInput(f"{folder}: is no run folder (it has no config.json of a run)")
    if not (folder / "model" / "model.safetensors").is_file():
        raise BadInput(
            f"{folder}: has no model/ yet, the run is not finished; the command in its config.json "
            "goes on with it"
        )
    return FinishedRun(folder, recorded.options, read_json(file))
