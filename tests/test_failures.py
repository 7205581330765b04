"""What fails outside the trainer: disks, trackers, memory, other processes; and numbers that are not finite."""

import json
import os
import re
import resource
import signal
import subprocess
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import forked_runs
import psutil
import pytest
import torch
from conftest import TWO, rows, sha256, summary, wait_for, without_clock
from safetensors.torch import load_file

from cifar_accel.data.order import Order
from cifar_accel.files import read_json, write_json
from cifar_accel.machine.memory import is_out_of_memory
from cifar_accel.optim.gradients import FiniteGuard
from cifar_accel.records import checkpoint
from cifar_accel.records.metrics import Metrics


@pytest.fixture
def small_disk(tmp_path):
    """Mount a tmpfs of so many KiB; skipped where this user may not."""
    mounted = []

    def mount(kib: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True
        )
        if done.returncode:
            pytest.skip("this user may not mount a tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


# ---- disks


def test_a_disk_that_takes_one_checkpoint_only(small_disk, words, tmp_path):
    """The second does not fit beside the first: a warning each time, the first stays, and the run ends as it should."""
    disk = small_disk(4_000)  # a checkpoint of test_nfnet takes 2.3 MB
    options = words("--save-dir", str(disk), "--run-name", "a", "--tracker", "none")
    forked_runs.finish(options, tmp_path / "log")
    said = (tmp_path / "log").read_text()
    assert "warning: no checkpoint at step 16" in said and "Traceback" not in said
    kept = checkpoint.newest_valid(disk / "a", print)
    assert kept is not None and kept.name == "step-00000008" and not list(disk.rglob("*.tmp"))
    assert len(rows(disk / "a")) == 13 and summary(disk / "a")["status"] == "finished"
    assert "the system may kill it" not in said, "there is memory enough"


def test_no_room_for_the_weights_at_the_end(small_disk, words, tmp_path):
    disk = small_disk(9_000)
    options = words("--save-dir", str(disk), "--run-name", "a", "--tracker", "none")
    filler = tmp_path / "disk" / "filler"
    training = forked_runs.Training(options, tmp_path / "log")
    wait_for(lambda: (disk / "a" / "checkpoints" / "step-00000008").exists())
    with pytest.raises(OSError):
        filler.write_bytes(b"x" * 9_000 * 1024)
    assert training.wait(60) and training.codes == [1]
    said = (tmp_path / "log").read_text()
    assert "the same command tries again" in said and "Traceback" not in said
    filler.unlink()
    forked_runs.finish(options, tmp_path / "log")
    assert summary(disk / "a")["status"] == "finished" and len(rows(disk / "a")) == 13


def test_metrics_wait_for_room(small_disk):
    disk, said = small_disk(16), []
    metrics = Metrics(disk / "metrics.jsonl", said.append)
    metrics.write({"step": 1, "text": "x" * 3000})
    with pytest.raises(OSError):
        (disk / "filler").write_bytes(b"x" * 20_000)
    for step in (2, 3):
        metrics.write({"step": step, "text": "y" * 3000})
    assert len(said) == 1 and "No space left" in said[0]
    assert [row["step"] for row in rows(disk)] == [1], "no part of a line is left"
    metrics.close()
    assert "lacks its last 2 lines" in said[1]
    (disk / "filler").unlink()
    metrics.write({"step": 4})
    metrics.close()
    assert [row["step"] for row in rows(disk)] == [1, 2, 3, 4] and len(said) == 2


def test_a_full_disk_leaves_the_old_json_and_no_part_of_the_new(small_disk):
    file = small_disk(16) / "summary.json"
    write_json(file, {"step": 1})
    with pytest.raises(OSError):
        write_json(file, {"step": 2, "text": "x" * 20_000})
    assert json.loads(file.read_text()) == {"step": 1} and [
        f.name for f in file.parent.iterdir()
    ] == [file.name]


def test_a_disk_that_may_only_be_read(small_disk, words, in_process):
    from cifar_accel.cli import train_command

    disk = small_disk(64)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for option in ("--save-dir", "--data-dir"):
        code, _, err = in_process(train_command, *words("--tracker", "none", option, disk / "x"))
        assert code == 2 and "Read-only file system" in err and err.count("\n") == 1


# ---- trackers


class Refuses(BaseHTTPRequestHandler):
    """A server that knows no key."""

    def do_POST(self):
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"error": "user is not logged in"}')

    do_GET = do_POST

    def log_message(self, *args):
        pass


def test_wandb_with_a_wrong_key(trainer):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    key = "0123456789" * 4
    about = dict(
        WANDB_MODE="online",
        WANDB_API_KEY=key,
        WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}",
    )
    began = time.monotonic()
    done = trainer(env=about)
    server.shutdown()
    assert (
        time.monotonic() - began < 90
        and len(rows(done.run)) == 13
        and summary(done.run)["status"] == "finished"
    )
    assert "wandb: offline" in done.stdout and list((done.run / "wandb").glob("offline-run-*"))
    secret = [p for p in done.run.rglob("*") if p.is_file() and key.encode() in p.read_bytes()]
    assert not secret and key not in done.stdout + done.stderr


def test_wandb_without_a_network(trainer):
    about = dict(
        WANDB_MODE="online", WANDB_API_KEY="0123456789" * 4, WANDB_BASE_URL="http://127.0.0.1:9"
    )
    began = time.monotonic()
    done = trainer(env=about)
    assert (
        time.monotonic() - began < 90
        and len(rows(done.run)) == 13
        and summary(done.run)["status"] == "finished"
    )
    assert "wandb: offline, the server does not answer" in done.stdout


def _train_without_its_service(trainer, tmp_path, epochs, do):
    """Train; once the first row is there, `do` something to wandb's own process."""
    run = tmp_path / "ck" / "a"
    with open(tmp_path / "log", "w") as log:
        command = trainer.command("--epochs", str(epochs), "--run-name", "a")
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
        wait_for((run / "metrics.jsonl").exists)
        service = [
            p for p in psutil.Process(process.pid).children(recursive=True) if "wandb" in p.name()
        ]
        assert service, "wandb has a process of its own"
        for p in service:
            do(p)
        assert process.wait(120) == 0
    assert summary(run)["status"] == "finished" and [r["step"] for r in rows(run)][-1] == 8 * epochs
    assert (
        len({r["step"] for r in rows(run)})
        == len(rows(run))
        == len({*range(3, 8 * epochs, 3), *range(8, 8 * epochs + 1, 8)})
    )
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in service)


def test_wandb_killed_in_mid_run(trainer, tmp_path):
    _train_without_its_service(trainer, tmp_path, 30, psutil.Process.kill)


@pytest.mark.faults
def test_wandb_that_no_longer_answers(trainer, tmp_path):
    """Its service is stopped, not killed: it takes no row and no goodbye."""
    _train_without_its_service(trainer, tmp_path, 6, psutil.Process.suspend)
    assert "wandb does not answer and is given up" in (tmp_path / "log").read_text()


# ---- memory


def _little_memory(mib: int) -> None:
    """Let this process take no more than `mib` beyond what it has once the model is made."""
    from cifar_accel import train

    real = train.set_up

    def set_up(*args):
        done = real(*args)
        now = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (now + mib * 2**20, resource.RLIM_INFINITY))
        return done

    train.set_up = set_up


def test_out_of_memory_names_what_fits(words, tmp_path):
    """Followed until it trains: a limit on addresses, unlike one on memory, also counts what is only set aside."""
    more = [
        "--image-size",
        "96",
        "--batch-size",
        "128",
        "--run-name",
        "a",
        "--tracker",
        "none",
        "--epochs",
        "1",
    ]
    size, codes = 128, [1]
    while codes == [1]:
        log = tmp_path / f"log-{size}"
        codes = forked_runs.finish(
            words(*more, "--micro-batch-size", str(size)), log, hook=partial(_little_memory, 560)
        ).codes
        if codes == [1]:
            said = log.read_text()
            assert (
                f"out of memory on cpu with {size} images at once" in said
                and "Traceback" not in said
            )
            found = re.search(
                r"(\d+) fit. Give --micro-batch-size (\d+): (\d+) accumulation steps", said
            )
            assert found and "the global batch stays 128" in said, said
            fit, given, steps = map(int, found.groups())
            assert fit == given < size and given * steps == 128
            size = given
    assert (
        codes == [0] and 8 <= size <= 64 and summary(tmp_path / "ck" / "a")["status"] == "finished"
    )


def test_a_host_is_warned_before_it_runs_out_of_memory(words, tmp_path):
    """With the sizes of this very machine; stopped before it takes them."""
    if psutil.virtual_memory().total > 300 * 2**30:
        pytest.skip("this machine has what the case lacks")
    more = [
        "--image-size",
        "1024",
        "--batch-size",
        "1024",
        "--limit-train",
        "1024",
        "--run-name",
        "a",
    ]
    training = forked_runs.Training(words(*more, "--tracker", "none"), tmp_path / "log")
    log = tmp_path / "log"
    wait_for(
        lambda: training.wait(0.01) or (log.exists() and "warning: a step needs" in log.read_text())
    )
    training.kill()
    said = log.read_text()
    assert re.search(
        r"needs about \d+\.\d\d GiB, and \d+\.\d\d GiB are free.* Give --micro-batch-size \d+\n",
        said,
    ), said


def test_what_is_not_supported_is_not_a_lack_of_memory():
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert not is_out_of_memory(
        RuntimeError("could not create a primitive descriptor for a matmul primitive")
    )


def _try_memory() -> None:
    """Do before the first step what a GPU's start does."""
    from cifar_accel import train
    from cifar_accel.machine import memory

    real = train.set_up

    def set_up(*args):
        run, state = real(*args)
        assert memory.fits(run, run.order.micro_batch_size)
        return run, state

    train.set_up = set_up


def test_the_trial_for_memory_changes_nothing(words, tmp_path):
    """Not the weights, not batch norm's statistics, not the ranks' synchrony; on two ranks with DDP's static graph."""
    options = ("--model", "test_efficientnet", "--tracker", "none", "--epochs", "2")
    for name, hook in (("a", None), ("b", _try_memory)):
        forked_runs.finish(words(*options, "--run-name", name), tmp_path / name, 2, hook=hook)
    assert sha256(tmp_path / "ck" / "a") == sha256(tmp_path / "ck" / "b")
    assert without_clock(rows(tmp_path / "ck" / "a")) == without_clock(rows(tmp_path / "ck" / "b"))


# ---- other processes


@pytest.mark.parametrize("dies", [0, 1])
def test_when_one_rank_dies_the_other_ends(words, tmp_path, dies):
    training = forked_runs.Training(
        words("--epochs", "400", "--run-name", "a", "--tracker", "none"), tmp_path / "log", 2
    )
    wait_for((tmp_path / "ck" / "a" / "metrics.jsonl").exists)
    began = time.monotonic()
    training.ranks[dies].kill()
    assert training.wait(60) and training.codes[1 - dies] == 1
    said = (tmp_path / "log").read_text()
    assert "another process of this run is gone" in said and "Traceback" not in said
    print(f"{time.monotonic() - began:.1f} s")


def test_when_one_rank_dies_under_torchrun(trainer, tmp_path):
    run = tmp_path / "ck" / "a"
    command = [
        *TWO,
        *trainer.command("--epochs", "400", "--run-name", "a", "--tracker", "none")[1:],
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((run / "metrics.jsonl").exists)
    main = int((run / ".owner").read_text().split()[1])
    workers = [p.pid for p in psutil.Process(process.pid).children()]
    os.kill(next(pid for pid in workers if pid != main), signal.SIGKILL)
    assert process.wait(60) != 0
    assert not any(psutil.pid_exists(pid) for pid in workers)


# ---- numbers that are not finite


def _spoil(step: int, rank: str) -> None:
    """Put one NaN into the images of one step on one rank."""
    from cifar_accel.data.batches import Pipeline

    real = Pipeline.training_batches

    def training_batches(self, order, start, stop):
        for i, batch in enumerate(real(self, order, start, stop)):
            if start + i // order.accumulation == step and os.environ.get("RANK", "0") == rank:
                batch.images[0, 0, 0, 0] = float("nan")
            yield batch

    Pipeline.training_batches = training_batches


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_step_that_is_not_finite(words, tmp_path, world, optimizer):
    options = words(
        "--run-name", "a", "--tracker", "none", "--log-every", "50", "--optimizer", optimizer
    )
    failed = forked_runs.finish(
        options, tmp_path / "log", world, hook=partial(_spoil, 13, str(world - 1))
    )
    said, run = (tmp_path / "log").read_text(), tmp_path / "ck" / "a"
    assert failed.codes == [1] * world and "Traceback" not in said
    samples = Order(3407, 256, 32).samples_of(13)
    assert "step 13 is not finite: loss" in said and "gradient norm nan, learning rate 0.00" in said
    assert f"training images {', '.join(map(str, samples[:8]))}, ..." in said
    assert read_json(run / "diverged.json")["samples"] == samples.tolist()
    assert summary(run)["status"] == "failed" and "step 13" in summary(run)["error"]
    assert checkpoint.newest_valid(run, print).name == "step-00000008", (
        "the last good checkpoint is untouched"
    )
    forked_runs.finish(
        options, tmp_path / "log", world
    )  # the fault was not in the images themselves
    assert summary(run)["status"] == "finished" and not (run / "diverged.json").exists()


def _keep_what_failed(file: Path) -> None:
    """Spoil step 13, and write the weights that are there when the run ends of it."""
    from cifar_accel import train

    real = train.explained

    def explained(e, run):
        torch.save(run.module.state_dict(), file)
        return real(e, run)

    train.explained = explained
    _spoil(13, "0")


def test_a_step_that_is_not_finite_and_those_after_it_change_no_weight(words, tmp_path):
    """Two more steps are made before the next row is due and the host looks."""
    options = words("--tracker", "none", "--log-every", "16")
    hook = partial(_keep_what_failed, tmp_path / "failed.pt")
    assert forked_runs.finish([*options, "--run-name", "a"], tmp_path / "a", hook=hook).codes == [1]
    forked_runs.finish([*options, "--run-name", "b", "--max-steps", "13"], tmp_path / "b")
    good = load_file(tmp_path / "ck" / "b" / "model" / "model.safetensors")
    failed = torch.load(tmp_path / "failed.pt")
    assert failed.keys() == good.keys() and all(
        torch.equal(failed[name], good[name]) for name in good
    )


def _infinite_loss() -> None:
    """One loss that is infinite on rank 1 alone, with gradients that are finite."""
    from cifar_accel import train

    real, calls = train.SoftTargetCrossEntropy.forward, []

    def forward(self, x, target):
        calls.append(1)
        loss = real(self, x, target)
        return loss + float("inf") if len(calls) == 14 and os.environ.get("RANK") == "1" else loss

    train.SoftTargetCrossEntropy.forward = forward


def test_a_loss_that_is_not_finite_on_one_rank(words, tmp_path):
    options = words("--run-name", "a", "--tracker", "none", "--log-every", "50")
    failed = forked_runs.finish(options, tmp_path / "log", 2, hook=_infinite_loss)
    said = (tmp_path / "log").read_text()
    assert failed.codes == [1, 1] and said.count("step 13 is not finite: loss inf") == 2, said
    assert read_json(tmp_path / "ck" / "a" / "diverged.json")["step"] == 13


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True, fused=True),
    "sgdm": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "not fused": lambda p: torch.optim.RMSprop(p, 0.1),
}


@pytest.mark.parametrize(
    "name, on_host", [*((name, True) for name in OPTIMIZERS), ("adamw", False), ("sgdm", False)]
)
def test_no_update_from_the_first_bad_step_on(name, on_host):
    """The host looks, as on a CPU, or the fused optimizer takes the flag, as on a GPU."""
    weight = torch.nn.Parameter(torch.ones(5))
    optimizer = OPTIMIZERS[name]([weight])
    guard = FiniteGuard(optimizer, torch.device("cpu"), False, step=7, on_host=on_host)

    def step(gradient):
        weight.grad = torch.full((5,), gradient)
        if guard.allows(weight.grad.norm(), [torch.tensor(1.0)]):
            optimizer.step()
        return weight.detach().clone()

    before, good = weight.detach().clone(), step(1.0)
    assert not torch.equal(before, good) and guard.report()[0, 0] == 0
    assert torch.equal(step(float("inf")), good) and torch.equal(step(1.0), good)
    assert guard.report().tolist() == [[1, 8, float("inf"), 1.0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_gradients_are_looked_through_where_no_norm_is_asked_for(value):
    """In any layout; and where all is well, not one bit of them is changed."""
    weights = [torch.nn.Parameter(torch.ones(3, 2, 3, 3)), torch.nn.Parameter(torch.ones(5))]
    guard = FiniteGuard(
        torch.optim.SGD(weights, 0.1, fused=True), torch.device("cpu"), False, step=0
    )
    weights[0].grad = torch.randn(3, 2, 3, 3).to(memory_format=torch.channels_last)
    weights[1].grad, kept = torch.randn(5) * 1e-40, weights[0].grad.clone()
    tiny = weights[1].grad.clone()
    assert guard.allows(None, [torch.tensor(1.0)]) and torch.equal(weights[0].grad, kept)
    assert torch.equal(weights[1].grad, tiny)
    weights[0].grad[1, 1, 2, 0] = value
    assert not guard.allows(None, [torch.tensor(1.0)])
    bad, step, norm, _ = guard.report()[0].tolist()
    assert (bad, step) == (1, 1) and not norm < float("inf")


@pytest.mark.parametrize("on_host", [True, False])
def test_a_gradient_scaler_may_pass_over_steps(on_host):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(5))], 0.1, fused=True)
    guard = FiniteGuard(optimizer, torch.device("cpu"), True, 0, on_host)
    assert (
        guard.allows(torch.tensor(float("inf")), [torch.tensor(1.0)]) and guard.report()[0, 0] == 0
    )
    assert (
        guard.allows(torch.tensor(1.0), [torch.tensor(float("nan"))]) and guard.report()[0, 0] == 1
    )


def test_what_a_run_prints_of_a_divergence(trainer):
    done = trainer("--learning-rate", "1e30", "--warmup-epochs", "0", check=1)
    assert (
        done.stderr.count("\n") == 1
        and "is not finite" in done.stderr
        and "its update was not applied" in done.stderr
    )
    assert summary(done.run)["status"] == "failed"
