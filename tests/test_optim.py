from dataclasses import replace

import numpy as np
import pytest
import torch

from cifar_accel.models.create import build_model
from cifar_accel.models.weights import classifier_parameters
from cifar_accel.optim.gradients import clip_gradients, gradient_norm
from cifar_accel.optim.optimizers import OPTIMIZERS, build_optimizer, parameter_groups
from cifar_accel.optim.schedules import SCHEDULES, learning_rate
from cifar_accel.options.recipes import recipe_defaults

REPORT = replace(recipe_defaults("report"), warmup_epochs=5.0)
MODEL = replace(recipe_defaults("digits"), model="test_nfnet", pretrained=False)


def curve(args, total=4875, warmup=975):
    return np.array([learning_rate(s, total, warmup, args) for s in range(total)])


def test_the_reports_cosine_with_its_slips_mended():
    lr = curve(REPORT)
    assert lr[0] == 1e-5 and lr[975] == lr.max() == 5e-4 and lr[-1] == pytest.approx(1e-6)
    assert lr[195] == pytest.approx(
        1e-5 + (5e-4 - 1e-5) / 5
    )  # the second epoch is not the first again
    assert np.all(np.diff(lr[:976]) > 0) and np.all(np.diff(lr[975:]) < 0)
    assert lr[975 + 1950] == pytest.approx((5e-4 + 1e-6) / 2, rel=1e-3)


def test_linear_decay_is_torchs():
    total = 100
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 5e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.001, total - 1)
    theirs = []
    for _ in range(total):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(
        curve(replace(REPORT, scheduler="linear_decay"), total, 0), theirs, rtol=1e-6
    )


def test_one_cycle_is_torchs():
    total = 101
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 5e-4, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 5e-4, total, pct_start=31 / 101, anneal_strategy="cos"
    )
    theirs = []
    for step in range(total):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            schedule.step()
    ours = curve(replace(REPORT, scheduler="one_cycle"), total, 30)
    # torch climbs along a cosine, we along a line: the ends and the whole descent agree
    np.testing.assert_allclose(ours[[0, 30]], np.array(theirs)[[0, 30]], rtol=1e-3)
    np.testing.assert_allclose(ours[30:], theirs[30:], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total, warmup", [(1, 0), (1, 1), (2, 1), (10, 10), (10, 0)])
def test_short_runs_have_rates(name, total, warmup):
    lr = curve(replace(REPORT, scheduler=name), total, warmup)
    assert np.all(np.isfinite(lr)) and np.all(lr > 0) and np.all(lr <= 5e-4 + 1e-12)


def test_the_reports_adamw():
    optimizer = build_optimizer(build_model(MODEL, 10, str), replace(REPORT, pipeline="device"))
    (group,) = optimizer.param_groups
    assert (
        isinstance(optimizer, torch.optim.AdamW)
        and group["amsgrad"]
        and group["weight_decay"] == 1e-2
    )


@pytest.mark.parametrize("name", [*OPTIMIZERS, "lion", "lamb", "adopt", "sgd", "nadamw", "muon"])
def test_optimizers_step(name):
    model = build_model(MODEL, 10, str)
    optimizer = build_optimizer(model, replace(MODEL, optimizer=name, learning_rate=1e-3))
    before = model.head.fc.weight.clone()
    for _ in range(2):  # the first step of some only gathers statistics
        model(torch.rand(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(before, model.head.fc.weight)


@pytest.mark.parametrize("name", ["test_nfnet", "test_vit"])
def test_gains_norms_biases_and_positions_are_spared(name):
    model = build_model(replace(MODEL, model=name), 10, str)
    decayed, spared = parameter_groups(model, replace(MODEL, decay_all=False))
    names = {p: n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] > 0 and spared["weight_decay"] == 0
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert all(names[p].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    for part in {"test_nfnet": ("gain", "bias"), "test_vit": ("pos_embed", "norm1.weight", "bias")}[
        name
    ]:
        assert any(part in names[p] for p in spared["params"]), part


def test_adaptive_clipping_spares_the_classifier_and_norm_clipping_does_not():
    model = build_model(MODEL, 10, str)
    for mode, spared in (("agc", True), ("norm", False)):
        for p in model.parameters():
            p.grad = torch.full_like(p, 100.0)
        clip_gradients(
            model, gradient_norm(model.parameters()), replace(MODEL, clip_grad=0.01, clip_mode=mode)
        )
        head = classifier_parameters(model)
        assert all((p.grad == 100).all() == spared for p in head)
        assert all(p.grad.abs().max() < 100 for p in model.parameters() if p not in head)
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert total == pytest.approx(0.01, rel=1e-3)


def test_adaptive_clipping_equals_timms():
    from timm.utils.agc import adaptive_clip_grad

    from cifar_accel.optim.gradients import clip_adaptively

    torch.manual_seed(0)
    shapes = [(8, 4, 3, 3), (16, 5), (7,), (6, 1, 1, 1), (), (3, 0)]
    ours, theirs = ([torch.nn.Parameter(torch.zeros(s)) for s in shapes] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        value, gradient = torch.randn(a.shape), torch.randn(a.shape) * 0.1
        for p in (a, b):
            p.data, p.grad = value.clone(), gradient.clone()
    before = ours[0].grad.clone()
    clip_adaptively(ours, 0.05)
    adaptive_clip_grad(theirs, 0.05)
    assert not torch.equal(ours[0].grad, before)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
