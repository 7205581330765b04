"""Run folders that were read."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cifar_accel.options.options import VOLATILE, TrainingArguments
from cifar_accel.records.metrics import read_metrics
from cifar_accel.records.summary import read_config, read_summary

# Options that make a setting: all but the seed, and those that change where or how a run runs.
SETTING = [f.name for f in fields(TrainingArguments) if f.name not in VOLATILE and f.name != "seed"]


@dataclass(frozen=True)
class RunFiles:
    """A run folder that was read: its options, its summary ({} while unfinished) and its rows."""

    path: Path
    options: dict[str, Any]
    command: list[str]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.summary.get("status") == "finished"

    @property
    def setting(self) -> tuple[str, str, str, str]:
        """What runs with different seeds have in common: data set, model, optimizer, schedule."""
        o = self.options
        names = {"nfnet": "NFNet-F0", "vit": "ViT-B/8"}
        model = names.get(
            o["model"], o["model"].removeprefix("local-dir:").rstrip("/").rpartition("/")[2]
        )
        return o["dataset"].rstrip("/").rpartition("/")[2], model, o["optimizer"], o["scheduler"]


def read_run(path: Path) -> RunFiles | None:
    """Read run folder `path`; None when it is none."""
    config = read_config(path)
    if config is None:
        return None
    rows = read_metrics(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
    options = asdict(TrainingArguments()) | config["options"]  # an earlier version had fewer
    return RunFiles(path, options, config.get("command", []), read_summary(path), rows)


def find_runs(folder: Path) -> list[RunFiles]:
    """All run folders at or below `folder`, by path."""
    runs = (read_run(file.parent) for file in sorted(folder.rglob("config.json")))
    return [run for run in runs if run]
