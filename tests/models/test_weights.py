import json
import os
import pickle
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from cifar_accel.errors import BadInput
from cifar_accel.models.create import build_model
from cifar_accel.models.weights import (
    classifier_parameters,
    load_model,
    load_weights,
    read_weights,
    save_model,
)
from cifar_accel.options.recipes import recipe_defaults

PLAIN = replace(recipe_defaults("digits"), model="test_nfnet", pretrained=False)
DIGITS = [str(digit) for digit in range(10)]


def quiet(line):
    pass


# ---- starting weights


@pytest.mark.parametrize("form", ["safetensors", "pth", "state_dict", "wrapped", "run"])
def test_starting_weights_in_every_form(tmp_path, form):
    source = build_model(replace(PLAIN, seed=5), 10, quiet).state_dict()
    path = tmp_path / "w.pth"
    if form == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file(source, path)
    elif form == "run":
        path = tmp_path / "run"
        (path / "model").mkdir(parents=True)
        save_file(source, path / "model" / "model.safetensors")
    elif form == "pth":
        torch.save(source, path)
    elif form == "state_dict":
        torch.save({"state_dict": source, "epoch": 3}, path)
    elif form == "wrapped":
        prefixed = {f"module._orig_mod.{name}": tensor for name, tensor in source.items()}
        torch.save({"model": prefixed}, path)
    said = []
    model = build_model(replace(PLAIN, checkpoint=str(path)), 10, said.append)
    assert all(torch.equal(v, source[name]) for name, v in model.state_dict().items())
    assert f"{len(source)} of {len(source)} tensors" in said[0]


def test_another_number_of_classes_keeps_a_new_classifier(tmp_path):
    source = build_model(replace(PLAIN, seed=5), 1000, quiet).state_dict()
    save_file(source, tmp_path / "w.safetensors")
    model = build_model(PLAIN, 10, quiet)
    line = load_weights(model, str(tmp_path / "w.safetensors"))
    assert "new: head.fc.weight, head.fc.bias" in line
    assert torch.equal(model.state_dict()["stem.conv1.weight"], source["stem.conv1.weight"])


def test_a_vit_goes_on_at_another_size(tmp_path):
    """With the very embeddings that timm makes for it from the same file."""
    small = replace(PLAIN, model="test_vit", image_size=64)
    save_model(build_model(small, 10, quiet), tmp_path / "model", small, DIGITS)
    said = []
    large = replace(small, image_size=96, checkpoint=str(tmp_path / "model"))
    model = build_model(large, 10, said.append)
    assert "pos_embed resampled from 4x4 to 6x6" in said[0]
    expected = timm.create_model(
        f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=10, img_size=96
    )
    assert torch.equal(model.pos_embed, expected.pos_embed)
    # What is no square grid is refused.
    state = expected.state_dict() | {"pos_embed": torch.zeros(1, 8, 64)}
    save_file(state, tmp_path / "bent.safetensors")
    with pytest.raises(BadInput, match="does not fit --model: pos_embed has shape"):
        build_model(replace(large, checkpoint=str(tmp_path / "bent.safetensors")), 10, quiet)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    vit = build_model(replace(PLAIN, model="test_vit"), 10, quiet)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(BadInput, match=r"does not fit --model: .* are not in it, first"):
        build_model(replace(PLAIN, checkpoint=str(tmp_path / "vit.safetensors")), 10, quiet)
    state = build_model(PLAIN, 10, quiet).state_dict()
    state["stem.conv1.weight"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "bent.safetensors")
    with pytest.raises(BadInput, match=r"stem.conv1.weight has shape \[3, 3\], the model's is \["):
        build_model(replace(PLAIN, checkpoint=str(tmp_path / "bent.safetensors")), 10, quiet)


@pytest.mark.parametrize("tensor", ["bn1.running_mean", "classifier.bias"])
def test_weights_that_are_not_finite_are_refused(tmp_path, tensor):
    """Training would not notice a running mean: only evaluation reads it."""
    args = replace(PLAIN, model="test_efficientnet")
    model = build_model(args, 10, quiet)
    model.state_dict()[tensor][0] = torch.nan
    torch.save(model.state_dict(), tmp_path / "w.pth")
    path = str(tmp_path / "w.pth")
    with pytest.raises(BadInput, match=rf"--checkpoint {path}: .* {tensor} is not finite"):
        build_model(replace(args, checkpoint=path), 10, quiet)

    save_model(model, tmp_path / "model", args, DIGITS)
    local = replace(args, model=f"local-dir:{tmp_path / 'model'}", pretrained=True)
    with pytest.raises(BadInput, match=rf"--model local-dir:.*/model: .* {tensor} is not finite"):
        build_model(local, 10, quiet)
    with pytest.raises(BadInput, match=rf"/model: .* {tensor} is not finite"):
        load_model(tmp_path / "model")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize(
    "content", [pickle.dumps({"state_dict": Hostile()}), b"nothing", b"", None]
)
def test_hostile_and_broken_files_are_refused_unread(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    if content is None:
        torch.save({"weight": Hostile()}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(BadInput, match="cannot be read safely"):
        read_weights(str(path))
    assert not (tmp_path / "hostile-was-here").exists()


@pytest.mark.parametrize(
    "table, message",
    [
        ({1: torch.zeros(2)}, "cannot be read safely as weights"),
        ([torch.zeros(2)], "cannot be read safely as weights"),
        ({"w": torch.zeros(2).to_sparse()}, "no table of dense real tensors"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "no table of dense real tensors"),
        ({"w": torch.zeros(2, device="meta")}, "no table of dense real tensors"),
        ({"model": {"w": torch.zeros(2)}, "state_dict": 3}, "cannot be read safely as weights"),
    ],
)
def test_tables_of_other_tensors_are_no_weights(tmp_path, table, message):
    torch.save(table, tmp_path / "w.pth")
    with pytest.raises(BadInput, match=message):
        read_weights(str(tmp_path / "w.pth"))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"holds no model.safetensors"):
        read_weights(str(tmp_path))
    with pytest.raises(BadInput, match="no such file or folder"):
        read_weights(str(tmp_path / "nowhere"))


# ---- the classifier


@pytest.mark.parametrize("name", ["test_nfnet", "test_vit", "test_efficientnet"])
def test_the_classifier_is_found_by_name(name):
    model = build_model(replace(PLAIN, model=name), 7, quiet)
    assert sorted(p.shape[0] for p in classifier_parameters(model)) == [7, 7]


# ---- the saved form


@pytest.mark.parametrize(
    "name, keywords", [("test_nfnet", ()), ("test_vit", ("patch_size=8",)), ("test_vit", ())]
)
def test_a_saved_model_is_a_local_dir_of_timm(tmp_path, name, keywords):
    args = replace(PLAIN, model=name, model_kwargs=keywords)
    model = build_model(args, 10, quiet).eval()
    save_model(model, tmp_path / "model", args, DIGITS)
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), again(x))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["num_classes"] == 10
    # A second time it would be too much for transformers, which gives both to the model.
    assert "num_classes" not in config["model_args"]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["mean"] == list(model.pretrained_cfg["mean"])


def test_a_model_of_an_earlier_version_is_loaded(tmp_path):
    """It has the number of classes among the model's arguments too."""
    model = build_model(PLAIN, 10, quiet)
    save_model(model, tmp_path, PLAIN, DIGITS)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["num_classes"] = 10
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(tmp_path)
    assert loaded.num_classes == 10
    assert list(loaded.pretrained_cfg["label_names"]) == DIGITS


def test_saving_leaves_the_layout_of_a_model_in_training(tmp_path):
    model = build_model(PLAIN, 10, quiet).to(memory_format=torch.channels_last)
    save_model(model, tmp_path / "model", PLAIN, DIGITS)
    assert not model.stem.conv1.weight.is_contiguous()
    saved = load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(v, saved[name]) for name, v in model.state_dict().items())


def test_a_damaged_model_folder_is_one_line(tmp_path):
    save_model(build_model(PLAIN, 10, quiet), tmp_path / "model", PLAIN, DIGITS)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="cannot be read as a model"):
        load_model(tmp_path / "model")
