"""Finished runs that differ in the seed alone, put together: what can be said of a setting."""

import json
from dataclasses import dataclass
from typing import Any

from cifar_accel.options.options import in_words
from cifar_accel.results.runs import COMPARED, RunFiles, Setting


@dataclass(frozen=True)
class Group:
    """Finished runs of one setting, one for each seed."""

    setting: Setting
    # What makes it differ from the other groups of its setting, and what it leaves out; may be "".
    label: str
    # By their seeds.
    runs: list[RunFiles]
    # Other runs of the same seeds. They are no further evidence: the newest stands for its seed.
    repeats: list[RunFiles]

    @property
    def name(self) -> str:
        """Model, optimizer, schedule and label, in words."""
        setting = self.setting
        name = f"{setting.model}, {setting.optimizer} + {setting.scheduler}"
        return f"{name} ({self.label})" if self.label else name

    @property
    def options(self) -> dict[str, Any]:
        """The options of all of its runs, but for the seed."""
        return self.runs[0].options

    @property
    def seeds(self) -> list[int]:
        """The seeds of its runs, in order."""
        return [run.options["seed"] for run in self.runs]

    @property
    def accuracies(self) -> list[float]:
        """Accuracy of each run, a share of 1."""
        return [run.summary["accuracy"] for run in self.runs]


def group_by_seed(runs: list[RunFiles]) -> list[Group]:
    """Finished runs, put together where they agree in all but the seed, in the order of `runs`."""
    # Options may be lists, which are no keys of a dictionary; their JSON is.
    by_options: dict[str, list[RunFiles]] = {}
    for run in runs:
        key = json.dumps([run.compared, run.summary["steps"]], sort_keys=True)
        by_options.setdefault(key, []).append(run)

    # Within a group all runs have the same options, so the first one stands for it.
    groups = []
    firsts = [members[0] for members in by_options.values()]
    for members in by_options.values():
        first = members[0]
        same_setting = [other for other in firsts if other.setting == first.setting]
        kept = _newest_by_seed(members)
        repeats = [run for run in members if run not in kept]
        groups.append(Group(first.setting, _label(first, same_setting), kept, repeats))
    return groups


def _newest_by_seed(runs: list[RunFiles]) -> list[RunFiles]:
    """Of each seed the run that ended last, by seed."""
    by_seed = {}
    for run in sorted(runs, key=lambda run: run.ended_at):
        by_seed[run.options["seed"]] = run
    return [by_seed[seed] for seed in sorted(by_seed)]


def _label(run: RunFiles, same_setting: list[RunFiles]) -> str:
    """What a reader must know of a run beside its setting.

    Args:
        run: the run that stands for its group.
        same_setting: those of all groups that have the same setting, `run` among them.
    """
    # The options in which the groups differ. What nobody asked for is told by the recipe that
    # brought it, if there is one, and what follows from others by these.
    options = run.options
    differing = [
        name
        for name in COMPARED
        if any(other.options.get(name) != options.get(name) for other in same_setting)
    ]
    telling = [name for name in differing if not _follows(name, same_setting)]
    differing = telling or differing
    if "recipe" in differing:
        asked = {name for other in same_setting for name in other.flags}
        differing = [name for name in differing if name == "recipe" or name in asked]
    parts = [f"{name} {in_words(options.get(name))}" for name in differing]

    # A run over a part of the data, or of the steps, is no whole one.
    for name in ("limit_train", "limit_test"):
        if options[name] and name not in differing:
            parts.append(f"{name} {options[name]:,}")
    steps = run.summary["steps"]
    total_steps = run.summary["total_steps"]
    if steps < total_steps:
        parts.append(f"{steps:,} of {total_steps:,} steps")
    return ", ".join(parts)


def _follows(name: str, runs: list[RunFiles]) -> bool:
    """Whether an option, or a fact, follows from others in all of these runs."""
    if name in ("weights", "data_fingerprint"):
        return True
    sources = {run.config["provenance"].get(name) for run in runs}
    return sources == {"derived"} and name != "mixed_precision"
