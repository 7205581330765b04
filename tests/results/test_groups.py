"""Which runs are put together, and what their setting is called."""

import json
import os

from made_runs import make_run

from cifar_accel.results.groups import group_by_seed
from cifar_accel.results.runs import find_runs


def test_repeats_of_one_seed_are_one_replicate(tmp_path):
    """The one that ended last stands for the seed, wherever it lies."""
    for name, accuracy, seed in (("a", 0.5, 2), ("b", 0.6, 2), ("c", 0.7, 1), ("d", 0.8, 2)):
        make_run(tmp_path / name, {"accuracy": accuracy}, seed=seed)
    ended = tmp_path / "b" / "summary.json"
    os.utime(ended, (2**31, 2**31))
    (group,) = group_by_seed(find_runs(tmp_path))
    assert (group.seeds, group.accuracies) == ([1, 2], [0.7, 0.6])
    assert sorted(run.path.name for run in group.repeats) == ["a", "d"]


def test_the_place_of_what_is_known_by_its_content_does_not_count(tmp_path):
    """Nor what earlier versions had no word for."""
    for seed, folder in enumerate(("/data/cifar100", "/scratch/cifar", "/old/cifar")):
        run = make_run(tmp_path / str(seed), seed=seed, dataset=folder, data_fingerprint="abc")
        config = json.loads((run / "config.json").read_text())
        if seed < 2:
            config["options"] |= {"tested_on": "test", "stored_size": 32}
            config["weights"] = {}
        (run / "config.json").write_text(json.dumps(config))
    (group,) = group_by_seed(find_runs(tmp_path))
    assert group.seeds == [0, 1, 2]


def test_starting_weights_are_told_apart_in_a_few_characters(tmp_path):
    for name in "ab":
        run = make_run(tmp_path / name)
        config = json.loads((run / "config.json").read_text())
        config["weights"] = {"model": ["1" * 64], "checkpoint": [name * 64]}
        (run / "config.json").write_text(json.dumps(config))
    labels = [group.label for group in group_by_seed(find_runs(tmp_path))]
    assert labels == [f"weights {'1' * 12} {name * 12}" for name in "ab"]


def test_recipes_are_told_by_their_names_and_what_flags_changed(tmp_path):
    recipes = {"report": dict(smoothing=0.1, mixup=0.8), "plain": dict(smoothing=0.2, mixup=0.0)}
    for recipe, options in recipes.items():
        for crop in (0, 4):
            run = make_run(
                tmp_path / f"{recipe}{crop}", recipe=recipe, crop_padding=crop, **options
            )
            config = run / "config.json"
            config.write_text(
                config.read_text().replace(
                    '"provenance": {}', '"provenance": {"crop_padding": "flag"}'
                )
            )
    labels = [group.label for group in group_by_seed(find_runs(tmp_path))]
    assert labels == [
        "crop_padding 0, recipe plain",
        "crop_padding 4, recipe plain",
        "crop_padding 0, recipe report",
        "crop_padding 4, recipe report",
    ]
