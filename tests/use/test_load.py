import json
from dataclasses import asdict, replace

import pytest
import torch

from cifar_accel.errors import BadInput
from cifar_accel.models.create import build_model
from cifar_accel.models.weights import save_model
from cifar_accel.options.recipes import recipe_defaults
from cifar_accel.use.load import load_run

ARGS = replace(
    recipe_defaults("digits"),
    model="test_nfnet",
    pretrained=False,
    run_name="a",
    warmup_epochs=0.5,
    scale=(0.5, 1.0),
)
FACTS = {
    "mixed_precision": "bf16",
    "classes": 10,
    "input_mean": [0.5, 0.5, 0.5],
    "input_std": [0.25, 0.25, 0.25],
    "total_steps": 12,
}


@pytest.fixture
def folder(tmp_path):
    """The folder of a run whose weights are saved."""
    options = asdict(ARGS) | FACTS
    (tmp_path / "config.json").write_text(json.dumps({"options": options, "provenance": {}}))
    model = build_model(ARGS, 10, str)
    save_model(model, tmp_path / "model", ARGS, [str(digit) for digit in range(10)])
    return tmp_path


def test_options_are_those_of_the_run(folder):
    run = load_run(folder)
    assert {name: getattr(run.options, name) for name in asdict(ARGS)} == asdict(ARGS)
    assert run.options.mixed_precision == "bf16"
    assert run.options.classes == 10
    assert run.options.input_mean == (0.5, 0.5, 0.5)
    assert run.config["options"]["total_steps"] == 12


def test_options_that_an_earlier_version_had_not_take_their_defaults(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["options"]["alternating_flip"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_run(folder).options.alternating_flip is False


def test_the_model_is_the_runs(folder):
    loaded = load_run(folder).model().state_dict()
    made = build_model(ARGS, 10, str).state_dict()
    assert loaded.keys() == made.keys()
    assert all(torch.equal(loaded[name], made[name]) for name in made)


def test_what_is_no_finished_run_is_refused(folder):
    (folder / "model" / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="has no model/ yet"):
        load_run(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="is no run folder"):
        load_run(folder)
