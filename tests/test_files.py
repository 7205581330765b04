"""Files that are whole or absent, and JSON read into a type."""

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest

from cifar_accel.errors import BadInput
from cifar_accel.files import home, read_as, read_json, share, sync, write_json


@dataclass(frozen=True)
class Row:
    step: int
    loss: float
    mean: tuple[float, float] = (0.0, 1.0)
    name: str | None = None


def read_row(path, text: str | bytes) -> Row | None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_as(Row, path)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "row.json"


def test_a_file_is_read_as_a_dataclass(file):
    text = '{"step": 3, "loss": 0.5, "mean": [0.1, 0.2], "name": "a"}'
    assert read_row(file, text) == Row(3, 0.5, (0.1, 0.2), "a")


def test_fields_that_the_file_lacks_take_their_defaults(file):
    assert read_row(file, '{"step": 3, "loss": 0.5}') == Row(3, 0.5)


def test_keys_that_the_type_lacks_are_ignored(file):
    assert read_row(file, '{"step": 3, "loss": 0.5, "later": {"a": []}}') == Row(3, 0.5)


def test_an_integer_passes_for_a_float(file):
    row = read_row(file, '{"step": 3, "loss": 1, "mean": [0, 1]}')
    assert row == Row(3, 1.0)
    assert isinstance(row.loss, float)


def test_numbers_that_are_not_finite_are_read_as_json_reads_them(file):
    text = '{"step": 3, "loss": NaN, "mean": [-Infinity, Infinity]}'
    row = read_row(file, text)
    assert math.isnan(row.loss) and math.isnan(json.loads(text)["loss"])
    assert list(row.mean) == json.loads(text)["mean"] == [-math.inf, math.inf]


@pytest.mark.parametrize(
    "text",
    [
        '{"step": "3", "loss": 0.5}',
        '{"step": 3.5, "loss": 0.5}',
        '{"step": true, "loss": 0.5}',
        '{"step": 3, "loss": "0.5"}',
        '{"step": 3, "loss": null}',
        '{"step": 3, "loss": 0.5, "mean": [0.1]}',
        '{"step": 3, "loss": 0.5, "mean": "ab"}',
        '{"step": 3, "loss": 0.5, "name": 4}',
        '{"loss": 0.5}',
        "[3, 0.5]",
        "null",
        "",
        '{"step": 3, "loss": 0.5',
        b'{"step": 3, "loss": 0.5, "name": "\xff"}',
        "[" * 100_000,
    ],
    ids=lambda text: str(text[:50]),
)
def test_a_file_of_another_kind_is_none(file, text):
    assert read_row(file, text) is None


def test_a_missing_file_and_a_folder_are_none(tmp_path):
    assert read_as(Row, tmp_path / "nowhere.json") is None
    assert read_as(Row, tmp_path) is None


def test_other_types_than_dataclasses(file):
    file.write_text('{"a": 1, "b": 2.5}')
    assert read_as(dict[str, float], file) == {"a": 1.0, "b": 2.5}
    assert read_as(dict[str, int], file) is None
    assert read_as(list[float], file) is None


def test_what_is_written_is_read_back(file):
    value = {"a": [1, 2.5, None, True], "b": {"ä": "x"}}
    write_json(file, value)
    assert read_json(file) == value == json.loads(file.read_text())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(file):
    write_json(file, {"step": 1})
    with pytest.raises(TypeError):
        write_json(file, {"step": object()})
    assert read_json(file) == {"step": 1}
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_not_written(file, number):
    write_json(file, {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"loss": number})
    assert read_json(file) == {"loss": 1.0}
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that cannot be synced")
def test_a_file_system_that_syncs_no_folder_is_passed_over(tmp_path):
    """/proc answers as some network file systems do; /dev/null does so for what is no folder."""
    assert sync(tmp_path)
    assert not sync(Path("/proc"))
    with pytest.raises(OSError, match="Invalid argument"):
        sync(Path("/dev/null"))


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_file_gets_the_rights_that_the_umask_leaves(tmp_path, mask, mode):
    folder = tmp_path / "folder"
    before = os.umask(mask)
    try:
        folder.mkdir()
    finally:
        os.umask(before)
    file = folder / "weights"
    file.touch(mode=0o600)
    share(file)
    assert stat.S_IMODE(file.stat().st_mode) == mode


def test_a_home_directory_is_filled_in_or_refused(monkeypatch):
    monkeypatch.setenv("HOME", "/homes/me")
    assert str(home("~/data")) == "/homes/me/data"
    assert str(home("data/~x")) == "data/~x"
    with pytest.raises(BadInput, match="no such home directory"):
        home("~nobody-of-that-name/x")
