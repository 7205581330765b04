"""Tables of texts: of the settings, and in Markdown or for a terminal."""

import statistics
from dataclasses import dataclass
from functools import cache
from typing import Any

from cifar_accel.console import printable
from cifar_accel.results.groups import Group
from cifar_accel.results.runs import RunFiles
from cifar_accel.results.sections import Entry, Section, accuracy_in_words, to_the_best
from cifar_accel.yaml_files import read_yaml, shipped_folder

# What stands in a cell without a value.
NONE = "–"
# In a terminal the least text of a setting, and what stands for the rest.
SHORTEST = 24
CUT = "…"

# What the columns mean, below the tables; and the words by which a file is known to be a report.
SIGN = "mean training loss of the last epoch"
LEGEND = (
    "acc.: top-1, mean over seeds ± half of its 95 % interval (n seeds). stands: below the best, "
    "or perhaps (below?); the same within half a point (= best); or it cannot be told (≈ best). "
    f"to the best: the difference in points, with its 95 % interval. loss: {SIGN}, smoothing and "
    "mixing included. lr: the highest learning rate. minutes: of a run, with evaluations."
)


@dataclass(frozen=True)
class Table:
    """A table of texts; its first column is the most important one, its last the least."""

    title: str
    head: list[str]
    rows: list[list[str]]


def section_table(section: Section) -> Table:
    """The settings of one section, the best first."""
    head = ["setting", "acc. %", "stands", "to the best", "top 5", "loss", "lr", "img/s", "minutes"]
    published = [_published(entry.group) for entry in section.entries]
    rows = [_row(entry) for entry in section.entries]
    if any(published):
        head.append("course report")
        rows = [[*row, cell or NONE] for row, cell in zip(rows, published, strict=True)]
    return Table("Settings", head, rows)


def _row(entry: Entry) -> list[str]:
    runs = entry.group.runs
    return [
        entry.name,
        accuracy_in_words(entry).replace(" %", ""),
        entry.standing,
        to_the_best(entry) or NONE,
        _mean(runs, "top5_accuracy", 100, ".2f"),
        _mean(runs, "train_loss", 1, ".4f"),
        f"{entry.group.options['learning_rate']:.3g}",
        _mean(runs, "images_per_s", 1, ",.0f"),
        _mean(runs, "wall_s", 1 / 60, ".1f"),
    ]


def _mean(runs: list[RunFiles], key: str, scale: float, digits: str) -> str:
    """The mean of a figure of summary.json; a run may have ended without it."""
    values = [run.summary.get(key) for run in runs]
    known = [scale * value for value in values if value is not None]
    return format(statistics.mean(known), digits) if known else NONE


@cache
def _course_report() -> list[dict[str, Any]]:
    """Options and figures of the course report's runs, from studies/report.yaml."""
    rows: list[dict[str, Any]] = read_yaml(shipped_folder("studies") / "report.yaml")["published"]
    return rows


def _published(group: Group) -> str:
    """Loss and accuracy in percent of the course report, where model and data are its own."""
    options = group.options
    if group.setting.dataset != "cifar100" or options["recipe"] != "report":
        return ""
    for row in _course_report():
        if all(row[name] == options[name] for name in ("model", "optimizer", "scheduler")):
            return f"{row['loss']:.4f}, {100 * row['accuracy']:.2f}"
    return ""


# ---- as text


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


def fitted(table: Table, columns: int) -> Table:
    """The table as wide as a terminal of so many columns: without its last ones, its first cut."""
    widths = [
        max(len(printable(cell)) for cell in column)
        for column in zip(table.head, *table.rows, strict=True)
    ]
    first = min(widths[0], SHORTEST)
    # "| a | b |": three characters a column, and one more.
    kept = 1
    room = columns - 1 - (first + 3)
    while kept < len(widths) and room >= widths[kept] + 3:
        room -= widths[kept] + 3
        kept += 1
    longest = first + max(0, room)

    def cut(row: list[str]) -> list[str]:
        name = printable(row[0])
        if len(name) > longest:
            # Out of its middle: what settings differ in stands at the end.
            head = longest // 3
            name = name[:head] + CUT + name[head + 1 - longest :]
        return [name, *row[1:kept]]

    return Table(table.title, cut(table.head), [cut(row) for row in table.rows])
