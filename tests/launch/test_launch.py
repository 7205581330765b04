import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import summary, wait_for

import cifar_accel
from cifar_accel.errors import BadInput
from cifar_accel.launch import command as command_module
from cifar_accel.launch.command import (
    check_launcher,
    command_for,
    config_file,
    dry_environment,
)

ROOT = Path(__file__).parent.parent.parent
LAUNCH = (sys.executable, "-m", "cifar_accel.launch")


@pytest.fixture
def own_config(tmp_path, monkeypatch):
    """Write the user's accelerate config file: its text, or its values by key."""

    def write(text=None, **values):
        folder = tmp_path / "hf" / "accelerate"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "default_config.yaml").write_text(text or yaml.safe_dump(values))

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return write


# ---- the command


def test_without_a_config_the_shipped_one_that_fits(own_config):
    command, environment, why = command_for(["--epochs", "3"])
    assert command == [sys.executable, "-m", "cifar_accel", "--epochs", "3"]
    assert environment == {"ACCELERATE_MIXED_PRECISION": "no"}
    assert "cpu.yaml" in why


def test_the_users_own_config_comes_first(own_config, monkeypatch):
    own_config(distributed_type="NO", num_processes=1, mixed_precision="bf16", use_cpu=True)
    _, environment, why = command_for([])
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environment["ACCELERATE_USE_CPU"] == "True"
    assert "your own accelerate config" in why
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert "ACCELERATE_MIXED_PRECISION" not in command_for([]).environment


def test_an_unquoted_no_is_no_truth_value(own_config):
    own_config("distributed_type: NO\nmixed_precision: no\n")
    command, environment, _ = command_for([])
    assert command == [sys.executable, "-m", "cifar_accel"]
    assert environment == {"ACCELERATE_MIXED_PRECISION": "no"}


def test_several_processes_go_through_a_launcher(own_config):
    own_config(distributed_type="MULTI_GPU", num_processes=4, mixed_precision="bf16")
    command = command_for(["--epochs", "3"]).command
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    assert command[-4:] == ["-m", "cifar_accel", "--epochs", "3"]


def test_several_processes_on_a_cpu_go_through_torchrun(own_config):
    """accelerate launch would start one."""
    own_config(distributed_type="MULTI_CPU", num_processes=2, mixed_precision="bf16")
    command, environment, _ = command_for([])
    assert environment == {"ACCELERATE_MIXED_PRECISION": "bf16"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert command[1:] == [*torchrun, "-m", "cifar_accel"]


@pytest.mark.parametrize(
    "values, launcher",
    [
        (dict(distributed_type="NO"), False),
        (dict(distributed_type="NO", dynamo_config={"dynamo_backend": "INDUCTOR"}), True),
        (dict(distributed_type="NO", dynamo_config={}), False),
        (dict(distributed_type="MULTI_GPU", num_processes=1, gpu_ids=0), False),
        (dict(distributed_type="MULTI_GPU", num_processes=1, num_machines=2), True),
        (dict(distributed_type="FSDP", num_processes=1), True),
    ],
)
def test_a_launcher_only_where_one_is_needed(own_config, values, launcher):
    own_config(**values)
    assert (command_for([]).command[2] == "accelerate.commands.launch") == launcher


# ---- the hardware


@pytest.fixture
def nvidia_smi(own_config, tmp_path, monkeypatch):
    """Put a program of that name in front of the PATH: the lines of a shell script."""

    def write(script):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        command_module._installed_gpus.cache_clear()

    yield write
    command_module._installed_gpus.cache_clear()


def test_several_gpus_take_the_shipped_file_for_them(nvidia_smi, monkeypatch):
    nvidia_smi("echo 'GPU 0: one'; echo 'GPU 1: two'; echo 'GPU 2: three'")
    command = command_for(["--epochs", "3"]).command
    assert command[2] == "accelerate.commands.launch"
    assert command[4].endswith("accelerate_configs/multi_gpu.yaml")
    assert command[5:] == ["--num_processes", "3", "-m", "cifar_accel", "--epochs", "3"]
    assert dry_environment()["CIFAR_ACCEL_PROCESSES"] == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert config_file()[0].name == "single_gpu.yaml"


def test_a_hung_nvidia_smi_counts_as_no_gpu(nvidia_smi, monkeypatch, capsys):
    nvidia_smi("exec sleep 60")
    monkeypatch.setattr(command_module, "PATIENCE", 0.2)
    assert config_file()[0].name == "cpu.yaml"
    assert command_for([]).command == [sys.executable, "-m", "cifar_accel"]
    said = "launch: nvidia-smi does not answer within 0.2 s; going on as without a GPU\n"
    assert capsys.readouterr().out == said


# ---- what is wrong with a config


BROKEN = [
    ("{", "is not YAML"),
    ("[1, 2]", "holds no keys"),
    ("num_processes: two", "num_processes two: must be a valid integer"),
    ("num_processes: [1]", "num_processes [1]: must be a valid integer"),
    ("num_processes: -1", "num_processes -1: must be greater than 0"),
    ("main_process_port: 99999", "main_process_port 99999: must be less than or equal to 65535"),
    ("main_process_port: here", "main_process_port here: must be a valid integer"),
    ("main_process_ip: 10.0.0.300", "main_process_ip 10.0.0.300: value is not a valid IPv4"),
    ("main_process_ip: the first one", "main_process_ip the first one: value is not a valid"),
]


@pytest.mark.parametrize("text, message", BROKEN)
def test_what_a_broken_config_says(own_config, text, message):
    own_config(text)
    with pytest.raises(BadInput) as raised:
        check_launcher()
    assert "default_config.yaml: " in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.parametrize("text", [BROKEN[0][0], BROKEN[2][0]])
def test_a_broken_config_is_one_line(own_config, text):
    own_config(text)
    done = subprocess.run([*LAUNCH, "--epochs", "3"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "default_config.yaml" in done.stderr


def test_a_home_that_is_not_there_holds_no_config(own_config, monkeypatch):
    """As in a container whose user has no name."""
    monkeypatch.setenv("HF_HOME", "~nobody-of-that-name/huggingface")
    assert config_file()[0].name == "cpu.yaml"


def test_a_config_that_is_not_there(own_config, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_CONFIG_FILE", str(tmp_path / "nowhere.yaml"))
    with pytest.raises(BadInput, match=r"nowhere.yaml: No such file"):
        check_launcher()


@pytest.fixture
def taken_port():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_that_is_taken_on_the_first_of_several_machines(own_config, taken_port):
    """The others were told to come to this port, so no other will do."""
    several = dict(distributed_type="MULTI_GPU", num_machines=2, num_processes=4)
    several |= dict(main_process_ip="127.0.0.1", main_process_port=taken_port)
    own_config(**several, machine_rank=0)
    with pytest.raises(BadInput, match=f"main_process_port {taken_port}: Address already in use"):
        check_launcher()
    own_config(**several, machine_rank=1)
    check_launcher()


def test_a_port_that_is_taken_stops_nobody_on_one_machine(own_config, taken_port):
    """accelerate launch looks for another by itself: two runs may share a machine."""
    own_config(distributed_type="MULTI_GPU", num_processes=2, main_process_port=taken_port)
    check_launcher()


def test_cpus_of_several_machines_are_not_started_from_here(own_config):
    own_config(distributed_type="MULTI_CPU", num_processes=2, num_machines=2)
    with pytest.raises(BadInput, match="MULTI_CPU on 2 machines is not started from here"):
        command_for([])


def test_what_a_dry_run_says_of_the_launcher(own_config):
    from cifar_accel.dry_run import Note, check_the_launcher

    line = check_the_launcher(None)
    assert line.startswith("./launch.sh would take ")
    assert line.endswith("cpu.yaml (0 GPUs here, and no accelerate config of your own)")
    own_config(distributed_type="MULTI_CPU", num_processes=2)
    with pytest.raises(Note, match=r"accelerate launch starts ONE with it; \./launch\.sh starts 2"):
        check_the_launcher(None)


@pytest.mark.parametrize("name", ["cpu", "single_gpu", "multi_gpu", "multi_node"])
def test_every_shipped_config_says_when_how_and_what(name):
    from accelerate.commands.config.config_args import load_config_from_file

    file = ROOT / "accelerate_configs" / f"{name}.yaml"
    text = file.read_text()
    for head in ("Use when", "Start with", "You should see"):
        assert f"# {head}" in text
    assert load_config_from_file(str(file)).num_processes >= 1


# ---- the child


def test_signals_and_exit_codes_come_through(words, tmp_path, own_config):
    options = words("--epochs", "60", "--run-name", "a", "--tracker", "none")
    process = subprocess.Popen([*LAUNCH, *options], stdout=subprocess.DEVNULL)
    wait_for((tmp_path / "ck" / "a" / "metrics.jsonl").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert summary(tmp_path / "ck" / "a")["status"] == "preempted"
    assert subprocess.run([*LAUNCH, "--epochs", "0"], capture_output=True).returncode == 2


def test_signals_and_exit_codes_come_through_two_processes(words, tmp_path, own_config):
    own_config(distributed_type="MULTI_CPU", num_processes=2)
    options = words("--epochs", "60", "--run-name", "a", "--tracker", "none")
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([*LAUNCH, *options], **silent)
    wait_for((tmp_path / "ck" / "a" / "metrics.jsonl").exists)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 143
    assert summary(tmp_path / "ck" / "a")["status"] == "preempted"

    # What trains nothing is not taken for stopped, and takes nothing away.
    marker = tmp_path / "ck" / "a" / "PREEMPTED"
    for other in (["--learning-rate", "1"], ["--dry-run"]):
        done = subprocess.run([*LAUNCH, *options, *other], capture_output=True, timeout=60)
        assert done.returncode != 143
        assert marker.exists()
    refused = subprocess.run([*LAUNCH, "--epochs", "0"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1


def test_stopped_while_two_processes_start(words, tmp_path, own_config):
    own_config(distributed_type="MULTI_CPU", num_processes=2)
    command = [*LAUNCH, *words("--tracker", "none")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    while not (line := process.stdout.readline()).startswith("loading torch"):
        assert line, "it ended by itself"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert not (tmp_path / "ck").exists()


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


def test_how_a_child_ended_is_told_by_what_it_wrote(tmp_path):
    """A launcher turns every code into 1, and what lies there from before says nothing."""
    from cifar_accel.launch.child import run_child

    (tmp_path / "PREEMPTED").touch()
    assert run_child(["sh", "-c", "exit 1"], {}, tmp_path) == 1
    write_again = f"echo SIGTERM > {tmp_path}/PREEMPTED; exit 1"
    assert run_child(["sh", "-c", write_again], {}, tmp_path) == 143
    assert run_child(["sh", "-c", "kill -9 $$"], {}, tmp_path) == 128 + 9
    assert run_child(["sh", "-c", "exit 0"], {}, tmp_path) == 0


def test_a_child_knows_that_it_was_launched(tmp_path):
    from cifar_accel.launch.child import run_child

    code = run_child(["sh", "-c", 'exit "$CIFAR_ACCEL_LAUNCHED$MORE"'], {"MORE": "2"}, tmp_path)
    assert code == 12


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a child of its parent's end")
def test_a_child_is_told_of_our_end(tmp_path):
    (tmp_path / "child.sh").write_text("""
trap 'touch told; exit' TERM
touch ready
while true; do sleep 0.1; done
""")
    code = """
from pathlib import Path
from cifar_accel.launch.child import run_child
run_child(["sh", "child.sh"], {}, Path("run"))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    wait_for((tmp_path / "ready").exists)
    process.kill()
    wait_for((tmp_path / "told").exists, 20)
    process.wait()


# ---- words


def test_the_version(in_process):
    from cifar_accel.cli import main

    expected = f"cifar_accel {cifar_accel.__version__}\n"
    assert in_process(main, "--version") == (0, expected, "")
    for module in ("cifar_accel", "cifar_accel.launch"):
        command = [sys.executable, "-m", module, "--version"]
        assert subprocess.run(command, capture_output=True, text=True).stdout == expected


def test_a_python_without_the_packages_is_one_line():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Without site-packages.
    command = [sys.executable, "-S", "-m", "cifar_accel", "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2
    assert " has no torch, " in done.stderr
    assert "./launch.sh" in done.stderr
    assert done.stderr.count("\n") == 1


# ---- launch.sh


def test_a_commands_name_runs_that_command(own_config, tmp_path):
    done = subprocess.run([*LAUNCH, "report", tmp_path / "none"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "none: no such folder" in done.stderr
    done = subprocess.run([*LAUNCH, "repport", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown command repport" in done.stderr
    assert "did you mean report" in done.stderr


def test_the_command_train_goes_through_the_launcher(own_config):
    options = ["--model", "test_vit", "--no-pretrained", "--dataset", "digits", "--dry-run"]
    done = subprocess.run([*LAUNCH, "train", *options], capture_output=True, text=True)
    assert done.stdout.startswith("launch: one process, settings of ")
    assert "plan and health" in done.stdout


def test_launch_sh_passes_its_words_on(tmp_path):
    """In a copy of the checkout in which everything is installed already."""
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    python.chmod(0o755)
    state = "cat pyproject.toml constraints.txt | cksum > .venv/.installed"
    subprocess.run(["bash", "-c", state], cwd=tmp_path, check=True)
    command = ["bash", tmp_path / "launch.sh", "report", "a folder"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "-m|cifar_accel.launch|report|a folder|"


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
    command = ["bash", tmp_path / "launch.sh", "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert "no Python >= 3.11" in done.stderr
    assert done.stderr.count("\n") == 1
