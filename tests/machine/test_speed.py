import gzip
import json
import subprocess
import sys

import numpy as np
import torch
from conftest import FRESH, rows, summary

from cifar_accel.machine.speed import peak_flops, peak_memory_mib


def test_peak_memory_is_the_processs_own():
    """Not what its parent held when it was started, which getrusage counts too."""
    held = np.ones(2**27, np.uint8)  # 128 MiB
    ours = peak_memory_mib(torch.device("cpu"))
    code = """
import numpy as np, torch
from cifar_accel.machine.speed import peak_memory_mib
print(peak_memory_mib(torch.device("cpu")))
more = np.ones(2**27, np.uint8)
print(peak_memory_mib(torch.device("cpu")))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    before, after = map(float, out.split())
    assert held.all() and before < ours - 100 and after > before + 100


def test_no_peak_is_claimed_where_none_is_known():
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_a_profile_is_written(trainer):
    done = trainer("--profile", "2", "--epochs", "1", "--tracker", "none")
    folder = done.run / "profile"
    assert f"profile: {folder / 'trace.json.gz'}" in done.stdout
    with gzip.open(folder / "trace.json.gz") as f:
        events = json.load(f)["traceEvents"]
    steps = {e["name"] for e in events if e["name"].startswith("ProfilerStep")}
    assert len(steps) == 2 and "convolution" in (folder / "operators.txt").read_text()


def test_compiled_runs_see_one_shape_a_model(trainer, tmp_path):
    """Two graphs, training and evaluation, though 100 test images are no whole number of batches; and a resume."""
    tiny = "--model test_vit --model-kwargs patch_size=16 depth=1 embed_dim=8 num_heads=1"  # compiles in seconds
    words = [*tiny.split(), "--compile", "--batch-size", "64", "--tracker", "none"]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = trainer(
        *words, "--micro-batch-size", "32", "--max-steps", "6", env=cache, launcher=FRESH
    )
    assert rows(done.run)[-1]["train/compiled_graphs"] == 2 and "compiled  2 graphs" in done.stdout
    again = trainer(
        *words, "--micro-batch-size", "32", "--max-steps", "8", env=cache, launcher=FRESH
    )
    assert "after step 6" in again.stdout and summary(again.run)["steps"] == 8


def test_without_a_compiler_a_run_goes_on_uncompiled(trainer, tmp_path):
    broken = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = trainer("--compile", "--epochs", "1", "--tracker", "none", env=broken, launcher=FRESH)
    assert done.stdout.count("warning: --compile does not work here and is left out") == 1
    assert (
        summary(done.run)["status"] == "finished"
        and "train/compiled_graphs" not in rows(done.run)[-1]
    )
