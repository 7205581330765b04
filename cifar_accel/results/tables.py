"""Tables over runs; runs that differ in the seed alone are averaged."""

import json
import statistics
from collections.abc import Iterable

from cifar_accel.results.runs import SETTING, RunFiles

# The course report's own results: (family, optimizer, schedule) -> last training loss, test accuracy.
PUBLISHED = {
    ("nfnet", "adamw", "cosine"): (1.6041, 0.7423),
    ("nfnet", "sgdm", "cosine"): (2.4778, 0.5847),
    ("nfnet", "adamw", "linear_decay"): (1.6641, 0.7336),
    ("vit", "adamw", "cosine"): (1.7612, 0.7317),
}


Table = tuple[str, list[str], list[list[str]]]


def default_table(runs: list[RunFiles]) -> Table:
    """The report's first table: one row per model under AdamW with warm-up and cosine."""
    default = [run for run in runs if run.setting[2:] == ("adamw", "cosine")]
    rows = [[s[1], s[0], *figures] for s, figures in _by_setting(default)]
    return "Default setting (AdamW, warm-up + cosine)", ["model", "data", *_FIGURES], rows


def settings_table(runs: list[RunFiles]) -> Table:
    """The report's second table: optimizers and schedules."""
    rows = [[s[1], s[0], f"{s[2]}, {s[3]}", *figures] for s, figures in _by_setting(runs)]
    return "Optimizers and schedules", ["model", "data", "optimizer, schedule", *_FIGURES], rows


_FIGURES = ["loss", "acc. %", "report"]


_LEGEND = """\
loss: mean training loss of the last epoch (smoothing and mixing included);
acc.: top-1 on the test images. report: loss and accuracy in the course report,
for the family, optimizer and schedule of the row, with NFNet-F0 and ViT-B/8 on
CIFAR-100.
"""


def _by_setting(runs: list[RunFiles]) -> Iterable[tuple[tuple[str, str, str, str], list[str]]]:
    """Each setting with its figures: the mean over the seeds, with standard deviation and n where there are several."""
    groups: dict[str, list[RunFiles]] = {}
    for (
        run
    ) in runs:  # seeds of one setting agree in every option that is neither the seed nor volatile
        rest = {k: run.options.get(k) for k in SETTING}
        groups.setdefault(json.dumps([run.setting, rest], sort_keys=True), []).append(run)
    pooled = list(groups.values())

    def figure(values: list[float], digits: int) -> str:
        text = f"{statistics.mean(values):.{digits}f}"
        return text + (
            f" ± {statistics.stdev(values):.{digits}f} (n={len(values)})" if len(values) > 1 else ""
        )

    for same in pooled:
        setting = same[0].setting
        rivals = [other[0].options for other in pooled if other[0].setting == setting]
        differ = [
            k for k in SETTING if any(other.get(k) != same[0].options.get(k) for other in rivals)
        ]
        name = setting[1].lower().replace("deit", "vit")
        published = next(
            (PUBLISHED.get((f, *setting[2:])) for f in ("nfnet", "vit") if f in name), None
        )
        theirs = f"{published[0]:.4f}, {100 * published[1]:.2f}" if published else "–"
        losses = [
            run.summary["train_loss"] for run in same if run.summary["train_loss"] is not None
        ]
        ours = [
            figure(losses, 4) if losses else "–",
            figure([100 * run.summary["accuracy"] for run in same], 2),
        ]
        options, told = same[0].options, [f"{k} {same[0].options.get(k)}" for k in differ]
        told += [
            f"{k} {options[k]:,}"
            for k in ("limit_train", "limit_test")
            if options[k] and k not in differ
        ]
        if same[0].summary["steps"] < same[0].summary["total_steps"]:
            told.append(f"{same[0].summary['steps']:,} of {same[0].summary['total_steps']:,} steps")
        label = ", ".join(told)
        yield (
            (setting[0], setting[1] + (f" ({label})" if label else ""), *setting[2:]),
            [*ours, theirs],
        )


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table with aligned columns, so that it reads well in a terminal too."""
    rows = [head, *([cell.replace("|", "\\|") for cell in row] for row in body)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
