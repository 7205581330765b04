import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from made_runs import make_run

from cifar_accel.cli import main
from cifar_accel.launch.study import as_flags, is_finished, name_runs, plan_runs, read_study
from cifar_accel.launch.yaml_files import shipped_folder


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
    parameters = {name: {"value": value} for name, value in common.items()}
    path.write_text(yaml.safe_dump({"name": "three", "parameters": parameters, **extra}))
    return path


def run_study(file: Path, *words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cifar_accel.cli", "study", file]
    command += ["--save-dir", file.parent / "ck", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=file.parent, timeout=240)


# ---- whole studies


def test_a_failed_run_is_listed_and_only_it_is_run_again(tmp_path, cache):
    later = tmp_path / "later.safetensors"
    rows = [
        {"run_name": "a"},
        {"run_name": "b", "checkpoint": str(later)},
        {"run_name": "c", "seed": 1},
    ]
    file = study_file(tmp_path / "study.yaml", cache, runs=rows)

    def written() -> list[int]:
        return [(tmp_path / "ck" / n / "metrics.jsonl").stat().st_mtime_ns for n in "ac"]

    first = run_study(file)
    assert first.returncode == 1
    assert "2 of 3 runs finished" in first.stdout
    assert re.search(r"failed: .*/ck/b ", first.stdout)
    assert "no such file" in first.stderr

    before = written()
    shutil.copy(tmp_path / "ck" / "a" / "model" / "model.safetensors", later)
    second = run_study(file)
    assert second.returncode == 0
    assert "3 of 3 runs finished" in second.stdout
    assert second.stdout.count("finished before") == 2
    assert second.stdout.count("loading torch") == 1
    assert written() == before

    third = run_study(file)
    assert third.returncode == 0
    assert third.stdout.count("finished before") == 3


def test_a_marker_of_an_earlier_stop_does_not_stop_the_study(tmp_path, cache):
    rows = [{"run_name": "a", "checkpoint": str(tmp_path / "never.pth")}, {"run_name": "b"}]
    (tmp_path / "ck" / "a").mkdir(parents=True)
    (tmp_path / "ck" / "a" / "PREEMPTED").touch()
    done = run_study(study_file(tmp_path / "study.yaml", cache, runs=rows))
    assert done.returncode == 1
    assert "1 of 2 runs finished" in done.stdout


# ---- the file


def test_the_shipped_studies():
    report = read_study(str(shipped_folder("studies") / "report.yaml"))
    assert report.name == "report"
    names = ("run_name", "model", "optimizer", "scheduler")
    assert [tuple(options[name] for name in names) for options in report.runs] == [
        ("convnet/adamw", "nfnet", "adamw", "cosine"),
        ("convnet/sgdm", "nfnet", "sgdm", "cosine"),
        ("convnet/linear_decay", "nfnet", "adamw", "linear_decay"),
        ("vit/adamw", "vit", "adamw", "cosine"),
    ]
    tour = read_study(str(shipped_folder("studies") / "tour.yaml"))
    assert len(tour.runs) == 4


@pytest.mark.parametrize("words, whole", [([], False), (["--max-steps=8"], True)])
def test_a_run_that_was_cut_short_by_hand_is_not_finished(tmp_path, words, whole):
    run = make_run(tmp_path / "a", {"steps": 8})
    config = json.loads((run / "config.json").read_text())
    config["command"] = ["program", *words]
    (run / "config.json").write_text(json.dumps(config))
    assert is_finished(run, words) == whole


def test_a_sweep_file_is_a_grid(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("""
program: cifar_accel
method: grid
parameters: {seed: {values: [1, 2]}, optimizer: {values: [adamw, sgdm]}, model_ema: {value: true}}
""")
    runs = read_study(str(file)).runs
    points = [(options["seed"], options["optimizer"]) for options in runs]
    assert points == [(1, "adamw"), (1, "sgdm"), (2, "adamw"), (2, "sgdm")]
    words = ["--group=sweep", "--seed=1", "--optimizer=adamw", "--model-ema"]
    assert list(as_flags(runs[0])) == words


def test_every_kind_of_value_has_its_words():
    options = {"pretrained": False, "max_time": None, "model_kwargs": ["a=1", "b=2"]}
    words = ["--no-pretrained", "--max-time=none", "--model-kwargs", "a=1", "b=2"]
    assert list(as_flags(options)) == words


# Three options of a thousand values each.
A_BILLION_RUNS = "parameters:" + "".join(
    f"\n  {name}: {{values: {list(range(1, 1001))}}}" for name in ("seed", "epochs", "batch_size")
)

# Each line repeats the one above it ten times.
A_BILLION_WORDS = "a0: &a0 [x]" + "".join(
    f"\na{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)
)
A_BILLION_MERGES = "a0: &a0 {x: y}" + "".join(
    f"\na{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10)
)


def test_aliases_and_merges_are_read(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("parameters: {seed: &s {values: [1, 2]}, epochs: *s}")
    assert len(read_study(str(file)).runs) == 4
    file.write_text("runs: [&a {seed: 1, model: vit}, {<<: *a, seed: 2}]")
    models = [(options["model"], options["seed"]) for options in read_study(str(file)).runs]
    assert models == [("vit", 1), ("vit", 2)]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text, message",
    [
        ("runs: [", "is not YAML"),
        ("name: 2001-99-99", "is not YAML"),
        ("name: x", "needs `parameters`"),
        ("runs: [{modell: vit}]", "there is no option modell; did you mean model"),
        ("runs: 3", "`runs` a list of tables"),
        ("parameters: [a]", "`parameters` must be a table"),
        ("parameters: {seed: {values: 3}}", "a list `values`"),
        ("parameters: {seed: 3}", "needs `value` or a list `values`"),
        ("method: bayes\nparameters: {seed: {value: 3}}", "wandb's agent"),
        ("runs: [{seed: 1, run_name: a}, {seed: 1, run_name: a}]", "two runs are the same"),
        ("runs: [{epochs: 0}]", "--epochs 0"),
        ("runs: [{dry_run: true}]", "--dry-run looks at one run"),
        ("parameters: {seed: {values: []}}", "a list `values` that is not empty"),
        (A_BILLION_RUNS, "more than 10,000 runs"),
        (A_BILLION_WORDS, "more than 1,000,000 characters, its aliases written out"),
        (A_BILLION_MERGES, "more than 1,000,000 characters, its aliases written out"),
        ("runs: [{seed: 1}]\nruns: [{seed: 2}]", "a key stands twice in a table"),
        ("runs: &a [*a]", "more than 1,000,000 characters, its aliases written out"),
    ],
)
def test_a_bad_study_starts_nothing(in_process, tmp_path, text, message):
    (tmp_path / "study.yaml").write_text(text)
    code, _, err = in_process(main, "study", tmp_path / "study.yaml")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_bad_launcher_config_starts_nothing(in_process, tmp_path, monkeypatch):
    (tmp_path / "study.yaml").write_text("runs: [{dataset: digits}]")
    (tmp_path / "config.yaml").write_text("num_processes: none")
    monkeypatch.setenv("ACCELERATE_CONFIG_FILE", str(tmp_path / "config.yaml"))
    code, out, err = in_process(main, "study", tmp_path / "study.yaml")
    assert code == 2
    assert "num_processes none: must be" in err
    assert out == ""


# ---- names


def test_seeds_of_a_setting_share_the_plan_of_a_budget():
    grid = [
        {"optimizer": optimizer, "seed": seed} for optimizer in ("adamw", "lion") for seed in (1, 2)
    ]
    runs = [{"recipe": "finetune", "budget": "30m", "model": "test_vit", **point} for point in grid]
    planned = plan_runs("study.yaml", runs, [])
    taken_over = [[word for word in words if "plan-of" in word] for words in planned.values()]
    folders = list(planned)
    assert taken_over == [[], [f"--plan-of={folders[0]}"], [], [f"--plan-of={folders[2]}"]]
    # Without a budget there is nothing to share.
    plain = plan_runs("study.yaml", [{"seed": 1}, {"seed": 2}], [])
    assert not any("plan-of" in word for words in plain.values() for word in words)


def test_runs_of_a_grid_get_names_of_their_own():
    runs = [{"learning_rate": rate, "seed": seed} for rate in (0.1, 0.2) for seed in (1, 2)]
    assert name_runs(runs, ["m/adamw-s1", "m/adamw-s2"] * 2) == [
        "m/adamw-s1-learning_rate=0.1",
        "m/adamw-s2-learning_rate=0.1",
        "m/adamw-s1-learning_rate=0.2",
        "m/adamw-s2-learning_rate=0.2",
    ]
    assert name_runs([{"seed": 1}, {"seed": 2}], ["a", "b"]) == ["a", "b"]
