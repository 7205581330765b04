"""Tables over runs; runs that differ in the seed alone are averaged."""

import json
import statistics
from dataclasses import dataclass

from cifar_accel.console import printable
from cifar_accel.results.runs import COMPARED, RunFiles, Setting

# The course report's own results: (family, optimizer, schedule) -> training loss of the last epoch
# and accuracy on the test images, a share of 1.
PUBLISHED = {
    ("nfnet", "adamw", "cosine"): (1.6041, 0.7423),
    ("nfnet", "sgdm", "cosine"): (2.4778, 0.5847),
    ("nfnet", "adamw", "linear_decay"): (1.6641, 0.7336),
    ("vit", "adamw", "cosine"): (1.7612, 0.7317),
}

# The last columns of every table.
FIGURES = ["loss", "acc. %", "report"]

# What stands in a cell without a value.
NONE = "–"

# What the columns mean, below the tables; and the words by which a file is known to be a report.
SIGN = "mean training loss of the last epoch"
LEGEND = f"""\
loss: {SIGN} (smoothing and mixing included);
acc.: top-1 on the test images, or on held-out ones where there are none. report:
loss and accuracy in the course report, for the family, optimizer and schedule of
the row, with NFNet-F0 and ViT-B/8 on CIFAR-100.
"""


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Group:
    """Runs of one experiment, with different seeds: a row of a table."""

    setting: Setting
    # What makes it differ from the other groups of its setting, and what it leaves out; may be "".
    label: str
    # The cells below FIGURES.
    figures: list[str]

    @property
    def model(self) -> str:
        """The model, with the label behind it."""
        if not self.label:
            return self.setting.model
        return f"{self.setting.model} ({self.label})"


def default_table(runs: list[RunFiles]) -> Table:
    """The report's first table: one row per model under AdamW with warm-up and cosine."""
    in_default_setting = [
        run
        for run in runs
        if run.setting.optimizer == "adamw" and run.setting.scheduler == "cosine"
    ]
    rows = []
    for group in group_by_seed(in_default_setting):
        rows.append([group.model, group.setting.dataset, *group.figures])
    title = "Default setting (AdamW, warm-up + cosine)"
    return Table(title, ["model", "data", *FIGURES], rows)


def settings_table(runs: list[RunFiles]) -> Table:
    """The report's second table: optimizers and schedules."""
    rows = []
    for group in group_by_seed(runs):
        setting = group.setting
        how = f"{setting.optimizer}, {setting.scheduler}"
        rows.append([group.model, setting.dataset, how, *group.figures])
    return Table(
        "Optimizers and schedules", ["model", "data", "optimizer, schedule", *FIGURES], rows
    )


def group_by_seed(runs: list[RunFiles]) -> list[Group]:
    """Finished runs, put together where they agree in all but the seed."""
    # Options may be lists, which are no keys of a dictionary; their JSON is.
    by_options: dict[str, list[RunFiles]] = {}
    for run in runs:
        options = {name: run.options.get(name) for name in COMPARED}
        key = json.dumps([run.setting, options, run.summary["steps"]], sort_keys=True)
        by_options.setdefault(key, []).append(run)

    # Within a group all runs have the same options, so the first one stands for it.
    groups = []
    firsts = [seeds[0] for seeds in by_options.values()]
    for seeds in by_options.values():
        first = seeds[0]
        same_setting = [other for other in firsts if other.setting == first.setting]
        groups.append(Group(first.setting, _label(first, same_setting), _figures(seeds)))
    return groups


def _label(run: RunFiles, same_setting: list[RunFiles]) -> str:
    """What a reader must know of a run beside its setting.

    Args:
        run: the run that stands for its group.
        same_setting: those of all groups that have the same setting, `run` among them.
    """
    # The options in which the groups differ.
    options = run.options
    differing = [
        name
        for name in COMPARED
        if any(other.options.get(name) != options.get(name) for other in same_setting)
    ]
    parts = [f"{name} {options.get(name)}" for name in differing]

    # A run over a part of the data, or of the steps, is no whole one.
    for name in ("limit_train", "limit_test"):
        if options[name] and name not in differing:
            parts.append(f"{name} {options[name]:,}")
    steps = run.summary["steps"]
    total_steps = run.summary["total_steps"]
    if steps < total_steps:
        parts.append(f"{steps:,} of {total_steps:,} steps")
    return ", ".join(parts)


def _figures(seeds: list[RunFiles]) -> list[str]:
    """The cells below FIGURES for runs that differ in the seed alone."""
    losses = [run.summary["train_loss"] for run in seeds]
    # A run that ended within its first epoch has no loss of a whole one.
    losses = [loss for loss in losses if loss is not None]
    accuracies = [100 * run.summary["accuracy"] for run in seeds]
    return [
        mean_and_deviation(losses, digits=4),
        mean_and_deviation(accuracies, digits=2),
        _published(seeds[0].setting),
    ]


def mean_and_deviation(values: list[float], digits: int) -> str:
    """The mean, with standard deviation and n where there are several values."""
    if not values:
        return NONE
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f} (n={len(values)})"


def _published(setting: Setting) -> str:
    """Loss and accuracy (in percent) of the course report for a setting, by the model's family."""
    # A DeiT is a ViT that was trained otherwise.
    model = setting.model.lower().replace("deit", "vit")
    for (family, *how), (loss, accuracy) in PUBLISHED.items():
        if family in model and how == [setting.optimizer, setting.scheduler]:
            return f"{loss:.4f}, {100 * accuracy:.2f}"
    return NONE


def markdown(table: Table) -> str:
    """A Markdown table with aligned columns, so that it reads well in a terminal too."""
    rows = [table.head]
    for row in table.rows:
        rows.append([printable(cell).replace("|", "\\|") for cell in row])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
