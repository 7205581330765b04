"""What a model says of each image, in a file."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from cifar_accel.data.datasets import Split
from cifar_accel.errors import BadInput
from cifar_accel.records.predictions import (
    FILE,
    keeps_logits,
    predictions_of,
    read_predictions,
    write_predictions,
)
from cifar_accel.records.predictions import of_outputs as of_labels


def split_of(n, classes=3):
    images = np.zeros((n, 3, 2, 2), np.uint8)
    return Split(images, np.arange(n) % classes, [f"class {c}" for c in range(classes)])


def of_outputs(split, outputs, fingerprint):
    return of_labels(split.labels, split.classes, outputs, fingerprint, split.places)


def outputs_of(n, classes=3):
    logits = np.random.default_rng(0).normal(size=(n, classes)).astype(np.float16)
    first = np.argsort(-logits, axis=1)[:, :5].astype(np.int32)
    return {"first_five": first, "logits": logits}


def test_what_is_written_is_read(tmp_path):
    split = split_of(7)
    written = {
        "test": of_outputs(split, outputs_of(7), "abc"),
        "held-out": of_outputs(split.subset(np.array([2, 4])), outputs_of(2), "abc"),
    }
    write_predictions(tmp_path, written)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    read = read_predictions(tmp_path)
    assert list(read) == ["test", "held-out"]
    for kind, expected in written.items():
        got = read[kind]
        assert got.labels.tolist() == expected.labels.tolist()
        assert got.places.tolist() == expected.places.tolist()
        assert (got.logits == expected.logits).all()
        assert (got.predicted == expected.logits.argmax(1)).all()
        assert got.correct.tolist() == (got.predicted == got.labels).tolist()
        assert (got.classes, got.images) == (split.classes, expected.images)


def test_images_are_told_apart():
    """By the data set, by which of its images they are, and by their order."""
    split = split_of(6)
    parts = [split, split.subset(np.arange(5)), split.subset(np.array([0, 1, 2, 3, 5]))]
    parts.append(split.subset(np.array([5, 3, 2, 1, 0])))
    seen = {of_outputs(part, outputs_of(len(part)), "abc").images for part in parts}
    assert len(seen) == 4
    assert of_outputs(split, outputs_of(6), "other").images not in seen
    # A part of a part is counted in the whole.
    again = split.subset(np.array([0, 1, 2, 3, 5])).subset(np.array([0, 1, 2, 3, 4]))
    assert of_outputs(again, outputs_of(5), "abc").images in seen


def test_large_logits_are_left_out(tmp_path):
    assert keeps_logits(10_000, 1000) and not keeps_logits(50_000, 1000)
    outputs = {"first_five": outputs_of(4)["first_five"]}
    write_predictions(tmp_path, {"test": of_outputs(split_of(4), outputs, "abc")})
    assert read_predictions(tmp_path)["test"].logits is None


@pytest.mark.parametrize(
    "spoilt",
    [
        {"test.first_five": np.zeros((4, 0), np.int32)},
        {"test.first_five": np.full((4, 3), 3, np.int32)},
        {"test.labels": np.full(4, -1, np.int32)},
        {"test.places": np.zeros(3, np.int32)},
        {"test.places": np.full(4, -(10**9), np.int32)},
        {"test.logits": np.zeros((4, 2), np.float16)},
        {"test.logits": np.full((4, 3), np.nan, np.float16)},
    ],
)
def test_figures_that_do_not_belong_together_are_refused(tmp_path, spoilt):
    write_predictions(tmp_path, {"test": of_outputs(split_of(4), outputs_of(4), "abc")})
    with safe_open(tmp_path / FILE, "numpy") as file:
        metadata = file.metadata()
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names} | spoilt
    save_file(tensors, tmp_path / FILE, metadata)
    with pytest.raises(BadInput, match="is no file of predictions"):
        read_predictions(tmp_path)


@pytest.mark.parametrize(
    "spoilt", [{"classes": "[[], [], []]"}, {"images": '{"test": ["abc"]}'}, {"images": "3"}]
)
def test_names_that_are_no_text_are_refused(tmp_path, spoilt):
    write_predictions(tmp_path, {"test": of_outputs(split_of(4), outputs_of(4), "abc")})
    with safe_open(tmp_path / FILE, "numpy") as file:
        metadata = file.metadata() | spoilt
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    save_file(tensors, tmp_path / FILE, metadata)
    with pytest.raises(BadInput, match="is no file of predictions"):
        read_predictions(tmp_path)


@pytest.mark.parametrize("images, flips", [(4, 1), (400, 1), (10_000, 20)])
def test_another_device_may_see_an_image_otherwise(tmp_path, images, flips):
    said = of_outputs(split_of(images), outputs_of(images), "abc")
    write_predictions(tmp_path, {"test": said})
    accuracy = float(said.correct.mean())
    assert predictions_of(tmp_path, "test", accuracy + flips / images) is not None
    with pytest.raises(BadInput, match="is not of the run's finished model"):
        predictions_of(tmp_path, "test", accuracy + (flips + 1) / images)


def test_predictions_are_those_of_the_run(tmp_path):
    said = of_outputs(split_of(4), outputs_of(4), "abc")
    write_predictions(tmp_path, {"test": said})
    accuracy = float(said.correct.mean())
    assert predictions_of(tmp_path, "test", accuracy, with_logits=False).images == said.images
    assert predictions_of(tmp_path, "held-out", accuracy) is None
    with pytest.raises(BadInput, match="is not of the run's finished model"):
        predictions_of(tmp_path, "test", accuracy + 0.5)


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_another_file_is_refused(tmp_path, content):
    assert read_predictions(tmp_path) == {}
    if content is None:
        save_file({"x": np.zeros(3)}, tmp_path / FILE)
    else:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(BadInput, match="is no file of predictions"):
        read_predictions(tmp_path)
