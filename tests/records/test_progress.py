"""The progress bar, as wide as its terminal."""

import io

import pytest

from cifar_accel.records.progress import Bar, Progress

FIGURES = ("loss 4.349", "test acc 75.50%", "12,390 img/s", "12% input", "MFU 40%")
TIMES = "epoch 12/25  64% 1:02:09<34:57"

# What is shown at so many columns.
SHOWN = {
    12: "",
    20: "epoch 12/25  64%",
    40: TIMES,
    60: f"{TIMES}, loss 4.349, test acc 75.50%",
    80: f"{TIMES}, loss 4.349, test acc 75.50%, 12,390 img/s",
    100: f"{TIMES}, {', '.join(FIGURES)}",
    200: f"epoch 12/25  64%|######4   | 1:02:09<34:57, {', '.join(FIGURES)}",
}


@pytest.fixture
def bar():
    made = Bar(total=1000, file=io.StringIO(), ascii=True)
    made.set_description_str("epoch 12/25", refresh=False)
    made.figures = FIGURES
    made.n = 640
    # Seconds that it has run.
    made.start_t -= 3729
    return made


@pytest.mark.parametrize("columns", SHOWN)
def test_the_bar_fits_its_terminal(bar, columns):
    bar.ncols = columns
    assert str(bar) == SHOWN[columns]


def test_nothing_is_ever_cut(bar):
    """The least important parts go, and they go whole."""
    for columns in range(16, 150):
        bar.ncols = columns
        head, *figures = str(bar).split(", ")
        assert len(str(bar)) <= columns
        assert head.startswith("epoch 12/25  64%")
        assert figures == list(FIGURES[: len(figures)])


@pytest.mark.parametrize("images", ["test", "val"])
def test_a_line_says_which_accuracy_it_shows(images, capsys, monkeypatch):
    progress = Progress(8, 32, 0, 32, images, float)
    row = {"step": 8, "train/loss": 2.0, "train/images_per_s": 1234.5, "train/input_share": 0.2}
    progress.log(row | {"eval/accuracy": 0.5})
    line = capsys.readouterr().out
    start = f"epoch 1/4  step 8/32  loss 2.000, {images} acc 50.00%, 1,234 img/s, 20% input, 00:00"
    assert line == f"{start} left\n"


def test_the_time_left_is_that_of_steps_that_are_not_equal(capsys):
    """Half of the steps take a quarter of the others' time."""
    progress = Progress(8, 32, 4, 32, "test", lambda step: step / 4 + max(0, step - 16) * 3 / 4)
    progress.started_at -= 30
    row = {"train/loss": 2.0, "train/images_per_s": 1.0, "train/input_share": 0.0}
    # 12 steps took 30 s: 16 of them, each four times as long, are left.
    progress.log(row | {"step": 16})
    assert "02:40 left" in capsys.readouterr().out
