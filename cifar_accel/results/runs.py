"""Run folders that were read."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from cifar_accel.options.options import VOLATILE, TrainingArguments
from cifar_accel.records.metrics import read_metrics
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
    def command(self) -> list[str]:
        """The command line that started it."""
        words: list[str] = self.config.get("command", [])
        return words

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.summary.get("status") == "finished"

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
        by_itself = _last_part(model.removeprefix("local-dir:"))
        return Setting(
            dataset=_last_part(self.options["dataset"]),
            model=MODEL_NAMES.get(model, by_itself),
            optimizer=self.options["optimizer"],
            scheduler=self.options["scheduler"],
        )


def _last_part(name: str) -> str:
    """What follows the last slash: the folder of a path, the name of a hub id."""
    return name.rstrip("/").rpartition("/")[2]


def read_run(path: Path) -> RunFiles | None:
    """Read the run folder `path`; None when it is none."""
    config = read_config(path)
    if config is None:
        return None
    # An earlier version had fewer options; what it did is what their defaults do.
    options = {**asdict(TrainingArguments()), **config["options"]}
    options["weights"] = config.get("weights")
    metrics = path / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.exists() else []
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
    runs = [read_run(file.parent) for file in sorted(folder.rglob("config.json"))]
    return [run for run in runs if run is not None]


def lost_runs(folder: Path, runs: list[RunFiles]) -> list[Path]:
    """Folders at or below `folder` with rows of a run, but without its config.json."""
    found = {file.parent for file in folder.rglob("metrics.jsonl")}
    return sorted(found - {run.path for run in runs})
