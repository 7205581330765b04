"""docs/extending.md, carried out: a copy of the package with all of its blocks trains."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import rows, summary

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The line above each piece of a block: the file, and where in it the piece goes.
HEAD = re.compile(r'^# (cifar_accel/\S+\.py), (after|before|in place of) "(.+)"$')


class Piece(NamedTuple):
    """Lines to write, and where: at the one line of `file` that begins with `anchor`."""

    file: str
    how: str
    anchor: str
    lines: list[str]


def pieces_of(page: str) -> list[Piece]:
    pieces: list[Piece] = []
    for block in BLOCK.findall(page):
        lines = block.splitlines()
        assert HEAD.match(lines[0]), f"this block does not say where it goes: {lines[0]}"
        for line in lines:
            if head := HEAD.match(line):
                pieces.append(Piece(head[1], head[2], head[3], []))
            else:
                pieces[-1].lines.append(line)
    return pieces


def apply(piece: Piece, root: Path) -> None:
    file = root / piece.file
    lines = file.read_text().splitlines()
    places = [i for i, line in enumerate(lines) if line.strip().startswith(piece.anchor)]
    assert len(places) == 1, f"{len(places)} lines of {piece.file} begin with {piece.anchor}"
    place = places[0]
    start = place + 1 if piece.how == "after" else place
    end = place if piece.how == "before" else place + 1
    lines[start:end] = piece.lines
    file.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A folder with the package as the page makes it."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "cifar_accel", root / "cifar_accel")
    for piece in pieces_of(PAGE):
        apply(piece, root)
    return root


@pytest.fixture
def extended(copy, tmp_path):
    """Run a module of the changed package in this test's folder."""

    def run(module: str, words: str, check: int = 0) -> str:
        command = [sys.executable, "-m", module, *words.split()]
        environment = os.environ | {"PYTHONPATH": str(copy)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == check, done.stdout + done.stderr
        return done.stdout

    return run


TRAINING = (
    "--data-dir cache --save-dir . --run-name run --model tiny --no-pretrained --recipe gray "
    "--dataset stripes --optimizer asgd --scheduler inverse_sqrt --warmup-epochs 0 --tracker csv "
    "--batch-size 32 --epochs 2 --learning-rate 3e-2 --log-every 4"
)


def test_a_training_with_all_that_the_page_adds(extended, tmp_path):
    # 256 images: 8 steps an epoch.
    extended("cifar_accel", TRAINING)
    logged = rows(tmp_path / "run")
    assert summary(tmp_path / "run")["status"] == "finished"
    assert [row["step"] for row in logged] == [4, 8, 12, 16]

    # The schedule falls from the peak to a tenth of it.
    assert logged[-1]["train/lr"] == pytest.approx(3e-3)
    # The tracker has each row's loss.
    lines = (tmp_path / "run" / "loss.csv").read_text().splitlines()
    assert lines == [f"{row['step']},{row['train/loss']}" for row in logged]
    # The metrics.
    assert all("train/ms_per_image" in row for row in logged)
    assert 0.5 <= logged[-1]["eval/confidence"] <= 1
    # Of the data set, the two classes and all test images.
    assert summary(tmp_path / "run")["evaluated_images"] == 64


def test_an_option_that_the_page_adds_may_have_no_effect(extended):
    words = TRAINING.replace("stripes", "digits").replace("--recipe gray", "--recipe plain")
    extended("cifar_accel", f"{words} --grayscale 0.5", check=2)


def test_the_augmentation_takes_colours_away(copy, tmp_path):
    code = """
import torch
import numpy as np
from cifar_accel.data.batches import Pipeline
from cifar_accel.data.datasets import Split
from cifar_accel.data.order import Order
from cifar_accel.options.options import TrainingArguments

images = np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8), dtype=np.uint8)
split = Split(images, np.zeros(64, np.int64), ["one"])
args = TrainingArguments(grayscale=0.5, image_size=8)
pipeline = Pipeline(args, split, torch.device("cpu"), (0, 0, 0), (1, 1, 1))
batch = next(pipeline.training_batches(Order(0, 64, 64), 0, 1)).images
gray = (batch == batch[:, :1]).flatten(1).all(1)
print(int(gray.sum()))
"""
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert 16 < int(done.stdout) < 48, done.stderr


def test_the_reason_to_stop(extended, tmp_path):
    (tmp_path / "STOP").touch()
    extended("cifar_accel", TRAINING, check=143)
    said = (tmp_path / "run" / "PREEMPTED").read_text()
    assert said.startswith("the file STOP after step 2;")


def test_the_command(extended):
    assert extended("cifar_accel.cli", "names").split()[:2] == ["names", "train"]


def test_the_blocks_are_checked_code(copy):
    """ruff finds no unknown name, no long line and no missing docstring."""
    ruff = [Path(sys.executable).parent / "ruff", "check", "--config", ROOT / "pyproject.toml"]
    done = subprocess.run([*ruff, copy / "cifar_accel"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_recipe_is_there():
    """A page without blocks would make the tests above easy."""
    files = {Path(piece.file).name for piece in pieces_of(PAGE)}
    names = "options resolve order batches optimizers schedules recipes create surgery sources"
    names += " evaluate train trackers cli signals"
    assert files == {f"{name}.py" for name in names.split()}
