"""Run folders without a training: what a report reads of a run of two epochs, 8 steps each."""

import json
from dataclasses import asdict
from pathlib import Path

from cifar_accel.options.options import TrainingArguments

FACTS = {
    "mixed_precision": "no",
    "classes": 10,
    "input_mean": [0.5, 0.5, 0.5],
    "input_std": [0.5, 0.5, 0.5],
}
FIGURES = {"train/loss": 2.0, "train/accuracy": 0.25, "train/lr": 1e-3}
EVALUATION = {"eval/loss": 1.5, "eval/accuracy": 0.5}


def make_run(folder: Path, summary: dict | None = None, evaluated: bool = True, **options) -> Path:
    """Write a finished run; `summary` and `options` replace parts of what it says."""
    (folder / "model").mkdir(parents=True)
    known = asdict(TrainingArguments(dataset="digits")) | {"run_name": folder.name}
    config = {
        "options": known | FACTS | options,
        "provenance": {},
        "command": ["cifar_accel", "--run-name", folder.name],
    }
    ending = {"status": "finished", "steps": 16, "total_steps": 16}
    ending |= {"train_loss": 2.0, "accuracy": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(ending | (summary or {})))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in (8, 16):
            row = {"step": step, "epoch": step / 8, **FIGURES}
            if evaluated:
                row |= EVALUATION
            file.write(json.dumps(row) + "\n")
    return folder
