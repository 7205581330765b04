import json
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import options_of_run
from PIL import Image
from safetensors.torch import load_file, save_file

import cifar_accel
from cifar_accel.data.decode import load_dataset
from cifar_accel.errors import BadInput
from cifar_accel.models.create import build_model
from cifar_accel.models.weights import save_model
from cifar_accel.options.recipes import recipe_defaults
from cifar_accel.records.predictions import read_predictions

DIGITS = [str(digit) for digit in range(10)]


def test_it_says_of_the_test_images_what_the_run_said(run):
    """By timm's own transform of Pillow images, against the batches of the evaluation."""
    said = read_predictions(run)["test"]
    test = load_dataset("digits", options_of_run(run)["data_dir"], 32).test
    images = [Image.fromarray(test.images[i].transpose(1, 2, 0)) for i in said.places]
    classifier = cifar_accel.load(run, device="cpu")
    probabilities = classifier.probabilities([classifier.prepare(image) for image in images])
    expected = torch.from_numpy(said.logits).float().softmax(1).numpy()
    # Logits are kept in half precision.
    assert np.abs(probabilities - expected).max() < 2e-3
    assert probabilities.shape == (100, 10)


def test_a_model_needs_nothing_but_its_folder(run, pictures):
    expected = cifar_accel.predict(run, pictures)
    moved = (run / "model").rename(run.parent / "elsewhere # 1")
    assert cifar_accel.predict(moved, pictures) == expected
    assert cifar_accel.predict(f"local-dir:{moved}", pictures) == expected


def test_images_may_be_files_or_open_or_arrays(model, pictures):
    classifier = cifar_accel.load(model)
    opened = [Image.open(file) for file in pictures]
    arrays = [np.asarray(image) for image in opened]
    expected = classifier.predict(pictures, top_k=3)
    assert [len(found) for found in expected] == [3, 3, 3]
    for found in expected:
        assert {prediction.label for prediction in found} <= set(DIGITS)
        shares = [prediction.probability for prediction in found]
        assert shares == sorted(shares, reverse=True)
    for images in (map(str, pictures), opened, arrays):
        assert classifier.predict(images, top_k=3) == expected
    # Another batch is the same up to rounding.
    again = classifier.predict(pictures, top_k=3, batch_size=2)
    for a, b in zip(chain(*again), chain(*expected), strict=True):
        assert a.label == b.label
        assert a.probability == pytest.approx(b.probability, abs=1e-6)
    # One image alone is a list of one.
    assert classifier.predict(pictures[0], top_k=3) == expected[:1]
    # All classes together are sure.
    assert classifier.predict(arrays[0], top_k=3) == expected[:1]
    (found,) = classifier.predict(arrays[0][None], top_k=99)
    assert sum(prediction.probability for prediction in found) == pytest.approx(1, abs=1e-5)
    with pytest.raises(BadInput, match="top_k 0, batch_size 64: both must be 1 or more"):
        classifier.predict(pictures, top_k=0)
    for empty in (np.zeros((0, 5, 3), np.uint8), Image.new("RGB", (0, 0))):
        with pytest.raises(BadInput, match="must be uint8|has 0x0 pixels"):
            classifier.predict([empty])
    with pytest.raises(BadInput, match=r"must be uint8 \[H, W, 3\], not float64 \(2, 2\)"):
        classifier.predict([np.zeros((2, 2))])


def test_an_image_of_any_shape_has_an_answer(model):
    shapes = [(1, 1), (1, 65_000), (65_000, 1), (3, 4000)]
    images = [np.zeros((*shape, 3), np.uint8) for shape in shapes]
    assert len(cifar_accel.predict(model, images)) == 4


def test_a_long_image_is_seen_at_its_centre(model):
    """What is cut away before it is resized would have been cut away afterwards."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32 * 11, 3), np.uint8)
    by_itself = cifar_accel.predict(model, [pixels[:, 160:192]])
    assert cifar_accel.predict(model, [pixels]) == by_itself


def test_an_open_image_is_what_its_file_is(model, tmp_path):
    """Turned as its EXIF data say; 16 bits are scaled."""
    rng = np.random.default_rng(0)
    turned = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    grey = Image.fromarray(rng.integers(0, 65536, (40, 40)).astype(np.uint16))
    grey.save(tmp_path / "grey.png")
    classifier = cifar_accel.load(model)
    for file in (tmp_path / "turned.png", tmp_path / "grey.png"):
        with Image.open(file) as image:
            assert torch.equal(classifier.prepare(image), classifier.prepare(file))
    # It is read when it is used.
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "turned.png").read_bytes()[:-3000])
    with Image.open(cut) as image, pytest.raises(BadInput, match="given open is not whole"):
        classifier.prepare(image)


def test_images_are_cut_and_not_squeezed_as_in_training(run, command, tmp_path):
    """Whatever was done to those of the weights that it began with."""
    args = replace(recipe_defaults("digits"), model="test_nfnet", pretrained=False)
    made = build_model(args, 10, str)
    made.pretrained_cfg["crop_mode"] = "squash"
    save_model(made, tmp_path / "saved", args, DIGITS)
    assert cifar_accel.load(tmp_path / "saved").input["crop_mode"] == "center"

    # Earlier versions wrote what the weights had.
    config = json.loads((run / "model" / "config.json").read_text())
    config["pretrained_cfg"]["crop_mode"] = "squash"
    (run / "model" / "config.json").write_text(json.dumps(config))
    assert cifar_accel.load(run).input["crop_mode"] == "center"
    assert command("export", run, "--out", tmp_path / "out")[0] == 0
    assert cifar_accel.load(tmp_path / "out").input["crop_mode"] == "center"
    # A model without its run is what it says.
    moved = (run / "model").rename(tmp_path / "moved")
    assert cifar_accel.load(moved).input["crop_mode"] == "squash"
    code, _, err = command("evaluate", moved, "--dataset", "digits")
    assert code == 2
    assert "crop squash; here they are made by bilinear or bicubic and the centre" in err


def test_names_may_be_a_table(model):
    """timm's other form; a number stands for a class that has none."""
    write_config(model, label_names={"0": "zero", "3": "three"})
    assert cifar_accel.load(model).classes == ["zero", "1", "2", "three", *DIGITS[4:]]


def test_a_published_model_knows_imagenets_names(weights, pictures):
    folder = weights / "tf_efficientnet_lite0.in1k"
    classifier = cifar_accel.load(folder)
    assert classifier.size == 224
    assert len(classifier.classes) == 1000
    assert classifier.classes[0].startswith("tench")
    assert len(classifier.predict(pictures)[0]) == 5


# ---- what is no model


def write_config(model, **values):
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def damage_weights(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def make_infinite(model):
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["head.fc.bias"][1] = torch.inf
    save_file(tensors, file)


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (damage_weights, "cannot be read as a model"),
        (make_infinite, "head.fc.bias is not finite"),
        (lambda model: (model / "model.safetensors").unlink(), "is neither a finished run nor a"),
        (lambda model: (model / "config.json").write_text("{"), "is neither a finished run nor a"),
        (lambda model: write_config(model, label_names=[1, 2]), "config.json: .* label_names"),
        (lambda model: write_config(model, label_names=DIGITS[1:]), "9 label_names for 10 classes"),
        (
            lambda model: write_config(model, architecture="no_such_net"),
            "cannot be read as a model",
        ),
    ],
)
def test_a_damaged_model_is_one_line(model, damage, complaint):
    damage(model)
    with pytest.raises(BadInput, match=complaint):
        cifar_accel.load(model)


@pytest.mark.parametrize(
    "name, value",
    [
        ("crop_pct", "all"),
        ("crop_pct", -1),
        ("crop_pct", 1e-9),
        ("interpolation", "random"),
        ("input_size", [3, 10**20, 10**20]),
        ("mean", [0.5, 0.5]),
        ("std", [0, 0, 0]),
    ],
)
def test_how_images_are_made_keeps_to_its_bounds(model, name, value):
    config = json.loads((model / "config.json").read_text())
    config["pretrained_cfg"][name] = value
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=rf"config.json: .* pretrained_cfg.{name}"):
        cifar_accel.load(model)


def test_weights_too_large_to_compute_with_are_refused(model, pictures):
    file = model / "model.safetensors"
    tensors = {name: tensor * 1e30 for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(BadInput, match="its weights are damaged: what it says is not finite"):
        cifar_accel.predict(model, pictures)


def test_what_is_not_there_is_one_line(tmp_path, model):
    with pytest.raises(BadInput, match="no such folder"):
        cifar_accel.load(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="--device mps: .* no such device"):
        cifar_accel.load(model, device="mps")


def test_a_model_without_names_counts_its_classes(model):
    config = json.loads((model / "config.json").read_text())
    del config["label_names"]
    (model / "config.json").write_text(json.dumps(config))
    assert cifar_accel.load(model).classes == DIGITS


# ---- for notebooks


def test_a_fresh_process_has_the_api(run, pictures):
    code = f"""
import sys, cifar_accel
assert "torch" not in sys.modules
runs = cifar_accel.read_runs({str(run.parent)!r})
assert "torch" not in sys.modules
print(runs[0].summary["status"], runs[0].options["model"], runs[0].rows[-1]["step"])
classifier = cifar_accel.load({str(run)!r})
assert isinstance(classifier, cifar_accel.Classifier)
(found,) = classifier.predict([{str(pictures[0])!r}], top_k=1)
print(isinstance(found[0], cifar_accel.Prediction), found[0].label in {DIGITS!r})
try:
    cifar_accel.read_runs("nowhere")
except cifar_accel.BadInput as error:
    print(error)
try:
    cifar_accel.nothing
except AttributeError as error:
    print(error)
"""
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert out.splitlines() == [
        "finished test_nfnet 8",
        "True True",
        "nowhere: no such folder",
        "module 'cifar_accel' has no attribute 'nothing'",
    ]


def test_the_api_is_typed():
    """What __init__.pyi says is what __init__.py has."""
    text = Path(cifar_accel.__path__[0], "__init__.pyi").read_text()
    assert set(cifar_accel.__all__) <= set(dir(cifar_accel))
    for name in cifar_accel.__all__:
        assert name == "__version__" or f"as {name}\n" in text
        assert getattr(cifar_accel, name)
