"""`--dry-run` says what would happen and what is amiss, and leaves no trace."""

import os
import re
import socket
import subprocess

import pytest
import yaml
from conftest import FRESH, TINY, TWO, files_of, forked
from PIL import Image

from cifar_accel.dry_run import Findings, check_data
from cifar_accel.options.parsing import parse_training


@pytest.fixture
def dry(tmp_path, cache, monkeypatch):
    """Run --dry-run in a folder of its own; gives exit code and standard output.

    With a `launcher`, or by another `module`, it is a process of its own.
    """
    # Nothing of this machine's launcher counts.
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(*words, module="cifar_accel", base=TINY, env=None, launcher=None):
        places = ["--data-dir", cache, "--save-dir", str(tmp_path / "ck")]
        options = [*base, *places, "--dry-run", *words]
        if launcher or module != "cifar_accel":
            command = [*(launcher or FRESH), "-m", module, *options]
            environment = os.environ | (env or {})
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=120
            )
        else:
            done = forked(options, tmp_path, env)
        assert "Traceback" not in done.stderr, done.stderr
        assert not (tmp_path / "ck").exists(), "it writes nothing"
        return done.returncode, done.stdout

    return run


def line(out: str, name: str) -> str:
    """The line of check `name`, which begins with ok, note or BAD."""
    for text in out.splitlines():
        mark, *rest = text.split() or [""]
        if mark in ("ok", "note", "BAD") and rest[:1] == [name]:
            return text
    raise AssertionError(f"no line of {name} in\n{out}")


# Options, the check that refuses them, and what it says.
REFUSED = [
    ("--limit-train 99999", "data", "there are only 1,438 images"),
    ("--validation-fraction 0.001 --crop-padding 9", "data", "leaves"),
    (
        "--crop-padding 8 --checkpoint /nowhere.pth",
        "data",
        "must be smaller than the images' side of 8",
    ),
    ("--checkpoint /nowhere.pth --resume /nowhere", "memory", "no such file"),
    ("--resume /nowhere", "run", "no such folder"),
    ("--image-size 512 --limit-train 1024 --batch-size 1024", "memory", "Give --micro-batch-size"),
    ("--optimizer sgmd", "schedule", "did you mean sgdm"),
]


def test_everything_with_its_origin(dry):
    code, out = dry("--micro-batch-size", "10", "--model-ema")
    assert code == 0
    assert "nothing is in the way" in out

    # Each option, and where it comes from.
    options = [text.split() for text in out.splitlines() if text.startswith("  --")]
    origins = {words[0]: words[-1] for words in options}
    assert origins["--learning-rate"] == "flag"
    assert origins["--smoothing"] == "recipe"
    assert origins["--seed"] == "default"
    assert origins["--warmup-epochs"] == "derived"

    # What follows from them.
    assert "256 training, 100 test images, 10 classes" in line(out, "data")
    batch = "32 = 1 process x 8 images x 4 accumulation steps; 8 steps an epoch"
    assert batch in line(out, "batch")
    schedule = "cosine, 32 steps, 6 of warm-up: 1e-05 at 0, 0.003 at 6,"
    assert schedule in line(out, "schedule")
    assert "MiB a process" in line(out, "memory")
    assert re.search(r"about [\d.]+ s: 4 epochs of [\d.]+ s, by a few steps: ", line(out, "time"))
    assert "; decoded images: 0 MiB, " in line(out, "disk")
    assert "a new run" in line(out, "run")


def test_a_budgets_plan_is_printed_and_not_carried_out(dry):
    base = "--dataset digits --model test_vit --recipe finetune --tracker none --batch-size 32"
    # Its weights may have to be downloaded still.
    _, out = dry("--budget", "10m", base=base.split())
    assert re.search(r"budget +\S+ +\d+ +[\d.]+ +[\d.]+  <- this", out)
    plan = r"fits into 10m: --image-size [\d:.,]+ --epochs \d+"
    assert re.search(plan, line(out, "time"))


def test_each_remedy(dry):
    for words, name, text in REFUSED:
        code, out = dry(*words.split())
        assert code == 2, out
        assert text in line(out, name)

    # The hub cannot be reached: what depends on the data is not known, the rest is. TINY[4:] are
    # its options without the data set and the model.
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    words = "--model vit --dataset some/where".split()
    code, out = dry(*words, base=TINY[4:], env=nowhere, launcher=FRESH)
    assert code == 2
    assert "checks failed" in out
    assert "BAD" in line(out, "data")
    assert "cannot be reached" in line(out, "data")
    assert "note" in line(out, "batch")

    # The launcher's processes, device and precision.
    code, out = dry("--batch-size", "31", env={"CIFAR_ACCEL_PROCESSES": "2"})
    assert code == 2
    assert "30 or 32 can" in line(out, "batch")
    code, out = dry("--device", "cuda", env={"CUDA_VISIBLE_DEVICES": ""})
    assert code == 2
    assert "sees no such device" in line(out, "device")
    assert "see above" in line(out, "memory")
    code, out = dry(env={"ACCELERATE_MIXED_PRECISION": "fp16"})
    assert code == 2
    assert "needs a GPU" in line(out, "device")


def test_a_name_that_is_wrong_is_told_once(dry):
    for words, name in (("--model nonsense", "model"), ("--optimizer nonsense", "schedule")):
        code, out = dry(*words.split())
        assert code == 2
        assert "BAD" in line(out, name)
        assert "note" in line(out, "memory")
        assert "1 of 12 checks failed" in out


def test_a_port_that_is_taken(dry, tmp_path):
    """On the first of two machines, where the other one was told to come."""
    config = {
        "distributed_type": "MULTI_CPU",
        "num_machines": 2,
        "num_processes": 2,
        "machine_rank": 0,
        "main_process_ip": "127.0.0.1",
    }
    file = tmp_path / "two_machines.yaml"
    environment = {"ACCELERATE_CONFIG_FILE": str(file)}
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        file.write_text(yaml.safe_dump(config | {"main_process_port": port}))
        code, out = dry(env=environment)
    assert code == 2
    assert f"main_process_port {port}: Address already in use" in line(out, "launcher")
    assert "name another one there" in line(out, "launcher")

    # And one that there cannot be.
    file.write_text(yaml.safe_dump(config | {"main_process_port": 99999}))
    code, out = dry(env=environment)
    assert code == 2
    assert "main_process_port" in line(out, "launcher")


def test_a_config_that_starts_one_process_only(dry, tmp_path):
    """By this config `accelerate launch` starts one process, and this package's launcher two."""
    folder = tmp_path / "hf" / "accelerate"
    folder.mkdir(parents=True)
    config = {"distributed_type": "MULTI_CPU", "num_processes": 2, "mixed_precision": "bf16"}
    (folder / "default_config.yaml").write_text(yaml.safe_dump(config))

    code, out = dry()
    assert code == 0
    assert "accelerate launch starts ONE" in line(out, "launcher")
    assert "32 = 1 process x 32 images" in line(out, "batch")

    code, out = dry(module="cifar_accel.launch")
    assert code == 0
    assert "32 = 2 processes x 16 images" in line(out, "batch")
    assert "bf16" in line(out, "precision")


def test_a_config_of_another_kind_is_refused(dry, tmp_path):
    config = tmp_path / "fsdp.yaml"
    config.write_text("{distributed_type: FSDP, num_processes: 2}")
    environment = {"ACCELERATE_CONFIG_FILE": str(config)}
    code, out = dry(module="cifar_accel.launch", env=environment)
    assert code == 2
    assert "asks for FSDP" in line(out, "device")


def test_images_of_unequal_size_are_counted_as_they_will_be_stored(dry, tmp_path):
    """Their side is what the padding must be smaller than."""
    data = tmp_path / "data"
    for split in ("train", "test"):
        for name in "ab":
            folder = data / split / name
            folder.mkdir(parents=True)
            for n in range(8):
                Image.new("RGB", (400 + n, 300)).save(folder / f"{n}.png")
    words = "--limit-train 0 --limit-test 0 --batch-size 4 --dataset".split()
    words.append(str(data))

    code, out = dry(*words, "--crop-padding", "4")
    assert code == 0, out
    assert "16 training, 16 test images, 2 classes; decoded once" in line(out, "data")
    # 32 images of 3 * 300 * 300 bytes.
    code, out = dry(*words, "--stored-size", "300")
    assert "to 300x300: 8 MiB on disk, and as much memory" in line(out, "data")
    code, out = dry(*words, "--crop-padding", "40")
    assert code == 2
    assert "images' side of 32" in line(out, "data")


def test_images_that_are_cut_away_take_no_memory(cache):
    args, origin = parse_training([*TINY, "--data-dir", cache])
    found = Findings(args, "no", 1, 1, origin=origin)
    check_data(found)
    # 256 to train on, 100 to test, of 1,797 images of 3 * 8 * 8 bytes.
    assert (found.image_bytes, found.resident_bytes) == (1797 * 192, 356 * 192)


def test_under_a_launcher_one_process_speaks(dry):
    code, out = dry(launcher=TWO)
    assert code == 0
    assert out.count("plan and health") == 1
    assert "32 = 2 processes" in line(out, "batch")


def test_a_run_that_is_there(trainer, in_process, cache):
    from cifar_accel.cli import train_command

    run = trainer(*"--run-name a --tracker none --max-steps 8".split()).run
    before = files_of(run)
    places = ["--data-dir", cache, "--save-dir", str(run.parent)]
    words = [*TINY, *places, *"--run-name a --dry-run".split()]

    code, out, _ = in_process(train_command, *words, "--max-steps", "8")
    assert code == 0
    assert "is finished" in line(out, "run")
    code, out, _ = in_process(train_command, *words, "--max-steps", "20")
    assert code == 0
    assert "goes on from step-00000008" in line(out, "run")
    code, out, _ = in_process(train_command, *words, "--learning-rate", "1")
    assert code == 2
    assert "--learning-rate 0.003 -> 1.0" in line(out, "run")
    assert files_of(run) == before
