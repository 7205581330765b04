import html
import json
import os
import re
import shutil
import subprocess

import pytest
from conftest import BIN, TINY, files_of, fill_up, forked, summary
from made_runs import make_run

from cifar_accel.cli import main
from cifar_accel.results.plots import PLOTS


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


def test_the_report(finished, in_process):
    """In the terminal as wide as that is, in report.md whole."""
    code, out, _ = in_process(main, "report", finished)
    assert code == 0
    accuracies = [100 * summary(finished / name)["accuracy"] for name in "ab"]
    assert f"{sum(accuracies) / 2:.2f} ± " in out
    assert "- un<b>finished: failed, <script>alert(1)</script>" in out
    assert max(map(len, out.split("\nThe page: ")[0].splitlines())) <= 80
    whole = html.unescape((finished / "report.md").read_text())
    assert "| setting | acc. %" in whole and "| minutes |" in whole
    assert "sgdm" in whole


def test_a_run_folder_is_only_read(finished, in_process):
    before = files_of(finished / "a")
    in_process(main, "report", finished)
    assert files_of(finished / "a") == before


def test_a_training_leaves_its_plots(finished):
    for name in PLOTS:
        assert (finished / "deep" / "c" / name).is_file()


def own_part(page: str) -> str:
    """The page without style, scripts and Vega, whose text is always the same."""
    return re.sub(r"<(style|script)[^>]*>.*?</\1>", "", page, flags=re.DOTALL)


def charts_of(page: str) -> str:
    """The page's figures, as they stand in it."""
    return re.search(r'<script type="application/json" id="charts">(.*?)</script>', page)[1]


def test_no_name_in_a_file_becomes_markup(in_process, tmp_path):
    """Of the folder, the data, the command, the run and its error; nor ends it the figures."""
    root = tmp_path / "<i>root"
    make_run(root / "<b>a & b?", dataset="some/<i>data", run_name="<i>run")
    make_run(root / "b", dataset="some/<i>data", optimizer="</script><i>")
    make_run(root / "c", {"status": "failed", "error": "<i>error"}, aa="rand-m9")
    code, _, _ = in_process(main, "report", root)
    assert code == 0
    page = (root / "report.html").read_text()
    own = own_part(page)
    assert "<i>" not in own and "<b>" not in own
    assert "&lt;i&gt;data" in own
    assert "c: failed, &lt;i&gt;error" in own
    assert 'href="%3Cb%3Ea%20%26%20b%3F/loss.png"' not in own
    assert 'href="%3Cb%3Ea%20%26%20b%3F/config.json"' in own
    assert "<" not in charts_of(page) and "\\u003c/script>" in charts_of(page)
    assert "<i>" not in (root / "report.md").read_text()


def test_a_report_is_replaced_as_a_whole(tmp_path, small_disk, in_process):
    """Where there is no room for the new one, the old one stays, and is known for a report."""
    disk = small_disk(2500)
    make_run(disk / "a")
    assert in_process(main, "report", disk)[0] == 0
    before = (disk / "report.md").read_bytes()
    fill_up(disk / "filler", 2**21)
    code, _, err = in_process(main, "report", disk)
    assert (code, "No space left" in err) == (2, True)
    assert (disk / "report.md").read_bytes() == before
    (disk / "filler").unlink()
    assert in_process(main, "report", disk)[0] == 0


def test_a_report_of_one_run(in_process, tmp_path):
    run = make_run(tmp_path / "a")
    code, _, _ = in_process(main, "report", run)
    assert code == 0
    page = (run / "report.html").read_text()
    assert "<h1>a</h1>" in page
    assert '<a href="metrics.jsonl">' in page


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
    "a second figure beyond floats": ending(top5_accuracy=10**400),
    "a speed that is none": ending(images_per_s=-1.0),
    "a time beyond floats": ending(wall_s=10**400),
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
    assert "50.00 (n = 1)" in out


def test_a_spoilt_config_is_told(in_process, tmp_path):
    for name in "abcd":
        make_run(tmp_path / name, smoothing=0.1 if name == "d" else 0.2)
    (tmp_path / "b" / "config.json").write_text("[" * 200_000)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    config["provenance"] = {"smoothing": ["flag"]}
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    code, out, err = in_process(main, "report", tmp_path)
    assert (code, err) == (0, "")
    assert "- b: no config.json of a run\n- c: no config.json of a run\n" in out


def test_curves_say_which_images_they_are_of(in_process, tmp_path):
    """All settings are tested on the same images at the end, and evaluated on others before."""
    make_run(tmp_path / "a", validation_fraction=0.1)
    in_process(main, "report", tmp_path)
    assert "Accuracy on held-out images after" in (tmp_path / "report.html").read_text()
    make_run(tmp_path / "b", validation_fraction=0.0)
    in_process(main, "report", tmp_path)
    assert "Accuracy on held-out or test images after" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("figure", [str(10**399), "NaN", "-1e400", "1e308"])
@pytest.mark.parametrize("key", ["eval/accuracy", "epoch"])
def test_a_figure_that_no_axis_can_show_is_left_out(in_process, tmp_path, figure, key):
    """Of the charts, which are drawn without it."""
    run = make_run(tmp_path / "a")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": 17, "epoch": 3, "{key}": {figure}}}\n')
    code, _, err = in_process(main, "report", tmp_path)
    assert (code, err) == (0, "")
    specs = json.loads(charts_of((tmp_path / "report.html").read_text()))
    assert all("NaN" not in json.dumps(spec) for spec in specs.values())


def test_no_control_character_reaches_the_terminal_or_the_page(in_process, tmp_path):
    escape = "x\x1b]0;title\x07\x9b\ny"
    options = dict.fromkeys(("dataset", "model", "optimizer", "scheduler", "run_name"), escape)
    make_run(tmp_path / "a", **options)
    make_run(tmp_path / "b", **options, checkpoint=escape)
    make_run(tmp_path / f"c{escape}", {"status": escape, "error": escape})
    shutil.copy(tmp_path / "a" / "metrics.jsonl", tmp_path)
    code, out, err = in_process(main, "report", tmp_path)
    assert (code, err) == (0, "")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", charts_of(page))
    for text in (out.replace("\n  ", " "), (tmp_path / "report.md").read_text(), own_part(page)):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
        assert r"x\x1b]0;title\x07\x9b\ny" in text


def test_a_folder_whose_name_is_not_utf_8(in_process, tmp_path):
    make_run(tmp_path / "a").rename(tmp_path / "a\udcff")
    code, _, err = in_process(main, "report", tmp_path)
    assert (code, err) == (0, "")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert r"a\udcff: 50.00%" in page and 'href="a%FF/config.json"' in page


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_a_report_of_somebody_else_stays(in_process, tmp_path, name):
    make_run(tmp_path / "a")
    (tmp_path / name).write_text("mine")
    code, _, err = in_process(main, "report", tmp_path)
    assert code == 2
    assert f"{name}: is no report of cifar-accel" in err
    assert (tmp_path / name).read_text() == "mine"

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
    assert b"## caf" in done.stdout
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


BROWSER_FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync
    --hide-scrollbars --virtual-time-budget=10000
""".split()

# Notes what goes wrong, and at the end what is shown and what was asked of a network.
PROBE = """<script>
const amiss = [];
addEventListener("error", (event) => amiss.push(event.message));
addEventListener("unhandledrejection", (event) => amiss.push(String(event.reason)));
for (const kind of ["error", "warn"]) console[kind] = (...words) => amiss.push(words.join(" "));
addEventListener("load", () => setTimeout(() => {
  const requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  const wide = document.documentElement.scrollWidth - innerWidth;
  document.title = JSON.stringify({amiss, wide,
    requests: requests.filter((name) => !name.startsWith("data:")),
    charts: document.querySelectorAll(".chart svg").length,
    pictures: [...document.images].filter((image) => image.naturalWidth > 0).length,
    tables: document.querySelectorAll("table").length,
    buttons: document.querySelectorAll("th button").length});
}, 3000));
</script>"""


def in_a_browser(folder, tmp_path, *flags):
    """What `PROBE` sees of the folder's report in Chromium."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium")
    probe = folder / "probe.html"
    probe.write_text((folder / "report.html").read_text().replace("<body>", "<body>" + PROBE, 1))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [browser, *BROWSER_FLAGS, *flags, profile, "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    probe.unlink()
    title = re.search("<title>(.*?)</title>", done.stdout)[1]
    return json.loads(html.unescape(title))


@pytest.mark.parametrize("width", [360, 1440])
def test_the_page_in_a_browser(finished, in_process, tmp_path, width):
    """Nothing goes wrong, nothing is asked of a network, and the page is as wide as the window."""
    in_process(main, "report", finished)
    seen = in_a_browser(finished, tmp_path, f"--window-size={width},9000")
    assert seen["amiss"] == [] and seen["requests"] == [] and seen["wide"] <= 0
    assert seen["charts"] >= 7
    # Of two settings the pictures that they are sure of and get wrong, and those of all.
    assert seen["pictures"] >= 12
    assert seen["buttons"] > 20


def test_the_page_without_scripts_has_its_tables(finished, in_process, tmp_path):
    in_process(main, "report", finished)
    own = own_part((finished / "report.html").read_text())
    assert own.count("<table") >= 6
    assert "Confused most often" in own and "95 % interval" in own
