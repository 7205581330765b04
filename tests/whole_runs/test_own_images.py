"""Runs on a user's own photographs: folders of classes, of unequal size, without test images."""

import json

import numpy as np
import pytest
from conftest import summary
from PIL import Image

from cifar_accel.cli import evaluate_command, report_command


@pytest.fixture
def photographs(tmp_path):
    """Two classes of twelve images of two sizes, and nothing else."""
    rng = np.random.default_rng(0)
    for level, name in ((60, "dark"), (180, "light")):
        folder = tmp_path / "photographs" / name
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(level - 50, level + 50, (50 + 10 * (i % 2), 70, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photographs"


def options(photographs, *words):
    """A run over all of them, a quarter of each class held out."""
    return (
        *("--dataset", str(photographs), "--limit-train", "0", "--limit-test", "0"),
        *("--validation-fraction", "0.25", "--batch-size", "6", "--epochs", "2"),
        *words,
    )


def recorded(run):
    return json.loads((run / "config.json").read_text())


def test_what_is_held_out_is_called_so(trainer, photographs, in_process):
    """In the lines of a run, its summary, an evaluation of it and the report."""
    done = trainer(*options(photographs))
    assert "18 training, 6 held-out images, 2 classes" in done.stdout
    assert "held-out acc" in done.stdout
    assert "reading the test set" not in done.stdout
    result = summary(done.run)
    assert result["tested_on"] == "held-out" and result["evaluated_images"] == 6
    assert f"accuracy {result['accuracy']:.2%} on 6 held-out images" in done.stdout

    code, out, _ = in_process(evaluate_command, done.run, "--device", "cpu")
    assert code == 0
    assert f"{result['accuracy']:.4%}  (6 held-out images of {photographs})" in out
    code, out, _ = in_process(report_command, done.run.parent)
    assert code == 0 and f"{100 * result['accuracy']:.2f}" in out


def test_without_held_out_images_it_is_refused_in_one_line(trainer, photographs):
    done = trainer(*options(photographs, "--validation-fraction", "0"), check=2)
    assert "has no test images; --validation-fraction 0.2 holds out a fifth" in done.stderr
    assert done.run is None


def test_a_run_keeps_the_size_of_its_copies(trainer, photographs):
    """The first start derives it; one from before there was such an option keeps the input's."""
    words = options(photographs, "--scale", "0.25", "1", "--crop-padding", "0", "--max-steps", "3")
    done = trainer(*words)
    config = recorded(done.run)
    # 32 / sqrt(0.25).
    assert config["options"]["stored_size"] == 64
    assert config["provenance"]["stored_size"] == "derived"

    del config["options"]["stored_size"], config["provenance"]["stored_size"]
    (done.run / "config.json").write_text(json.dumps(config))
    again = trainer(*words[:-2], env={"CIFAR_ACCEL_SEEN": "1"})
    assert "copies of 32x32" in again.stdout


def test_finetune_fits_crops_and_averages_to_the_images(trainer, photographs):
    """Crops are shifted by the same share of images of any size; a tenth of the run is averaged."""
    trained = trainer(*options(photographs, "--max-steps", "1"))
    words = ["--checkpoint", str(trained.run), "--recipe", "finetune", "--image-size", "64"]
    words += ["--model-ema", "--epochs", "60", "--max-steps", "1", "--run-name", "a"]
    config = recorded(trainer(*options(photographs, *words)).run)
    assert config["options"]["crop_padding"] == 8
    assert config["options"]["model_ema_decay"] == 1 - 10 / config["options"]["total_steps"]
    assert {config["provenance"][name] for name in ("crop_padding", "model_ema_decay")} == {
        "derived"
    }
