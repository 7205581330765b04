import math
from dataclasses import replace

import pytest
import torch
from timm.utils.agc import adaptive_clip_grad

from cifar_accel.models.create import build_model
from cifar_accel.models.weights import classifier_parameters
from cifar_accel.optim.gradients import Watch, clip_adaptively, clip_gradients, gradient_norm
from cifar_accel.options.recipes import recipe_defaults

MODEL = replace(recipe_defaults("digits"), model="test_nfnet", pretrained=False)
CPU = torch.device("cpu")
GOOD = torch.tensor(1.0)


# ---- clipping


def test_adaptive_clipping_spares_the_classifier_and_norm_clipping_does_not():
    model = build_model(MODEL, 10, str)
    head = classifier_parameters(model)
    for mode, spared in (("agc", True), ("norm", False)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 100.0)
        args = replace(MODEL, clip_grad=0.01, clip_mode=mode)
        clip_gradients(model, gradient_norm(model.parameters()), args)
        assert all((p.grad == 100).all() == spared for p in head)
        assert all(p.grad.abs().max() < 100 for p in model.parameters() if p not in head)
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert total == pytest.approx(0.01, rel=1e-3)


def test_adaptive_clipping_equals_timms():
    torch.manual_seed(0)
    ours = []
    theirs = []
    for shape in [(8, 4, 3, 3), (16, 5), (7,), (6, 1, 1, 1), (), (3, 0)]:
        value = torch.randn(shape)
        gradient = torch.randn(shape) * 0.1
        for parameters in (ours, theirs):
            parameters.append(torch.nn.Parameter(value.clone()))
            parameters[-1].grad = gradient.clone()
    before = ours[0].grad.clone()
    clip_adaptively(ours, 0.05)
    adaptive_clip_grad(theirs, 0.05)
    assert not torch.equal(ours[0].grad, before)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.grad, b.grad)


# ---- what is not finite


def watch_of(parameters, on_host, scaled=False, step=7):
    """A watch on the CPU, kept as there (`on_host`) or as on an accelerator."""
    return Watch(parameters, CPU, scaled, step, on_host=on_host)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["loss", "norm"])
def test_the_first_step_that_is_not_finite_is_remembered(on_host, value, what):
    watch = watch_of([], on_host)
    watch.note([GOOD, GOOD * 3], GOOD * 5)
    assert watch.report().tolist() == [[0, 7, 5, 2]]
    bad = torch.tensor(value)
    watch.note([bad, GOOD] if what == "loss" else [GOOD], bad if what == "norm" else GOOD)
    # Later steps, good or bad, change nothing.
    watch.note([GOOD], GOOD)
    watch.note([bad], bad)
    is_bad, step, norm, loss = watch.report()[0].tolist()
    assert (is_bad, step) == (1, 8)
    assert math.isfinite(loss) == (what == "norm")
    assert math.isfinite(norm) == (what == "loss")


@pytest.mark.parametrize("on_host", [True, False])
def test_large_step_numbers_are_exact(on_host):
    watch = watch_of([], on_host, step=2**24 + 1)
    watch.note([GOOD], GOOD)
    assert watch.report()[0, 1] == 2**24 + 1


def test_both_ways_of_watching_give_the_same_report():
    watches = [watch_of([], on_host) for on_host in (True, False)]
    for loss, norm in [(0.5, 2.0), (0.25, 4.0), (math.inf, 1.0), (1.0, 1.0)]:
        for watch in watches:
            watch.note([torch.tensor(loss)], torch.tensor(norm))
        host, device = (watch.report() for watch in watches)
        assert torch.equal(host, device)
        assert host.dtype == device.dtype
        assert host.shape == device.shape == (1, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gradients_are_looked_through_where_no_norm_is_asked_for(value):
    """In any layout; and where all is well, not one bit of them is changed."""
    weights = [torch.nn.Parameter(torch.ones(3, 2, 3, 3)), torch.nn.Parameter(torch.ones(5))]
    weights[0].grad = torch.randn(3, 2, 3, 3).to(memory_format=torch.channels_last)
    # Denormal numbers.
    weights[1].grad = torch.randn(5) * 1e-40
    kept = [weight.grad.clone() for weight in weights]
    watch = Watch(weights, CPU, scaled=False, step=0)
    watch.note([GOOD], None)
    assert watch.report().tolist() == [[0, 0, 0, 1]]
    assert all(torch.equal(w.grad, k) for w, k in zip(weights, kept, strict=True))
    weights[0].grad[1, 1, 2, 0] = value
    watch.note([GOOD], None)
    is_bad, step, norm, loss = watch.report()[0].tolist()
    assert (is_bad, step, loss) == (1, 1, 1)
    assert not math.isfinite(norm)


def test_a_bad_loss_is_reported_with_its_norm():
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.full((4,), 2.0)
    watch = Watch([weight], CPU, scaled=False, step=0)
    watch.note([torch.tensor(math.inf)], None)
    assert watch.report().tolist() == [[1, 0, 4, math.inf]]


@pytest.mark.parametrize("on_host", [True, False])
def test_a_gradient_scaler_may_pass_over_steps(on_host):
    watch = watch_of([], on_host, scaled=True)
    watch.note([GOOD], torch.tensor(math.inf))
    assert watch.report()[0, 0] == 0
    watch.note([torch.tensor(math.nan)], GOOD)
    assert watch.report()[0, :2].tolist() == [1, 8]
