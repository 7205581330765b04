"""report.html: one file that can be mailed. Style, figures and Vega are in it as text.

What comes from run folders is escaped by Jinja; figures go in as JSON, in which `<` is written as
an escape, so that no name ends the script.
"""

import base64
import io
import json
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from cifar_accel.console import printable
from cifar_accel.data.decode import decoded_images
from cifar_accel.errors import BadInput
from cifar_accel.options.options import VOLATILE, flag, in_words
from cifar_accel.records.predictions import Predictions, read_predictions
from cifar_accel.results import charts as draw
from cifar_accel.results.calibration import (
    calibration_error,
    confidence,
    reliability,
    temperature,
)
from cifar_accel.results.mistakes import (
    Mistake,
    accuracy_by_class,
    always_taken_for_one,
    between_superclasses,
    confident_mistakes,
    most_confused,
)
from cifar_accel.results.runs import RunFiles, said_by
from cifar_accel.results.sections import (
    MARGIN,
    Entry,
    Section,
    checks,
    half_width,
    title_of,
    verdict_lines,
)
from cifar_accel.results.statistics import wilson
from cifar_accel.results.superclasses import superclass_of
from cifar_accel.results.tables import LEGEND, NONE, Table, section_table

TEMPLATES = Path(__file__).parent / "templates"

# Settings whose mistakes are shown, confused pairs, pictures, and the side of one in pixels.
MOST_SETTINGS = 8
PAIRS = 12
PICTURES = 12
PICTURE_SIDE = 96

# The curves: what an axis says (with the images that are evaluated while training), and what a
# metric is multiplied by.
CURVES = {
    "eval/accuracy": ("accuracy on {} images after each epoch, %", 100),
    "eval/loss": ("loss on {} images after each epoch, nats", 1),
    "train/loss": ("training loss, nats", 1),
    "train/lr": ("learning rate", 1),
}


@dataclass(frozen=True)
class Chart:
    """A figure of the page."""

    id: str
    title: str
    height: int
    # Its numbers, for those who do not see it.
    table: Table | None


@dataclass
class Charts:
    """The figures so far: their Vega-Lite specifications, by id."""

    specs: dict[str, Any] = field(default_factory=dict)

    def add(self, title: str, chart: Any, table: Table | None = None) -> Chart:
        """Take in an Altair chart."""
        number = f"chart-{len(self.specs) + 1}"
        self.specs[number] = chart.to_dict()
        # With axes and legend.
        return Chart(number, title, self.specs[number]["height"] + 60, table)


def page(
    title: str, folder: Path, runs: list[RunFiles], sections: list[Section], unfinished: list[str]
) -> str:
    """The page of all `runs` below `folder`, the finished ones of them in `sections`."""
    charts = Charts()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    # What a name may hold must not reach a terminal or the page's layout.
    environment.finalize = lambda value: printable(value) if type(value) is str else value
    described = [_section(section, charts) for section in sections]
    return environment.get_template("page.html").render(
        title=title,
        facts=_facts(runs),
        sections=described,
        legend=LEGEND,
        unfinished=unfinished,
        runs=[_run(run, folder) for run in runs],
        style=_text("page.css"),
        script=_text("page.js"),
        vega=vega(),
        charts=json.dumps(charts.specs, allow_nan=False).replace("<", "\\u003c"),
    )


def _text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


@cache
def vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script, of the version that Altair writes for."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle(vl_version="6.4")  # type: ignore[call-arg]
    return bundle


def _facts(runs: list[RunFiles]) -> str:
    """What the runs are, in a line."""
    finished = sum(run.finished for run in runs)
    hours = sum(run.minutes or 0 for run in runs) / 60
    data = sorted({run.setting.dataset for run in runs})
    versions = sorted(
        {
            f"{name} {run.config['versions'].get(name)}"
            for run in runs
            for name in ("torch", "timm", "cifar_accel")
            if name in run.config.get("versions", {})
        }
    )
    counts = f"{finished} of {len(runs)} runs finished, {hours:.1f} hours of training"
    return "; ".join([counts, ", ".join(data), *versions])


# ---- a section


def _section(section: Section, charts: Charts) -> dict[str, Any]:
    """What the template is given of a section."""
    everything = [said for entry in section.entries for said in entry.candidate.tested.values()]
    alike = always_taken_for_one(everything) if _on_the_same_images(everything) else []
    # Runs of an earlier version leave out where they err.
    lines = checks(section)
    without = sum(len(entry.group.runs) for entry in section.entries) - len(everything)
    if without:
        lines.append(f"{without} runs have no predictions: cifar-accel evaluate RUN writes them")
    shown = section.entries[:MOST_SETTINGS]
    best = section.best.group
    return {
        "title": title_of(section),
        "verdict": verdict_lines(section),
        "checks": lines,
        "common": _common(section),
        "settings": section_table(section),
        "charts": [*_comparing(section, charts), *_calibration(shown, charts)],
        "errors": [part for entry in shown if (part := _errors(entry, charts))],
        "images": "test image" if best.options["tested_on"] == "test" else "training image",
        "alike": _pictured(best.runs[0], alike[:PICTURES]),
        "alike_count": f"{len(alike):,}",
    }


def _predictions(entry: Entry) -> list[tuple[RunFiles, Predictions]]:
    """The setting's runs that have left predictions of the images that count, with their logits."""
    found = []
    for run in entry.group.runs:
        # What is amiss with a file is among the notes.
        said, _ = said_by(run)
        if said is not None:
            found.append((run, said))
    return found


def _on_the_same_images(predictions: Sequence[Predictions]) -> bool:
    """Whether there are several, all of the same images."""
    return len(predictions) > 1 and len({said.identity for said in predictions}) == 1


def _common(section: Section) -> str:
    """The options in which all settings agree and that someone gave, in a line."""
    groups = [entry.group for entry in section.entries]
    given = sorted({name for group in groups for run in group.runs for name in run.flags})
    words = []
    for name in ["recipe", "epochs", "image_size", "batch_size", *given]:
        values = {json.dumps(group.options.get(name)) for group in groups}
        if len(values) == 1 and name not in VOLATILE | {"seed", "dataset"}:
            words.append(f"{flag(name)} {in_words(groups[0].options.get(name))}")
    return "In all of them: " + ", ".join(dict.fromkeys(words))


def _comparing(section: Section, charts: Charts) -> list[Chart]:
    """Intervals, differences, curves and cost of the settings."""
    spread = [_spread(entry) for entry in section.entries]
    title = "Accuracy of each seed, mean and 95 % interval"
    made = [charts.add(title, draw.intervals(spread))]

    differences = [
        {
            "name": printable(entry.name),
            "difference": round(100 * entry.comparison.difference, 3),
            "low": round(100 * entry.comparison.interval.low, 3),
            "high": round(100 * entry.comparison.interval.high, 3),
        }
        for entry in section.entries
        if entry.comparison and entry.comparison.interval and not entry.comparison.single
    ]
    if differences:
        title = f"Difference to the best; within the band, {100 * MARGIN:g} points, it is too small"
        made.append(charts.add(title, draw.differences(differences, 100 * MARGIN)))

    fractions = [entry.group.options["validation_fraction"] for entry in section.entries]
    kinds = sorted({"held-out" if fraction else "test" for fraction in fractions})
    for key, (pattern, scale) in CURVES.items():
        label = pattern.format(" or ".join(kinds))
        curves = {
            printable(entry.name): draw.binned(entry.group.runs, key, scale)
            for entry in section.entries
        }
        drawn = {name: rows for name, rows in curves.items() if rows}
        if drawn:
            title = f"{label[0].upper()}{label[1:]}: mean, and from the least to the largest seed"
            made.append(charts.add(title, draw.curves(drawn, label)))

    cost = [
        {
            "name": printable(entry.name),
            "minutes": round(run.minutes, 2),
            "accuracy": round(100 * run.summary["accuracy"], 3),
            "seed": run.options["seed"],
        }
        for entry in section.entries
        for run in entry.group.runs
        if run.minutes
    ]
    if cost:
        made.append(charts.add("Accuracy and time, a point a run", draw.cost(cost)))
    return made


def _spread(entry: Entry) -> dict[str, Any]:
    """A row of `charts.intervals`."""
    values = [100 * accuracy for accuracy in entry.group.accuracies]
    mean = float(np.mean(values))
    half = 100 * (half_width(entry) or 0)
    return {
        "name": printable(entry.name),
        "mean": round(mean, 3),
        "low": round(mean - half, 3),
        "high": round(mean + half, 3),
        "values": [round(value, 3) for value in values],
    }


def _calibration(shown: list[Entry], charts: Charts) -> list[Chart]:
    """How far the settings' probabilities can be believed; of runs that have logits."""
    by_setting = {}
    rows = []
    for entry in shown:
        read = _predictions(entry)
        with_logits = [(run, said) for run, said in read if said.logits is not None]
        if not with_logits:
            continue
        binned = [reliability(confidence(said), said.correct) for _, said in with_logits]
        by_setting[printable(entry.name)] = binned[0]
        error = 100 * float(np.mean([calibration_error(bins) for bins in binned]))
        rows.append([entry.name, f"{error:.2f}", *_mended(with_logits)])
    if not by_setting:
        return []
    head = ["setting", "ECE, %", "temperature", "ECE with it, %"]
    chart = draw.reliability_chart(by_setting)
    title = "Accuracy over confidence, of each setting's first seed"
    return [charts.add(title, chart, Table("Calibration", head, rows))]


def _mended(with_logits: list[tuple[RunFiles, Predictions]]) -> list[str]:
    """The temperature that held-out images ask for, and the calibration error with it."""
    found = []
    for run, said in with_logits:
        held_out = read_predictions(run.path).get("held-out")
        # Not of the images by which the run is judged.
        if held_out and held_out.logits is not None and held_out.identity != said.identity:
            divisor = temperature(held_out)
            bins = reliability(confidence(said, divisor), said.correct)
            found.append((divisor, calibration_error(bins)))
    if not found:
        has_held_out = with_logits[0][0].options["validation_fraction"]
        return ["no other held-out images" if has_held_out else "needs --validation-fraction", NONE]
    divisor, error = np.mean(found, axis=0)
    direction = "overconfident" if divisor > 1 else "underconfident"
    return [f"{divisor:.2f} ({direction})", f"{100 * error:.2f}"]


# ---- where a setting errs


def _errors(entry: Entry, charts: Charts) -> dict[str, Any]:
    """What the template is given of a setting's mistakes; nothing where none are known."""
    of_runs = _predictions(entry)
    if not of_runs:
        return {}
    predictions = [said for _, said in of_runs]
    if not _on_the_same_images(predictions):
        # Each seed has test images of its own: one stands for all.
        predictions = predictions[:1]
    classes = predictions[0].classes
    pairs = [
        [pair.true, pair.taken_for, f"{pair.images:.1f}", f"{pair.share:.0%}"]
        for pair in most_confused(predictions, PAIRS)
    ]
    tables = [
        Table("Confused most often", ["class", "taken for", "images", "of the class"], pairs),
        _by_class(predictions),
    ]
    made = []
    above = superclass_of(classes)
    if above:
        shares = between_superclasses(predictions, above)
        chart = draw.superclass_map(shares, sorted(set(above)))
        made.append(charts.add("Super-classes: what their images are taken for, in %", chart))
    return {
        "name": entry.name,
        "charts": made,
        "tables": tables,
        "mistakes": _pictured(of_runs[0][0], confident_mistakes(predictions[0], PICTURES)),
    }


def _by_class(predictions: list[Predictions]) -> Table:
    """Accuracy of each class with its interval, the lowest first."""
    shares, images = accuracy_by_class(predictions)
    rows = []
    for c in np.argsort(shares, kind="stable"):
        if images[c]:
            low, high = wilson(round(shares[c] * images[c]), int(images[c]))
            between = f"{low:.0%} to {high:.0%}"
            rows.append([predictions[0].classes[c], f"{shares[c]:.1%}", between, str(images[c])])
    return Table("By class", ["class", "accuracy", "95 % interval", "images"], rows)


def _pictured(run: RunFiles, mistakes: list[Mistake]) -> list[dict[str, Any]]:
    """Mistakes with their pictures, where the decoded images are on this machine."""
    options = run.options
    kind = "test" if options["tested_on"] == "test" else "train"
    images = None
    # A home folder may be one that this machine does not know.
    with suppress(BadInput):
        images = decoded_images(
            str(options["data_dir"]),
            str(options.get("data_fingerprint")),
            options.get("stored_size"),
            kind,
        )
    shown = []
    for mistake in mistakes:
        picture = ""
        if images is not None and mistake.place < len(images):
            picture = _webp(images[mistake.place])
        sure = "" if mistake.probability is None else f", {mistake.probability:.0%} sure"
        shown.append(asdict(mistake) | {"picture": picture, "sure": sure})
    return shown


def _webp(pixels: Any) -> str:
    """An image uint8 [3, H, W] as WebP, no larger than its place on the page; in base 64."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.thumbnail((2 * PICTURE_SIDE, 2 * PICTURE_SIDE))
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=85)
    return base64.b64encode(encoded.getvalue()).decode()


# ---- a run


def _run(run: RunFiles, folder: Path) -> dict[str, Any]:
    """What the template is given of a run."""
    parts = run.path.relative_to(folder).parts
    # A report of one run's own folder has no name for it but the folder's.
    name = "/".join(parts) or run.path.name
    # As bytes, since the name of a folder need not be UTF-8.
    base = "".join(f"{quote(os.fsencode(part))}/" for part in parts)
    names = ("config.json", "summary.json", "metrics.jsonl", "loss.png", "accuracy.png", "lr.png")
    files = [{"name": n, "href": Markup(f"{base}{n}")} for n in names if (run.path / n).exists()]
    result = run.became
    if run.finished:
        result = f"{run.summary['accuracy']:.2%}, seed {run.options['seed']}"
    given = [[flag(name), in_words(run.options.get(name))] for name in sorted(run.flags)]
    # The first word is the program's path on the machine that trained.
    command = shlex.join(["python", "-m", "cifar_accel", *run.command[1:]])
    table = Table("Given by flag", ["option", "value"], given)
    return {"name": name, "result": result, "command": command, "files": files, "table": table}
