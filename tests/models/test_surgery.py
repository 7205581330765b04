import copy
from dataclasses import replace

import pytest
import timm
import torch

from cifar_accel.models import surgery
from cifar_accel.models.create import build_model
from cifar_accel.models.weights import load_model, save_model
from cifar_accel.options.recipes import recipe_defaults


def shortened(model):
    return [name for name, layer in model.named_modules() if type(layer) is surgery._CentreConv2d]


@pytest.mark.parametrize("name", ["resnet18", "resnet26t", "test_nfnet"])
def test_shortened_convolutions_compute_the_same(name):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=7).double().train()
    short = copy.deepcopy(plain)
    surgery.apply(short)
    assert shortened(short) or name == "test_nfnet", "nothing was shortened"
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for model in (plain, short):
        model(x).square().sum().backward()
    gradients = dict(short.named_parameters())
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[key].grad, parameter.grad)
    assert plain.state_dict().keys() == short.state_dict().keys()
    torch.testing.assert_close(copy.deepcopy(short).eval()(x), plain.eval()(x))


def test_only_dense_convolutions_that_keep_the_size_are_shortened():
    def convolution(kernel, **keywords):
        return torch.nn.Conv2d(8, 8, kernel, **keywords)

    model = torch.nn.ModuleDict(
        {
            "same": convolution(3, padding=1),
            "dilated": convolution(3, padding=2, dilation=2),
            "oblong": convolution((1, 3), padding=(0, 1)),
            "pointwise": convolution(1),
            "shrinking": convolution(3),
            "grouped": convolution(3, padding=1, groups=2),
            "reflecting": convolution(3, padding=1, padding_mode="reflect"),
        }
    )
    surgery.apply(model)
    assert shortened(model) == ["same", "dilated", "oblong"]


def test_a_new_model_and_a_loaded_one_are_changed_alike(tmp_path):
    args = replace(recipe_defaults("digits"), model="resnet18", pretrained=False)
    made = build_model(args, 10, print)
    save_model(made, tmp_path, args, [str(digit) for digit in range(10)])
    loaded = load_model(tmp_path)
    assert shortened(made)
    assert shortened(loaded) == shortened(made)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(x), made.eval()(x))
