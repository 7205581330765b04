import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import TINY, forked, summary
from PIL import Image

from cifar_accel.cli import main
from cifar_accel.launch.study import as_flags, name_runs, read_study
from cifar_accel.results.charts import PLOTS, _save_figure, smooth

STUDIES = Path(__file__).parent.parent / "studies"


def study_file(path: Path, cache: str, **extra) -> Path:
    common = {
        "recipe": "digits",
        "dataset": "digits",
        "model": "test_nfnet",
        "pretrained": False,
        "limit_train": 256,
        "limit_test": 100,
        "batch_size": 32,
        "epochs": 2,
        "learning_rate": 3e-3,
        "tracker": "none",
        "data_dir": cache,
    }
    study = {"name": "three", "parameters": {k: {"value": v} for k, v in common.items()}, **extra}
    path.write_text(yaml.safe_dump(study))
    return path


def run_study(file: Path, *words) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "cifar_accel.cli",
        "study",
        file,
        "--save-dir",
        file.parent / "ck",
        *words,
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=file.parent, timeout=240)


def test_a_failed_run_is_listed_and_only_it_is_run_again(tmp_path, cache):
    rows = [
        {"run_name": "a"},
        {"run_name": "b", "checkpoint": str(tmp_path / "later.safetensors")},
        {"run_name": "c", "seed": 1},
    ]
    file = study_file(tmp_path / "study.yaml", cache, runs=rows)
    first = run_study(file)
    assert first.returncode == 1 and "2 of 3 runs finished" in first.stdout
    assert re.search(r"failed: .*/ck/b ", first.stdout) and "no such file" in first.stderr
    made = {n: (tmp_path / "ck" / n / "metrics.jsonl").stat().st_mtime_ns for n in "ac"}
    shutil.copy(
        tmp_path / "ck" / "a" / "model" / "model.safetensors", tmp_path / "later.safetensors"
    )
    second = run_study(file)
    assert second.returncode == 0 and "3 of 3 runs finished" in second.stdout
    assert second.stdout.count("finished before") == 2 and second.stdout.count("loading torch") == 1
    assert {n: (tmp_path / "ck" / n / "metrics.jsonl").stat().st_mtime_ns for n in "ac"} == made
    third = run_study(file)
    assert third.returncode == 0 and third.stdout.count("finished before") == 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """Two runs of one setting with different seeds, one of another, and one that never finished."""
    root = tmp_path_factory.mktemp("runs")
    for name, words in {
        "a": ["--seed", "1"],
        "b": ["--seed", "2"],
        "deep/c": ["--optimizer", "sgdm"],
    }.items():
        where = ["--data-dir", cache, "--save-dir", str(root), "--run-name", name]
        done = forked([*TINY, *where, "--tracker", "none", "--epochs", "2", *words], root)
        assert done.returncode == 0, done.stderr
    shutil.copytree(root / "a", root / "un<b>finished")
    text = json.loads((root / "a" / "summary.json").read_text()) | {
        "status": "failed",
        "error": "<script>alert(1)</script>",
    }
    (root / "un<b>finished" / "summary.json").write_text(json.dumps(text))
    return root


def test_the_tables(finished, in_process):
    code, out, _ = in_process(main, "report", finished)
    assert code == 0 and html.unescape((finished / "report.md").read_text()) in out
    tables = [
        [
            re.split(r"\s*\|\s*", line.strip("| "))
            for line in t.strip().splitlines()
            if line.startswith("| ")
        ]
        for t in re.split(r"## .*\n", out)[1:3]
    ]
    default, settings = tables
    assert default[0] == ["model", "data", "loss", "acc. %", "report"] and len(default) == 2
    accuracies = [100 * summary(finished / n)["accuracy"] for n in "ab"]
    mean, sd = sum(accuracies) / 2, abs(accuracies[0] - accuracies[1]) / 2**0.5
    assert (
        default[1][:2] == ["test_nfnet (limit_train 256, limit_test 100)", "digits"]
        and default[1][3] == f"{mean:.2f} ± {sd:.2f} (n=2)"
    )
    assert default[1][4] == "1.6041, 74.23"
    assert [row[2] for row in settings[1:]] == ["adamw, cosine", "sgdm, cosine"]
    assert settings[2][-1] == "2.4778, 58.47"
    assert "un<b>finished: failed" in out


def test_the_plots_are_pictures_that_can_be_read(finished):
    for name in PLOTS:
        image = Image.open(finished / "a" / name)
        assert image.width > 800 and image.height > 500
        assert len(image.convert("RGB").getcolors(100_000)) > 20


def test_a_dollar_in_a_name_is_no_formula(tmp_path):
    _save_figure(tmp_path / "a.png", lambda axes: axes.plot([0, 1], [0, 1], label=r"$\frac$"))
    assert Image.open(tmp_path / "a.png").width > 800


def test_the_page_in_a_browser(finished, in_process, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium")
    in_process(main, "report", finished)
    page = (finished / "report.html").read_text()
    assert "<script>" not in page and "un<b>" not in page
    probe = finished / "probe.html"  # the same page, which then counts what it shows
    counting = (
        "<script>onload=()=>{document.title=[...document.images].filter(i=>i.naturalWidth>100).length+' of '+"
        "document.images.length+' images, '+document.querySelectorAll('table').length+' tables'}</script>"
    )
    probe.write_text(page.replace("</body>", counting + "</body>"))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        f"--disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'} --virtual-time-budget=5000"
    ).split()
    done = subprocess.run(
        [browser, *flags, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120
    )
    probe.unlink()
    assert "<title>13 of 13 images, 2 tables</title>" in done.stdout


def test_the_shipped_studies():
    name, runs = read_study(str(STUDIES / "report.yaml"))
    assert name == "report"
    assert [(r["run_name"], r["model"], r["optimizer"], r["scheduler"]) for r in runs] == [
        ("convnet/adamw", "nfnet", "adamw", "cosine"),
        ("convnet/sgdm", "nfnet", "sgdm", "cosine"),
        ("convnet/linear_decay", "nfnet", "adamw", "linear_decay"),
        ("vit/adamw", "vit", "adamw", "cosine"),
    ]
    _, tour = read_study(str(STUDIES / "tour.yaml"))
    assert len(tour) == 4


def test_a_sweep_file_is_a_grid(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "program: cifar_accel\nmethod: grid\nparameters: {seed: {values: [1, 2]}, optimizer: {values: [adamw, sgdm]}, "
        "model_ema: {value: true}}\n"
    )
    _, runs = read_study(str(file))
    assert [(r["seed"], r["optimizer"]) for r in runs] == [
        (1, "adamw"),
        (1, "sgdm"),
        (2, "adamw"),
        (2, "sgdm"),
    ]
    assert list(as_flags(runs[0])) == [
        "--group=sweep",
        "--seed=1",
        "--optimizer=adamw",
        "--model-ema",
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("runs: [", "is not YAML"),
        ("name: x", "needs `parameters`"),
        ("runs: [{modell: vit}]", "there is no option modell; did you mean model"),
        ("runs: 3", "`runs` a list of tables"),
        ("parameters: [a]", "`parameters` must be a table"),
        ("parameters: {seed: {values: 3}}", "a list `values`"),
        ("parameters: {seed: 3}", "needs `value` or a list `values`"),
        ("method: bayes\nparameters: {seed: {value: 3}}", "wandb's agent"),
        ("runs: [{seed: 1, run_name: a}, {seed: 1, run_name: a}]", "two runs are the same"),
        ("runs: [{epochs: 0}]", "--epochs 0"),
    ],
)
def test_a_bad_study_starts_nothing(in_process, tmp_path, text, message):
    (tmp_path / "study.yaml").write_text(text)
    code, _, err = in_process(main, "study", tmp_path / "study.yaml")
    assert code == 2 and message in err and err.count("\n") == 1


def test_only_seeds_are_averaged(finished, in_process, tmp_path):
    """Runs that differ in anything else have rows of their own that say in what."""
    for name, rate in (("a", 0.001), ("b", 0.01)):
        shutil.copytree(finished / name, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["options"]["learning_rate"] = rate
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    _, out, _ = in_process(main, "report", tmp_path)
    assert "n=2" not in out and "learning_rate 0.001" in out and "learning_rate 0.01" in out


def test_runs_of_a_grid_get_names_of_their_own():
    runs = [{"learning_rate": rate, "seed": s} for rate in (0.1, 0.2) for s in (1, 2)]
    names = ["m/adamw-s1", "m/adamw-s2"] * 2
    assert name_runs(runs, names) == [
        f"m/adamw-s{s}-learning_rate={rate}" for rate in (0.1, 0.2) for s in (1, 2)
    ]
    assert name_runs([{"seed": 1}, {"seed": 2}], ["a", "b"]) == ["a", "b"]


def test_a_marker_of_an_earlier_stop_does_not_stop_the_study(tmp_path, cache):
    rows = [{"run_name": "a", "checkpoint": str(tmp_path / "never.pth")}, {"run_name": "b"}]
    (tmp_path / "ck" / "a").mkdir(parents=True)
    (tmp_path / "ck" / "a" / "PREEMPTED").touch()
    done = run_study(study_file(tmp_path / "study.yaml", cache, runs=rows))
    assert done.returncode == 1 and "1 of 2 runs finished" in done.stdout


def test_smoothing_starts_without_bias():
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    assert smooth([1.0, 2.0, 4.0]) == [1.0, 2.0, 4.0]
