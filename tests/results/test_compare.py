"""`cifar-accel compare` on run folders: what it says, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_runs import make_run

from cifar_accel.cli import main
from cifar_accel.records.predictions import FILE, of_outputs, write_predictions

CLASSES = [f"class {i}" for i in range(10)]


def predicted_run(folder: Path, right, subset=0, classes=CLASSES, kind="test", **options) -> Path:
    """A finished run that got the images right that `right` says, of the `subset` of a data set."""
    right = np.asarray(right, bool)
    figures = {"accuracy": float(right.mean()), "evaluated_images": len(right)}
    run = make_run(folder, figures, **options)
    labels = np.arange(len(right)) % len(classes)
    first = np.where(right, labels, (labels + 1) % len(classes))
    places = np.arange(len(right)) + 10_000 * subset
    predictions = of_outputs(labels, classes, {"first_five": first[:, None]}, "abc", places)
    write_predictions(run, {kind: predictions})
    return run


def setting(folder: Path, counts, seeds=None, images=1000, **options) -> Path:
    """A run a seed, which gets the first so many of its `images` right."""
    seeds = seeds or range(1, len(counts) + 1)
    for seed, count in zip(seeds, counts, strict=True):
        predicted_run(folder / f"s{seed}", np.arange(images) < count, seed=seed, **options)
    return folder


@pytest.fixture
def said(in_process, monkeypatch):
    """The words of a command that ends well, unwrapped."""
    monkeypatch.setenv("COLUMNS", "1000")

    def words(*arguments):
        code, out, err = in_process(main, "compare", *arguments)
        assert (code, err) == (0, "")
        return out

    return words


@pytest.fixture
def found(said):
    """The JSON of one comparison."""

    def one(*arguments):
        comparison = json.loads(said(*arguments, "--json"))
        return comparison

    return one


@pytest.fixture
def refused(in_process):
    """The one line of a refusal."""

    def line(*arguments):
        code, out, err = in_process(main, "compare", *arguments)
        assert (code, out) == (2, "") and err.count("\n") == 1
        return err

    return line


# ---- several runs each

# Of 1,000 images; B - A is 4 2 7 6 5 8, in the mean 16/3, with the SD sqrt(14/3).
A = [740, 744, 742, 746, 743, 741]
B = [744, 746, 749, 752, 748, 749]


def test_pairs_by_seed(said, found, tmp_path):
    a = setting(tmp_path / "a", A)
    b = setting(tmp_path / "b", B, scheduler="linear_decay")
    one = found(a, b)
    assert one["a"]["name"] == "NFNet-F0, adamw + cosine"
    assert one["b"]["name"] == "NFNet-F0, adamw + linear_decay"
    assert (one["a"]["n"], one["pairs"], one["test"]) == (6, 6, "paired t")
    assert one["a"]["accuracy"] == pytest.approx(0.7426667)
    assert one["difference"] == pytest.approx(0.016 / 3)
    # t of 5 degrees of freedom cuts at 2.57058.
    half = 2.570582 * (14 / 3 / 6) ** 0.5 / 1000
    assert one["interval"] == pytest.approx([0.016 / 3 - half, 0.016 / 3 + half])
    assert one["sign_flips"] == 2 / 64
    assert (one["verdict"], one["ahead"], one["b_ahead_in"]) == ("better", "b", 6)
    assert one["differ_in"] == {"scheduler": ["cosine", "linear_decay"]}
    assert (one["images"], one["tested_on"]) == (1000, "test")

    out = said(a, b)
    assert "B - A         +0.53 pp [+0.31, +0.76], paired t, p = 0.002" in out
    assert "B ahead in 6 of 6, r = 0.64, Welch [+0.21, +0.85]" in out
    assert "sign flips p = 0.031 (6 pairs cannot go below 0.031)" in out
    assert "differ in     scheduler cosine / linear_decay\n" in out
    assert "verdict       better: B is better on this test set. For new images: " in out
    assert "A 74.27 % ± 0.23 (SD 0.22, n = 6), B 74.80 % ± 0.29 (SD 0.28, n = 6)" in out
    assert "could see     differences from 0.31 pp on, four times in five; 0.5 pp takes 4" in out


def test_new_images(said, found, tmp_path):
    """The images that a setting gets right by a hair vary, so less is known of others."""
    a, b = setting(tmp_path / "a", A), setting(tmp_path / "b", B, vflip=0.5)
    # For each image, over the seeds: one of them more is right in B for 32 cases of six.
    right = [(np.arange(1000)[:, None] < counts).mean(1) for counts in (A, B)]
    variance = (
        14e-6 / 3 / 6 * 2.570582**2 + np.var(right[1] - right[0], ddof=1) / 1000 * 1.959964**2
    )
    one = found(a, b)
    low, high = one["new_images"]
    assert (high - low) / 2 == pytest.approx(variance**0.5, rel=1e-5)
    assert (low + high) / 2 == pytest.approx(one["difference"])
    assert low < one["interval"][0] < one["interval"][1] < high
    assert one["holds_for_new_images"] is (low > 0)


def test_five_seeds_are_tentative(said, found, tmp_path):
    a, b = setting(tmp_path / "a", A[:5]), setting(tmp_path / "b", B[:5], smoothing=0.1)
    for folder in (a, b):
        make_run(folder / "killed", {"status": "preempted"}, seed=6)
    assert found(a, b)["verdict"] == "tentatively"
    out = said(a, b)
    assert "tentatively: B is better on this test set (n = 5; better takes 6)" in out
    assert f"not finished: {a / 'killed'}: preempted\nnot finished: {b / 'killed'}: preemp" in out
    # The other way round A is ahead.
    assert found(b, a)["ahead"] == "a"


def test_two_seeds_never_tell(said, found, tmp_path):
    a, b = setting(tmp_path / "a", [100, 101]), setting(tmp_path / "b", [900, 901], smoothing=0.1)
    one = found(a, b)
    assert (one["verdict"], one["test"], one["pairs"]) == ("cannot tell", "Welch", 0)
    assert one["p"] < 0.001
    assert "cannot tell: two runs of a setting never say it" in said(a, b)


def test_one_run_against_several(said, found, tmp_path):
    a, b = setting(tmp_path / "a", [100]), setting(tmp_path / "b", [900, 901, 902], smoothing=0.1)
    one = found(a, b)
    assert (one["verdict"], one["test"], one["interval"], one["p"]) == ("cannot tell", *[None] * 3)
    assert one["difference"] == pytest.approx(0.801)
    assert "cannot tell: A has one run against 3" in said(a, b)
    assert "cannot tell: B has one run against 3" in said(b, a)


def test_seeds_without_a_partner_are_named(said, found, tmp_path):
    a = setting(tmp_path / "a", A[:4], seeds=[1, 2, 3, 9])
    b = setting(tmp_path / "b", B[:5], seeds=[1, 2, 3, 4, 5], smoothing=0.1)
    one = found(a, b)
    assert (one["pairs"], one["a"]["seeds"], one["b"]["n"]) == (3, [1, 2, 3], 3)
    # The accuracies are of the seeds that are compared.
    assert one["a"]["accuracy"] == pytest.approx(0.742)
    expected = "seeds         1 2 3 in both; left out: 9, only in A; left out: 4 5, only in B\n"
    assert expected in said(a, b)


def test_too_few_common_seeds_are_not_paired(said, found, tmp_path):
    a = setting(tmp_path / "a", A, seeds=range(1, 7))
    b = setting(tmp_path / "b", [count + 100 for count in A], seeds=range(5, 11), smoothing=0.1)
    one = found(a, b)
    assert (one["test"], one["pairs"], one["a"]["n"], one["b"]["n"]) == ("Welch", 0, 6, 6)
    assert one["sign_flips"] is None and one["a"]["left_out"] == []
    assert one["verdict"] == "tentatively"
    assert "the runs are not paired; better takes the same seeds" in said(a, b)


def test_repeats_are_no_evidence(said, found, tmp_path):
    a, b = setting(tmp_path / "a", A[:3]), setting(tmp_path / "b", B[:3], smoothing=0.1)
    predicted_run(tmp_path / "a" / "again", np.arange(1000) < 742, seed=3)
    assert found(a, b)["a"]["n"] == 3
    assert "1 of A passed over: repeats of a seed" in said(a, b)


def test_the_same_within_a_margin(said, found, tmp_path):
    a = setting(tmp_path / "a", [740, 742, 744])
    b = setting(tmp_path / "b", [741, 742, 743], smoothing=0.1)
    # Differences 1 0 -1 of 1,000: 4.30265 / sqrt(3) = 2.484 thousandths to either side.
    assert found(a, b)["interval"] == pytest.approx([-0.002484, 0.002484], abs=1e-6)
    assert found(a, b)["verdict"] == "same"
    assert found(a, b)["holds_for_new_images"] is True
    # For new images the interval is a little wider.
    narrow = found(a, b, "--margin", "0.25")
    assert (narrow["verdict"], narrow["holds_for_new_images"]) == ("same", False)
    assert found(a, b, "--margin", "0.24")["verdict"] == "cannot tell"
    assert "same: within 0.5 pp on this test set" in said(a, b)
    assert "the interval holds 0 and reaches beyond 0.24 pp" in said(a, b, "--margin", "0.24")


def test_equal_runs(said, found, tmp_path):
    a = setting(tmp_path / "a", A)
    one = found(a, a)
    assert (one["verdict"], one["difference"], one["ahead"]) == ("same", 0, None)
    assert (one["interval"], one["p"], one["new_images"]) == (None, None, None)
    out = said(a, a)
    assert "differ in     no option" in out
    assert "same: equal on this test set, seed by seed" in out
    assert f"A             NFNet-F0, adamw + cosine in {a}" in out


def test_neither_is_ahead(found, tmp_path):
    """The means of 0.1 0.2 0.3 and of 0.3 0.2 0.1 are not quite equal in floating point."""
    a = setting(tmp_path / "a", [1, 2, 3], images=10)
    b = setting(tmp_path / "b", [3, 2, 1], images=10, hflip=0.5)
    one = found(a, b)
    assert one["a"]["accuracy"] != one["b"]["accuracy"]
    assert (one["difference"], one["ahead"]) == (0, None)


def test_differences_without_a_spread(said, found, tmp_path):
    """Whatever they are: chance that is not seen cannot be judged."""
    b = setting(tmp_path / "b", [count + 100 for count in A], smoothing=0.1)
    one = found(setting(tmp_path / "a", A), b)
    assert (one["verdict"], one["interval"], one["p"]) == ("cannot tell", None, None)
    out = said(tmp_path / "a", b)
    assert "+10.00 pp, no interval without a spread" in out
    assert "cannot tell: there is no spread over seeds" in out


def test_many_options(said, tmp_path):
    a = setting(tmp_path / "a", A)
    b = setting(tmp_path / "b", B, epochs=3, hflip=0.5, vflip=0.5, mixup=1, cutmix=1, smoothing=0.1)
    config = b / "s1" / "config.json"
    flagged = '"provenance": {"smoothing": "flag"}'
    config.write_text(config.read_text().replace('"provenance": {}', flagged))
    line = next(line for line in said(a, b).splitlines() if line.startswith("differ in"))
    assert line.removeprefix("differ in").strip() == (
        "smoothing 0.0 / 0.1, hflip 0.0 / 0.5, vflip 0.0 / 0.5, mixup 0.0 / 1, cutmix 0.0 / 1, "
        "and 1 more"
    )


def test_each_seed_may_have_images_of_its_own(said, found, tmp_path):
    """Pairs have the same ones; a mean over seeds for one image there is not."""
    for name, counts in (("a", A), ("b", B)):
        for seed, count in enumerate(counts):
            options = dict(
                seed=seed, limit_test=1000, scheduler={"a": "cosine"}.get(name, "constant")
            )
            predicted_run(tmp_path / name / f"s{seed}", np.arange(1000) < count, seed, **options)
    one = found(tmp_path / "a", tmp_path / "b")
    assert (one["verdict"], one["new_images"]) == ("better", None)
    out = said(tmp_path / "a", tmp_path / "b")
    assert "new images    not known: each seed has test images of its own" in out


def test_runs_without_predictions(said, found, tmp_path):
    a, b = setting(tmp_path / "a", A), setting(tmp_path / "b", B, smoothing=0.1)
    (b / "s4" / FILE).unlink()
    assert found(a, b)["verdict"] == "better"
    out = said(a, b)
    assert f"not known: {b / 's4'} has no {FILE}; cifar-accel evaluate writes it" in out


# ---- one run each


def test_one_run_each(said, found, tmp_path):
    """Of 100 images A alone gets 5 right and B alone 1; both 60."""
    both = np.arange(100) < 60
    a = predicted_run(tmp_path / "a", both | (np.arange(100) >= 95), seed=1)
    b = predicted_run(tmp_path / "b", both | (np.arange(100) == 70), seed=2, hflip=0.5)
    one = found(a, b)
    assert (one["a_alone"], one["b_alone"], one["p"]) == (5, 1, pytest.approx(0.21875))
    assert (one["test"], one["pairs"], one["verdict"]) == ("McNemar", 0, "cannot tell")
    assert one["difference"] == pytest.approx(-0.04)
    half = 1.959964 * (6 - 16 / 100) ** 0.5 / 100
    assert one["interval"] == pytest.approx([-0.04 - half, -0.04 + half], abs=1e-7)
    # Wilson's of 65 in 100.
    assert one["a"]["interval"] == pytest.approx([0.5525442, 0.7363581], abs=1e-6)
    out = said(a, b)
    assert "A 65.00 % [55.25, 73.64], B 61.00 % [51.20, 69.98]" in out
    assert "A right, B wrong 5; A wrong, B right 1, McNemar exact, p = 0.219" in out
    assert "nothing of the settings" in out
    assert "verdict       cannot tell these two models apart; train several seeds" in out


def test_one_run_each_never_tells_of_settings(said, found, tmp_path):
    a = predicted_run(tmp_path / "a", np.arange(100) < 30)
    b = predicted_run(tmp_path / "b", np.arange(100) < 90, hflip=0.5)
    one = found(a, b)
    assert (one["verdict"], one["ahead"]) == ("cannot tell", "b") and one["p"] < 1e-9
    assert "cannot tell the settings apart; of these two models B is better" in said(a, b)


def test_equal_models(said, found, tmp_path):
    a = predicted_run(tmp_path / "a", np.arange(100) < 30)
    one = found(a, a)
    assert (one["p"], one["interval"], one["difference"], one["verdict"]) == (
        1,
        None,
        0,
        "cannot tell",
    )
    assert "A right, B wrong 0; A wrong, B right 0" in said(a, a)


def test_one_run_each_without_predictions(said, found, tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", {"accuracy": 0.6}, hflip=0.5)
    one = found(a, b)
    assert (one["difference"], one["test"], one["a"]["interval"]) == (
        pytest.approx(0.1),
        None,
        None,
    )
    assert f"McNemar needs {FILE} of both; cifar-accel evaluate RUN writes it" in said(a, b)


# ---- all below a folder


def test_all_against_a_baseline(said, tmp_path):
    """Three comparisons, whose p of the t test are taken by Holm."""
    setting(tmp_path / "a", A)
    setting(tmp_path / "b", B, scheduler="constant")
    setting(tmp_path / "c", [count + 50 + 9 * i for i, count in enumerate(A)], optimizer="sgdm")
    setting(tmp_path / "d", [741, 743, 743, 745, 744, 740], smoothing=0.1)
    every = json.loads(said(tmp_path, "--json"))["comparisons"]
    assert [one["a"]["name"] for one in every] == ["NFNet-F0, adamw + cosine (smoothing 0.0)"] * 3
    raw = [one["p"] for one in every]
    smallest, middle, largest = sorted(range(3), key=raw.__getitem__)
    adjusted = [one["p_holm"] for one in every]
    assert adjusted[smallest] == pytest.approx(3 * raw[smallest])
    assert adjusted[middle] == pytest.approx(2 * raw[middle])
    assert adjusted[largest] == pytest.approx(raw[largest])
    assert [one["verdict"] for one in every] == ["better", "better", "same"]
    out = said(tmp_path)
    assert out.startswith("3 comparisons with one baseline, A. Better and tentatively hold for all")
    assert "by Holm p = 0.0" in out


def test_many_comparisons_make_a_difference_less_sure(said, tmp_path):
    """B alone against A is told, and beside three settings like A it is not."""
    setting(tmp_path / "a", [740, 744, 742, 746])
    setting(tmp_path / "b", [760, 764, 750, 756], scheduler="constant")
    code = json.loads(said(tmp_path, "--json"))["comparisons"][0]
    assert code["p"] == code["p_holm"] < 0.05 and code["verdict"] == "tentatively"
    for i, name in enumerate("cde"):
        setting(tmp_path / name, [741, 749, 733, 751 + i], optimizer="sgdm", hflip=0.1 * i)
    beside = json.loads(said(tmp_path, "--json"))["comparisons"][0]
    assert beside["p"] == code["p"] and beside["verdict"] == "cannot tell"
    assert "with so many comparisons one may come out so by chance" in said(tmp_path)


def test_the_baseline_has_a_name_or_a_folder(said, refused, tmp_path):
    setting(tmp_path / "a", A)
    setting(tmp_path / "b", B, scheduler="constant")
    setting(tmp_path / "c", B, optimizer="sgdm")
    for name in ("b", "constant", tmp_path / "b", tmp_path / "b" / "s1", "NFNet-F0, ADAMW + const"):
        every = json.loads(said(tmp_path, "--baseline", name, "--json"))["comparisons"]
        assert [one["a"]["name"] for one in every] == ["NFNet-F0, adamw + constant"] * 2
    assert "no setting is called so or in that folder" in refused(tmp_path, "--baseline", "zzz")
    err = refused(tmp_path, "--baseline", "adamw")
    assert "2 settings are called so" in err and "adamw + constant" in err and "sgdm" not in err
    assert "--baseline b: has no effect" in refused("a", "b", "--baseline", "b")


def test_what_cannot_be_compared_is_a_line_below(said, tmp_path):
    setting(tmp_path / "a", A)
    setting(tmp_path / "b", B, scheduler="constant")
    setting(tmp_path / "c", B, dataset="cifar10")
    make_run(tmp_path / "d", {"status": "failed", "error": "out of \x1b[31mpaper"}, hflip=0.5)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "metrics.jsonl").write_text("")
    (make_run(tmp_path / "f", hflip=0.1) / "summary.json").write_text('{"status": "fini')
    out = said(tmp_path)
    assert "not compared: NFNet-F0, adamw + cosine in " in out and "other data (cifar10" in out
    assert f"not finished: {tmp_path / 'd'}: failed, out of \\x1b[31mpaper\n" in out
    assert f"passed over: {tmp_path / 'e'}: no config.json of a run\n" in out
    assert f"not finished: {tmp_path / 'f'}: no summary.json of a run\n" in out
    both = json.loads(said(tmp_path, "--json"))
    assert len(both["comparisons"]) == 1 and len(both["notes"]) == 4


# ---- refusals

OTHERS = [
    (dict(data_fingerprint="abc"), dict(data_fingerprint="abd"), "other data"),
    (dict(dataset="digits"), dict(dataset="cifar10"), "other data (cifar10 against digits)"),
    (dict(classes=10), dict(classes=20), "other class lists (20 against 10)"),
    (dict(tested_on="test"), dict(tested_on="held-out"), "(held-out against test)"),
    (dict(limit_test=0), dict(limit_test=100), "other test images, limit_test (100 against 0)"),
    (
        dict(tested_on="held-out", validation_fraction=0.1),
        dict(tested_on="held-out", validation_fraction=0.2),
        "other test images, validation_fraction (0.2 against 0.1)",
    ),
]


@pytest.mark.parametrize("of_a, of_b, line", OTHERS)
def test_other_figures_are_refused(refused, tmp_path, of_a, of_b, line):
    a, b = make_run(tmp_path / "a", **of_a), make_run(tmp_path / "b", **of_b)
    assert line in refused(a, b)


def test_no_comparison_is_possible_below(refused, tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", dataset="cifar10")
    assert "cannot be compared with" in refused(tmp_path)


def test_what_matters_for_held_out_images_alone(found, tmp_path):
    a = make_run(tmp_path / "a", validation_fraction=0.1)
    b = make_run(tmp_path / "b", validation_fraction=0.2)
    assert found(a, b)["verdict"] == "cannot tell"


def test_other_images_of_one_seed_are_refused(refused, tmp_path):
    a = setting(tmp_path / "a", A)
    b = setting(tmp_path / "b", B, hflip=0.5)
    for seed in (2, 3):
        (b / f"s{seed}" / FILE).unlink()
    other = predicted_run(tmp_path / "other", np.arange(1000) < B[2], subset=1)
    (other / FILE).rename(b / "s3" / FILE)
    assert "other test images, seeds 3 and 3" in refused(a, b)
    # Single models are told apart by common images only, whatever their seeds.
    assert "other test images, seeds 1 and 3" in refused(a / "s1", b / "s3")
    lonely = predicted_run(tmp_path / "classes", np.ones(1000), classes=CLASSES[::-1], hflip=0.5)
    assert "other class lists" in refused(a / "s1", lonely)


def test_the_split_that_counts_is_read(found, tmp_path):
    options = dict(tested_on="held-out", validation_fraction=0.2, kind="held-out")
    a = predicted_run(tmp_path / "a", np.arange(100) < 50, **options)
    b = predicted_run(tmp_path / "b", np.arange(100) < 40, hflip=0.5, **options)
    assert (found(a, b)["a_alone"], found(a, b)["tested_on"]) == (10, "held-out")


def test_a_run_that_was_cut_short(refused, found, tmp_path):
    whole = make_run(tmp_path / "whole")
    cut = make_run(tmp_path / "cut", {"steps": 8}, hflip=0.5)
    line = "other numbers of steps, one cut by --max-steps (8 of 16 against 16 of 16)"
    assert line in refused(whole, cut)
    # Both by the same step; or neither, with epochs of their own.
    also = make_run(tmp_path / "also", {"steps": 8})
    assert found(cut, also)["verdict"] == "cannot tell"
    longer = make_run(tmp_path / "longer", {"steps": 32, "total_steps": 32}, epochs=50)
    assert found(whole, longer)["verdict"] == "cannot tell"


def test_folders_without_a_run_to_compare(refused, tmp_path):
    done = make_run(tmp_path / "done")
    assert "nowhere: no such folder" in refused("nowhere", done)
    (tmp_path / "empty").mkdir()
    assert "no run folder (with config.json)" in refused(done, tmp_path / "empty")
    for name, status in (("x", "failed"), ("y", "preempted")):
        make_run(tmp_path / "open" / name, {"status": status, "accuracy": None})
    (make_run(tmp_path / "open" / "z") / "summary.json").unlink()
    err = refused(done, tmp_path / "open")
    assert "has no finished run to compare" in err
    assert "x: failed;" in err and "y: preempted;" in err and "z: running or killed" in err


def test_several_settings_in_one_folder(refused, tmp_path):
    mixed = tmp_path / "mixed"
    make_run(mixed / "a")
    make_run(mixed / "b", optimizer="sgdm")
    err = refused(mixed, make_run(tmp_path / "c"))
    assert "has runs of 2 settings" in err and "adamw + cosine" in err and "sgdm + cosine" in err
    assert "all runs are of one setting" in refused(tmp_path / "c")


def test_damaged_predictions_are_passed_over(said, found, tmp_path):
    a, b = setting(tmp_path / "a", A), setting(tmp_path / "b", B, hflip=0.5)
    (b / "s1" / FILE).write_bytes(b"\x00" * 20)
    assert found(a, b)["verdict"] == "better"
    for out in (said(a, b), said(tmp_path)):
        assert f"passed over: {b / 's1' / FILE}: is no file of predictions" in out
        assert f"cifar-accel evaluate {b / 's1'} writes it anew" in out


def test_predictions_of_another_model_are_passed_over(said, tmp_path):
    a, b = setting(tmp_path / "a", A), setting(tmp_path / "b", B, hflip=0.5)
    (b / "s1" / FILE).write_bytes((a / "s1" / FILE).read_bytes())
    assert f"{b / 's1' / FILE}: is not of the run's finished model" in said(a, b)


def test_folders_of_links_are_read(found, tmp_path):
    a, b = setting(tmp_path / "a", A), setting(tmp_path / "b", B, hflip=0.5)
    links = tmp_path / "links"
    links.mkdir()
    for run in b.iterdir():
        (links / run.name).symlink_to(run)
    # A link in a circle ends nowhere.
    (links / "up").symlink_to(links)
    assert found(a, links)["b"]["n"] == len(B)


def test_a_margin_is_not_negative(refused, tmp_path):
    assert "--margin -1: must be greater than or equal to 0" in refused("a", "b", "--margin", "-1")


# ---- how it is printed


@pytest.mark.parametrize("columns", [None, "60", "120"])
def test_lines_fit_the_terminal(in_process, monkeypatch, tmp_path, columns):
    setting(tmp_path / "a", A)
    setting(tmp_path / "b", B, scheduler="constant", model="some/" + 150 * "x")
    setting(tmp_path / "c", B, optimizer="sgdm")
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    _, out, _ = in_process(main, "compare", tmp_path)
    width = int(columns or 80)
    assert max(map(len, out.splitlines())) in range(width - 5, width + 1)
    assert "\n              " in out


def test_neither_torch_nor_the_plots_are_loaded(tmp_path):
    """They take seconds."""
    a, b = setting(tmp_path / "a", A), setting(tmp_path / "b", B, hflip=0.5)
    code = (
        "import sys; from cifar_accel.cli import main; main(sys.argv[1:]); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'scipy.stats')))"
    )
    command = [sys.executable, "-c", code, "compare", str(a), str(b)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "better: B is better" in done.stdout


def test_json_that_cannot_be_written_is_told(tmp_path):
    """A program must not take half of it for the whole."""
    for name, smoothing in (("a", 0.1), ("b", 0.2)):
        make_run(tmp_path / name, smoothing=smoothing)
    words = [sys.executable, "-m", "cifar_accel.cli", "compare", str(tmp_path), "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "stdout: No space left on device" in done.stderr
