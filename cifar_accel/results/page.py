"""report.md and report.html of all runs below a folder."""

import html
import os
import shlex
from pathlib import Path
from urllib.parse import quote

from cifar_accel.console import printable
from cifar_accel.errors import BadInput
from cifar_accel.files import home, write_text
from cifar_accel.options.options import ReportArguments
from cifar_accel.results.charts import PLOTS, draw_comparison, plot_run, save_figure
from cifar_accel.results.runs import RunFiles, find_runs
from cifar_accel.results.tables import LEGEND, SIGN, Table, default_table, markdown, settings_table

# Of the page. On a narrow screen wide tables scroll by themselves, and the plots of a run, side by
# side elsewhere, stand below each other.
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;
     color:#222;background:#fff}
table{border-collapse:collapse;margin:1rem 0}
th,td{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:left}
td{font-variant-numeric:tabular-nums}
img{max-width:100%;height:auto}
.plots{display:grid;gap:1rem;
       grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr))}
.plots img{width:100%}
code{background:#f4f4f4;padding:.1rem .3rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
"""


def write_report(args: ReportArguments) -> str:
    """Write report.md and report.html into `args.folder`, and return the Markdown.

    Runs that have no plots yet get them. Raises BadInput when there is no run at or below the
    folder, or when it cannot be written.
    """
    folder = home(args.folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    runs = find_runs(folder)
    if not runs:
        raise BadInput(f"{folder}: no run folder (with config.json) at or below it")
    for run in runs:
        if run.rows and not all(_is_drawn(run, name) for name in PLOTS):
            plot_run(run.path, lambda line: None)

    # The tables are over finished runs; the others are listed with what became of them.
    finished = [run for run in runs if run.finished]
    unfinished = [_what_became_of(run, folder) for run in runs if not run.finished]
    lost = {file.parent for file in folder.rglob("metrics.jsonl")} - {run.path for run in runs}
    unfinished += [f"{path.relative_to(folder)}: no config.json of a run" for path in sorted(lost)]
    tables = [default_table(finished), settings_table(finished)]
    tables = [table for table in tables if table.rows]
    text = report_in_markdown(tables, unfinished)
    try:
        for file in (folder / "report.md", folder / "report.html"):
            if file.exists() and SIGN not in file.read_text(encoding="utf-8", errors="replace"):
                raise BadInput(f"{file}: is no report of cifar-accel; move it away, or rename it")
        # Markdown may hold HTML, and names come from files that anyone may have made.
        write_text(folder / "report.md", html.escape(text, quote=False))
        if finished:
            save_figure(folder / "overview.png", lambda axes: draw_comparison(axes, finished))
        page = report_in_html(folder, runs, tables, unfinished)
        write_text(folder / "report.html", page)
    except OSError as error:
        raise BadInput(
            f"{folder}: the report cannot be written there ({error.strerror})"
        ) from error
    return f"{text}\nThe page with the plots: {folder / 'report.html'}"


def _is_drawn(run: RunFiles, plot: str) -> bool:
    """Whether a plot shows all rows. A run that was killed has drawn nothing itself."""
    file = run.path / plot
    rows = run.path / "metrics.jsonl"
    return file.exists() and file.stat().st_mtime_ns >= rows.stat().st_mtime_ns


def _what_became_of(run: RunFiles, folder: Path) -> str:
    """One line for a run that is not finished."""
    damaged = (run.path / "summary.json").exists()
    otherwise = "no summary.json of a run" if damaged else "running or killed"
    line = f"{run.path.relative_to(folder)}: {run.summary.get('status', otherwise)}"
    error = run.summary.get("error")
    return f"{line}, {error}" if error else line


def report_in_markdown(tables: list[Table], unfinished: list[str]) -> str:
    """The report as Markdown, not escaped: for a terminal."""
    parts = [f"## {table.title}\n\n{markdown(table)}\n\n" for table in tables]
    parts.append(LEGEND)
    if unfinished:
        parts.append("\n## Not finished\n\n")
        parts += [f"- {printable(line)}\n" for line in unfinished]
    return "".join(parts)


# ---- the page; whatever comes from a file is escaped where it enters a piece of HTML


def escape(text: str) -> str:
    """`text` as HTML shows it: neither markup nor control characters."""
    return html.escape(printable(text))


def report_in_html(
    folder: Path, runs: list[RunFiles], tables: list[Table], unfinished: list[str]
) -> str:
    """The report as one HTML page that refers to the plots beside it by relative paths."""
    # Resolved, since a folder that was given as "." has no name.
    title = escape(folder.resolve().name)
    parts = [f"<h1>{title}</h1>"]
    parts += [table_in_html(table) for table in tables]
    parts.append(f"<p>{LEGEND}</p>")
    if unfinished:
        lines = "".join(f"<li>{escape(line)}</li>" for line in unfinished)
        parts.append(f"<h2>Not finished</h2><ul>{lines}</ul>")
    if (folder / "overview.png").exists():
        parts.append('<p><img src="overview.png" alt="accuracy of all runs"></p>')
    parts += [run_in_html(run, folder) for run in runs]
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width">
<title>{title}</title>
<style>{STYLE}</style>
<body>
{body}
</body>
</html>
"""


def table_in_html(table: Table) -> str:
    """A table below its title."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    lines = [f"<tr>{head}</tr>"]
    for row in table.rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    rows = "\n".join(lines)
    return f"""
<h2>{escape(table.title)}</h2>
<div class=scroll><table>
{rows}
</table></div>"""


def run_in_html(run: RunFiles, folder: Path) -> str:
    """A run's section: its result, its command and its plots."""
    # A report of one run's own folder has the plots beside it, and no name but the folder's.
    parts = run.path.relative_to(folder).parts
    name = "/".join(parts) or run.path.name
    # As bytes, since the name of a folder need not be UTF-8.
    base = "".join(f"{quote(os.fsencode(part))}/" for part in parts)
    images = []
    for file, shows in PLOTS.items():
        if (run.path / file).exists():
            images.append(f'<img src="{base}{file}" alt="{shows} of {escape(name)}">')

    result = f"seed {run.options['seed']}, {run.summary.get('steps', 0):,} steps"
    accuracy = run.summary.get("accuracy")
    if accuracy is not None:
        result = f"accuracy {accuracy:.2%}, {result}"
    # The first word is the program's path on the machine that trained.
    command = shlex.join(["python", "-m", "cifar_accel", *run.command[1:]])
    return f"""
<h2>{escape(name)}</h2>
<p>{escape(result)}</p>
<p><code>{escape(command)}</code></p>
<div class=plots>{"".join(images)}</div>"""
