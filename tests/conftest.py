"""What the tests share: data to train on, ways to run the trainer, and ways to read a run.

CIFAR_ACCEL_DATA may name real CIFAR-100 and CIFAR_ACCEL_WEIGHTS a folder of ImageNet weights; the
tests that need them are skipped where they are not set.
"""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import forked_runs
import numpy as np
import pytest
from PIL import Image

# Bit-equality needs one number of threads, and the tests share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# wandb never talks to a server, but in the tests that say so.
os.environ.pop("WANDB_API_KEY", None)
os.environ["WANDB_MODE"] = "offline"

ROOT = Path(__file__).parents[1]
# Where the console scripts of this environment lie.
BIN = Path(sys.executable).parent

# Launchers: one process, and two processes by torchrun.
FRESH = (sys.executable,)
TWO = (str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2")

# The smallest real training: 8 optimizer steps an epoch, 32 in all; a second once torch is loaded.
TINY = (
    "--dataset digits --model test_nfnet --no-pretrained --recipe digits "
    "--limit-train 256 --limit-test 100 "
    "--batch-size 32 --epochs 4 --learning-rate 3e-3 --log-every 3"
).split()

# What the functions of `stub` may use.
STUB_HEADERS = ("dlfcn", "errno", "sys/stat", "unistd")

# The long form of a test: `pytest -m faults` runs it.
LONG = pytest.mark.faults


# ---- data and weights


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> str:
    """One folder of decoded data for all tests, and all test workers."""
    base = tmp_path_factory.getbasetemp()
    # Each worker of pytest-xdist has a folder of its own inside the common one.
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent
    return str(base / "cache")


@pytest.fixture(scope="session")
def cifar() -> str:
    """Real CIFAR-100 in the hub's parquet layout."""
    path = os.environ.get("CIFAR_ACCEL_DATA", "")
    if not path:
        pytest.skip("CIFAR_ACCEL_DATA is not set")
    return path


@pytest.fixture(scope="session")
def weights() -> Path:
    """A folder of ImageNet-trained `local-dir:` models."""
    path = os.environ.get("CIFAR_ACCEL_WEIGHTS", "")
    if not path:
        pytest.skip("CIFAR_ACCEL_WEIGHTS is not set")
    return Path(path)


def picture(seed: int, size=(32, 32)) -> bytes:
    """A PNG file of noise; `size` is (height, width)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def image_folder(root: Path, sizes=((32, 32),), splits=("train", "test")) -> Path:
    """Make a folder of PNG files: two classes of three images in each split."""
    for split in splits:
        for class_number, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                seed = 1000 * class_number + i
                if split == "test":
                    seed += 500
                (folder / f"{i}.png").write_bytes(picture(seed, sizes[i % len(sizes)]))
    return root


def folder_with_an_empty_class(root: Path) -> Path:
    """An image folder that has a third class without an image."""
    image_folder(root)
    (root / "train" / "eel").mkdir()
    return root


def folder_with_a_cut_image(root: Path) -> Path:
    """An image folder with a file that ends too early, train/dog/1.png."""
    image_folder(root)
    file = root / "train" / "dog" / "1.png"
    file.write_bytes(file.read_bytes()[:-1500])
    return root


def parquet_folder(root: Path, rows=12, columns=("img", "fine_label"), names=True) -> Path:
    """Make parquet files as the hub has them, with `rows` images in each split.

    Image i of the training split is `picture(i)`, of the test split `picture(rows + i)`. `names`
    says whether the files name their four classes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(parents=True, exist_ok=True)
    labels = [i % 4 for i in range(rows)]
    for split, first_seed in (("train", 0), ("test", rows)):
        values = {
            "img": [{"bytes": picture(first_seed + i), "path": f"{i}.png"} for i in range(rows)],
            "text": ["x"] * rows,
            "fine_label": labels,
            "label": labels,
            "coarse_label": [i % 2 for i in range(rows)],
        }
        table = pa.table({column: values[column] for column in columns})
        if names:
            # Where the hub's `datasets` library puts the names.
            feature = {"names": ["ant", "bee", "cow", "dog"], "_type": "ClassLabel"}
            features = {"fine_label": feature, "label": feature}
            metadata = json.dumps({"info": {"features": features}})
            table = table.replace_schema_metadata({"huggingface": metadata})
        pq.write_table(table, root / f"{split}-00000-of-00001.parquet")
    return root


@pytest.fixture
def stub(tmp_path) -> Callable[[str], dict[str, str]]:
    """Put C functions in the place of the system's, for processes with the environment it gives."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")

    def made(functions: str) -> dict[str, str]:
        source, library = tmp_path / "stub.c", tmp_path / "stub.so"
        headers = "".join(f"#include <{name}.h>\n" for name in STUB_HEADERS)
        source.write_text(f"#define _GNU_SOURCE\n{headers}{functions}\n")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        return os.environ | {"LD_PRELOAD": str(library)}

    return made


# ---- running the trainer


@pytest.fixture
def words(tmp_path, cache):
    """Options of a tiny training, with more at the end; its runs go to `tmp_path / "ck"`."""
    return lambda *more: [*TINY, "--data-dir", cache, "--save-dir", str(tmp_path / "ck"), *more]


@pytest.fixture
def trainer(tmp_path, cache):
    """Train as a user does, in `tmp_path`; gives the finished process, its run folder as `.run`.

    Without a `launcher` it is a fork of a process that has imported the trainer. With one it is a
    process of its own: `FRESH`, `TWO`, or the first words of another command. `base` are options
    that come first; `check` is the exit code that it must have, None for any. `trainer.command`
    gives the words of such a command.
    """

    def with_places(*words, base=TINY):
        return [*base, "--data-dir", cache, "--save-dir", str(tmp_path / "ck"), *words]

    def command(*words, launcher=FRESH, base=TINY):
        return [*launcher, "-m", "cifar_accel", *with_places(*words, base=base)]

    def run(*words, launcher=None, check=0, env=None, timeout=240, base=TINY):
        if launcher:
            done = subprocess.run(
                command(*words, launcher=launcher, base=base),
                capture_output=True,
                text=True,
                env=os.environ | (env or {}),
                timeout=timeout,
                cwd=tmp_path,
            )
        else:
            done = forked(with_places(*words, base=base), tmp_path, env, timeout)
        if check is not None:
            output = f"{done.stdout}\n{done.stderr}"
            assert done.returncode == check, f"exit code {done.returncode}\n{output}"
        done.run = newest_run(tmp_path / "ck")
        return done

    run.command = command
    return run


def newest_run(folder: Path) -> Path | None:
    """The run folder below `folder` that was begun last."""
    configs = folder.rglob("config.json")
    # A saved model has a config.json too.
    own = [config for config in configs if not config.parent.name.startswith("model")]
    own.sort(key=lambda config: config.stat().st_mtime)
    return own[-1].parent if own else None


def forked(
    words: Sequence[str],
    folder: Path,
    env: dict[str, str] | None = None,
    timeout: float = 240.0,
) -> subprocess.CompletedProcess:
    """What `python -m cifar_accel WORDS` gives, from a fork of a process that has imported it."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        err = Path(scratch, "err")
        training = forked_runs.finish(
            words, out, seconds=timeout, environment=env, err=err, cwd=folder
        )
        return subprocess.CompletedProcess(
            words, training.codes[0], out.read_text(), err.read_text()
        )


@pytest.fixture(autouse=True)
def handlers_restored():
    """A command sets signal handlers of its own, and so does a StopRequest."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(wakeup)


@pytest.fixture
def in_process(capfd, monkeypatch, tmp_path):
    """Call a command in this process: (exit code, stdout, stderr). For what takes little time."""
    monkeypatch.chdir(tmp_path)

    def call(function, *words):
        try:
            code = function([str(word) for word in words])
        except SystemExit as e:
            code = e.code
        return (code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, cache) -> Path:
    """The folder of a finished run of test_nfnet on handwritten digits, which nobody changes."""
    folder = tmp_path_factory.mktemp("finished")
    places = ["--data-dir", cache, "--save-dir", str(folder)]
    done = forked([*TINY, *places, "--tracker", "none", "--epochs", "1"], folder)
    assert done.returncode == 0, done.stderr
    return newest_run(folder)


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished_run, tmp_path / "ck" / finished_run.name))


@pytest.fixture
def model(run, tmp_path) -> Path:
    """Its model folder, moved to where nothing of the run is."""
    return (run / "model").rename(tmp_path / "moved")


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """Three small images, alone in their folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    files = [folder / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        file.write_bytes(picture(i, (20 + i, 30)))
    return files


@pytest.fixture
def command(in_process):
    """Call a command of cifar-accel in this process: (exit code, stdout, stderr)."""
    from cifar_accel.cli import main

    return lambda *words: in_process(main, *words)


def heed_signals() -> None:
    """For a child, before it begins: take the signals that a shell or nohup may have ignored.

    A shell that runs the tests in the background ignores SIGINT for them, nohup SIGHUP.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_for(condition: Callable[[], object], timeout: float = 120.0) -> None:
    """Wait until `condition()` is true; fails after `timeout` seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"waited {timeout:g} s in vain")


# ---- reading a run


def rows(run: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[int]:
    """The step of each row of metrics.jsonl."""
    return [row["step"] for row in rows(run)]


def summary(run: Path) -> dict:
    """The content of summary.json."""
    return json.loads((run / "summary.json").read_text())


def options_of_run(run: Path) -> dict:
    """What config.json records of the options, and of what they come to."""
    return json.loads((run / "config.json").read_text())["options"]


def files_of(run: Path) -> dict[Path, bytes]:
    """Every file of a run folder, with what it holds."""
    return {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


def contents(run: Path) -> dict[Path, bytes]:
    """Every file of a run folder but its lock, with what it holds."""
    return {file: held for file, held in files_of(run).items() if file.name != ".lock"}


def sha256(run: Path) -> str:
    """The digest of the final weights."""
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def without_clock(lines: list[dict]) -> list[dict]:
    """Rows without the figures that are another each time: times, speeds and peaks of memory."""
    timed = ("time_s", "train/images_per_s", "train/input_share", "train/peak_memory_mib")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def assert_same_run(run: Path, whole: Path) -> None:
    """Weights by their bytes, and every logged figure but the clock's, which only ever goes on."""
    assert sha256(run) == sha256(whole)
    clock = [row["time_s"] for row in rows(run)]
    assert clock == sorted(clock)
    assert without_clock(rows(run)) == without_clock(rows(whole))
    for key in ("accuracy", "best_accuracy", "train_loss", "steps", "status"):
        assert summary(run)[key] == summary(whole)[key]


def wandb_runs(run: Path) -> list[Path]:
    """wandb's own files of a run, one for each start of it."""
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"))


def wandb_inspect(file: Path, *options: str) -> str:
    """What wandb itself reads in one of its files, as JSON."""
    command = [BIN / "wandb", "leet", "inspect", *options, "--json", file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wandb_summary(file: Path) -> dict:
    """The state, configuration and summary of an offline run."""
    return json.loads(wandb_inspect(file, "--summary"))


@pytest.fixture
def small_disk(tmp_path):
    """Mount a tmpfs of so many KiB; skipped where this user may not."""
    mounted = []

    def mount(kib: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder]
        done = subprocess.run(command, capture_output=True)
        if done.returncode:
            pytest.skip("this user may not mount a tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def fill_up(file: Path, size: int) -> None:
    """Write `file` until its disk is full; `size` bytes are more than it takes."""
    with pytest.raises(OSError):
        file.write_bytes(b"x" * size)
