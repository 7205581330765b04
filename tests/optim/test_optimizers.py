from dataclasses import replace

import pytest
import torch

from cifar_accel.errors import BadInput
from cifar_accel.models.create import build_model
from cifar_accel.optim.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    check_names,
    moments_per_weight,
    parameter_groups,
)
from cifar_accel.options.recipes import recipe_defaults

REPORT = replace(recipe_defaults("report"), warmup_epochs=5.0)
MODEL = replace(recipe_defaults("digits"), model="test_nfnet", pretrained=False)


def test_the_reports_adamw():
    optimizer = build_optimizer(build_model(MODEL, 10, str), replace(REPORT, pipeline="device"))
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert group["amsgrad"]
    assert group["weight_decay"] == 1e-2


@pytest.mark.parametrize("name", [*OPTIMIZERS, "lion", "lamb", "adopt", "sgd", "nadamw", "muon"])
def test_optimizers_step(name):
    model = build_model(MODEL, 10, str)
    optimizer = build_optimizer(model, replace(MODEL, optimizer=name, learning_rate=1e-3))
    before = model.head.fc.weight.clone()
    # The first step of some only gathers statistics.
    for _ in range(2):
        model(torch.rand(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(before, model.head.fc.weight)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"optimizer": "adamm"}, "--optimizer adamm: unknown; .* did you mean adamw"),
        ({"optimizer": "lionn"}, "--optimizer lionn: unknown; .* did you mean lion"),
        ({"optimizer": "adahessian"}, "needs second derivatives"),
        ({"optimizer": "lamb", "momentum": 0.5}, "--momentum has no effect on --optimizer lamb"),
        ({"scheduler": "cosin"}, "--scheduler cosin: unknown"),
    ],
)
def test_names_that_do_not_exist_are_refused(changes, complaint):
    with pytest.raises(BadInput, match=complaint):
        check_names(replace(REPORT, **changes))


@pytest.mark.parametrize("name", ["test_nfnet", "test_vit"])
def test_gains_norms_biases_and_positions_are_spared(name):
    model = build_model(replace(MODEL, model=name), 10, str)
    decayed, spared = parameter_groups(model, replace(MODEL, decay_all=False))
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] > 0
    assert spared["weight_decay"] == 0
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert all(names[p].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    expected = {
        "test_nfnet": ("gain", "bias"),
        "test_vit": ("pos_embed", "norm1.weight", "bias"),
    }
    for part in expected[name]:
        assert any(part in names[p] for p in spared["params"]), part


@pytest.mark.parametrize("name", ["test_nfnet", "test_vit", "test_resnet"])
def test_layer_decay(name):
    args = replace(MODEL, model=name, decay_all=False, layer_decay=0.5)
    model = build_model(args, 10, str)
    groups = parameter_groups(model, args)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scales = [scale[id(p)] for p in model.parameters()]
    # The classifier learns at the full rate, what lies before it at half of that, and so on.
    assert scales[-1] == 1
    assert sorted(set(scales)) == [0.5**n for n in reversed(range(len(set(scales))))]
    assert scales[0] == min(scales) <= 0.5**3
    # Weight decay is as without it.
    plain = parameter_groups(model, replace(args, layer_decay=1.0))
    for wanted in (0.0, args.weight_decay):
        sets = [
            {id(p) for group in found if group["weight_decay"] == wanted for p in group["params"]}
            for found in (groups, plain)
        ]
        assert sets[0] == sets[1]


@pytest.mark.parametrize(
    "name, amsgrad, moments",
    [
        ("adamw", False, 2),
        ("adamw", True, 3),
        ("sgdm", False, 1),
        ("lion", False, 1),
        ("muon", False, 1),
        ("nadamw", False, 2),
        ("adan", False, 4),
        # Rows and columns in place of a matrix.
        ("adafactor", False, 0),
    ],
)
def test_what_an_optimizer_keeps_is_counted(name, amsgrad, moments):
    args = replace(MODEL, optimizer=name, amsgrad=amsgrad)
    state = torch.get_rng_state()
    assert moments_per_weight(args) == moments
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["adamw", "sgdm", "lion"])
def test_what_is_counted_is_what_a_model_in_training_has(name):
    args = replace(MODEL, optimizer=name)
    model = build_model(args, 10, str)
    optimizer = build_optimizer(model, args)
    model(torch.rand(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values()]
    # A count of steps for each parameter is no moment.
    numbers = sum(value.numel() for value in kept if torch.is_tensor(value) and value.ndim)
    with_shape = sum(p.numel() for p in model.parameters() if p.ndim)
    assert numbers == moments_per_weight(args) * with_shape
