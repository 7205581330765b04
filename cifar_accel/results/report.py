"""`cifar-accel report`: what runs say, in the terminal, in report.md and in one page."""

import html
import shutil
import textwrap

from cifar_accel.console import printable
from cifar_accel.errors import BadInput
from cifar_accel.files import home, write_text
from cifar_accel.options.options import ReportArguments
from cifar_accel.results.groups import group_by_seed
from cifar_accel.results.page import page
from cifar_accel.results.runs import find_runs, lost_runs
from cifar_accel.results.sections import Section, checks, sections_of, title_of, verdict_lines
from cifar_accel.results.tables import LEGEND, SIGN, fitted, markdown, section_table


def write_report(args: ReportArguments) -> str:
    """Write report.md and report.html into `args.folder`; what a terminal is told.

    Nothing is written into run folders below it. Raises BadInput when there is no run at or below
    the folder, when it cannot be written, or when a file there is none that a report wrote.
    """
    folder = home(args.folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    runs = find_runs(folder)
    if not runs:
        raise BadInput(f"{folder}: no run folder (with config.json) at or below it")
    files = [folder / "report.md", folder / "report.html"]

    # What is said is of finished runs; the others are listed with what became of them.
    finished = [run for run in runs if run.finished]
    ends = {run.path: run.became for run in runs if not run.finished}
    ends |= dict.fromkeys(lost_runs(folder, runs), "no config.json of a run")
    unfinished = [f"{path.relative_to(folder)}: {became}" for path, became in ends.items()]
    sections = sections_of(group_by_seed(finished))
    text = in_markdown(sections, unfinished)
    # Resolved, since a folder that was given as "." has no name.
    title = printable(folder.resolve().name)
    try:
        for file in files:
            if file.exists() and SIGN not in file.read_text(encoding="utf-8", errors="replace"):
                raise BadInput(f"{file}: is no report of cifar-accel; move it away, or rename it")
        # Markdown may hold HTML, and names come from files that anyone may have made.
        write_text(files[0], html.escape(text, quote=False))
        write_text(files[1], page(title, folder, runs, sections, unfinished))
    except OSError as error:
        raise BadInput(
            f"{folder}: the report cannot be written there ({error.strerror})"
        ) from error
    columns = shutil.get_terminal_size().columns
    return f"{in_markdown(sections, unfinished, columns)}\nThe page: {files[1]}"


def in_markdown(sections: list[Section], unfinished: list[str], columns: int | None = None) -> str:
    """The report as Markdown, not escaped; for a terminal of so many `columns`."""
    parts = []
    for section in sections:
        table = section_table(section)
        if columns:
            table = fitted(table, columns)
        lines = [*verdict_lines(section), *(f"Note: {line}" for line in checks(section))]
        parts.append(f"## {title_of(section)}\n\n")
        parts += [f"{_filled(line, columns)}\n" for line in lines]
        parts.append(f"\n{markdown(table)}\n\n")
    parts.append(textwrap.fill(LEGEND, columns or 10**6) + "\n")
    if unfinished:
        parts.append("\n## Not finished\n\n")
        parts += [f"- {printable(line)}\n" for line in unfinished]
    return "".join(parts)


def _filled(line: str, columns: int | None) -> str:
    """An item of a list, wrapped to so many columns."""
    return textwrap.fill(f"- {printable(line)}", columns or 10**6, subsequent_indent="  ")
