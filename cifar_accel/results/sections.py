"""What the report says of settings that can be compared: in which order they stand, and how surely.

Settings can be compared where they were judged by the same images. Each is compared with the best
of them, as `cifar-accel compare` does it. The best is chosen by the same figures, which is as much
as to look at all pairs, so p values are adjusted for these.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_type_hints

from cifar_accel.console import printable
from cifar_accel.options.options import PositiveShare, Share, ShareBelowOne, TrainingArguments
from cifar_accel.results.comparison import (
    Candidate,
    Comparison,
    against,
    candidates_of,
    conclude,
    judged_by,
)
from cifar_accel.results.groups import Group
from cifar_accel.results.runs import COMPARED
from cifar_accel.results.statistics import LEAST_RUNS, games_howell, holm, mean_interval, welch_test

# Settings that differ by less than this share are the same for all that matters.
MARGIN = 0.005
# Names in a sentence.
MOST_NAMED = 4
# Too few values of an option for the best to lie at their edge.
FEWEST_VALUES = 3
# Options of which there is no more than 1.
SHARES = {
    name
    for name, kind in get_type_hints(TrainingArguments, include_extras=True).items()
    if kind in (Share, ShareBelowOne, PositiveShare)
}

# How a setting stands to the best one, by the verdict on the two.
STANDING = {"better": "below", "tentatively": "below?", "same": "= best", "cannot tell": "≈ best"}


@dataclass(frozen=True)
class Entry:
    """A setting and how it stands."""

    candidate: Candidate
    # What tells it from the other settings of the section.
    name: str
    # With the best as A; None for the best itself, and where they cannot be compared.
    comparison: Comparison | None
    # One of STANDING, "best", or "" where they are not compared.
    standing: str

    @property
    def group(self) -> Group:
        """The runs of the setting."""
        return self.candidate.group


@dataclass(frozen=True)
class Section:
    """Settings that were judged by the same images, the best first."""

    entries: list[Entry]
    # Why a setting is not compared.
    notes: list[str]

    @property
    def best(self) -> Entry:
        """The setting of the highest mean accuracy."""
        return self.entries[0]

    @property
    def images(self) -> str:
        """What the accuracies are of, in words."""
        options = self.best.group.options
        kind = options["tested_on"]
        counts = {run.summary.get("evaluated_images") for run in self.best.group.runs}
        count = next(iter(counts)) if len(counts) == 1 else None
        return f"{count:,} {kind} images" if count else f"{kind} images"


def sections_of(groups: Sequence[Group]) -> list[Section]:
    """Sections of settings that can be compared; the one with the most runs first."""
    by_images: dict[str, list[Group]] = {}
    for group in groups:
        by_images.setdefault(json.dumps(judged_by(group.options)), []).append(group)
    sections = [_section(members) for members in by_images.values()]
    return sorted(sections, key=lambda section: -sum(len(e.group.runs) for e in section.entries))


def _section(groups: list[Group]) -> Section:
    candidates = candidates_of(groups)
    candidates.sort(key=lambda candidate: -statistics.mean(candidate.group.accuracies))
    best = candidates[0]
    compared, refused = against(best, candidates, MARGIN)
    notes = [*(note for each in candidates for note in each.notes), *refused]
    concluded = conclude(compared, _adjusted(compared, candidates))
    comparisons = {each.b.name: _of_the_best(each) for each in concluded}
    entries = []
    names = _short_names(candidates)
    for candidate, name in zip(candidates, names, strict=True):
        comparison = comparisons.get(candidate.name)
        standing = STANDING[comparison.verdict] if comparison else ""
        standing = "best" if candidate is best else standing
        entries.append(Entry(candidate, name, comparison, standing))
    return Section(entries, notes)


def _of_the_best(comparison: Comparison) -> Comparison:
    """The comparison without a verdict for the other one."""
    if comparison.ahead != "b" or comparison.verdict not in ("better", "tentatively"):
        return comparison
    return replace(comparison, verdict="cannot tell", reason="ahead over the seeds of both")


def _adjusted(compared: list[Comparison], candidates: list[Candidate]) -> list[float]:
    """p of the comparisons with the best that have one, as of all pairs of the candidates.

    The smaller of two valid ones, and so doubled: Holm's over as many tests as there are pairs of
    settings, and Games and Howell's of the same runs.
    """
    tested = [each for each in compared if each.p is not None]
    own = [each.p for each in tested if each.p is not None]
    pairs = math.comb(len(candidates), 2)
    if pairs == 1:
        return own
    by_name = {each.name: each for each in candidates}

    def by_range(each: Comparison) -> float:
        # Single models have no spread over seeds.
        if each.single:
            return 1.0
        values = [by_name[side.name].accuracies(side.seeds) for side in (each.a, each.b)]
        return games_howell(welch_test(*values), len(candidates))

    by_holm = holm(own, pairs)
    return [min(1.0, 2 * min(p, by_range(each))) for each, p in zip(tested, by_holm, strict=True)]


def _short_names(candidates: list[Candidate]) -> list[str]:
    """The settings' names without what is in all of them, where that is enough to tell them."""
    parts = []
    for candidate in candidates:
        setting = candidate.group.setting
        label = candidate.group.label
        words = [setting.model, setting.optimizer, setting.scheduler]
        parts.append([*words, *(label.split(", ") if label else [])])
    common = set.intersection(*map(set, parts))
    names = [", ".join(part for part in of_one if part not in common) for of_one in parts]
    whole = [candidate.name for candidate in candidates]
    return names if all(names) and len(set(names)) == len(names) else whole


# ---- in words


def title_of(section: Section) -> str:
    """The data set and the images that the section is of."""
    return f"{printable(section.best.group.setting.dataset)}, {section.images}"


def verdict_lines(section: Section) -> list[str]:
    """What the section's figures say, the most important first."""
    best = section.best
    figures = accuracy_in_words(best)
    if len(section.entries) == 1:
        return [f"{best.name}: {figures} on {section.images}."]
    lines = [f"Highest of {len(section.entries)} settings: {best.name}, {figures}."]
    if all(len(entry.group.runs) == 1 for entry in section.entries):
        lines.append(
            "With one run each nothing is said of the settings; repeat them with other seeds."
        )
        return lines
    if all(entry.comparison is None for entry in section.entries):
        lines.append("No other can be compared with it; the notes say why.")
    for verdict, words in (
        ("better", "It is better than"),
        ("tentatively", "Tentatively it is better than"),
        ("same", f"The same within {100 * MARGIN:g} points:"),
        ("cannot tell", "Cannot be told from it:"),
    ):
        found = [
            entry
            for entry in section.entries
            if entry.comparison and entry.comparison.verdict == verdict
        ]
        if found:
            named = "; ".join(f"{each.name} ({to_the_best(each)})" for each in found[:MOST_NAMED])
            more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
            lines.append(f"{words} {named}{more}.")
    return lines


def to_the_best(entry: Entry) -> str:
    """The difference to the best in points, and its interval over seeds; "" without one."""
    comparison = entry.comparison
    if comparison is None:
        return ""
    points = f"{100 * comparison.difference:+.2f}"
    # That of two single models is over images, and says nothing of the settings.
    if comparison.interval and not comparison.single:
        low, high = (f"{100 * bound:+.2f}" for bound in comparison.interval)
        points += f" [{low}, {high}]"
    return points


def accuracy_in_words(entry: Entry) -> str:
    """Mean accuracy, the half-width of its 95 % interval, and n."""
    accuracies = entry.group.accuracies
    text = f"{100 * statistics.mean(accuracies):.2f} %"
    n = len(accuracies)
    half = half_width(entry)
    if half is not None:
        return f"{text} ± {100 * half:.2f} (n = {n})"
    return f"{text} (n = {n})"


def half_width(entry: Entry) -> float | None:
    """Half of the 95 % interval of the mean over seeds; None for one run or without a spread."""
    interval = mean_interval(entry.candidate.accuracies(entry.group.seeds))
    return (interval.high - interval.low) / 2 if interval else None


def checks(section: Section) -> list[str]:
    """What a reader should know before the verdict is believed: one line each, where amiss."""
    groups = [entry.group for entry in section.entries]
    runs = [run for group in groups for run in group.runs]
    repeats = sum(len(group.repeats) for group in groups)
    lines = list(section.notes)
    if repeats:
        lines.append(f"repeats of a seed, which are no evidence: {repeats}; the newest counts")
    if len(groups) == 1:
        return lines
    few = [entry.name for entry in section.entries if len(entry.group.runs) < LEAST_RUNS]
    if few:
        which = "all settings" if len(few) == len(groups) else _some(few)
        lines.append(f"fewer than {LEAST_RUNS} seeds: {which}")
    if len({tuple(group.seeds) for group in groups}) > 1:
        lines.append("the settings have different seeds; where two share three, these are compared")
    starts = [start for run in runs for start in (run.config, *run.config.get("resumed", []))]
    machines = {json.dumps(start.get("hardware"), sort_keys=True) for start in starts}
    if len(machines) > 1:
        lines.append("the runs are of different machines or threads: compare no times")
    lines += [line for name in COMPARED if (line := _at_the_edge(section, name))]
    lines.append("the best is chosen by the images that it is judged by: its figure is too good")
    return lines


def _at_the_edge(section: Section, name: str) -> str:
    """A line where the best setting has the least or largest value of an option that was varied."""
    # What follows from other options was not varied by anybody.
    if section.best.group.runs[0].config.get("provenance", {}).get(name) == "derived":
        return ""
    values = [entry.group.options.get(name) for entry in section.entries]
    numbers = sorted({v for v in values if isinstance(v, int | float) and not isinstance(v, bool)})
    if len(numbers) < FEWEST_VALUES or values[0] not in (numbers[0], numbers[-1]):
        return ""
    # Beyond nothing, and beyond the whole, there is nothing to try.
    if values[0] == 0 or (values[0] == 1 and name in SHARES):
        return ""
    side = "least" if values[0] == numbers[0] else "largest"
    return f"the best has the {side} {name} that was tried, {values[0]}: try beyond it"


def _some(names: list[str]) -> str:
    """Some names, and how many more."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return "; ".join(names[:MOST_NAMED]) + more
