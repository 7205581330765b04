import json
import math
from dataclasses import replace

import pytest
import timm
import torch

from cifar_accel.errors import BadInput
from cifar_accel.models.create import (
    ALIASES,
    build_model,
    check_model,
    forward_flops,
    use_channels_last,
)
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
        vit = timm.create_model(ALIASES["vit"], img_size=32, num_classes=100)
        assert vit(torch.zeros(1, 3, 32, 32)).shape == (1, 100)


def test_the_same_seed_gives_the_same_new_weights():
    first = build_model(PLAIN, 10, quiet).state_dict()
    again = build_model(PLAIN, 10, quiet).state_dict()
    other_seed = build_model(replace(PLAIN, seed=1), 10, quiet).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.fc.weight"], other_seed["head.fc.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": ["test_nfnet"]},
        {"num_classes": "7"},
        {"pretrained_cfg": None},
        {"model_args": [1]},
        {"pretrained_cfg": {"mean": None}},
        {"pretrained_cfg": {"std": "abc"}},
        {"pretrained_cfg": {"mean": [math.nan, 0.5, 0.5]}},
        {"pretrained_cfg": {"mean": [0.5, 1e300, 0.5]}},
        {"pretrained_cfg": {"std": [0.5, 0.5, 0]}},
        {"pretrained_cfg": {"std": [math.inf, 0.5, 0.5]}},
    ],
)
def test_a_local_model_in_another_form_is_refused(tmp_path, changes):
    args = replace(PLAIN, model=f"local-dir:{tmp_path}")
    file = tmp_path / "config.json"
    config = {"architecture": "test_nfnet", "num_classes": 7, "pretrained_cfg": {}}
    file.write_text(json.dumps(config))
    check_model(args, quiet)
    file.write_text(json.dumps(config | changes))
    with pytest.raises(BadInput, match="in timm's form"):
        check_model(args, quiet)


@pytest.mark.parametrize("keywords", ["features_only=True", "global_pool=''"])
def test_a_model_that_gives_no_logits_is_refused(keywords):
    args = replace(PLAIN, model="test_vit", model_kwargs=(keywords,))
    with pytest.raises(BadInput, match="does not give 10 logits"):
        build_model(args, 10, quiet)


def test_a_model_that_cannot_be_saved_is_refused_before_it_trains():
    with pytest.raises(BadInput, match="its layers share weights"):
        build_model(replace(PLAIN, model="coat_tiny"), 10, quiet)


def test_a_local_model_that_gives_no_logits_is_refused(tmp_path):
    config = {"architecture": "test_nfnet", "num_classes": 7, "pretrained_cfg": {}}
    config["model_args"] = {"features_only": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="does not give 10 logits"):
        build_model(replace(PLAIN, model=f"local-dir:{tmp_path}"), 10, quiet)


def test_imagenet_weights_from_a_folder(weights):
    args = replace(
        PLAIN,
        model=f"local-dir:{weights / 'deit_tiny_patch16_224.fb_in1k'}",
        pretrained=True,
        model_kwargs=("patch_size=4",),
    )
    model = build_model(args, 100, quiet)
    assert model.patch_embed.proj.weight.shape == (192, 3, 4, 4)
    assert model.pos_embed.shape[1] == 65
    # Trained weights spread wider than new ones, whose deviation is 0.02.
    assert model.blocks[0].attn.qkv.weight.std() > 0.04


def test_the_memory_format_follows_the_family():
    nfnet = timm.create_model("test_nfnet")
    vit = timm.create_model("test_vit")
    args = TrainingArguments()
    cpu = torch.device("cpu")
    assert use_channels_last(args, nfnet, cpu)
    assert not use_channels_last(args, vit, cpu)
    assert use_channels_last(replace(args, memory_format="channels_last"), vit, cpu)
    assert not use_channels_last(replace(args, memory_format="contiguous"), nfnet, cpu)


def test_flops_are_counted():
    convolution = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
    model = torch.nn.Sequential(convolution, torch.nn.Flatten())
    assert forward_flops(model, 16) == 2 * 16 * 16 * 3 * 8 * 9
