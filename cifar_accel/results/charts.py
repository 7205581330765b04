"""Plots of one run and of several."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cifar_accel.results.runs import RunFiles, read_run

PLOTS = {"loss.png": "loss", "accuracy.png": "accuracy", "lr.png": "learning rate"}


# ---- plots


def plot_run(path: Path, say: Callable[[str], None]) -> None:
    """Write loss.png, accuracy.png and lr.png into a run folder; a failure is said and does no harm."""
    try:
        run = read_run(path)
        if run and run.rows:
            _plot(run)
            say(f"plots: {', '.join(PLOTS)} in {path}")
    except Exception as e:  # a plot never ends a training
        say(f"warning: no plots ({type(e).__name__}: {e})")


def _plot(run: RunFiles) -> None:
    train = [r for r in run.rows if "train/loss" in r]
    tests = [r for r in run.rows if "eval/loss" in r]
    held_out = "held-out images" if run.options.get("validation_fraction") else "test"
    names = "scale crop_padding hflip vflip color_jitter reprob mixup cutmix"
    plain = run.options["aa"] == "none" and not any(run.options[name] for name in names.split())
    mixed = "batches" if plain else "augmented batches"
    soft = f", label smoothing {run.options['smoothing']:g}" if run.options["smoothing"] else ""
    title = f"{run.setting[1]}, {run.setting[2]} + {run.setting[3]}, {run.setting[0]}"

    def curve(
        axes: Any, rows: list[dict[str, Any]], key: str, label: str, color: str, scale: float = 1.0
    ) -> None:
        x, y = [r["epoch"] for r in rows], [r[key] * scale for r in rows]
        if len(y) > 30:  # raw and smoothed
            axes.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(x, smooth(y), color=color, linewidth=1.8, label=f"{label}, smoothed")
        else:
            axes.plot(x, y, color=color, linewidth=1.6, marker="o", markersize=4, label=label)

    def loss(axes: Any) -> None:
        curve(axes, train, "train/loss", f"train ({mixed}{soft})", "tab:blue")
        curve(axes, tests, "eval/loss", held_out, "tab:orange")
        axes.set(ylabel="cross-entropy, nats", title=f"Loss: {title}")

    def accuracy(axes: Any) -> None:
        curve(axes, train, "train/accuracy", f"train ({mixed})", "tab:blue", 100)
        curve(axes, tests, "eval/accuracy", held_out, "tab:orange", 100)
        if tests:
            last = tests[-1]
            axes.annotate(
                f"{last['eval/accuracy']:.2%}",
                (last["epoch"], last["eval/accuracy"] * 100),
                xytext=(0, -16),
                textcoords="offset points",
                ha="right",
            )
        axes.set(ylabel="top-1 accuracy, %", ylim=(0, 103), title=f"Accuracy: {title}")

    def rate(axes: Any) -> None:
        axes.plot(
            [r["epoch"] for r in train],
            [r["train/lr"] for r in train],
            color="tab:green",
            label="learning rate",
        )
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axes.set(ylabel="learning rate", title=f"Schedule: {title}")

    for name, draw in zip(PLOTS, (loss, accuracy, rate), strict=True):
        _save_figure(run.path / name, draw)


def _save_figure(path: Path, draw: Callable[[Any], None]) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scratch = path.with_name(f".{path.name}")
    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar in a name is a dollar
        figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
        axes = FigureCanvasAgg(figure).figure.add_subplot()
        draw(axes)
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        figure.savefig(scratch, format="png")
    os.replace(scratch, path)


def smooth(values: list[float], span: float = 0.05) -> list[float]:
    """Exponential moving average over a share `span` of the curve, corrected for its start."""
    decay, mean, weight, out = 1 - 1 / max(1.0, span * len(values)), 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        out.append(mean / weight)
    return out


# ---- the page


def _compare(axes: Any, runs: list[RunFiles]) -> None:
    for run in runs:
        tests = [r for r in run.rows if "eval/accuracy" in r]
        # A legend of more than a dozen lines would cover the curves; the sections below the figure name them all.
        label = str(run.options["run_name"]) if len(runs) <= 12 else None
        axes.plot(
            [r["epoch"] for r in tests],
            [100 * r["eval/accuracy"] for r in tests],
            marker=".",
            label=label,
        )
    axes.set(
        ylabel="top-1 accuracy, %",
        ylim=(0, 103),
        title="Accuracy after each epoch, all finished runs",
    )
