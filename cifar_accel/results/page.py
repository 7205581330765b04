"""report.md and report.html of all runs below a folder."""

import html
import shlex
from pathlib import Path

from cifar_accel.errors import BadInput
from cifar_accel.files import home
from cifar_accel.options.options import ReportArguments
from cifar_accel.results.charts import PLOTS, _compare, _save_figure, plot_run
from cifar_accel.results.runs import RunFiles, find_runs
from cifar_accel.results.tables import _LEGEND, Table, default_table, markdown, settings_table

# ---- tables


def write_report(args: ReportArguments) -> str:
    """Write report.md and report.html into `args.folder`, plot what is not yet plotted, and return the Markdown.

    Raises BadInput when there is no run below the folder or it cannot be written.
    """
    folder = home(args.folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    runs = find_runs(folder)
    if not runs:
        raise BadInput(f"{folder}: no run folder (with config.json) at or below it")
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
    text = (
        "".join(f"## {title}\n\n{markdown(head, body)}\n\n" for title, head, body in tables if body)
        + _LEGEND
    )
    text += (
        "\n## Not finished\n\n" + "".join(f"- {line}\n" for line in open_runs) if open_runs else ""
    )
    try:
        (folder / "report.md").write_text(html.escape(text, quote=False))
        if done:
            _save_figure(folder / "overview.png", lambda axes: _compare(axes, done))
        (folder / "report.html").write_text(page(folder, runs, tables, open_runs))
    except OSError as e:
        raise BadInput(f"{folder}: the report cannot be written there ({e.strerror})") from e
    return text + f"\nThe page with the plots: {folder / 'report.html'}"


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
            lines = "".join(
                "<tr>" + "".join(f"<td>{e(c)}</td>" for c in row) + "</tr>" for row in body
            )
            parts.append(
                f"<h2>{e(title)}</h2><div class=scroll><table><tr>{cells}</tr>{lines}</table></div>"
            )
    parts.append(f"<p>{e(_LEGEND)}</p>")
    if open_runs:
        parts.append(
            "<h2>Not finished</h2><ul>"
            + "".join(f"<li>{e(line)}</li>" for line in open_runs)
            + "</ul>"
        )
    if (folder / "overview.png").exists():
        parts.append('<p><img src="overview.png" alt="accuracy of all runs"></p>')
    for run in runs:
        name = str(run.path.relative_to(folder)) if run.path != folder else run.path.name
        base = (
            ""
            if run.path == folder
            else "/".join(map(_quote, run.path.relative_to(folder).parts)) + "/"
        )
        images = "".join(
            f'<img src="{base}{p}" alt="{e(t)} of {e(name)}">'
            for p, t in PLOTS.items()
            if (run.path / p).exists()
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
