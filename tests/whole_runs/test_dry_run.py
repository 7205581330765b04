"""`--dry-run` says what would happen and what is amiss, and leaves no trace."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import BIN, FRESH, TINY, forked


@pytest.fixture
def dry(tmp_path, cache, monkeypatch):
    """Run --dry-run in a folder of its own; gives exit code and the lines by their name."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(*words, module="cifar_accel", base=TINY, env=None, launcher=None):
        options = [
            *base,
            "--data-dir",
            cache,
            "--save-dir",
            str(tmp_path / "ck"),
            "--dry-run",
            *words,
        ]
        if launcher or module != "cifar_accel":
            command = [*(launcher or FRESH), "-m", module, *options]
            done = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | (env or {}), timeout=120
            )
        else:
            done = forked(options, tmp_path, env)
        assert "Traceback" not in done.stderr, done.stderr
        assert not (tmp_path / "ck").exists(), "it writes nothing"
        return done.returncode, done.stdout

    return run


def line(out: str, name: str) -> str:
    marks = (["ok"], ["note"], ["BAD"])
    return next(t for t in out.splitlines() if t.split()[:1] in marks and t.split()[1] == name)


REFUSED = [
    (["--limit-train", "99999"], "data", "there are only 1,438 images"),
    (["--validation-fraction", "0.001", "--crop-padding", "9"], "data", "leaves"),
    (
        ["--crop-padding", "8", "--checkpoint", "/nowhere.pth"],
        "data",
        "must be smaller than the images' side of 8",
    ),
    (["--checkpoint", "/nowhere.pth", "--resume", "/nowhere"], "memory", "no such file"),
    (["--resume", "/nowhere"], "run", "no such folder"),
]


def test_everything_with_its_origin(dry):
    code, out = dry("--micro-batch-size", "10", "--model-ema")
    assert code == 0 and "nothing is in the way" in out
    options = {
        text.split()[0]: text.split()[-1] for text in out.splitlines() if text.startswith("  --")
    }
    assert options["--learning-rate"] == "flag" and options["--smoothing"] == "recipe"
    assert options["--seed"] == "default" and options["--warmup-epochs"] == "derived"
    assert "256 training, 100 test images, 10 classes" in line(out, "data")
    assert "32 = 1 process x 8 images x 4 accumulation steps; 8 steps an epoch" in line(
        out, "batch"
    )
    assert "cosine, 32 steps, 6 of warm-up: 1e-05 at 0, 0.003 at 6," in line(out, "schedule")
    assert "MiB a process" in line(out, "memory") and "a new run" in line(out, "run")


def test_each_remedy(dry, tmp_path):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    code, out = dry(
        "--model", "vit", "--dataset", "some/where", base=TINY[4:], env=nowhere, launcher=FRESH
    )
    assert code == 2 and "checks failed" in out
    assert "BAD" in line(out, "data") and "cannot be reached" in line(out, "data")
    assert "note" in line(out, "batch")
    code, out = dry("--batch-size", "31", env={"CIFAR_ACCEL_PROCESSES": "2"})
    assert code == 2 and "30 or 32 can" in line(out, "batch")
    code, out = dry("--image-size", "512", "--limit-train", "1024", "--batch-size", "1024")
    assert code == 2 and "Give --micro-batch-size" in line(out, "memory")
    for words, name, text in REFUSED:
        code, out = dry(*words)
        assert code == 2 and text in line(out, name), out
    code, out = dry("--optimizer", "sgmd")
    assert code == 2 and "did you mean sgdm" in line(out, "schedule")
    code, out = dry("--device", "cuda", env={"CUDA_VISIBLE_DEVICES": ""})
    assert (
        code == 2 and "sees no such device" in line(out, "device") and "BAD" in line(out, "memory")
    )
    code, out = dry(env={"ACCELERATE_MIXED_PRECISION": "fp16"})
    assert code == 2 and "needs a GPU" in line(out, "device")


def test_a_port_that_is_taken(dry):
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        port = s.getsockname()[1]
        code, out = dry(env={"CIFAR_ACCEL_PROCESSES": "2", "MASTER_PORT": str(port)})
        assert (
            code == 2
            and "already in use" in line(out, "port")
            and "set MASTER_PORT" in line(out, "port")
        )
    code, out = dry(env={"CIFAR_ACCEL_PROCESSES": "2", "MASTER_PORT": "99999"})
    assert code == 2 and "set MASTER_PORT" in line(out, "port")


def test_a_config_that_starts_one_process_only(dry, tmp_path):
    folder = tmp_path / "hf" / "accelerate"
    folder.mkdir(parents=True)
    config = dict(distributed_type="MULTI_CPU", num_processes=2, mixed_precision="bf16")
    (folder / "default_config.yaml").write_text(yaml.safe_dump(config))
    code, out = dry()
    assert code == 0 and "accelerate launch starts ONE" in line(out, "launcher")
    assert "32 = 1 process x 32 images" in line(out, "batch")
    code, out = dry(module="cifar_accel.launch")
    assert (
        code == 0
        and "32 = 2 processes x 16 images" in line(out, "batch")
        and "bf16" in line(out, "precision")
    )


def test_images_of_unequal_size_are_counted_as_they_will_be_stored(dry, tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for n in range(8):
                Image.new("RGB", (400 + n, 300)).save(tmp_path / "data" / split / name / f"{n}.png")
    words = (
        "--dataset",
        str(tmp_path / "data"),
        "--limit-train",
        "0",
        "--limit-test",
        "0",
        "--batch-size",
        "4",
    )
    code, out = dry(*words, "--crop-padding", "4")
    assert code == 0 and "16 training, 16 test images, 2 classes" in line(out, "data"), out
    code, out = dry(*words, "--crop-padding", "40")
    assert code == 2 and "images' side of 32" in line(out, "data")


def test_a_config_of_another_kind_is_refused(dry, tmp_path):
    (tmp_path / "fsdp.yaml").write_text("{distributed_type: FSDP, num_processes: 2}")
    about = {"ACCELERATE_CONFIG_FILE": str(tmp_path / "fsdp.yaml")}
    code, out = dry(module="cifar_accel.launch", env=about)
    assert code == 2 and "asks for FSDP" in line(out, "device")


def test_under_a_launcher_one_process_speaks(dry):
    code, out = dry(launcher=(str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"))
    assert (
        code == 0 and out.count("plan and health") == 1 and "32 = 2 processes" in line(out, "batch")
    )


def test_a_run_that_is_there(trainer, in_process, cache):
    from cifar_accel.cli import train_command

    done = trainer("--run-name", "a", "--tracker", "none", "--max-steps", "8")
    before = {p: p.read_bytes() for p in done.run.rglob("*") if p.is_file()}
    where = [
        *TINY,
        "--data-dir",
        cache,
        "--save-dir",
        str(done.run.parent),
        "--run-name",
        "a",
        "--dry-run",
    ]
    code, out, _ = in_process(train_command, *where, "--max-steps", "8")
    assert code == 0 and "is finished" in line(out, "run")
    code, out, _ = in_process(train_command, *where, "--max-steps", "20")
    assert code == 0 and "goes on from step-00000008" in line(out, "run")
    code, out, _ = in_process(train_command, *where, "--learning-rate", "1")
    assert code == 2 and "--learning-rate 0.003 -> 1.0" in line(out, "run")
    assert {p: p.read_bytes() for p in done.run.rglob("*") if p.is_file()} == before
    assert Path(done.run).is_dir()
