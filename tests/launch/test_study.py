import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import yaml
from conftest import heed_signals, steps, summary, wait_for
from filelock import FileLock
from made_runs import make_run

import cifar_accel.launch.command as command_module
from cifar_accel.cli import main
from cifar_accel.errors import BadInput
from cifar_accel.launch.study import places_for, tell_results
from cifar_accel.launch.study_file import read_study
from cifar_accel.launch.study_runs import StudyRun, plan_runs


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


def command(file: Path, *words) -> list:
    start = [sys.executable, "-m", "cifar_accel.cli", "study", file]
    return [*start, "--save-dir", file.parent / "ck", *words]


def run_study(file: Path, *words) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(file, *words), capture_output=True, text=True, cwd=file.parent, timeout=240
    )


def start_study(file: Path, *words) -> subprocess.Popen:
    """A study whose output is to be read as it comes."""
    return subprocess.Popen(
        command(file, *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=file.parent,
        preexec_fn=heed_signals,
    )


def read_to(process: subprocess.Popen, words: str) -> str:
    """What a process prints, to the first line that holds `words`."""
    told = ""
    for line in process.stdout:
        told += line
        if words in line:
            return told
    raise AssertionError(f"{words!r} is not in\n{told}")


# ---- whole studies


def test_a_failed_run_is_listed_and_only_it_is_run_again(tmp_path, cache, capsys):
    later = tmp_path / "later.safetensors"
    rows = [
        {"run_name": "a"},
        {"run_name": "b", "checkpoint": str(later)},
        {"run_name": "c", "seed": 1},
    ]
    file = study_file(tmp_path / "study.yaml", cache, runs=rows, baseline="a")

    def written() -> list[int]:
        return [(tmp_path / "ck" / n / "metrics.jsonl").stat().st_mtime_ns for n in "ac"]

    # The plan, a line for each run, the table, what failed and what to ask next: nothing else.
    first = run_study(file)
    assert first.returncode == 1
    plan, launch, *lines = first.stdout.splitlines()
    assert plan == "study three: 0 of 3 runs finished, 3 to do; time left not known yet"
    assert launch.startswith("launch: one process")
    folder = re.escape(str(tmp_path / "ck"))
    patterns = [
        rf"1 of 3: accuracy \d+\.\d\d%, [\d.]+ s; about [\d.]+ s left: {folder}/a",
        rf"2 of 3: failed \(exit code \d\); about [\d.]+ s left: {folder}/b",
        rf"3 of 3: accuracy \d+\.\d\d%, [\d.]+ s; nothing left: {folder}/c",
        "",
        r"\|.*acc.*\|",
        r"\|-[-|]*\|",
        r"\|.*test_nfnet.*\|",
        "",
        "study three: 2 of 3 runs finished",
        rf"  failed: {folder}/b \(.*",
        rf"  the page of all runs there: cifar-accel report {folder}",
    ]
    assert len(lines) == len(patterns)
    for pattern, line in zip(patterns, lines, strict=True):
        assert re.fullmatch(pattern, line), line
    assert "no such file" in first.stderr

    before = written()
    shutil.copy(tmp_path / "ck" / "a" / "model" / "model.safetensors", later)
    second = run_study(file, "--verbose")
    assert second.returncode == 0
    assert "2 of 3 runs finished, 1 to do; about" in second.stdout
    assert "study three: 3 of 3 runs finished" in second.stdout
    assert second.stdout.count("loading torch") == 1
    assert written() == before

    third = run_study(file)
    assert third.returncode == 0
    assert "3 of 3 runs finished, 0 to do; nothing left" in third.stdout
    table = [line for line in third.stdout.splitlines() if line.startswith("|")]
    assert len(table) > 2
    assert [line for line in second.stdout.splitlines() if line.startswith("|")] == table

    # What it says to ask next is an answer.
    compare = shlex.split(third.stdout.splitlines()[-1].partition("cifar-accel ")[2])
    assert main(compare) == 0
    assert "verdict" in capsys.readouterr().out


def test_jobs_run_at_a_time_stop_by_ctrl_c_and_go_on(tmp_path, cache):
    """Three runs, two at a time; the one that fails says why."""
    rows = [{"run_name": name, "epochs": 20} for name in "abc"]
    rows[2]["checkpoint"] = str(tmp_path / "never.pth")
    file = study_file(tmp_path / "study.yaml", cache, runs=rows)
    ck = tmp_path / "ck"
    process = start_study(file, "--jobs", "2")
    begun = [ck / name / "metrics.jsonl" for name in "ab"]
    wait_for(lambda: process.poll() is not None or all(file.exists() for file in begun))
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 143
    assert "study: stopping; what runs saves a checkpoint first" in told
    assert "the same command goes on from here" in told
    assert [summary(ck / name)["status"] for name in "ab"] == ["preempted"] * 2
    assert not (ck / "c").exists()

    done = run_study(file, "--jobs", "2")
    assert done.returncode == 1
    assert "0 of 3 runs finished, 3 to do" in done.stdout
    assert "study three: 2 of 3 runs finished" in done.stdout
    assert done.stderr.count("never.pth: no such file") == 1
    assert [summary(ck / name)["steps"] for name in "ab"] == [160] * 2
    # A run goes on where it was stopped: each step is logged once.
    assert steps(ck / "a") == sorted(set(steps(ck / "a")))


def test_two_studies_of_one_file_share_its_runs(tmp_path, cache):
    rows = [{"run_name": name} for name in "ab"]
    file = study_file(tmp_path / "study.yaml", cache, runs=rows)
    studies = [start_study(file), start_study(file)]
    told = [process.communicate(timeout=240)[0] for process in studies]
    assert [process.returncode for process in studies] == [0, 0]
    assert all("study three: 2 of 2 runs finished" in output for output in told)
    # Each was trained once.
    for name in "ab":
        config = json.loads((tmp_path / "ck" / name / "config.json").read_text())
        assert not config.get("resumed")
        assert steps(tmp_path / "ck" / name)[-1] == 16


@pytest.mark.skipif(sys.platform != "linux", reason="tells the bar by a terminal of Linux")
def test_on_a_terminal_the_bar_of_the_run_is_shown(tmp_path, cache):
    file = study_file(tmp_path / "study.yaml", cache, runs=[{"run_name": "a"}])
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    with open(its, "wb") as terminal:
        process = subprocess.Popen(
            command(file), stdout=subprocess.DEVNULL, stderr=terminal, cwd=tmp_path
        )
    shown = b""
    # At its end a terminal is an error to read.
    with open(ours, "rb", buffering=0) as reader, contextlib.suppress(OSError):
        while part := reader.read(1000):
            shown += part
    assert process.wait(60) == 0
    assert b"epoch 2/2 100%" in shown
    assert b"loading torch" not in shown


def test_what_cannot_be_compared_stands_in_tables_of_its_own(tmp_path):
    """One has a column more: the course report's figures."""
    file = tmp_path / "study.yaml"
    file.write_text("runs: [{run_name: a, model: nfnet}, {run_name: b, dataset: digits}]")
    runs = plan_runs(str(file), read_study(str(file)), [], str(tmp_path / "ck"))
    for run in runs:
        data = run.args.dataset
        make_run(run.folder, dataset=data, model=run.args.model, data_fingerprint=data)
        run.state = "finished"
    lines = []
    assert tell_results("two", runs, lines.append) == 0
    told = "\n".join(lines)
    assert told.count("| setting") == 2
    assert told.count("course report") == 1
    assert "digits, test images" in told


# ---- what another process trains


def one_run(tmp_path: Path) -> tuple[Path, StudyRun]:
    """A study of one run, and that run."""
    file = tmp_path / "study.yaml"
    file.write_text("runs: [{run_name: a, dataset: digits}]")
    (run,) = plan_runs(str(file), read_study(str(file)), [], str(tmp_path / "ck"))
    return file, run


def finish(run: StudyRun) -> None:
    """Write what the run's own training would leave."""
    make_run(run.folder)
    config = json.loads((run.folder / "config.json").read_text())
    config["command"] = ["program", *run.words]
    (run.folder / "config.json").write_text(json.dumps(config))


def test_a_run_in_progress_elsewhere_is_waited_for(tmp_path):
    file, run = one_run(tmp_path)
    run.folder.mkdir(parents=True)
    with FileLock(run.folder / ".lock"):
        (run.folder / ".lock").write_text("process 7 on here\n")
        process = start_study(file)
        told = read_to(process, "waiting for 1")
        assert f"{run.folder}: in progress elsewhere, process 7 on here" in told
        finish(run)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "1 of 1: accuracy 50.00%" in told


def test_ctrl_c_ends_the_wait_for_another_process(tmp_path):
    file, run = one_run(tmp_path)
    run.folder.mkdir(parents=True)
    with FileLock(run.folder / ".lock"):
        process = start_study(file)
        read_to(process, "waiting for 1")
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[0]
    assert process.returncode == 143
    assert "the same command goes on from here" in told


def test_a_marker_of_an_earlier_stop_does_not_stop_the_study(tmp_path, cache):
    rows = [{"run_name": "a", "checkpoint": str(tmp_path / "never.pth")}, {"run_name": "b"}]
    (tmp_path / "ck" / "a").mkdir(parents=True)
    (tmp_path / "ck" / "a" / "PREEMPTED").touch()
    done = run_study(study_file(tmp_path / "study.yaml", cache, runs=rows))
    assert done.returncode == 1
    assert "1 of 2 runs finished" in done.stdout


def test_a_bad_launcher_config_starts_nothing(in_process, tmp_path, monkeypatch):
    (tmp_path / "study.yaml").write_text("runs: [{dataset: digits}]")
    (tmp_path / "config.yaml").write_text("num_processes: none")
    monkeypatch.setenv("ACCELERATE_CONFIG_FILE", str(tmp_path / "config.yaml"))
    code, out, err = in_process(main, "study", tmp_path / "study.yaml")
    assert code == 2
    assert "num_processes none: must be" in err
    assert out == ""


# ---- what is only shown


@pytest.mark.parametrize("flag", ["--status", "--dry-run"])
def test_what_is_shown_is_not_trained(in_process, tmp_path, flag):
    file = tmp_path / "study.yaml"
    file.write_text("runs: [{run_name: a, dataset: digits}, {run_name: b c, seed: 4}]")
    a, _ = plan_runs(str(file), read_study(str(file)), [], str(tmp_path / "ck"))
    finish(a)
    before = set(tmp_path.rglob("*"))
    code, out, _ = in_process(main, "study", file, flag, "--save-dir", tmp_path / "ck")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "study study: 1 of 2 runs finished, 1 to do; time left not known yet"
    assert f"{a.folder}: finished, accuracy 50.00%" in lines
    assert f"{tmp_path}/ck/b c: to do" in lines
    command = (
        f"    {sys.executable} -m cifar_accel --group=study '--run-name=b c' --seed=4 "
        f"--save-dir={tmp_path}/ck"
    )
    assert (command in lines) == (flag == "--dry-run")
    assert set(tmp_path.rglob("*")) == before


# ---- places


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with so many GPUs, by a program that stands for nvidia-smi."""

    def with_gpus(count: int, visible: str | None = None) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\n" + "echo 'GPU 0: one'\n" * count)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        monkeypatch.delenv("ACCELERATE_CONFIG_FILE", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        command_module._installed_gpus.cache_clear()

    yield with_gpus
    command_module._installed_gpus.cache_clear()


@pytest.mark.parametrize("visible, taken", [(None, ["0", "1"]), ("3,GPU-7,1", ["3", "GPU-7"])])
def test_jobs_take_a_gpu_each(machine, visible, taken):
    machine(4, visible)
    places = places_for(2)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in places.environments] == taken
    assert places.environments[0]["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert places.command == [sys.executable, "-m", "cifar_accel"]
    assert "OMP_NUM_THREADS" not in places.environments[0]
    with pytest.raises(BadInput, match=r"--jobs 5: each run takes a GPU, of which there are [34]"):
        places_for(5)


def test_jobs_share_the_cores_where_there_is_no_gpu(machine, monkeypatch):
    machine(0)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [each["OMP_NUM_THREADS"] for each in places_for(3).environments] == ["2"] * 3
    assert places_for(20).environments[0]["OMP_NUM_THREADS"] == "1"
    # One at a time is what it was; and what the user set stays.
    assert "OMP_NUM_THREADS" not in places_for(1).environments[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert places_for(3).environments[0]["OMP_NUM_THREADS"] == "5"


def test_jobs_are_of_one_process_each(machine, in_process, tmp_path, monkeypatch):
    machine(2)
    config = tmp_path / "two.yaml"
    config.write_text("distributed_type: MULTI_CPU\nnum_processes: 2")
    monkeypatch.setenv("ACCELERATE_CONFIG_FILE", str(config))
    file, _ = one_run(tmp_path)
    code, out, err = in_process(main, "study", file, "--jobs", 2)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--jobs 2: {config} asks for a launcher" in err
    # Its own choice of GPUs is kept.
    config.write_text("distributed_type: NO\ngpu_ids: 1,0")
    places = places_for(2)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in places.environments] == ["1", "0"]


def test_no_jobs_are_refused(in_process, tmp_path):
    file, _ = one_run(tmp_path)
    code, _, err = in_process(main, "study", file, "--jobs", 0)
    assert (code, err.count("\n")) == (2, 1)
    assert "--jobs 0: must be greater than 0" in err
