"""Two settings compared: what their runs say of the difference, and what may be concluded.

A and B are the two settings; a difference is B - A. Accuracies are shares of 1. The methods are in
`statistics.py`, the words in `compare.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cifar_accel.errors import BadInput
from cifar_accel.options.options import in_words
from cifar_accel.records.predictions import FILE as PREDICTIONS
from cifar_accel.records.predictions import Predictions
from cifar_accel.results.groups import Group
from cifar_accel.results.runs import COMPARED, said_by
from cifar_accel.results.statistics import (
    ALPHA,
    LEAST_RUNS,
    LEAST_RUNS_FOR_BETTER,
    Interval,
    TTest,
    Verdict,
    correlation,
    detectable,
    deviation,
    flips_interval,
    holm,
    mcnemar,
    mean_interval,
    new_images_interval,
    paired_test,
    seeds_needed,
    sign_flips,
    verdict,
    welch_test,
    wilson,
)

# Characters of an option's value in a line.
LONGEST_VALUE = 40


@dataclass(frozen=True)
class Candidate:
    """A setting that may be compared."""

    name: str
    group: Group
    # By seed, without logits; a run without predictions has none.
    tested: dict[int, Predictions]
    # A line for each run whose predictions cannot be used.
    notes: list[str]

    def accuracies(self, seeds: list[int]) -> NDArray[np.float64]:
        """Accuracies of these seeds' runs, float64 [n]."""
        by_seed = dict(zip(self.group.seeds, self.group.accuracies, strict=True))
        return np.array([by_seed[seed] for seed in seeds])


@dataclass(frozen=True)
class Side:
    """One of two settings, over its runs that are compared."""

    name: str
    n: int
    accuracy: float
    # By t over seeds, or by Wilson over the images of a single run; None where it is not known.
    interval: Interval | None
    # Standard deviation over seeds; None for a single run.
    deviation: float | None
    seeds: list[int]
    # Seeds that the other setting does not have.
    left_out: list[int]
    # Further runs of these seeds, which are no evidence.
    repeats: int


@dataclass(frozen=True)
class Comparison:
    """All that is said of two settings. The fields are the keys of the JSON."""

    a: Side
    b: Side
    # Options in which they differ, with the values of A and B.
    differ_in: dict[str, list[Any]]
    dataset: str
    # "test" or "held-out" images, and their number where it is known.
    tested_on: str
    images: int | None
    # None where no test is sound.
    test: Literal["paired t", "Welch", "McNemar"] | None
    # Seeds that both have; 0 where the test is not over pairs of seeds.
    pairs: int
    difference: float
    interval: Interval | None = None
    p: float | None = None
    # `p` as one of several comparisons: by Holm; in a report as `sections.py` has it.
    p_holm: float | None = None
    # p of the sign flips; the seeds in which B is ahead; Pearson's r; Welch's interval: of pairs.
    sign_flips: float | None = None
    b_ahead_in: int | None = None
    correlation: float | None = None
    welch_interval: Interval | None = None
    # Images that only one of two models gets right.
    a_alone: int | None = None
    b_alone: int | None = None
    # The interval of the difference for other images, or why there is none.
    new_images: Interval | None = None
    no_new_images: str | None = None
    # Whether the verdict is that of new images too; None where there is none for them.
    holds_for_new_images: bool | None = None
    # The difference that is found four times in five, and the seeds it takes to find the margin.
    could_see: float | None = None
    margin: float = 0.0
    seeds_for_margin: int | None = None
    verdict: Verdict = "cannot tell"
    # Why the verdict is no clearer; "" for "better" and "same".
    reason: str = ""

    @property
    def ahead(self) -> Literal["a", "b"] | None:
        """Which has the higher accuracy, whatever the verdict."""
        if self.difference == 0:
            return None
        return "b" if self.difference > 0 else "a"

    @property
    def single(self) -> bool:
        """Whether it is of two models, one run each."""
        return self.a.n == self.b.n == 1


def candidates_of(groups: Sequence[Group]) -> list[Candidate]:
    """Settings that may be compared, in the order of `groups`; no two have one name."""
    names = [group.name for group in groups]
    candidates = []
    for group in groups:
        # Names say nothing of the data.
        unclear = names.count(group.name) > 1
        name = f"{group.name} in {group.runs[0].path}" if unclear else group.name
        candidates.append(candidate(name, group))
    return candidates


def candidate(name: str, group: Group) -> Candidate:
    """A setting with the predictions of its runs."""
    tested = {}
    notes = []
    for run in group.runs:
        said, amiss = said_by(run, with_logits=False)
        if amiss:
            notes.append(amiss)
        if said is not None:
            tested[run.options["seed"]] = said
    return Candidate(name, group, tested, notes)


# ---- what must be equal


def judged_by(options: dict[str, Any]) -> dict[str, Any]:
    """What settings of these options must agree in to be compared, by its name in a complaint."""
    facts = {"data, by data_fingerprint": options.get("data_fingerprint")}
    # Data of one fingerprint may lie in two places.
    if options.get("data_fingerprint") is None:
        facts["data"] = options["dataset"]
    facts |= {"class lists": options["classes"], "images tested on": options["tested_on"]}
    cuts = ["limit_test"]
    if options["tested_on"] == "held-out":
        cuts += ["limit_train", "validation_fraction"]
    return facts | {f"test images, {name}": options[name] for name in cuts}


def _refuse(a: Candidate, b: Candidate, what: str, of_a: Any, of_b: Any) -> None:
    """Raise BadInput where two facts differ, of which figures of one kind have the same."""
    if of_a != of_b:
        raise BadInput(
            f"{b.name} cannot be compared with {a.name}: other {what} "
            f"({short(of_b)} against {short(of_a)}); compare runs that have the same"
        )


def _refuse_other_figures(a: Candidate, b: Candidate) -> None:
    """Raise BadInput where the accuracies of A and B are no figures of one kind."""
    # What the accuracies are of.
    facts_b = judged_by(b.group.options)
    for what, of_a in judged_by(a.group.options).items():
        _refuse(a, b, what, of_a, facts_b.get(what))
    lists = [next(iter(each.tested.values())).classes for each in (a, b) if each.tested]
    if len(lists) == 2:
        _refuse(a, b, "class lists", *lists)

    # A run that was cut short stands for its setting beside another of as many steps alone.
    ends = [each.group.runs[0].summary for each in (a, b)]
    if any(end["steps"] < end["total_steps"] for end in ends):
        steps = [f"{end['steps']:,} of {end['total_steps']:,}" for end in ends]
        if ends[0]["steps"] != ends[1]["steps"]:
            _refuse(a, b, "numbers of steps, one cut by --max-steps", *steps)


def _refuse_other_images(a: Candidate, b: Candidate, pairs: list[tuple[int, int]]) -> None:
    """Raise BadInput where the runs of a pair of seeds are known to be tested on other images."""
    for seed_a, seed_b in pairs:
        if seed_a in a.tested and seed_b in b.tested:
            of_a, of_b = a.tested[seed_a].identity, b.tested[seed_b].identity
            _refuse(a, b, f"test images, seeds {seed_a} and {seed_b}", of_a, of_b)


# ---- figures


def against(
    baseline: Candidate, candidates: list[Candidate], margin: float
) -> tuple[list[Comparison], list[str]]:
    """Comparisons of all others with the baseline, without verdicts; a line for each impossible."""
    comparisons = []
    refused = []
    for other in candidates:
        if other is baseline:
            continue
        try:
            comparisons.append(compare_two(baseline, other, margin))
        except BadInput as error:
            refused.append(f"not compared: {error}")
    return comparisons, refused


def compare_two(a: Candidate, b: Candidate, margin: float) -> Comparison:
    """What the runs of A and B say, without the verdict. `margin` is a share of 1.

    Raises BadInput where they cannot be compared.
    """
    # Which runs are compared: those of common seeds, if they are enough.
    _refuse_other_figures(a, b)
    seeds_a, seeds_b = a.group.seeds, b.group.seeds
    common = [seed for seed in seeds_a if seed in seeds_b]
    single = len(seeds_a) == len(seeds_b) == 1
    # Pairs are by seed; single models are compared on the same images, whatever their seeds.
    pairs = [(seed, seed) for seed in common]
    _refuse_other_images(a, b, [(seeds_a[0], seeds_b[0])] if single else pairs)
    # Fewer pairs are not worth leaving the others out for.
    if len(common) >= LEAST_RUNS:
        seeds_a = seeds_b = common

    # What can be said whatever the number of runs.
    side_a, side_b = _side(a, seeds_a), _side(b, seeds_b)
    plain = Comparison(
        a=side_a,
        b=side_b,
        differ_in=_differing_options(a.group, b.group),
        dataset=a.group.options["dataset"],
        tested_on=a.group.options["tested_on"],
        images=_images(a) or _images(b),
        test=None,
        pairs=0,
        # Without what the mean's rounding adds to equal ones.
        difference=round(side_b.accuracy - side_a.accuracy, 12),
        margin=margin,
    )

    # The test goes by the numbers of runs, never by which p is smaller.
    if single:
        return _of_two_models(plain, a, b)
    if side_a.n == 1 or side_b.n == 1:
        lonely, many = ("A", side_b.n) if side_a.n == 1 else ("B", side_a.n)
        reason = f"{lonely} has one run against {many}, and one run says nothing of its spread"
        return replace(plain, reason=reason, no_new_images="needs several runs of each")
    return _of_seeds(plain, a, b)


def _side(candidate: Candidate, seeds: list[int]) -> Side:
    """A setting over the runs of `seeds`."""
    group = candidate.group
    accuracies = candidate.accuracies(seeds)
    n = len(seeds)
    accuracy = float(np.mean(accuracies))
    images = _images(candidate)
    interval = None
    if n > 1:
        interval = mean_interval(accuracies)
    elif images:
        interval = wilson(round(accuracy * images), images)
    return Side(
        name=candidate.name,
        n=n,
        accuracy=accuracy,
        interval=interval,
        deviation=deviation(accuracies) if n > 1 else None,
        seeds=seeds,
        left_out=[seed for seed in group.seeds if seed not in seeds],
        repeats=len(group.repeats),
    )


def _images(candidate: Candidate) -> int | None:
    """The number of images that a run of the setting was tested on, where it is known."""
    for tested in candidate.tested.values():
        return len(tested.correct)
    images: int | None = candidate.group.runs[0].summary.get("evaluated_images")
    return images


def _differing_options(a: Group, b: Group) -> dict[str, list[Any]]:
    """Options in which A and B differ, with both values; those that were given by flag first."""
    given = a.runs[0].flags | b.runs[0].flags
    differing = [name for name in COMPARED if a.options.get(name) != b.options.get(name)]
    differing.sort(key=lambda name: name not in given)
    return {name: [a.options.get(name), b.options.get(name)] for name in differing}


def _of_two_models(plain: Comparison, a: Candidate, b: Candidate) -> Comparison:
    """The comparison of single runs: of two models on the same images."""
    plain = replace(plain, reason="one run each says nothing of the settings")
    if not (a.tested and b.tested):
        return plain
    # The images on which they do not agree.
    (tested_a,), (tested_b,) = a.tested.values(), b.tested.values()
    images = len(tested_a.correct)
    a_alone = int(np.sum(tested_a.correct & ~tested_b.correct))
    b_alone = int(np.sum(tested_b.correct & ~tested_a.correct))
    return replace(
        plain,
        test="McNemar",
        interval=flips_interval(a_alone, b_alone, images),
        p=mcnemar(a_alone, b_alone),
        a_alone=a_alone,
        b_alone=b_alone,
    )


def _of_seeds(plain: Comparison, a: Candidate, b: Candidate) -> Comparison:
    """The comparison of several runs each: paired by seed where the sides have the same seeds."""
    accuracies_a, accuracies_b = a.accuracies(plain.a.seeds), b.accuracies(plain.b.seeds)
    # Welch's test stands beside the paired one, or in its place.
    welch = welch_test(accuracies_a, accuracies_b)
    paired = plain.a.seeds == plain.b.seeds and plain.a.n >= LEAST_RUNS
    if paired:
        by_seed = accuracies_b - accuracies_a
        test = paired_test(by_seed)
        variance = deviation(by_seed) ** 2
        plain = replace(
            plain,
            test="paired t",
            pairs=len(by_seed),
            sign_flips=sign_flips(by_seed),
            b_ahead_in=int(np.sum(by_seed > 0)),
            correlation=correlation(accuracies_a, accuracies_b),
            welch_interval=welch.interval,
        )
    else:
        test = welch
        variance = deviation(accuracies_a) ** 2 + deviation(accuracies_b) ** 2
        plain = replace(plain, test="Welch")

    # Beyond these images, and what such a study could have found at all.
    new_images, no_new_images = _new_images(plain, a, b, test)
    could_see, seeds_for_margin = None, None
    if test.interval is not None:
        could_see = detectable(test.standard_error, test.degrees_of_freedom)
        seeds_for_margin = seeds_needed(plain.margin, variance, paired)
    return replace(
        plain,
        interval=test.interval,
        p=test.p,
        new_images=new_images,
        no_new_images=no_new_images,
        could_see=could_see,
        seeds_for_margin=seeds_for_margin,
    )


def _new_images(
    plain: Comparison, a: Candidate, b: Candidate, test: TTest
) -> tuple[Interval | None, str | None]:
    """The interval of the difference for other images, or why there is none."""
    # The predictions of every run that is compared, all of the same images.
    tested = []
    for side, candidate in ((plain.a, a), (plain.b, b)):
        for run in candidate.group.runs:
            seed = run.options["seed"]
            if seed in side.seeds and seed not in candidate.tested:
                return None, f"{run.path} has no {PREDICTIONS}; cifar-accel evaluate writes it"
        tested.append([candidate.tested[seed] for seed in side.seeds])
    if len({run.identity for runs in tested for run in runs}) > 1:
        return None, f"each seed has {plain.tested_on} images of its own, so none has a mean"
    if test.interval is None:
        return None, "there is no spread over seeds"
    # For each image the share of the runs that get it right.
    of_a, of_b = (np.mean([run.correct for run in runs], axis=0) for runs in tested)
    return new_images_interval(of_b - of_a, test), None


# ---- conclusions


def conclude(
    comparisons: list[Comparison], adjusted: list[float] | None = None
) -> list[Comparison]:
    """The comparisons with their verdicts; `better` and `tentatively` hold for all together.

    `adjusted` are the p of those that have one, for that (unset: Holm's).
    """
    # A comparison without a test claims nothing, so it costs the others nothing.
    if adjusted is None:
        adjusted = holm([each.p for each in comparisons if each.p is not None])
    together = iter(adjusted)
    concluded = []
    for each in comparisons:
        p = None if each.p is None else next(together)
        each = replace(each, p_holm=p)
        if each.test in ("paired t", "Welch"):
            each = _with_verdict(each)
        concluded.append(each)
    return concluded


def _with_verdict(each: Comparison) -> Comparison:
    """A comparison over seeds with its verdict, and the reason why it is no clearer."""
    runs = min(each.a.n, each.b.n)
    word = verdict(each.difference, each.interval, each.p_holm, each.sign_flips, runs, each.margin)
    # Why it is no clearer.
    reason = ""
    if word == "cannot tell":
        reason = _why_nothing(each, runs)
    elif word == "tentatively" and runs < LEAST_RUNS_FOR_BETTER:
        reason = f"n = {runs}; better takes {LEAST_RUNS_FOR_BETTER}"
    elif word == "tentatively" and each.test == "Welch":
        reason = "the runs are not paired; better takes the same seeds"
    elif word == "tentatively":
        reason = "the sign flips do not agree"
    # Whether it goes beyond these images.
    holds = None
    if word != "cannot tell" and each.new_images is not None:
        holds = _holds(word, each.new_images, each.margin)
    return replace(each, verdict=word, reason=reason, holds_for_new_images=holds)


def _holds(word: Verdict, interval: Interval, margin: float) -> bool:
    """Whether a verdict other than "cannot tell" is right all over the interval."""
    if word == "same":
        return -margin < interval.low and interval.high < margin
    return interval.low > 0 or interval.high < 0


def _why_nothing(each: Comparison, runs: int) -> str:
    """Why nothing can be told of several runs each."""
    if runs < LEAST_RUNS:
        return f"two runs of a setting never say it; train {LEAST_RUNS} seeds of each or more"
    if each.interval is None:
        return "there is no spread over seeds, so nothing shows how far chance goes"
    if each.p is not None and each.p < ALPHA:
        return "with so many comparisons one may come out so by chance"
    return f"the interval holds 0 and reaches beyond {100 * each.margin:g} pp"


def short(value: Any) -> str:
    """An option's value in words, cut where it is long."""
    words = in_words(value)
    return words if len(words) <= LONGEST_VALUE else f"{words[: LONGEST_VALUE - 3]}..."
