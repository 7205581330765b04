import pytest
from made_runs import make_run
from PIL import Image

from cifar_accel.results.charts import PLOTS, plot_run, save_figure, smooth


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


def test_a_dollar_in_a_name_is_no_formula(tmp_path):
    save_figure(tmp_path / "a.png", lambda axes: axes.plot([0, 1], [0, 1], label=r"$\frac$"))
    assert Image.open(tmp_path / "a.png").width > 800


def test_smoothing_starts_without_bias():
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    assert smooth([1.0, 2.0, 4.0]) == [1.0, 2.0, 4.0]
