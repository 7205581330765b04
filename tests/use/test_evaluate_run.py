import csv
import json
import resource
from dataclasses import asdict, replace

import numpy as np
import psutil
import pytest
import torch
from conftest import image_folder, parquet_folder
from safetensors.torch import load_file, save_file

from cifar_accel.errors import BadInput
from cifar_accel.models.create import build_model
from cifar_accel.models.weights import save_model
from cifar_accel.options.options import EvaluateArguments
from cifar_accel.options.recipes import recipe_defaults
from cifar_accel.records.predictions import FILE as PREDICTIONS
from cifar_accel.records.predictions import read_predictions
from cifar_accel.results.superclasses import CIFAR100
from cifar_accel.use.evaluate_run import evaluate_run

NAMES = ["ant", "bee", "cow", "dog"]


@pytest.fixture
def made_run(tmp_path):
    """Gives the folder of a run on `dataset` whose model names its classes `names`."""

    def make(dataset, names, name="run", **options):
        options = {"model": "test_nfnet", "pretrained": False, "run_name": "a"} | options
        args = replace(
            recipe_defaults("digits"),
            dataset=str(dataset),
            data_dir=str(tmp_path / "cache"),
            **options,
        )
        facts = {
            "mixed_precision": "no",
            "classes": len(names),
            "input_mean": [0.5, 0.5, 0.5],
            "input_std": [0.25, 0.25, 0.25],
        }
        config = {"options": asdict(args) | facts, "provenance": {}}
        folder = tmp_path / name
        save_model(build_model(args, len(names), str), folder / "model", args, names)
        (folder / "config.json").write_text(json.dumps(config))
        ending = {"status": "finished", "steps": 1, "total_steps": 1, "train_loss": 1}
        ending["accuracy"] = 0
        (folder / "summary.json").write_text(json.dumps(ending))
        return folder

    return make


def figures(run, **options):
    return evaluate_run(EvaluateArguments(str(run), device="cpu", **options), str, str)


def test_labels_are_matched_by_the_names_of_the_classes(tmp_path, made_run):
    """A model that counts its classes backwards, each with its weights, scores the same."""
    data = parquet_folder(tmp_path / "data")
    run = made_run(data, NAMES)
    expected = figures(run)
    # The same model, its outputs in reverse.
    file = run / "model" / "model.safetensors"
    weights = load_file(file)
    for name in ("head.fc.weight", "head.fc.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, file)
    config = json.loads((run / "model" / "config.json").read_text())
    config["label_names"] = NAMES[::-1]
    (run / "model" / "config.json").write_text(json.dumps(config))
    for given in (None, str(data)):
        again = figures(run, dataset=given)
        assert again["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert again["accuracy"] == expected["accuracy"]


def test_damaged_predictions_are_written_anew(tmp_path, made_run):
    run = made_run(parquet_folder(tmp_path / "data"), NAMES)
    accuracy = figures(run)["accuracy"]
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"accuracy": accuracy}))
    (run / PREDICTIONS).write_bytes(b"damaged")
    figures(run)
    written = (run / PREDICTIONS).stat().st_mtime_ns
    assert read_predictions(run)["test"].correct.mean() == pytest.approx(accuracy)
    # One that is its own stays.
    figures(run)
    assert (run / PREDICTIONS).stat().st_mtime_ns == written


def test_images_that_have_changed_since_are_told(tmp_path, made_run):
    data = parquet_folder(tmp_path / "data")
    run = made_run(data, NAMES)
    config = json.loads((run / "config.json").read_text())
    config["options"]["data_fingerprint"] = "another"
    (run / "config.json").write_text(json.dumps(config))

    def said(dataset=None):
        lines = []
        args = EvaluateArguments(str(run), device="cpu", dataset=dataset)
        evaluate_run(args, lines.append, lines.append)
        return " ".join(lines)

    assert "are not those that the run was trained with" in said()
    assert "not those" not in said(str(data))


@pytest.mark.parametrize("model", ["test_nfnet", "test_vit"])
def test_another_size(tmp_path, made_run, model):
    """As a run of that size that has the same weights."""
    data = parquet_folder(tmp_path / "data")
    run = made_run(data, NAMES, model=model, image_size=32)
    weights = str(run / "model" / "model.safetensors")
    larger = made_run(data, NAMES, "larger", model=model, image_size=48, checkpoint=weights)
    said = []
    args = EvaluateArguments(str(run), device="cpu", image_size=48)
    result = evaluate_run(args, said.append, said.append)
    assert "note: at 48 pixels, which is not the model's own size" in said
    # Nothing of it is left in the run folder.
    assert not (run / PREDICTIONS).exists()
    assert result == figures(larger)


def test_images_that_no_memory_is_left_for(tmp_path, made_run):
    run = made_run(parquet_folder(tmp_path / "data"), NAMES, model="test_resnet", image_size=32)
    before = resource.getrlimit(resource.RLIMIT_AS)
    # Room for one image, and not for a batch.
    room = psutil.Process().memory_info().vms + 1000 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (room, before[1]))
    try:
        with pytest.raises(BadInput, match="no room on cpu for .*--batch-size 256; make it small"):
            figures(run, image_size=2000)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_size_that_the_model_cannot_take(tmp_path, made_run):
    run = made_run(parquet_folder(tmp_path / "data"), NAMES, model="test_vit", image_size=32)
    with pytest.raises(BadInput, match=r"--image-size 33: .*model cannot take it: .* patch size"):
        figures(run, image_size=33)


def test_an_older_model_of_a_run_that_goes_on_is_not_taken_for_it(tmp_path, made_run):
    run = made_run(parquet_folder(tmp_path / "data"), NAMES)
    (run / "summary.json").unlink()
    with pytest.raises(BadInput, match="the run is not finished"):
        figures(run)


def test_images_may_be_of_some_of_the_classes(tmp_path, made_run):
    run = made_run("digits", ["ant", "cat", "dog", "eel"])
    data = image_folder(tmp_path / "data")
    assert figures(run, dataset=str(data))["evaluated_images"] == 6


def test_a_class_that_the_model_does_not_know_is_refused(tmp_path, made_run):
    data = image_folder(tmp_path / "data")
    run = made_run(data, ["cat", "eel"])
    # As many classes as the model's. The run's own data may have changed as well.
    for given in (None, str(data)):
        with pytest.raises(BadInput, match=r"\['dog'\], that .* does not know; it knows 2, such"):
            figures(run, dataset=given)


def test_numbers_are_no_names(tmp_path, made_run):
    data = parquet_folder(tmp_path / "data", names=False)
    with pytest.raises(BadInput, match=r"\['0', '1', '2'\], which are numbers and no names"):
        figures(made_run(data, NAMES))


def test_weights_that_are_not_finite_are_refused(tmp_path, made_run):
    run = made_run(image_folder(tmp_path / "data"), ["cat", "dog"])
    file = run / "model" / "model.safetensors"
    weights = load_file(file)
    weights["head.fc.bias"][1] = torch.inf
    save_file(weights, file)
    with pytest.raises(BadInput, match=r"run/model: .* head.fc.bias is not finite"):
        figures(run)


# ---- a model alone, and other images


def classes_folder(root, names, sizes=((32, 32),)):
    """A folder of classes without train/, of three images each."""
    data = image_folder(root, sizes, splits=("test",))
    for old, new in zip(("cat", "dog"), names, strict=True):
        (data / "test" / old).rename(data / new)
    (data / "test").rmdir()
    return data


def test_a_model_alone_is_judged_as_its_run_is(tmp_path, trainer, cache):
    data = parquet_folder(tmp_path / "data")
    words = ("--dataset", str(data), "--limit-train", "0", "--limit-test", "0", "--epochs", "1")
    run = trainer(*words, "--batch-size", "4", "--tracker", "none").run
    expected = {size: figures(run, image_size=size) for size in (None, 48)}
    assert expected[None]["loss"] != expected[48]["loss"]
    # Still in its run folder it is the run's.
    assert figures(run / "model") == expected[None]
    moved = (run / "model").rename(tmp_path / "moved")
    given = {"dataset": str(data), "data_dir": cache}
    for size, as_the_run in expected.items():
        alone = figures(moved, image_size=size, **given)
        assert alone["loss"] == pytest.approx(as_the_run["loss"], rel=1e-6)
        assert alone["classes"] == as_the_run["classes"]
    with pytest.raises(BadInput, match="is neither a finished run nor a model"):
        figures(tmp_path)
    with pytest.raises(BadInput, match="is a model without its run: give --dataset FOLDER"):
        figures(moved)
    with pytest.raises(BadInput, match="--tracker wandb: .* lies in no run folder"):
        figures(moved, tracker="wandb", **given)


def test_a_folder_of_classes_is_judged_as_a_whole(tmp_path, made_run):
    """Its classes in another order than the model's, some of them, and images of any size."""
    run = made_run("digits", ["ant", "dog", "cat", "eel"])
    data = classes_folder(tmp_path / "data", ("cat", "dog"), sizes=((32, 32), (40, 60)))
    said = []
    args = EvaluateArguments(str(run), device="cpu", dataset=str(data))
    result = evaluate_run(args, said.append, said.append)
    assert result["evaluated_images"] == 6
    assert [c["name"] for c in result["classes"]] == ["dog", "cat"]
    assert [c["images"] for c in result["classes"]] == [3, 3]
    assert "note: images of 2 of the model's 4 classes" in said
    assert f"(6 images of {data})" in " ".join(said)
    # Nothing of them is left in the run folder.
    assert not (run / PREDICTIONS).exists()


def test_a_class_may_be_called_train(tmp_path, made_run):
    """As one of CIFAR-100's is; a split holds folders, and a class images."""
    run = made_run("digits", ["bus", "train"])
    data = classes_folder(tmp_path / "data", ("bus", "train"))
    result = figures(run, dataset=str(data))
    assert [c["images"] for c in result["classes"]] == [3, 3]


def test_a_folder_with_test_images_alone(tmp_path, made_run):
    run = made_run("digits", ["cat", "dog"])
    data = image_folder(tmp_path / "data", splits=("test",))
    assert figures(run, dataset=str(data))["evaluated_images"] == 6


def test_the_names_of_a_damaged_run_are_refused(tmp_path, made_run):
    """The same as wherever a model is read."""
    run = made_run(parquet_folder(tmp_path / "data"), NAMES)
    file = run / "model" / "config.json"
    for names, complaint in ((5, "config.json: .* label_names"), (NAMES[1:], "has 3 label_names")):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"label_names": names}))
        with pytest.raises(BadInput, match=complaint):
            figures(run)


def test_details_are_those_of_the_predictions(tmp_path, made_run):
    data = parquet_folder(tmp_path / "data", rows=40)
    result = figures(made_run(data, NAMES))
    right = sum(c["accuracy"] * c["images"] for c in result["classes"])
    assert right / 40 == pytest.approx(result["accuracy"])
    low, high = result["accuracy_interval"]
    assert low < result["accuracy"] < high
    assert 0 <= result["calibration_error"] <= 1
    wrong = sum(pair["images"] for pair in result["confused"])
    assert wrong == 40 - right


def test_a_file_of_predictions(tmp_path, made_run):
    run = made_run("digits", ["cat", "dog"])
    data = classes_folder(tmp_path / "data", ("cat", "dog"))
    file = tmp_path / "said.csv"
    result = figures(run, dataset=str(data), predictions=str(file))
    rows = list(csv.DictReader(file.open()))
    assert [row["image"] for row in rows] == [str(f) for f in sorted(data.rglob("*.png"))]
    assert {row["label"] for row in rows} == {"cat", "dog"}
    right = [row["label"] == row["prediction"] for row in rows]
    assert np.mean(right) == result["accuracy"]
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)
    # What the file is stays: a link, for one.
    (tmp_path / "link.csv").symlink_to(file)
    figures(run, dataset=str(data), predictions=str(tmp_path / "link.csv"))
    assert (tmp_path / "link.csv").is_symlink()
    with pytest.raises(BadInput, match="--predictions .*must be a file"):
        figures(run, dataset=str(data), predictions=str(tmp_path))
    with pytest.raises(BadInput, match="--predictions .*nowhere/said.csv: must be a file in a"):
        figures(run, dataset=str(data), predictions=str(tmp_path / "nowhere" / "said.csv"))


def test_a_name_that_two_classes_have_is_refused(tmp_path, made_run):
    run = made_run("digits", ["cat", "dog", "cat"])
    with pytest.raises(BadInput, match="'cat' is the name of two of the model's classes"):
        figures(run, dataset=str(classes_folder(tmp_path / "data", ("cat", "dog"))))


def test_json_is_all_of_stdout(command, run):
    code, out, err = command("evaluate", run, "--json")
    assert (code, err) == (0, "")
    read = json.loads(out)
    assert read["accuracy"] == json.loads((run / "summary.json").read_text())["accuracy"]
    assert len(read["classes"]) == 10
    # What is said beside it goes elsewhere.
    code, out, err = command("evaluate", run, "--json", "--predictions", run / "said.csv")
    assert json.loads(out) == read
    assert "written" in err


def test_cifar100_has_super_classes(cifar, tmp_path, command):
    """Of a model that knows nothing of them yet."""
    args = replace(recipe_defaults("digits"), model="test_nfnet", pretrained=False)
    names = " ".join(CIFAR100.values()).split()
    save_model(build_model(args, 100, str), tmp_path / "model", args, names)
    words = ("evaluate", tmp_path / "model", "--dataset", cifar, "--data-dir", tmp_path / "cache")
    code, out, err = command(*words, "--device", "cpu")
    assert code == 0, err
    assert "groups    lowest of 20: " in out
    assert f"(10,000 test images of {cifar})" in out
