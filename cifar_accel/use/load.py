"""A finished run, read back from its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from cifar_accel.errors import BadInput
from cifar_accel.files import adapter, first_fault, read_json
from cifar_accel.models.create import check_logits
from cifar_accel.models.weights import load_model
from cifar_accel.records.summary import Config, RecordedOptions, read_summary


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

        Raises BadInput when they cannot be read, or it gives no logits for the run's images.
        """
        model = load_model(self.folder / "model")
        where = f"the model of {self.folder}/config.json"
        check_logits(model, self.options.input_size, self.options.classes, where)
        return model


def load_run(folder: Path) -> FinishedRun:
    """The run in `folder`, of this or an earlier version. Its weights are not read yet.

    Raises BadInput when the folder is none of a run, or the run is not finished.
    """
    file = folder / "config.json"
    try:
        recorded = adapter(Config).validate_json(file.read_bytes(), strict=True)
    except (OSError, ValidationError) as e:
        raise BadInput(f"{folder}: is no run folder (config.json: {first_fault(e)})") from e
    # A run that was allowed more steps has an older model/ until it is finished again.
    is_finished = read_summary(folder).get("status") == "finished"
    if not is_finished or not (folder / "model" / "model.safetensors").is_file():
        raise BadInput(
            f"{folder}: the run is not finished; the command in its config.json goes on with it"
        )
    return FinishedRun(folder, recorded.options, read_json(file))
