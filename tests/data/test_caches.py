"""`cifar-accel cache` lists the decoded data sets, and removes those that nobody uses."""

import os
from pathlib import Path

import pytest
from conftest import image_folder
from filelock import FileLock

from cifar_accel.cli import cache_command
from cifar_accel.data.decode import load_dataset


@pytest.fixture
def data_dir(tmp_path):
    """Digits, images of unequal size, what a kill left, an older version, and other people's."""
    cache = tmp_path / "cache"
    key = load_dataset("digits", str(cache), 32).fingerprint
    unequal = str(image_folder(tmp_path / "data", sizes=((40, 60), (32, 32))))
    for side in (16, 24):
        load_dataset(unequal, str(cache), side)
    (cache / f"decoded-v2-{key}-8px.tmp").mkdir()
    (cache / f"decoded-{key}").mkdir()
    (cache / f"decoded-{key}.lock").touch()
    (cache / "decoded-by-hand").mkdir()
    (cache / "cifar-100-python").mkdir()
    return cache


def key_of(data_dir: Path) -> str:
    """The fingerprint of the digits."""
    return load_dataset("digits", str(data_dir), 32).fingerprint


def test_each_is_listed(data_dir, in_process):
    code, out, _ = in_process(cache_command, "--data-dir", data_dir)
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 6
    (digits,) = (line for line in lines if "digits" in line)
    assert "0.4 MB, version 2, 20" in digits
    assert digits.endswith("digits, 1,797 images of 8x8")
    assert sum(line.endswith("data, 12 images of 24x24") for line in lines) == 1
    assert sum(line.endswith(f"decoded-{key_of(data_dir)}, not whole") for line in lines) == 1
    assert lines[-1] == f"       0.4 MB in all, in {data_dir}"
    assert len(list(data_dir.iterdir())) == 8


def test_a_folder_with_none_is_one_line(tmp_path, in_process):
    for folder in (tmp_path, tmp_path / "nowhere"):
        code, out, _ = in_process(cache_command, "--data-dir", folder, "--clear")
        assert code == 0
        assert out == f"       0.0 MB in all, in {folder}\n"


def test_all_are_removed_but_those_in_use(data_dir, in_process):
    key = key_of(data_dir)
    with FileLock(data_dir / f"decoded-v2-{key}.lock"):
        code, out, _ = in_process(cache_command, "--data-dir", data_dir, "--clear")
    assert code == 0
    assert out.count("; removed") == 3
    assert out.count("; left, for a process makes it") == 2
    left = ["cifar-100-python", "decoded-by-hand"]
    kept = [f"decoded-v2-{key}{end}" for end in ("", "-8px.tmp", ".lock")]
    assert sorted(os.listdir(data_dir)) == sorted(left + kept)

    # Once it is free, it goes too, with its lock.
    assert in_process(cache_command, "--data-dir", data_dir, "--clear")[0] == 0
    assert sorted(os.listdir(data_dir)) == left
    # What was removed is made anew.
    assert len(load_dataset("digits", str(data_dir), 32).train) == 1438
