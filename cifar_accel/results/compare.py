"""`cifar-accel compare`: what runs of two settings say of their difference, and what they do not.

A and B are the two settings; a difference is B - A. Accuracies are shares of 1 in here and in the
JSON, and percent in the words.
"""

import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cifar_accel.errors import BadInput
from cifar_accel.files import home
from cifar_accel.options.options import CompareArguments
from cifar_accel.records.predictions import FILE as PREDICTIONS
from cifar_accel.results.comparison import (
    Candidate,
    Comparison,
    against,
    candidate,
    candidates_of,
    compare_two,
    conclude,
    short,
)
from cifar_accel.results.groups import Group, group_by_seed
from cifar_accel.results.runs import RunFiles, find_runs, lost_runs
from cifar_accel.results.statistics import ALPHA, Interval

# Options in which A and B differ that are told.
MOST_TOLD = 5
# Columns of a line's name, and the narrowest text beside it.
INDENT = 14
NARROWEST = 26


def compare(args: CompareArguments) -> str:
    """The comparisons in words for a terminal, or as JSON.

    Raises BadInput where there is nothing to compare, or where A and B cannot be compared.
    """
    # What of all runs below the folders can be compared.
    if args.b is None:
        candidates, notes = _below(home(args.a))
        baseline = _baseline(candidates, args.baseline, home(args.a))
        compared, others = against(baseline, candidates, args.margin / 100)
        if not compared:
            raise BadInput(others[0].removeprefix("not compared: "))
        comparisons = conclude(compared)
        notes += others
    else:
        if args.baseline is not None:
            raise BadInput(f"--baseline {args.baseline}: has no effect, for A is {args.a}; omit it")
        a, b, notes = _two(home(args.a), home(args.b))
        comparisons = conclude([compare_two(a, b, args.margin / 100)])

    # Shares of 1 for programs; null stands for what cannot be had.
    if args.json:
        shown: list[dict[str, Any]] = [
            {**asdict(each), "ahead": each.ahead} for each in comparisons
        ]
        # Of two settings there is one comparison, which is the whole.
        whole = {"comparisons": shown} if args.b is None else shown[0]
        return json.dumps({**whole, "notes": notes}, indent=2, allow_nan=False)
    width = shutil.get_terminal_size().columns
    return in_lines(comparisons, notes, width)


# ---- what is compared


def _finished(folder: Path) -> tuple[list[RunFiles], list[str]]:
    """The finished runs at or below `folder`, and a line for each of the others.

    Raises BadInput where there is no finished one.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    runs = find_runs(folder)
    # A folder with metrics and without a config.json that can be read is no run any longer.
    notes = [f"not finished: {run.path}: {run.became}" for run in runs if not run.finished]
    lost = lost_runs(folder, runs)
    notes += [f"passed over: {path}: no config.json of a run" for path in lost]
    finished = [run for run in runs if run.finished]
    if not finished:
        found = "; ".join(notes[:3]) or "no run folder (with config.json) at or below it"
        more = f"; and {len(notes) - 3} more" if len(notes) > 3 else ""
        raise BadInput(f"{folder}: has no finished run to compare: {found}{more}")
    return finished, notes


def _below(folder: Path) -> tuple[list[Candidate], list[str]]:
    """The settings below `folder` by path, and lines on what is passed over."""
    runs, notes = _finished(folder)
    groups = group_by_seed(runs)
    if len(groups) == 1:
        raise BadInput(
            f"{folder}: all runs are of one setting, {groups[0].name}; name a second folder"
        )
    candidates = candidates_of(groups)
    return candidates, [*notes, *(note for each in candidates for note in each.notes)]


def _two(folder_a: Path, folder_b: Path) -> tuple[Candidate, Candidate, list[str]]:
    """The settings of two folders, and lines on what is passed over."""
    (group_a, notes), (group_b, more) = _one_setting(folder_a), _one_setting(folder_b)
    # Together they get names that say in what they differ.
    names = [group.name for group in group_by_seed([*group_a.runs, *group_b.runs])]
    if len(set(names)) < 2:
        names = [f"{group_a.name} in {folder_a}", f"{group_b.name} in {folder_b}"]
    notes += [note for note in more if note not in notes]
    a, b = candidate(names[0], group_a), candidate(names[1], group_b)
    return a, b, [*notes, *a.notes, *b.notes]


def _one_setting(folder: Path) -> tuple[Group, list[str]]:
    runs, notes = _finished(folder)
    groups = group_by_seed(runs)
    if len(groups) > 1:
        names = "; ".join(group.name for group in groups[:MOST_TOLD])
        more = f"; and {len(groups) - MOST_TOLD} more" if len(groups) > MOST_TOLD else ""
        raise BadInput(
            f"{folder}: has runs of {len(groups)} settings ({names}{more}); name a folder of one, "
            "or this folder alone to compare all with a baseline"
        )
    return groups[0], notes


def _baseline(candidates: list[Candidate], name: str | None, folder: Path) -> Candidate:
    """The setting that the others are compared with: the first by path, or the one of `name`.

    `name` is a folder, from here or within `folder`, or a part of a setting's name.
    """
    if name is None:
        return candidates[0]
    places = {home(name).resolve(), (folder / name).resolve()}
    in_folder = [each for each in candidates if places & _folders_of(each.group)]
    of_name = [each for each in candidates if name.lower() in each.name.lower()]
    exact = [each for each in candidates if name == each.name]
    chosen = exact or in_folder or of_name
    if len(chosen) != 1:
        known = "; ".join(each.name for each in chosen or candidates)
        found = f"{len(chosen)} settings are" if chosen else "no setting is"
        raise BadInput(f"--baseline {name}: {found} called so or in that folder; there are {known}")
    return chosen[0]


def _folders_of(group: Group) -> set[Path]:
    """The folders of a setting's runs and all above them."""
    paths = [run.path.resolve() for run in group.runs + group.repeats]
    return {folder for path in paths for folder in (path, *path.parents)}


# ---- words


def in_lines(comparisons: list[Comparison], notes: list[str], width: int) -> str:
    """The comparisons as text of `width` columns, and the `notes` below."""
    several = len(comparisons) > 1
    parts = []
    if several:
        head = (
            f"{len(comparisons)} comparisons with one baseline, A. Better and tentatively hold for "
            "all together (p by Holm); each interval, same and new images for itself."
        )
        parts.append(_paragraph("", head, width, 0))
    for each in comparisons:
        lines = _head_lines(each) + _figures_lines(each)
        parts.append("\n".join(_paragraph(*line, width) for line in lines if line[1]))
    # What else lies below the folders.
    if notes:
        parts.append("\n".join(_paragraph("", note, width, 2) for note in notes))
    return "\n\n".join(parts)


def _paragraph(label: str, text: str, width: int, indent: int = INDENT) -> str:
    """`text` beside its `label`, filled; what a no-break space joins stays in one line."""
    filled = textwrap.fill(
        text,
        max(width, INDENT + NARROWEST),
        initial_indent=label.ljust(INDENT) if label else "",
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )
    return filled.replace("\xa0", " ")


def _head_lines(each: Comparison) -> list[tuple[str, str]]:
    """What is compared: of any comparison."""
    images = f"{each.images:,} " if each.images else ""
    # A few options tell two settings apart; many are another recipe.
    told = list(each.differ_in.items())[:MOST_TOLD]
    differ = [f"{name} {short(a)} / {short(b)}" for name, (a, b) in told]
    if len(each.differ_in) > MOST_TOLD:
        differ.append(f"and {len(each.differ_in) - MOST_TOLD} more")
    return [
        ("A", each.a.name),
        ("B", each.b.name),
        ("differ in", ", ".join(differ) or "no option"),
        ("data", f"{each.dataset}, {images}{each.tested_on} images, at the end of each run"),
        ("seeds", _seeds(each)),
    ]


def _seeds(each: Comparison) -> str:
    """Which seeds are compared, and which runs are not."""
    if each.a.seeds == each.b.seeds:
        parts = [f"{_numbers(each.a.seeds)} in both"]
    else:
        parts = [f"A {_numbers(each.a.seeds)}, B {_numbers(each.b.seeds)}"]
    for letter, side in (("A", each.a), ("B", each.b)):
        if side.left_out:
            parts.append(f"left out: {_numbers(side.left_out)}, only in {letter}")
        if side.repeats:
            parts.append(f"{side.repeats} of {letter} passed over: repeats of a seed")
    return "; ".join(parts)


def _figures_lines(each: Comparison) -> list[tuple[str, str]]:
    """What was found; a line without a text is none."""
    models = ""
    if each.single:
        models = "what is said is of these two trained models, nothing of the settings"

    # How small p can become is told where that is near 5 %.
    exact = ""
    if each.sign_flips is not None:
        lowest = 2 / 2**each.pairs
        exact = f"sign flips {_p(each.sign_flips)}"
        if lowest > 0.01:
            exact += f" ({each.pairs} pairs cannot go below {lowest:.2g})"

    new_images = ""
    if each.new_images is not None:
        interval = _interval(each.new_images)
        new_images = f"{_points(each.difference)} {interval}, over images and seeds"
    elif each.no_new_images:
        new_images = f"not known: {each.no_new_images}"

    could_see = ""
    if each.could_see is not None:
        could_see = f"differences from {100 * each.could_see:.2f} pp on, four times in five"
        needed = f"{each.seeds_for_margin}" if each.seeds_for_margin else "more than 1,000"
        if each.margin:
            could_see += f"; {100 * each.margin:g} pp takes {needed} seeds each"
    return [
        ("accuracy", _accuracies(each)),
        ("B - A", _difference(each)),
        ("one run each", models),
        ("exact check", exact),
        ("new images", new_images),
        ("verdict", _conclusion(each)),
        ("could see", could_see),
    ]


def _accuracies(each: Comparison) -> str:
    """Both accuracies, each with its interval and what that is."""
    parts = []
    kinds = []
    for letter, side in (("A", each.a), ("B", each.b)):
        text = f"{letter}\xa0{100 * side.accuracy:.2f}\xa0%"
        if side.n == 1 and side.interval:
            low, high = side.interval
            text += f"\xa0[{100 * low:.2f},\xa0{100 * high:.2f}]"
            kinds.append("95 % interval over images (Wilson)")
        elif side.interval:
            half = side.interval.high - side.accuracy
            text += f"\xa0±\xa0{100 * half:.2f}"
            kinds.append("mean ± half-width of its 95 % interval (t)")
        if side.deviation is not None:
            text += f" (SD {100 * side.deviation:.2f}, n = {side.n})".replace(" ", "\xa0")
        parts.append(text)
    # Each kind once.
    return "; ".join([", ".join(parts), *dict.fromkeys(kinds)])


def _difference(each: Comparison) -> str:
    """The difference with its test, and what else is known of pairs."""
    parts = [_points(each.difference)]
    if each.interval is not None:
        parts[0] += f" {_interval(each.interval)}"
    elif each.test is not None:
        parts.append("no interval without a spread")
    if each.a_alone is not None:
        parts.append(f"A right, B wrong {each.a_alone:,}; A wrong, B right {each.b_alone:,}")
    if each.p is not None:
        exact = " exact" if each.test == "McNemar" else ""
        parts.append(f"{each.test}{exact}, {_p(each.p)}")
        if each.p_holm != each.p and each.p_holm is not None:
            parts.append(f"by Holm {_p(each.p_holm)}")
    elif each.test is None and each.single:
        parts.append(f"McNemar needs {PREDICTIONS} of both; cifar-accel evaluate RUN writes it")
    if each.pairs:
        parts.append(f"B ahead in {each.b_ahead_in} of {each.pairs}")
    if each.correlation is not None:
        parts.append(f"r\xa0=\xa0{each.correlation:.2f}")
    if each.welch_interval is not None:
        parts.append(f"Welch {_interval(each.welch_interval)}")
    return ", ".join(parts)


def _conclusion(each: Comparison) -> str:
    """The verdict in words."""
    leader = (each.ahead or "").upper()
    where = "on this test set" if each.tested_on == "test" else "on these held-out images"
    if each.single:
        text = "cannot tell these two models apart"
        if each.p_holm is not None and each.p_holm < ALPHA:
            text = f"cannot tell the settings apart; of these two models {leader} is better {where}"
        return f"{text}; train several seeds of each to compare the settings"
    if each.verdict == "cannot tell":
        return f"cannot tell: {each.reason}"
    if each.verdict == "same":
        text = f"same: within {100 * each.margin:g} pp {where}"
        if each.interval is None:
            text = f"same: equal {where}, seed by seed"
    else:
        text = f"{each.verdict}: {leader} is better {where}"
    if each.reason:
        text += f" ({each.reason})"
    if each.holds_for_new_images is None:
        return text
    return f"{text}. For new images: {'too' if each.holds_for_new_images else 'cannot tell'}"


def _points(share: float) -> str:
    return f"{100 * share:+z.2f}\xa0pp"


def _interval(interval: Interval) -> str:
    return f"[{100 * interval.low:+z.2f},\xa0{100 * interval.high:+z.2f}]"


def _p(p: float) -> str:
    return "p\xa0<\xa00.001" if p < 0.001 else f"p\xa0=\xa0{p:.3f}"


def _numbers(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
