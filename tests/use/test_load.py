import json
import math
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
DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture
def folder(tmp_path):
    """The folder of a run whose weights are saved."""
    options = asdict(ARGS) | FACTS
    (tmp_path / "config.json").write_text(json.dumps({"options": options, "provenance": {}}))
    ending = {"status": "finished", "steps": 12, "total_steps": 12, "train_loss": 1, "accuracy": 0}
    (tmp_path / "summary.json").write_text(json.dumps(ending))
    model = build_model(ARGS, 10, str)
    save_model(model, tmp_path / "model", ARGS, DIGITS)
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


@pytest.mark.parametrize(
    "name, value",
    [
        ("crop_pct", 0),
        ("image_size", -1),
        ("seed", -1),
        ("classes", 0),
        ("input_mean", [0.5, 0.5, 1e300]),
        ("input_std", [0.5, 0, 0.5]),
        ("input_std", [math.nan, 0.5, 0.5]),
    ],
)
def test_a_recorded_option_keeps_to_its_bounds(folder, name, value):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["options"][name] = value
    file.write_text(json.dumps(config))
    with pytest.raises(BadInput, match=rf"\(config.json: .* options.{name}.* Input should be"):
        load_run(folder)


@pytest.mark.parametrize("image_size", [10**9, 30])
def test_a_size_that_the_model_cannot_take_is_refused(folder, image_size):
    args = replace(ARGS, model="test_vit")
    save_model(build_model(args, 10, str), folder / "model", args, DIGITS)
    config = json.loads((folder / "config.json").read_text())
    config["options"]["image_size"] = image_size
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        BadInput, match=rf"--image-size {image_size}: the model of .* cannot take it"
    ):
        load_run(folder).model()


def test_a_model_that_gives_no_logits_is_refused(folder):
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_args": {"num_classes": 0}}))
    with pytest.raises(BadInput, match="does not give 10 logits"):
        load_run(folder).model()


def test_what_is_no_finished_run_is_refused(folder):
    (folder / "model" / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="the run is not finished"):
        load_run(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="is no run folder"):
        load_run(folder)
