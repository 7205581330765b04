"""What is said of settings, and what a reader is told before it."""

import json

import pytest
from made_runs import make_run

from cifar_accel.results.groups import group_by_seed
from cifar_accel.results.runs import find_runs
from cifar_accel.results.sections import checks, sections_of, verdict_lines


def sections(folder):
    return sections_of(group_by_seed(find_runs(folder)))


def make_runs(folder, accuracies, **options):
    for seed, accuracy in enumerate(accuracies):
        make_run(folder / f"{options}-{seed}", {"accuracy": accuracy}, seed=seed, **options)


def test_settings_that_were_judged_by_other_images_are_sections_of_their_own(tmp_path):
    make_runs(tmp_path, [0.5, 0.6], data_fingerprint="a")
    make_runs(tmp_path, [0.5, 0.6, 0.7], data_fingerprint="b")
    make_runs(tmp_path, [0.5], data_fingerprint="b", limit_test=100)
    make_runs(tmp_path, [0.5], data_fingerprint="b", tested_on="held-out", validation_fraction=0.1)
    assert [len(section.best.group.runs) for section in sections(tmp_path)] == [3, 2, 1, 1]


def test_the_verdict_says_what_is_told_from_the_best(tmp_path):
    make_runs(tmp_path, [0.700, 0.711, 0.705, 0.699, 0.702, 0.708], reprob=0.1)
    make_runs(tmp_path, [0.690, 0.700, 0.694, 0.690, 0.691, 0.697], reprob=0.2)
    make_runs(tmp_path, [0.699, 0.710, 0.705, 0.699, 0.701, 0.708], reprob=0.3)
    make_runs(tmp_path, [0.720, 0.680, 0.710, 0.690, 0.700, 0.690], reprob=0.4)
    lines = verdict_lines(sections(tmp_path)[0])
    assert lines[0].startswith("Highest of 4 settings: reprob 0.1, 70.42 % ± ")
    assert lines[1].startswith("It is better than reprob 0.2 (-1.05 [")
    assert lines[2].startswith("The same within 0.5 points: reprob 0.3 (-0.05 [")
    assert lines[3].startswith("Cannot be told from it: reprob 0.4 (-0.58 [")


def test_single_runs_say_nothing_of_settings(tmp_path):
    make_runs(tmp_path, [0.7], reprob=0.1)
    make_runs(tmp_path, [0.5], reprob=0.2)
    assert verdict_lines(sections(tmp_path)[0]) == [
        "Highest of 2 settings: reprob 0.1, 70.00 % (n = 1).",
        "With one run each nothing is said of the settings; repeat them with other seeds.",
    ]


def test_what_a_reader_should_know_first(tmp_path):
    for rate, accuracies in ((0.1, [0.5, 0.6]), (0.2, [0.6, 0.7, 0.65]), (0.3, [0.7, 0.8])):
        make_runs(tmp_path, accuracies, learning_rate=rate)
    make_run(tmp_path / "again", {"accuracy": 0.9}, seed=1, learning_rate=0.3)
    lines = "\n".join(checks(sections(tmp_path)[0]))
    assert "repeats of a seed, which are no evidence: 1" in lines
    assert "fewer than 3 seeds: learning_rate 0.3; learning_rate 0.1" in lines
    assert "the settings have different seeds" in lines
    assert "the best has the largest learning_rate that was tried, 0.3: try beyond it" in lines
    assert "chosen by the images that it is judged by" in lines


def test_a_sound_study_has_one_note(tmp_path):
    for reprob in (0.1, 0.2):
        make_runs(tmp_path, [0.5, 0.6, 0.7], reprob=reprob, validation_fraction=0.1)
    (note,) = checks(sections(tmp_path)[0])
    assert "chosen by the images that it is judged by" in note


def test_two_settings_need_no_more_than_a_comparison(tmp_path):
    """p of the differences 0.090, 0.100, 0.108 is 0.0027; twice that would do as well."""
    make_runs(tmp_path, [0.690, 0.700, 0.708], reprob=0.1)
    make_runs(tmp_path, [0.6, 0.6, 0.6], reprob=0.2)
    entry = sections(tmp_path)[0].entries[1]
    assert entry.comparison.p_holm == entry.comparison.p < 0.01


def test_a_setting_that_is_ahead_over_the_common_seeds_is_not_below(tmp_path):
    """One seed that the other does not have makes the first setting the best."""
    make_runs(tmp_path, [0.700, 0.701, 0.702, 0.990], reprob=0.1)
    make_runs(tmp_path, [0.710, 0.7112, 0.7121], reprob=0.2)
    best, other = sections(tmp_path)[0].entries
    assert (best.name, other.comparison.ahead) == ("reprob 0.1", "b")
    assert (other.comparison.verdict, other.standing) == ("cannot tell", "≈ best")


def test_nothing_is_said_where_nothing_can_be_compared(tmp_path):
    make_runs(tmp_path, [0.5, 0.6, 0.7], reprob=0.1)
    for seed in range(3):
        ending = {"accuracy": 0.2, "steps": 4}
        make_run(tmp_path / f"cut{seed}", ending, seed=seed, reprob=0.2)
    lines = verdict_lines(sections(tmp_path)[0])
    assert lines[1:] == ["No other can be compared with it; the notes say why."]


def test_a_noisy_setting_is_not_taken_for_a_sure_one(tmp_path):
    """The best of six varies by two points, the others by a tenth of one."""
    make_runs(tmp_path, [0.70, 0.72, 0.74], reprob=0.1)
    for place in range(2, 7):
        make_runs(tmp_path, [0.700, 0.701, 0.702], reprob=place / 10)
    standings = {entry.standing for entry in sections(tmp_path)[0].entries[1:]}
    assert standings == {"≈ best"}


def test_a_run_that_moved_is_of_two_machines(tmp_path):
    make_runs(tmp_path, [0.5, 0.6, 0.7], reprob=0.1)
    make_runs(tmp_path, [0.5, 0.6, 0.7], reprob=0.2)
    assert not any("machines" in line for line in checks(sections(tmp_path)[0]))
    file = next(tmp_path.glob("*/config.json"))
    config = json.loads(file.read_text())
    config["resumed"] = [{"hardware": {"cpu_count": 64}}]
    file.write_text(json.dumps(config))
    assert any("of different machines" in line for line in checks(sections(tmp_path)[0]))


@pytest.mark.parametrize("name, beyond", [("mixup", True), ("reprob", False)])
def test_beyond_one_there_may_be_more_to_try(tmp_path, name, beyond):
    for value in (0.2, 0.4, 1.0):
        make_runs(tmp_path, [0.5 + value / 10] * 3, **{name: value})
    lines = checks(sections(tmp_path)[0])
    assert any(f"the best has the largest {name}" in line for line in lines) == beyond
