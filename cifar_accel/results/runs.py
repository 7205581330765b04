"""Run folders that were read."""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from cifar_accel.errors import BadInput
from cifar_accel.files import home, last_part
from cifar_accel.options.options import VOLATILE, TrainingArguments
from cifar_accel.records.metrics import read_metrics
from cifar_accel.records.predictions import Predictions, predictions_of
from cifar_accel.records.summary import read_config, read_summary

# The options in which runs of one experiment agree: all but the seed, and but those that change
# where or how a run goes; and what was known only once the run was set up.
COMPARED = [
    *(f.name for f in fields(TrainingArguments) if f.name not in VOLATILE | {"seed"}),
    "mixed_precision",
    "data_fingerprint",
    "tested_on",
    "weights",
]

# What the course report calls the models that have short names here.
MODEL_NAMES = {"nfnet": "NFNet-F0", "vit": "ViT-B/8"}


class Setting(NamedTuple):
    """What a row of a table is about, as it is shown."""

    dataset: str
    model: str
    optimizer: str
    scheduler: str


@dataclass(frozen=True)
class RunFiles:
    """A run folder that was read."""

    path: Path
    # Every option of TrainingArguments by name, and what was known only once the run was set up.
    options: dict[str, Any]
    # config.json as it is.
    config: dict[str, Any]
    # summary.json; {} as long as there is none.
    summary: dict[str, Any]
    # When that was written, in seconds; 0 as long as there is none.
    ended_at: float
    # The lines of metrics.jsonl, by step.
    rows: list[dict[str, Any]]

    @property
    def flags(self) -> set[str]:
        """The options that were given by flag."""
        provenance = self.config.get("provenance", {})
        return {name for name, source in provenance.items() if source == "flag"}

    @property
    def compared(self) -> dict[str, Any]:
        """The options of COMPARED; of what is known by its content the place does not count."""
        options = {name: self.options.get(name) for name in COMPARED}
        if options["data_fingerprint"] is not None:
            options["dataset"] = None
        for name, digests in self.config.get("weights", {}).items():
            if digests:
                options[name] = None
        # It follows from others; runs of earlier versions had none.
        if "stored_size" not in self.flags:
            options["stored_size"] = None
        return options

    @property
    def command(self) -> list[str]:
        """The command line that started it."""
        words: list[str] = self.config.get("command", [])
        return words

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.summary.get("status") == "finished"

    @property
    def minutes(self) -> float | None:
        """Minutes of training, evaluation and saving over all starts; None where nothing says."""
        seconds = self.summary.get("wall_s")
        return None if seconds is None else seconds / 60

    @property
    def became(self) -> str:
        """What became of a run that is not finished, in words."""
        damaged = (self.path / "summary.json").exists()
        otherwise = "no summary.json of a run" if damaged else "running or killed"
        words = [self.summary.get("status", otherwise), self.summary.get("error")]
        return ", ".join(filter(None, words))

    @property
    def setting(self) -> Setting:
        """The run's row in a table."""
        model = self.options["model"]
        by_itself = last_part(model.removeprefix("local-dir:"))
        return Setting(
            dataset=last_part(self.options["dataset"]),
            model=MODEL_NAMES.get(model, by_itself),
            optimizer=self.options["optimizer"],
            scheduler=self.options["scheduler"],
        )


def read_run(path: Path) -> RunFiles | None:
    """Read the run folder `path`; None when it is none."""
    config = read_config(path)
    if config is None:
        return None
    # An earlier version had fewer options; what it did is what their defaults do.
    options = {**asdict(TrainingArguments()), **config["options"]}
    digests = [digest for of_one in config.get("weights", {}).values() for digest in of_one]
    # Enough of each to tell them apart.
    options["weights"] = " ".join(digest[:12] for digest in digests) or None
    options.setdefault("tested_on", "test")
    rows = []
    with suppress(OSError):
        rows = read_metrics(path / "metrics.jsonl")
    file = path / "summary.json"
    return RunFiles(
        path=path,
        options=options,
        config=config,
        summary=read_summary(path),
        ended_at=file.stat().st_mtime if file.exists() else 0.0,
        rows=rows,
    )


def find_runs(folder: Path) -> list[RunFiles]:
    """All run folders at or below `folder`, by path."""
    runs = [read_run(path) for path in _folders_with("config.json", folder)]
    return [run for run in runs if run is not None]


def read_runs(folder: str | os.PathLike[str]) -> list[RunFiles]:
    """Every run at or below `folder`, finished or not, by path: options, summary, rows.

    `[run.summary | {"path": run.path} for run in runs]` is a table, as pandas takes it, and so is
    `run.rows`. Raises BadInput when there is no such folder, or no run in it.
    """
    path = home(os.fspath(folder))
    runs = find_runs(path)
    if not runs:
        raise BadInput(f"{folder}: {'holds no run' if path.is_dir() else 'no such folder'}")
    return runs


def lost_runs(folder: Path, runs: list[RunFiles]) -> list[Path]:
    """Folders at or below `folder` with rows of a run, but without its config.json."""
    found = _folders_with("metrics.jsonl", folder)
    return sorted(set(found) - {run.path for run in runs})


def _folders_with(name: str, folder: Path) -> list[Path]:
    """Folders at or below `folder` that hold a file `name`, by path; links are followed."""
    found = []
    seen = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        # By another way it is the same folder, and may be one above.
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        if name in files:
            found.append(Path(path))
    return sorted(found)


def said_by(run: RunFiles, with_logits: bool = True) -> tuple[Predictions | None, str]:
    """What a finished run says of the images that count, and what is amiss with its file of it."""
    kind, accuracy = run.options["tested_on"], run.summary["accuracy"]
    try:
        return predictions_of(run.path, kind, accuracy, with_logits), ""
    except BadInput as e:
        return None, f"passed over: {e}; cifar-accel evaluate {run.path} writes it anew"
