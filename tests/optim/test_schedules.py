import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from cifar_accel.errors import BadInput
from cifar_accel.optim.schedules import SCHEDULES, check_schedule, learning_rate
from cifar_accel.options.recipes import recipe_defaults

REPORT = replace(recipe_defaults("report"), warmup_epochs=5.0)


def curve(args, total=4875, warmup=975):
    return np.array([learning_rate(step, total, warmup, args) for step in range(total)])


def test_the_reports_cosine_with_its_slips_mended():
    lr = curve(REPORT)
    assert lr[0] == 1e-5
    assert lr[975] == lr.max() == 5e-4
    assert lr[-1] == pytest.approx(1e-6)
    # The second epoch is not the first again.
    assert lr[195] == pytest.approx(1e-5 + (5e-4 - 1e-5) / 5)
    assert np.all(np.diff(lr[:976]) > 0)
    assert np.all(np.diff(lr[975:]) < 0)
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
    ours = curve(replace(REPORT, scheduler="linear_decay"), total, 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


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
    # torch climbs along a cosine, we along a line: the ends and the whole descent agree.
    np.testing.assert_allclose(ours[[0, 30]], np.array(theirs)[[0, 30]], rtol=1e-3)
    np.testing.assert_allclose(ours[30:], theirs[30:], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total, warmup", [(1, 0), (1, 1), (2, 1), (10, 10), (10, 0)])
def test_short_runs_have_rates(name, total, warmup):
    lr = curve(replace(REPORT, scheduler=name), total, warmup)
    assert np.all(np.isfinite(lr))
    assert np.all(lr > 0)
    assert np.all(lr <= 5e-4 + 1e-12)


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(BadInput, match=r"cosin: unknown; .*; did you mean cosine"):
        check_schedule(replace(REPORT, scheduler="cosin"))


def test_schedules_load_no_torch():
    code = "import sys; import cifar_accel.optim.schedules; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
