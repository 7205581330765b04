"""The example trains like the trainer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import rows
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent

# Trains with the words given, and writes weights and figures into the folder given first.
CODE = """
import json, sys
from safetensors.torch import save_file
from examples.minimal_loop import train

folder, *words = sys.argv[1:]
model, losses, figures = train(words)
weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
save_file(weights, f"{folder}/weights.safetensors")
json.dump([losses, figures], open(f"{folder}/figures.json", "w"))
"""


@pytest.mark.parametrize("more", ["", "--micro-batch-size 8 --mixup 0.8 --hflip 0.5"])
def test_the_example_is_equal_to_the_trainer(more, trainer, cache, tmp_path):
    from examples.minimal_loop import OPTIONS

    # 44 steps an epoch; a row at every step.
    options = [*OPTIONS, "--epochs", "2", "--data-dir", cache, *more.split()]
    command = [sys.executable, "-c", CODE, str(tmp_path), *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    losses, figures = json.loads((tmp_path / "figures.json").read_text())

    done = trainer("--log-every", "1", "--tracker", "none", base=options)
    logged = rows(done.run)
    assert len(losses) == 88
    assert [row["train/loss"] for row in logged] == losses
    assert logged[-1]["eval/loss"] == figures["loss"]
    assert logged[-1]["eval/accuracy"] == figures["accuracy"]

    # Every weight by its bits.
    ours = load_file(tmp_path / "weights.safetensors")
    theirs = load_file(done.run / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.equal(theirs[name]), name
