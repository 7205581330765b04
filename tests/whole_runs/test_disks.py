"""Disks that are full, or may only be read."""

import json
import subprocess
import sys

import forked_runs
import pytest
from conftest import fill_up, rows, steps, summary, wait_for

from cifar_accel.files import write_json
from cifar_accel.records import checkpoint
from cifar_accel.records.metrics import Metrics


def test_a_disk_that_takes_one_checkpoint_only(small_disk, words, tmp_path):
    """The second does not fit beside the first: a warning each time, and the run ends well."""
    # A checkpoint of test_nfnet takes 2.3 MB.
    disk = small_disk(4_000)
    run = disk / "a"
    options = words("--save-dir", str(disk), *"--run-name a --tracker none".split())
    forked_runs.finish(options, tmp_path / "log")

    said = (tmp_path / "log").read_text()
    assert "warning: no checkpoint at step 16" in said
    assert "Traceback" not in said

    kept = checkpoint.newest_valid(run, print)
    assert kept is not None
    assert kept.name == "step-00000008"
    assert not list(disk.rglob("*.tmp"))

    assert len(rows(run)) == 13
    assert summary(run)["status"] == "finished"


def test_no_room_for_the_weights_at_the_end(small_disk, words, tmp_path):
    disk = small_disk(9_000)
    run = disk / "a"
    options = words("--save-dir", str(disk), *"--run-name a --tracker none".split())

    # The disk fills up in mid-run.
    training = forked_runs.Training(options, tmp_path / "log")
    wait_for((run / "checkpoints" / "step-00000008").exists)
    filler = disk / "filler"
    fill_up(filler, 9_000 * 1024)
    assert training.wait(60)
    assert training.codes == [1]
    said = (tmp_path / "log").read_text()
    assert "the same command tries again" in said
    assert "Traceback" not in said

    # With room again, the same command ends the run.
    filler.unlink()
    forked_runs.finish(options, tmp_path / "log")
    assert summary(run)["status"] == "finished"
    assert len(rows(run)) == 13


def test_metrics_wait_for_room(small_disk):
    disk = small_disk(16)
    said = []
    metrics = Metrics(disk / "metrics.jsonl", said.append)
    metrics.write({"step": 1, "text": "x" * 3000})

    # One warning, however many lines wait.
    fill_up(disk / "filler", 20_000)
    for step in (2, 3):
        metrics.write({"step": step, "text": "y" * 3000})
    assert len(said) == 1
    assert "No space left" in said[0]
    assert steps(disk) == [1], "no part of a line is left"
    metrics.close()
    assert "lacks its last 2 lines" in said[1]

    # With room again, they all come, in order.
    (disk / "filler").unlink()
    metrics.write({"step": 4})
    metrics.close()
    assert steps(disk) == [1, 2, 3, 4]
    assert len(said) == 2


def test_a_full_disk_leaves_the_old_json_and_no_part_of_the_new(small_disk):
    file = small_disk(16) / "summary.json"
    write_json(file, {"step": 1})
    with pytest.raises(OSError):
        write_json(file, {"step": 2, "text": "x" * 20_000})
    assert json.loads(file.read_text()) == {"step": 1}
    assert list(file.parent.iterdir()) == [file]


# Answers `folder` for a folder and `file` for a file, if they are errors.
FSYNC = """
int fsync(int fd) {{
    struct stat about;
    fstat(fd, &about);
    errno = S_ISDIR(about.st_mode) ? {folder} : {file};
    return errno ? -1 : 0;
}}
"""

SAVE_THREE = """
import sys, torch
from pathlib import Path
from cifar_accel.records.checkpoint import save_checkpoint
weights = {"w": torch.ones(2)}
for step in (1, 2, 3):
    save_checkpoint(Path(sys.argv[1]), weights, {}, None, {"step": step}, keep=2)
"""


def test_a_file_system_that_syncs_no_folder_keeps_checkpoints(stub, tmp_path):
    """As network and FUSE file systems may: said once, and older checkpoints go all the same."""
    environment = stub(FSYNC.format(folder="EINVAL", file="0"))
    command = [sys.executable, "-c", SAVE_THREE, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("cannot be synced") == 1
    kept = checkpoint.list_checkpoints(tmp_path)
    assert [path.name for path in kept] == ["step-00000003", "step-00000002"]
    assert all(checkpoint.fault(path) is None for path in kept)


def test_a_file_that_does_not_reach_the_disk_makes_no_checkpoint(stub, tmp_path):
    environment = stub(FSYNC.format(folder="0", file="EIO"))
    command = [sys.executable, "-c", SAVE_THREE, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "OSError: [Errno 5]" in done.stderr
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_disk_that_may_only_be_read(small_disk, words, in_process):
    from cifar_accel.cli import train_command

    disk = small_disk(64)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for option in ("--save-dir", "--data-dir"):
        code, _, err = in_process(train_command, *words("--tracker", "none", option, disk / "x"))
        assert code == 2
        assert "Read-only file system" in err
        assert err.count("\n") == 1
