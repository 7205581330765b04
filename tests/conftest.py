"""What the tests share: decoded data, real CIFAR-100 where the environment names it, and ways to run things."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import forked_runs
import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # bit-equality needs one thread count, and tests share few cores
os.environ.pop("WANDB_API_KEY", None)
os.environ["WANDB_MODE"] = "offline"

BIN = Path(sys.executable).parent
FRESH = (sys.executable,)
TWO = (str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2")

# The smallest real training: 8 optimizer steps an epoch, a second in all once torch is loaded.
TINY = (
    "--dataset digits --model test_nfnet --no-pretrained --recipe digits --limit-train 256 --limit-test 100 "
    "--batch-size 32 --epochs 4 --learning-rate 3e-3 --log-every 3"
).split()


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> str:
    """One folder of decoded data for all tests, and all test workers."""
    base = tmp_path_factory.getbasetemp()
    return str((base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "cache")


@pytest.fixture(scope="session")
def cifar() -> str:
    """Real CIFAR-100 in hub parquet layout; the test is skipped where CIFAR_ACCEL_DATA does not name it."""
    path = os.environ.get("CIFAR_ACCEL_DATA", "")
    if not path:
        pytest.skip("CIFAR_ACCEL_DATA is not set")
    return path


@pytest.fixture(scope="session")
def weights() -> Path:
    """Folder of ImageNet-trained local-dir models; the test is skipped where CIFAR_ACCEL_WEIGHTS does not name it."""
    path = os.environ.get("CIFAR_ACCEL_WEIGHTS", "")
    if not path:
        pytest.skip("CIFAR_ACCEL_WEIGHTS is not set")
    return Path(path)


@pytest.fixture
def words(tmp_path, cache):
    """Options of a tiny training in this test's folder."""
    return lambda *more: [*TINY, "--data-dir", cache, "--save-dir", str(tmp_path / "ck"), *more]


@pytest.fixture
def trainer(tmp_path, cache):
    """Train as a user does; gives the finished process, with the run folder as `.run`.

    In a fork of a process that has imported the trainer, unless there is a `launcher` (`FRESH`: a process of its own).
    """

    def command(*words, launcher=FRESH, base=TINY):
        where = ["--data-dir", cache, "--save-dir", str(tmp_path / "ck")]
        return [*launcher, "-m", "cifar_accel", *base, *where, *words]

    def run(*words, launcher=None, check=0, env=None, timeout=240, base=TINY):
        if launcher:
            words = command(*words, launcher=launcher, base=base)
            about = dict(env=os.environ | (env or {}), timeout=timeout, cwd=tmp_path)
            done = subprocess.run(words, capture_output=True, text=True, **about)
        else:
            done = forked(command(*words, base=base)[3:], tmp_path, env, timeout)
        assert check is None or done.returncode == check, (
            f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        found = sorted((tmp_path / "ck").rglob("config.json"), key=lambda p: p.stat().st_mtime)
        done.run = next(
            (p.parent for p in reversed(found) if not p.parent.name.startswith("model")), None
        )
        return done

    run.command = command
    return run


def forked(
    words, folder: Path, env: dict[str, str] | None = None, timeout: float = 240.0
) -> subprocess.CompletedProcess:
    """What `python -m cifar_accel WORDS` in `folder` gives, from a fork of a process that has imported it."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        training = forked_runs.finish(
            words, out, seconds=timeout, environment=env, err=err, cwd=folder
        )
        return subprocess.CompletedProcess(
            words, training.codes[0], out.read_text(), err.read_text()
        )


@pytest.fixture
def in_process(capfd, monkeypatch, tmp_path):
    """Call the command line in this process: (exit code, stdout, stderr). For what ends before training."""
    monkeypatch.chdir(tmp_path)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def call(function, *words):
        try:
            code = function([str(w) for w in words])
        except SystemExit as e:
            code = e.code
        return (code, *capfd.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def heed_signals() -> None:
    """For a child: a shell that runs the tests in the background has SIGINT ignored, nohup SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def contents(run: Path) -> dict[Path, bytes]:
    """All files of a run folder but those of its lock."""
    return {
        p: p.read_bytes()
        for p in run.rglob("*")
        if p.is_file() and p.name not in (".owner", ".lock")
    }


def without_clock(lines: list[dict]) -> list[dict]:
    timed = ("time_s", "train/images_per_s", "train/input_share", "train/peak_memory_mib")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def wait_for(condition, timeout=120.0):
    """Wait until `condition()` is true; fails after `timeout` seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def sha256(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def wandb_runs(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"))


def wandb_summary(file: Path) -> dict:
    command = [BIN / "wandb", "leet", "inspect", "--summary", "--json", file]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
