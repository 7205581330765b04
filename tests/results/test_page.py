import html
import json
import re
import shutil
import subprocess

import pytest
from conftest import TINY, forked, summary
from made_runs import make_run

from cifar_accel.cli import main
from cifar_accel.results.charts import PLOTS


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """Two runs of one setting with different seeds, one of another, and one that failed."""
    root = tmp_path_factory.mktemp("runs")
    where = ["--data-dir", cache, "--save-dir", str(root)]
    runs = {"a": ["--seed", "1"], "b": ["--seed", "2"], "deep/c": ["--optimizer", "sgdm"]}
    for name, options in runs.items():
        words = [*TINY, *where, "--run-name", name, "--tracker", "none", "--epochs", "2", *options]
        done = forked(words, root)
        assert done.returncode == 0, done.stderr
    failed = shutil.copytree(root / "a", root / "un<b>finished")
    ending = {"status": "failed", "error": "<script>alert(1)</script>"}
    (failed / "summary.json").write_text(json.dumps(summary(root / "a") | ending))
    return root


def cells(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without its rule."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines]


def test_the_tables(finished, in_process):
    code, out, _ = in_process(main, "report", finished)
    assert code == 0
    assert html.unescape((finished / "report.md").read_text()) in out
    default, settings = map(cells, re.split(r"## .*\n", out)[1:3])

    assert default[0] == ["model", "data", "loss", "acc. %", "report"]
    assert len(default) == 2
    accuracies = [100 * summary(finished / name)["accuracy"] for name in "ab"]
    mean = sum(accuracies) / 2
    deviation = abs(accuracies[0] - accuracies[1]) / 2**0.5
    assert default[1][:2] == ["test_nfnet (limit_train 256, limit_test 100)", "digits"]
    assert default[1][3] == f"{mean:.2f} ± {deviation:.2f} (n=2)"
    assert default[1][4] == "1.6041, 74.23"

    assert [row[2] for row in settings[1:]] == ["adamw, cosine", "sgdm, cosine"]
    assert settings[2][-1] == "2.4778, 58.47"
    assert "- un<b>finished: failed, <script>alert(1)</script>" in out


def test_only_seeds_are_averaged(finished, in_process, tmp_path):
    """Runs that differ in anything else have rows of their own that say in what."""
    for name, rate in (("a", 0.001), ("b", 0.01)):
        shutil.copytree(finished / name, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["options"]["learning_rate"] = rate
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    _, out, _ = in_process(main, "report", tmp_path)
    assert "n=2" not in out
    assert "learning_rate 0.001" in out
    assert "learning_rate 0.01" in out


def test_a_training_leaves_its_plots(finished):
    for name in PLOTS:
        assert (finished / "deep" / "c" / name).is_file()


def test_no_name_in_a_file_becomes_markup(in_process, tmp_path):
    """Of the folder, the data, the command, the run and its error."""
    root = tmp_path / "<i>root"
    make_run(root / "<b>a & b?", dataset="some/<i>data", run_name="<i>run")
    make_run(root / "c", {"status": "failed", "error": "<i>error"}, aa="rand-m9")
    code, _, _ = in_process(main, "report", root)
    assert code == 0
    page = (root / "report.html").read_text()
    assert "<i>" not in page
    assert "<b>" not in page
    assert "&lt;i&gt;data" in page
    assert "c: failed, &lt;i&gt;error" in page
    assert 'src="%3Cb%3Ea%20%26%20b%3F/loss.png" alt="loss of &lt;b&gt;a &amp; b?"' in page
    assert "<i>" not in (root / "report.md").read_text()


def test_a_report_of_one_run(in_process, tmp_path):
    """The plots lie beside the page then."""
    run = make_run(tmp_path / "a")
    code, _, _ = in_process(main, "report", run)
    assert code == 0
    page = (run / "report.html").read_text()
    assert "<h2>a</h2>" in page
    assert '<img src="loss.png" alt="loss of a">' in page


@pytest.mark.parametrize("make, message", [(False, "no such folder"), (True, "no run folder")])
def test_nothing_to_report(in_process, tmp_path, make, message):
    if make:
        (tmp_path / "a").mkdir()
    code, _, err = in_process(main, "report", tmp_path / "a")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_report_that_cannot_be_written(in_process, tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "report.md").mkdir()
    code, _, err = in_process(main, "report", tmp_path)
    assert code == 2
    assert "the report cannot be written there (Is a directory)" in err


# Counts what a browser shows of the page, into its title.
COUNT = """<script>onload = () => {
  const shown = [...document.images].filter(image => image.naturalWidth > 100).length
  const tables = document.querySelectorAll('table').length
  document.title = `${shown} of ${document.images.length} images, ${tables} tables`
}</script>"""

BROWSER_FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync
    --virtual-time-budget=5000
""".split()


def test_the_page_in_a_browser(finished, in_process, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium")
    in_process(main, "report", finished)
    page = (finished / "report.html").read_text()
    assert "<script>" not in page
    assert "un<b>" not in page
    probe = finished / "probe.html"
    probe.write_text(page.replace("</body>", COUNT + "</body>"))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [browser, *BROWSER_FLAGS, profile, "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    probe.unlink()
    assert "<title>13 of 13 images, 2 tables</title>" in done.stdout
