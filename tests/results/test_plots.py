import pytest
from made_runs import make_run
from matplotlib.figure import Figure
from PIL import Image

from cifar_accel.results.plots import (
    PLOTS,
    draw_learning_rate,
    plot_run,
    save_figure,
    smooth,
)
from cifar_accel.results.runs import read_run


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_plots_are_pictures_that_can_be_read(tmp_path, evaluated):
    run = make_run(tmp_path / "a", evaluated=evaluated)
    said = []
    plot_run(run, said.append)
    assert said == [f"plots: loss.png, accuracy.png, lr.png in {run}"]
    for name in PLOTS:
        image = Image.open(run / name)
        assert image.width > 800
        assert image.height > 500
        assert len(image.convert("RGB").getcolors(100_000)) > 20


def test_a_plot_never_ends_a_training(tmp_path):
    run = make_run(tmp_path / "a")
    (run / "loss.png").mkdir()
    said = []
    plot_run(run, said.append)
    assert len(said) == 1
    assert said[0].startswith("warning: no plots (IsADirectoryError: ")


def test_the_schedule_is_drawn_at_every_step(tmp_path):
    """Though rows are far between: the warm-up begins at 0."""
    facts = {"steps_per_epoch": 8, "total_steps": 16}
    run = read_run(make_run(tmp_path / "a", warmup_epochs=0.5, learning_rate=0.1, **facts))
    axes = Figure().add_subplot()
    draw_learning_rate(axes, run)
    epochs, rates = axes.lines[0].get_data()
    assert list(epochs) == [step / 8 for step in range(16)]
    assert rates[:5] == pytest.approx([1e-8, 0.025, 0.05, 0.075, 0.1], abs=1e-3)
    assert rates[-1] == pytest.approx(0, abs=1e-4)


def test_a_dollar_in_a_name_is_no_formula(tmp_path):
    save_figure(tmp_path / "a.png", lambda axes: axes.plot([0, 1], [0, 1], label=r"$\frac$"))
    assert Image.open(tmp_path / "a.png").width > 800


def test_smoothing_starts_without_bias():
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    assert smooth([1.0, 2.0, 4.0]) == [1.0, 2.0, 4.0]
