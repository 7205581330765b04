"""Tables over runs; runs that differ in the seed alone are averaged."""

import statistics
from dataclasses import dataclass

from cifar_accel.console import printable
from cifar_accel.results.groups import Group, group_by_seed
from cifar_accel.results.runs import RunFiles, Setting

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


def default_table(runs: list[RunFiles]) -> Table:
    """The report's first table: one row per model under AdamW with warm-up and cosine."""
    in_default_setting = [
        run
        for run in runs
        if run.setting.optimizer == "adamw" and run.setting.scheduler == "cosine"
    ]
    rows = []
    for group in group_by_seed(in_default_setting):
        rows.append([_model(group), group.setting.dataset, *_figures(group)])
    title = "Default setting (AdamW, warm-up + cosine)"
    return Table(title, ["model", "data", *FIGURES], rows)


def settings_table(runs: list[RunFiles]) -> Table:
    """The report's second table: optimizers and schedules."""
    rows = []
    for group in group_by_seed(runs):
        setting = group.setting
        how = f"{setting.optimizer}, {setting.scheduler}"
        rows.append([_model(group), setting.dataset, how, *_figures(group)])
    return Table(
        "Optimizers and schedules", ["model", "data", "optimizer, schedule", *FIGURES], rows
    )


def _model(group: Group) -> str:
    """The model, with the label behind it."""
    return f"{group.setting.model} ({group.label})" if group.label else group.setting.model


def _figures(group: Group) -> list[str]:
    """The cells below FIGURES."""
    losses = [run.summary["train_loss"] for run in group.runs]
    # A run that ended within its first epoch has no loss of a whole one.
    losses = [loss for loss in losses if loss is not None]
    accuracies = [100 * accuracy for accuracy in group.accuracies]
    return [
        mean_and_deviation(losses, digits=4),
        mean_and_deviation(accuracies, digits=2),
        _published(group.setting),
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
