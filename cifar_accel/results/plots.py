"""The plots of a run."""

import math
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from cifar_accel.console import printable
from cifar_accel.optim.schedules import SCHEDULES, learning_rate
from cifar_accel.options.options import TrainingArguments
from cifar_accel.results.runs import RunFiles, read_run

# matplotlib's Axes. The library is loaded where a figure is written, since that takes a second.
Axes = Any

# The plots of a run folder, and what each shows.
PLOTS = {"loss.png": "loss", "accuracy.png": "accuracy", "lr.png": "learning rate"}

# Options that change a training image or mix two. `aa` does too, and is "none" when it is off.
AUGMENTATIONS = (
    "scale",
    "crop_padding",
    "hflip",
    "vflip",
    "color_jitter",
    "reprob",
    "mixup",
    "cutmix",
)

# A curve of more points than this is drawn thin, with a smoothed one over it.
MOST_SINGLE_POINTS = 30

# Points of a schedule.
LARGEST_CURVE = 2000

# Figures of this size are not drawn: some a float cannot hold.
LARGEST = 1e100

# Size in inches, and dots an inch: 910 x 546 pixels.
FIGURE_SIZE = (7, 4.2)
FIGURE_DPI = 130


def plot_run(path: Path, say: Callable[[str], None]) -> None:
    """Write loss.png, accuracy.png and lr.png into a run folder; says so, or why it could not."""
    try:
        run = read_run(path)
        if run is not None and run.rows:
            save_figure(path / "loss.png", lambda axes: draw_loss(axes, run))
            save_figure(path / "accuracy.png", lambda axes: draw_accuracy(axes, run))
            save_figure(path / "lr.png", lambda axes: draw_learning_rate(axes, run))
            say(f"plots: {', '.join(PLOTS)} in {path}")
    # Whatever goes wrong in here, the training before it is done and stays so.
    except Exception as error:
        say(f"warning: no plots ({type(error).__name__}: {error})")


# ---- what is drawn


def draw_loss(axes: Axes, run: RunFiles) -> None:
    """Training and test loss by epoch."""
    smoothing = run.options["smoothing"]
    training = f"train ({_training_images(run)}"
    if smoothing:
        training += f", label smoothing {smoothing:g}"
    training += ")"
    draw_curve(axes, run, "train/loss", training, "tab:blue")
    draw_curve(axes, run, "eval/loss", _evaluated_images(run), "tab:orange")
    axes.set(ylabel="cross-entropy, nats", title=f"Loss: {_title(run)}")


def draw_accuracy(axes: Axes, run: RunFiles) -> None:
    """Training and test accuracy in percent by epoch, and the last one as a number."""
    training = f"train ({_training_images(run)})"
    draw_curve(axes, run, "train/accuracy", training, "tab:blue", scale=100)
    draw_curve(axes, run, "eval/accuracy", _evaluated_images(run), "tab:orange", scale=100)
    epochs, accuracies = points(run, "eval/accuracy", 100)
    if epochs:
        # Below the last point, 16 points of a font's size away from it.
        axes.annotate(
            f"{accuracies[-1]:.2f}%",
            (epochs[-1], accuracies[-1]),
            xytext=(0, -16),
            textcoords="offset points",
            ha="right",
        )
    axes.set(ylabel="top-1 accuracy, %", ylim=(0, 103), title=f"Accuracy: {_title(run)}")


def draw_learning_rate(axes: Axes, run: RunFiles) -> None:
    """The learning rate by epoch, as the schedule has it at every step that was taken."""
    axes.plot(*_schedule(run), color="tab:green", label="learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.set(ylabel="learning rate", title=f"Schedule: {_title(run)}")


def draw_curve(
    axes: Axes, run: RunFiles, key: str, label: str, color: str, scale: float = 1.0
) -> None:
    """The metric `key` by epoch, times `scale`."""
    epochs, values = points(run, key, scale)
    if len(values) <= MOST_SINGLE_POINTS:
        axes.plot(epochs, values, color=color, linewidth=1.6, marker="o", markersize=4, label=label)
        return
    axes.plot(epochs, values, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(epochs, smooth(values), color=color, linewidth=1.8, label=f"{label}, smoothed")


def smooth(values: list[float], share: float = 0.05) -> list[float]:
    """Exponential moving average over about `share` of the curve, without the bias of its start.

    The weights of the values seen so far are summed and divided out, as in Adam (Kingma and Ba,
    2015).
    """
    span = max(1.0, share * len(values))
    decay = 1 - 1 / span
    total = 0.0
    total_weight = 0.0
    smoothed = []
    for value in values:
        total = decay * total + (1 - decay) * value
        total_weight = decay * total_weight + (1 - decay)
        smoothed.append(total / total_weight)
    return smoothed


# ---- what is said about it


def _schedule(run: RunFiles) -> tuple[list[float], list[float]]:
    """Epochs and learning rates; by the rows of a run whose schedule is not known here."""
    options = run.options
    if options["scheduler"] not in SCHEDULES or "steps_per_epoch" not in options:
        return points(run, "train/lr")
    names = [field.name for field in fields(TrainingArguments)]
    args = TrainingArguments(**{name: options[name] for name in names})
    steps_per_epoch = options["steps_per_epoch"]
    warmup_steps = round((args.warmup_epochs or 0) * steps_per_epoch)
    last = run.rows[-1]["step"]
    # As many as a figure can show.
    steps = range(0, last, max(1, last // LARGEST_CURVE))
    rates = [learning_rate(step, options["total_steps"], warmup_steps, args) for step in steps]
    return [step / steps_per_epoch for step in steps], rates


def points(run: RunFiles, key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """The epochs in which `key` was logged, and its values, times `scale`; NaN is left out."""
    rows = [row for row in run.rows if abs(row.get(key, math.nan)) < LARGEST]
    rows = [row for row in rows if abs(row["epoch"]) < LARGEST]
    return [row["epoch"] for row in rows], [scale * row[key] for row in rows]


def _title(run: RunFiles) -> str:
    dataset, model, optimizer, scheduler = run.setting
    return printable(f"{model}, {optimizer} + {scheduler}, {dataset}")


def _training_images(run: RunFiles) -> str:
    """What the training figures are of, which explains why they may lie below the test's."""
    changed = any(run.options[name] for name in AUGMENTATIONS)
    if run.options["aa"] != "none" or changed:
        return "augmented batches"
    return "batches"


def _evaluated_images(run: RunFiles) -> str:
    return "held-out images" if run.options.get("validation_fraction") else "test"


# ---- the file


def save_figure(path: Path, draw: Callable[[Axes], None]) -> None:
    """Write the PNG `path`, over epochs, with what `draw` puts into its axes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A dollar in a run's name is a dollar, not the start of a formula.
    with matplotlib.rc_context({"text.parse_math": False}):
        # Not by pyplot, which keeps every figure and may want a display.
        figure = Figure(figsize=FIGURE_SIZE, dpi=FIGURE_DPI, layout="constrained")
        axes = FigureCanvasAgg(figure).figure.add_subplot()
        draw(axes)
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)

        # Replaced at once, so that a page never shows half a picture.
        scratch = path.with_name(f".{path.name}")
        figure.savefig(scratch, format="png")
    os.replace(scratch, path)
