import copy
import json
import os
import pickle
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from cifar_accel.errors import BadInput
from cifar_accel.models.create import (
    ALIASES,
    build_model,
    check_model,
    forward_flops,
    use_channels_last,
)
from cifar_accel.models.surgery import shorten_convolutions
from cifar_accel.models.weights import classifier_parameters, load_weights, read_weights, save_model
from cifar_accel.options.options import TrainingArguments
from cifar_accel.options.recipes import recipe_defaults

PLAIN = replace(recipe_defaults("digits"), model="test_nfnet", pretrained=False)


def quiet(line):
    pass


def test_the_short_names_are_the_reports_models():
    assert ALIASES == {
        "nfnet": "dm_nfnet_f0.dm_in1k",
        "vit": "vit_base_patch8_224.augreg_in21k_ft_in1k",
    }
    with torch.device("meta"):
        assert timm.create_model(ALIASES["vit"], img_size=32, num_classes=100)(
            torch.zeros(1, 3, 32, 32)
        ).shape == (
            1,
            100,
        )


@pytest.mark.parametrize(
    "name, keywords", [("test_nfnet", ()), ("test_vit", ("patch_size=8",)), ("test_vit", ())]
)
def test_a_saved_model_is_a_local_dir_of_timm(tmp_path, name, keywords):
    args = replace(PLAIN, model=name, model_kwargs=keywords)
    model = build_model(args, 10, quiet).eval()
    save_model(model, tmp_path / "model", args, [str(i) for i in range(10)])
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), again(x))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["num_classes"] == 10 and config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["mean"] == list(model.pretrained_cfg["mean"])


def test_the_same_seed_gives_the_same_new_weights():
    a, b = (build_model(PLAIN, 10, quiet).state_dict() for _ in range(2))
    c = build_model(replace(PLAIN, seed=1), 10, quiet).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(
        a["head.fc.weight"], c["head.fc.weight"]
    )


@pytest.mark.parametrize("form", ["safetensors", "pth", "state_dict", "wrapped", "run"])
def test_starting_weights_in_every_form(tmp_path, form):
    source = build_model(replace(PLAIN, seed=5), 10, quiet).state_dict()
    path = tmp_path / {"safetensors": "w.safetensors", "run": "run"}.get(form, "w.pth")
    if form == "safetensors":
        save_file(source, path)
    elif form == "run":
        (path / "model").mkdir(parents=True)
        save_file(source, path / "model" / "model.safetensors")
    else:
        wrapped = {f"module._orig_mod.{k}": v for k, v in source.items()}
        torch.save(
            {
                "pth": source,
                "state_dict": {"state_dict": source, "epoch": 3},
                "wrapped": {"model": wrapped},
            }[form],
            path,
        )
    said = []
    model = build_model(replace(PLAIN, checkpoint=str(path)), 10, said.append)
    assert all(torch.equal(v, source[k]) for k, v in model.state_dict().items())
    assert f"{len(source)} of {len(source)} tensors" in said[0]


def test_another_number_of_classes_keeps_a_new_classifier(tmp_path):
    source = build_model(replace(PLAIN, seed=5), 1000, quiet).state_dict()
    save_file(source, tmp_path / "w.safetensors")
    line = load_weights(model := build_model(PLAIN, 10, quiet), str(tmp_path / "w.safetensors"))
    assert "new: head.fc.weight, head.fc.bias" in line
    assert torch.equal(model.state_dict()["stem.conv1.weight"], source["stem.conv1.weight"])


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save_file(
        build_model(replace(PLAIN, model="test_vit"), 10, quiet).state_dict(),
        tmp_path / "vit.safetensors",
    )
    with pytest.raises(BadInput, match="does not fit --model: .* are not in it, first"):
        build_model(replace(PLAIN, checkpoint=str(tmp_path / "vit.safetensors")), 10, quiet)
    state = build_model(PLAIN, 10, quiet).state_dict()
    state["stem.conv1.weight"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "bent.safetensors")
    with pytest.raises(BadInput, match="stem.conv1.weight has shape 3x3"):
        build_model(replace(PLAIN, checkpoint=str(tmp_path / "bent.safetensors")), 10, quiet)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize("content", [pickle.dumps({"state_dict": Hostile()}), b"nothing", None])
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
    "changes",
    [
        {"architecture": ["test_nfnet"]},
        {"num_classes": "7"},
        {"pretrained_cfg": None},
        {"model_args": [1]},
        {"pretrained_cfg": {"mean": None}},
        {"pretrained_cfg": {"std": "abc"}},
    ],
)
def test_a_local_model_in_another_form_is_refused(tmp_path, changes):
    about = {"architecture": "test_nfnet", "num_classes": 7, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    check_model(replace(PLAIN, model=f"local-dir:{tmp_path}", pretrained=False), quiet)
    (tmp_path / "config.json").write_text(json.dumps(about | changes))
    with pytest.raises(BadInput, match="in timm's form"):
        check_model(replace(PLAIN, model=f"local-dir:{tmp_path}", pretrained=False), quiet)


@pytest.mark.parametrize(
    "table",
    [
        {1: torch.zeros(2)},
        {"w": torch.zeros(2).to_sparse()},
        {"w": torch.zeros(2, dtype=torch.complex64)},
        {"w": torch.zeros(2, device="meta")},
    ],
)
def test_tables_of_other_tensors_are_no_weights(tmp_path, table):
    torch.save(table, tmp_path / "w.pth")
    with pytest.raises(BadInput, match="no table of dense real tensors"):
        read_weights(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["test_nfnet", "test_vit", "test_efficientnet"])
def test_the_classifier_is_found_by_name(name):
    model = build_model(replace(PLAIN, model=name), 7, quiet)
    assert sorted(p.shape[0] for p in classifier_parameters(model)) == [7, 7]


def test_imagenet_weights_from_a_folder(weights):
    args = replace(
        PLAIN,
        model=f"local-dir:{weights / 'deit_tiny_patch16_224.fb_in1k'}",
        pretrained=True,
        model_kwargs=("patch_size=4",),
    )
    model = build_model(args, 100, quiet)
    assert model.patch_embed.proj.weight.shape == (192, 3, 4, 4) and model.pos_embed.shape[1] == 65
    assert model.blocks[0].attn.qkv.weight.std() > 0.04  # trained, not initialised (0.02)


@pytest.mark.parametrize("name", ["resnet18", "resnet26t", "test_nfnet"])
def test_shortened_convolutions_compute_the_same(name):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=7).double().train()
    short = copy.deepcopy(plain)
    shorten_convolutions(short)
    swapped = [m for m in short.modules() if type(m).__name__ == "_CentreConv2d"]
    assert swapped or name == "test_nfnet", "nothing was shortened"
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for model in (plain, short):
        model(x).square().sum().backward()
    gradients = dict(short.named_parameters())
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[key].grad, parameter.grad)
    assert plain.state_dict().keys() == short.state_dict().keys()
    torch.testing.assert_close(copy.deepcopy(short).eval()(x), plain.eval()(x))


def test_the_memory_format_follows_the_family():
    nfnet, vit = (timm.create_model(n) for n in ("test_nfnet", "test_vit"))
    args, cpu = TrainingArguments(), torch.device("cpu")
    assert use_channels_last(args, nfnet, cpu) and not use_channels_last(args, vit, cpu)
    assert use_channels_last(replace(args, memory_format="channels_last"), vit, cpu)
    assert not use_channels_last(replace(args, memory_format="contiguous"), nfnet, cpu)


def test_flops_are_counted():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.Flatten())
    assert forward_flops(model, 16) == 2 * 16 * 16 * 3 * 8 * 9
