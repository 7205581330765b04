import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import summary, wait_for

from cifar_accel.launch.command import command_for

ROOT = Path(__file__).parent.parent


@pytest.fixture
def own_config(tmp_path, monkeypatch):
    """Write the user's accelerate config file."""

    def write(**values):
        folder = tmp_path / "hf" / "accelerate"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "default_config.yaml").write_text(yaml.safe_dump(values))

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return write


def test_without_a_config_the_shipped_one_that_fits(own_config):
    command, environment, why = command_for(["--epochs", "3"])
    assert command == [sys.executable, "-m", "cifar_accel", "--epochs", "3"]
    assert environment == {"ACCELERATE_MIXED_PRECISION": "no"} and "cpu.yaml" in why


def test_the_users_own_config_comes_first(own_config, monkeypatch):
    own_config(distributed_type="NO", num_processes=1, mixed_precision="bf16", use_cpu=True)
    command, environment, why = command_for([])
    assert (
        environment["ACCELERATE_MIXED_PRECISION"] == "bf16" and "your own accelerate config" in why
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert "ACCELERATE_MIXED_PRECISION" not in command_for([])[1]


def test_several_processes_go_through_a_launcher(own_config):
    own_config(distributed_type="MULTI_GPU", num_processes=4, mixed_precision="bf16")
    command, _, why = command_for(["--epochs", "3"])
    assert command[1:3] == ["-m", "accelerate.commands.launch"] and command[-4:] == [
        "-m",
        "cifar_accel",
        "--epochs",
        "3",
    ]
    own_config(
        distributed_type="MULTI_CPU", num_processes=2, mixed_precision="bf16"
    )  # accelerate launch starts one
    assert command_for([])[1] == {"ACCELERATE_MIXED_PRECISION": "bf16"}
    assert command_for([])[0][1:] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "cifar_accel",
    ]


@pytest.mark.parametrize(
    "text", ["{", "[1, 2]", "num_processes: two", "num_processes: [1]", "num_processes: -1"]
)
def test_a_broken_config_is_one_line(own_config, tmp_path, text):
    own_config()
    (tmp_path / "hf" / "accelerate" / "default_config.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "cifar_accel.launch", "--epochs", "3"],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "default_config.yaml" in done.stderr
    )


@pytest.mark.parametrize("name", ["cpu", "single_gpu", "multi_gpu", "multi_node"])
def test_every_shipped_config_says_when_how_and_what(name):
    text = (ROOT / "accelerate_configs" / f"{name}.yaml").read_text()
    assert all(f"# {head}" in text for head in ("Use when", "Start with", "You should see"))
    from accelerate.commands.config.config_args import load_config_from_file

    assert (
        load_config_from_file(str(ROOT / "accelerate_configs" / f"{name}.yaml")).num_processes >= 1
    )


def test_signals_and_exit_codes_come_through(trainer, tmp_path, own_config):
    launcher = [sys.executable, "-m", "cifar_accel.launch"]
    words = [*trainer.command("--epochs", "60", "--run-name", "a", "--tracker", "none")[3:]]
    process = subprocess.Popen([*launcher, *words], stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "ck" / "a" / "metrics.jsonl").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143 and summary(tmp_path / "ck" / "a")["status"] == "preempted"
    assert subprocess.run([*launcher, "--epochs", "0"], capture_output=True).returncode == 2


def test_signals_and_exit_codes_come_through_two_processes(trainer, tmp_path, own_config):
    own_config(distributed_type="MULTI_CPU", num_processes=2)
    launcher = [sys.executable, "-m", "cifar_accel.launch"]
    words = [*trainer.command("--epochs", "60", "--run-name", "a", "--tracker", "none")[3:]]
    process = subprocess.Popen(
        [*launcher, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: (tmp_path / "ck" / "a" / "metrics.jsonl").exists())
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 143 and summary(tmp_path / "ck" / "a")["status"] == "preempted"
    marker = tmp_path / "ck" / "a" / "PREEMPTED"
    for other in (["--learning-rate", "1"], ["--dry-run"]):
        done = subprocess.run([*launcher, *words, *other], capture_output=True, timeout=60)
        assert done.returncode != 143 and marker.exists(), "what trains nothing takes nothing away"
    refused = subprocess.run([*launcher, "--epochs", "0"], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1


def test_stopped_while_two_processes_start(trainer, tmp_path, own_config):
    own_config(distributed_type="MULTI_CPU", num_processes=2)
    words = [*trainer.command("--tracker", "none")[3:]]
    command = [sys.executable, "-m", "cifar_accel.launch", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    while not (line := process.stdout.readline()).startswith("loading torch"):
        assert line, "it ended by itself"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143 and not (tmp_path / "ck").exists()


@pytest.mark.parametrize("status, code", [("failed", 1), ("preempted", 143)])
def test_a_failure_after_a_signal_is_still_a_failure(tmp_path, status, code):
    """A child that takes the signal and ends with 1, having written how it ended."""
    about = {"status": status, "steps": 3, "total_steps": 8, "train_loss": None}
    (tmp_path / "child.py").write_text(f"""
import pathlib, signal, sys, time
here = pathlib.Path({str(tmp_path)!r})
def stop(number, frame):
    (here / "summary.json").write_text({json.dumps(about)!r})
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
(here / "ready").touch()
time.sleep(60)
""")
    (tmp_path / "starter.py").write_text(f"""
import pathlib, sys
from cifar_accel.launch.child import run_child
here = pathlib.Path({str(tmp_path)!r})
sys.exit(run_child([sys.executable, str(here / "child.py")], {{}}, here))
""")
    process = subprocess.Popen([sys.executable, tmp_path / "starter.py"])
    wait_for((tmp_path / "ready").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == code


def test_launch_sh_without_a_python(tmp_path):
    """A fresh copy on a machine whose only Python is too old."""
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    env = {
        "PATH": f"{fake.parent}:/usr/bin:/bin",
        "PYTHON": "python3",
        "HOME": os.environ.get("HOME", "/"),
    }
    done = subprocess.run(
        ["bash", tmp_path / "launch.sh", "--epochs", "1"], capture_output=True, text=True, env=env
    )
    assert (
        done.returncode == 2 and "no Python >= 3.11" in done.stderr and done.stderr.count("\n") == 1
    )
