"""Peak memory and speed, profiles, and compiled models."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FRESH, rows, summary

from cifar_accel.machine.speed import peak_flops, peak_memory_mib

PRINT_PEAKS = """
import numpy as np, torch
from cifar_accel.machine.speed import peak_memory_mib
print(peak_memory_mib(torch.device("cpu")))
more = np.ones(2**27, np.uint8)
print(peak_memory_mib(torch.device("cpu")))
"""


def test_peak_memory_is_the_processs_own():
    """Not what its parent held when it was started, which getrusage counts too."""
    # 128 MiB, held until the child is done.
    held = np.ones(2**27, np.uint8)
    ours = peak_memory_mib(torch.device("cpu"))
    command = [sys.executable, "-c", PRINT_PEAKS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert held.all()
    assert before < ours - 100
    assert after > before + 100


def test_no_peak_is_claimed_where_none_is_known():
    assert peak_flops(torch.device("cpu"), "bf16") is None


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
    ],
)
def test_a_devices_peak_is_its_own(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == peak


def test_a_profile_is_written(trainer):
    done = trainer(*"--profile 2 --epochs 1 --tracker none".split())
    folder = done.run / "profile"
    assert f"profile: {folder / 'trace.json.gz'}" in done.stdout
    with gzip.open(folder / "trace.json.gz") as f:
        events = json.load(f)["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep")}
    assert len(steps) == 2
    assert "convolution" in (folder / "operators.txt").read_text()


def test_compiled_runs_see_one_shape_a_model(trainer, tmp_path):
    """Two graphs, one for training and one for evaluation; after a resume too.

    Though 100 test images are no whole number of batches.
    """
    # A model that compiles in seconds.
    model = "--model test_vit --model-kwargs patch_size=16 depth=1 embed_dim=8 num_heads=1"
    batch = "--batch-size 64 --micro-batch-size 32"
    words = f"{model} --compile {batch} --tracker none --max-steps".split()
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}

    done = trainer(*words, "6", env=environment, launcher=FRESH)
    assert rows(done.run)[-1]["train/compiled_graphs"] == 2
    assert "compiled  2 graphs" in done.stdout
    again = trainer(*words, "8", env=environment, launcher=FRESH)
    assert "after step 6" in again.stdout
    assert summary(again.run)["steps"] == 8


def test_without_a_compiler_a_run_goes_on_uncompiled(trainer, tmp_path):
    environment = {
        "CXX": "/nonexistent",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    words = "--compile --epochs 1 --tracker none".split()
    done = trainer(*words, env=environment, launcher=FRESH)
    assert done.stdout.count("warning: --compile does not work here and is left out") == 1
    assert summary(done.run)["status"] == "finished"
    assert "train/compiled_graphs" not in rows(done.run)[-1]
