"""What is told of a run that costs itself accuracy."""

from dataclasses import fields, replace

import pytest

from cifar_accel.models.advice import advice
from cifar_accel.models.create import build_model
from cifar_accel.options.recipes import recipe_defaults


def told(recipe, given=(), **options):
    """The lines on a run of `options`, as if its model had its published weights."""
    args = replace(recipe_defaults(recipe), model="test_vit", **options)
    origin = {field.name: "recipe" for field in fields(args)} | dict.fromkeys(given, "flag")
    model = build_model(replace(args, pretrained=False), 10, str)
    return advice(args, origin, model)


def test_the_reports_recipe_hurts_in_four_ways():
    baseline, size, statistics, flip = told("report")
    assert "a baseline; finetune" in baseline
    assert "--image-size 32 is under a third of the 160 px" in size
    assert "4 tokens an image" in size
    assert "--mean none --std none" in statistics
    assert "--vflip 0.5 turns photographs upside down" in flip


@pytest.mark.parametrize("recipe, options", [("finetune", {}), ("plain", {"image_size": 64})])
def test_a_good_run_is_told_nothing(recipe, options):
    assert told(recipe, **options) == []


def test_from_nothing_there_is_nothing_to_lose():
    assert told("plain", pretrained=False) == []


def test_what_a_flag_says_is_meant():
    lines = told("report", given=["mean", "std", "vflip"], image_size=64)
    assert len(lines) == 1


def test_muon_on_weights():
    (line,) = told("finetune", optimizer="muon")
    assert "muon degrades weights that were trained by Adam" in line
