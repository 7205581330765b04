"""Plots, tables and the page, all from the files in run folders."""

import html
import json
import os
import shlex
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cifar_accel.config import VOLATILE, ReportArguments, TrainingArguments, home
from cifar_accel.run_folder import read_config, read_summary
from cifar_accel.tracking import read_metrics

# The course report's own results: (family, optimizer, schedule) -> last training loss, test accuracy.
PUBLISHED = {
    ("nfnet", "adamw", "cosine"): (1.6041, 0.7423),
    ("nfnet", "sgdm", "cosine"): (2.4778, 0.5847),
    ("nfnet", "adamw", "linear_decay"): (1.6641, 0.7336),
    ("vit", "adamw", "cosine"): (1.7612, 0.7317),
}
# Options that make a setting: all but the seed, and those that change where or how a run runs.
SETTING = [f.name for f in fields(TrainingArguments) if f.name not in VOLATILE and f.name != "seed"]
PLOTS = {"loss.png": "loss", "accuracy.png": "accuracy", "lr.png": "learning rate"}


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
        model = names.get(o["model"], o["model"].removeprefix("local-dir:").rstrip("/").rpartition("/")[2])
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

    def curve(axes: Any, rows: list[dict[str, Any]], key: str, label: str, color: str, scale: float = 1.0) -> None:
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
        axes.plot([r["epoch"] for r in train], [r["train/lr"] for r in train], color="tab:green", label="learning rate")
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


# ---- tables


def write_report(args: ReportArguments) -> str:
    """Write report.md and report.html into `args.folder`, plot what is not yet plotted, and return the Markdown.

    Raises ValueError when there is no run below the folder or it cannot be written.
    """
    folder = home(args.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    runs = find_runs(folder)
    if not runs:
        raise ValueError(f"{folder}: no run folder (with config.json) at or below it")
    for run in runs:
        if run.rows and not all((run.path / name).exists() for name in PLOTS):
            plot_run(run.path, lambda line: None)
    done = [run for run in runs if run.finished]
    open_runs = [
        f"{run.path.relative_to(folder)}: {run.summary.get('status', 'running or killed')}"
        + (f", {run.summary['error']}" if run.summary.get("error") else "")
        for run in runs
        if not run.finished
    ]
    tables = [default_table(done), settings_table(done)]
    text = "".join(f"## {title}\n\n{markdown(head, body)}\n\n" for title, head, body in tables if body) + _LEGEND
    text += "\n## Not finished\n\n" + "".join(f"- {line}\n" for line in open_runs) if open_runs else ""
    try:
        (folder / "report.md").write_text(html.escape(text, quote=False))
        if done:
            _save_figure(folder / "overview.png", lambda axes: _compare(axes, done))
        (folder / "report.html").write_text(page(folder, runs, tables, open_runs))
    except OSError as e:
        raise ValueError(f"{folder}: the report cannot be written there ({e.strerror})") from e
    return text + f"\nThe page with the plots: {folder / 'report.html'}"


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
    for run in runs:  # seeds of one setting agree in every option that is neither the seed nor volatile
        rest = {k: run.options.get(k) for k in SETTING}
        groups.setdefault(json.dumps([run.setting, rest], sort_keys=True), []).append(run)
    pooled = list(groups.values())

    def figure(values: list[float], digits: int) -> str:
        text = f"{statistics.mean(values):.{digits}f}"
        return text + (f" ± {statistics.stdev(values):.{digits}f} (n={len(values)})" if len(values) > 1 else "")

    for same in pooled:
        setting = same[0].setting
        rivals = [other[0].options for other in pooled if other[0].setting == setting]
        differ = [k for k in SETTING if any(other.get(k) != same[0].options.get(k) for other in rivals)]
        name = setting[1].lower().replace("deit", "vit")
        published = next((PUBLISHED.get((f, *setting[2:])) for f in ("nfnet", "vit") if f in name), None)
        theirs = f"{published[0]:.4f}, {100 * published[1]:.2f}" if published else "–"
        losses = [run.summary["train_loss"] for run in same if run.summary["train_loss"] is not None]
        ours = [figure(losses, 4) if losses else "–", figure([100 * run.summary["accuracy"] for run in same], 2)]
        options, told = same[0].options, [f"{k} {same[0].options.get(k)}" for k in differ]
        told += [f"{k} {options[k]:,}" for k in ("limit_train", "limit_test") if options[k] and k not in differ]
        if same[0].summary["steps"] < same[0].summary["total_steps"]:
            told.append(f"{same[0].summary['steps']:,} of {same[0].summary['total_steps']:,} steps")
        label = ", ".join(told)
        yield (setting[0], setting[1] + (f" ({label})" if label else ""), *setting[2:]), [*ours, theirs]


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table with aligned columns, so that it reads well in a terminal too."""
    rows = [head, *([cell.replace("|", "\\|") for cell in row] for row in body)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


# ---- the page


def _compare(axes: Any, runs: list[RunFiles]) -> None:
    for run in runs:
        tests = [r for r in run.rows if "eval/accuracy" in r]
        # A legend of more than a dozen lines would cover the curves; the sections below the figure name them all.
        label = str(run.options["run_name"]) if len(runs) <= 12 else None
        axes.plot([r["epoch"] for r in tests], [100 * r["eval/accuracy"] for r in tests], marker=".", label=label)
    axes.set(ylabel="top-1 accuracy, %", ylim=(0, 103), title="Accuracy after each epoch, all finished runs")


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:left}
td{font-variant-numeric:tabular-nums}img{max-width:100%;height:auto}.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:1rem}
.plots img{width:100%}code{background:#f4f4f4;padding:.1rem .3rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
"""


def page(folder: Path, runs: list[RunFiles], tables: list[Table], open_runs: list[str]) -> str:
    """The report as one HTML page that refers to the plots beside it by relative paths."""
    e = html.escape
    parts = [f"<h1>{e(folder.resolve().name)}</h1>"]
    for title, head, body in tables:
        if body:
            cells = "".join(f"<th>{e(c)}</th>" for c in head)
            lines = "".join("<tr>" + "".join(f"<td>{e(c)}</td>" for c in row) + "</tr>" for row in body)
            parts.append(f"<h2>{e(title)}</h2><div class=scroll><table><tr>{cells}</tr>{lines}</table></div>")
    parts.append(f"<p>{e(_LEGEND)}</p>")
    if open_runs:
        parts.append("<h2>Not finished</h2><ul>" + "".join(f"<li>{e(line)}</li>" for line in open_runs) + "</ul>")
    if (folder / "overview.png").exists():
        parts.append('<p><img src="overview.png" alt="accuracy of all runs"></p>')
    for run in runs:
        name = str(run.path.relative_to(folder)) if run.path != folder else run.path.name
        base = "" if run.path == folder else "/".join(map(_quote, run.path.relative_to(folder).parts)) + "/"
        images = "".join(
            f'<img src="{base}{p}" alt="{e(t)} of {e(name)}">' for p, t in PLOTS.items() if (run.path / p).exists()
        )
        accuracy = run.summary.get("accuracy")
        result = f"accuracy {accuracy:.2%}, " if accuracy is not None else ""
        seed = f"seed {run.options['seed']}, {run.summary.get('steps', 0):,} steps"
        command = shlex.join(["python", "-m", "cifar_accel", *run.command[1:]])
        parts.append(
            f"<h2>{e(name)}</h2><p>{e(result + seed)}</p><p><code>{e(command)}</code></p>"
            f"<div class=plots>{images}</div>"
        )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{e(folder.resolve().name)}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _quote(part: str) -> str:
    from urllib.parse import quote

    return quote(part)
