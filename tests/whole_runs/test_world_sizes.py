"""One run on any number of processes."""

import forked_runs
import pytest
from conftest import LONG, rows, summary

from cifar_accel.data.order import Order

# Up to 24, and the largest powers of two with their neighbours; all of them in the long form.
SOME_WORLDS = [*range(1, 25), *(2**n + near for n in (6, 8, 10) for near in (-1, 0))]


@pytest.mark.parametrize("worlds", [SOME_WORLDS, pytest.param(range(1, 1025), marks=LONG)])
def test_each_global_batch_is_cut_once_for_1_to_1024_processes(worlds):
    for world in worlds:
        for accumulation in (1, 2, 3, 4, 8):
            batch = 2 * world * accumulation
            positions = []
            for rank in range(world):
                order = Order(5, 10**6, batch, world, rank, accumulation)
                for micro in range(accumulation):
                    positions += order.positions(micro).tolist()
            assert sorted(positions) == list(range(batch))


@pytest.mark.parametrize(
    "model, pipeline, counts",
    [
        ("test_nfnet", "device", (1, 2)),
        pytest.param("test_nfnet", "device", (1, 2, 4), marks=LONG),
        pytest.param("test_nfnet", "timm", (1, 2, 4), marks=LONG),
        pytest.param("test_vit", "device", (1, 2, 4), marks=LONG),
        pytest.param("test_vit", "timm", (1, 2, 4), marks=LONG),
    ],
)
def test_world_size_and_accumulation_change_nothing(words, tmp_path, model, pipeline, counts):
    """More than fifty steps on so many processes with so many accumulation steps."""
    options = [
        *"--mixup 0.5 --cutmix 1 --hflip 0.5 --log-every 1 --tracker none".split(),
        *f"--epochs 7 --learning-rate 1e-3 --model {model} --pipeline {pipeline}".split(),
    ]
    if model == "test_vit":
        options += ["--model-kwargs", "patch_size=8"]
    if pipeline == "timm":
        options += ["--workers", "1"]

    expected = None
    for world in counts:
        for accumulation in counts:
            name = f"w{world}a{accumulation}"
            run = tmp_path / "ck" / name
            own = ("--micro-batch-size", str(32 // world // accumulation), "--run-name", name)
            forked_runs.finish(words(*options, *own), tmp_path / name, world)
            lines = rows(run)
            assert len(lines) == 56
            assert summary(run)["evaluated_images"] == 100

            # The first of them is what the others are compared with.
            if expected is None:
                expected = lines
            for row, first in zip(lines, expected, strict=True):
                assert row["train/lr"] == first["train/lr"]
                loss = pytest.approx(first["train/loss"], rel=1e-5)
                assert row["train/loss"] == loss, (name, row["step"])
