import html
import json
import os
import re
import shutil
import subprocess

import pytest
from conftest import BIN, TINY, fill_up, forked, summary
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


def test_plots_of_a_run_that_went_on_are_drawn_again(in_process, tmp_path):
    run = make_run(tmp_path / "a")
    in_process(main, "report", tmp_path)
    before = (run / "loss.png").read_bytes()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 24, "epoch": 3, "train/loss": 9.0, "train/lr": 0.1}\n')
    in_process(main, "report", tmp_path)
    assert (run / "loss.png").read_bytes() != before


def test_a_report_is_replaced_as_a_whole(tmp_path, small_disk, in_process):
    """Where there is no room for the new one, the old one stays, and is known for a report."""
    disk = small_disk(600)
    make_run(disk / "a")
    assert in_process(main, "report", disk)[0] == 0
    before = (disk / "report.md").read_bytes()
    fill_up(disk / "filler", 2**20)
    code, _, err = in_process(main, "report", disk)
    assert (code, "No space left" in err) == (2, True)
    assert (disk / "report.md").read_bytes() == before
    (disk / "filler").unlink()
    assert in_process(main, "report", disk)[0] == 0


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


# ---- files that no training wrote


def ending(**changes) -> str:
    """A summary.json with other values."""
    whole = {"status": "finished", "steps": 16, "total_steps": 16, "accuracy": 0.5}
    return json.dumps(whole | {"train_loss": 2.0} | changes)


SPOILT_SUMMARIES = {
    "a loss of text": ending(train_loss="x"),
    "a loss beyond floats": ending(train_loss=10**400),
    "an accuracy beyond floats": ending(accuracy=10**400),
    "an accuracy of NaN": ending(accuracy=float("nan")),
    "steps without end": ending(steps=10**400),
    "an error that is a list": ending(status="failed", error=[1]),
    "brackets": "[" * 200_000,
}


def test_a_spoilt_summary_leaves_the_others_their_report(in_process, tmp_path):
    make_run(tmp_path / "good")
    for name, text in SPOILT_SUMMARIES.items():
        run = make_run(tmp_path / name)
        (run / "summary.json").write_text(text)
    code, out, err = in_process(main, "report", tmp_path)
    assert (code, err) == (0, "")
    for name in SPOILT_SUMMARIES:
        assert f"- {name}: no summary.json of a run\n" in out
    assert "50.00 " in out
    assert "n=" not in out


def test_a_spoilt_config_is_told(in_process, tmp_path):
    for name in ("a", "b"):
        make_run(tmp_path / name)
    (tmp_path / "b" / "config.json").write_text("[" * 200_000)
    code, out, err = in_process(main, "report", tmp_path)
    assert (code, err) == (0, "")
    assert "- b: no config.json of a run\n" in out


@pytest.mark.parametrize("figure", [str(10**399), "NaN", "-1e400", "1e308"])
@pytest.mark.parametrize("key", ["eval/accuracy", "epoch"])
def test_a_figure_that_no_axis_can_show_is_left_out(in_process, tmp_path, figure, key):
    """Of the plots, which are drawn without it."""
    run = make_run(tmp_path / "a")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": 17, "epoch": 3, "{key}": {figure}}}\n')
    code, _, err = in_process(main, "report", tmp_path)
    assert (code, err) == (0, "")
    assert (run / "accuracy.png").exists()
    assert (tmp_path / "overview.png").exists()


def test_no_control_character_reaches_the_terminal_or_the_page(in_process, tmp_path):
    escape = "x\x1b]0;title\x07\x9b\ny"
    options = dict.fromkeys(("dataset", "model", "optimizer", "scheduler", "run_name"), escape)
    make_run(tmp_path / "a", **options)
    make_run(tmp_path / "b", **options, checkpoint=escape)
    make_run(tmp_path / f"c{escape}", {"status": escape, "error": escape})
    shutil.copy(tmp_path / "a" / "metrics.jsonl", tmp_path)
    code, out, err = in_process(main, "report", tmp_path)
    assert (code, err) == (0, "")
    texts = [out, *((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))]
    for text in texts:
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
        assert r"x\x1b]0;title\x07\x9b\ny" in text
    # The legend has lines of its own.
    assert r"included);\n" not in texts[2]


def test_a_folder_whose_name_is_not_utf_8(in_process, tmp_path):
    make_run(tmp_path / "a").rename(tmp_path / "a\udcff")
    code, _, err = in_process(main, "report", tmp_path)
    assert (code, err) == (0, "")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert r'src="a%FF/loss.png" alt="loss of a\udcff"' in page


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_a_report_of_somebody_else_stays(in_process, tmp_path, name):
    make_run(tmp_path / "a")
    (tmp_path / name).write_text("mine")
    code, _, err = in_process(main, "report", tmp_path)
    assert code == 2
    assert f"{name}: is no report of cifar-accel" in err
    assert (tmp_path / name).read_text() == "mine"
    assert not (tmp_path / "overview.png").exists()

    # Our own is written anew.
    (tmp_path / name).unlink()
    assert in_process(main, "report", tmp_path)[0] == 0
    assert in_process(main, "report", tmp_path)[0] == 0


# What a shell may say of its characters.
LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0"},
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "Latin-1": {"PYTHONIOENCODING": "latin-1"},
}


@pytest.mark.parametrize("environment", LOCALES.values(), ids=LOCALES)
def test_a_report_is_utf_8_in_any_locale(tmp_path, environment):
    """A dash stands in a cell without a value."""
    make_run(tmp_path / "a", {"train_loss": None}, dataset="caf\u00e9")
    command = [BIN / "cifar-accel", "report", tmp_path]
    done = subprocess.run(command, capture_output=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    assert b"| NFNet-F0 | caf" in done.stdout
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "\u2013" in text
        assert "caf\u00e9" in text


def test_a_report_that_is_not_read_to_its_end_is_written(tmp_path):
    make_run(tmp_path / "a")
    reader, writer = os.pipe()
    os.close(reader)
    command = [BIN / "cifar-accel", "report", tmp_path]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "report.html").exists()


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
