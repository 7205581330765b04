"""benchmarks/gpu.sh on a machine without a GPU, at toy size."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import parquet_folder

from benchmarks import gpu
from benchmarks.measure import Row

ROOT = Path(__file__).parents[1]
REHEARSAL = "--device cpu --tiny".split()


def figures(table: str) -> dict[str, str]:
    """The rows of a table by their names."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:2] == "| "]
    return {name: figure for name, figure, *_ in rows[1:]}


def test_every_part_has_a_row(tmp_path, cache):
    data = parquet_folder(tmp_path / "data", 512)
    file = tmp_path / "table.md"
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", data, "--data-dir", cache, *REHEARSAL, "--out", file],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # The table is the last of what is printed.
    assert done.stdout.endswith(file.read_text())
    rows = figures(file.read_text())
    assert rows["tests/test_cuda_without_gpu.py"] == "1 passed"

    # Each part by words of its rows: what was measured, and what is not without a GPU.
    parts = "test_cuda.py;report policy;plain policy;eager;epoch;local batch 2;channels_last, bf16"
    for words in parts.split(";"):
        assert any(words in name for name in rows), words
    assert list(rows.values()).count("needs a GPU") == 4
    assert not any("failed" in figure or "cut" in figure for figure in rows.values())


@pytest.fixture
def rehearse(monkeypatch, capsys):
    """Rehearse some parts in this process; gives the exit code and the rows."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["gpu", *REHEARSAL, *words])
        with pytest.raises(SystemExit) as end:
            gpu.main()
        return int(end.value.code), figures(capsys.readouterr().out)

    return run


def test_a_part_that_fails_leaves_a_row_and_the_rest_goes_on(rehearse):
    code, rows = rehearse("no-such-data", "--only", "step of test_vit, eager", "batches")
    assert code == 1
    assert rows["step of test_vit, eager"].startswith("failed with exit code 1: ")
    assert "no-such-data" in rows["step of test_vit, eager"]
    assert any("local batch 2" in name for name in rows)


def test_what_no_longer_fits_is_left_out(rehearse):
    code, rows = rehearse("--minutes", "0", "--only", "batches")
    assert (code, rows) == (0, {"batches of test_vit": "left out: 0 minutes are over"})


def slow_rows():
    """A part of two rows, of which the second never comes."""
    yield Row("first", "s", [1.0])
    print("the second takes long", flush=True)
    time.sleep(600)


def test_what_takes_too_long_is_cut(tmp_path):
    rows, failed = gpu.run_part(gpu.Part("slow", 1.0, slow_rows), 1.0, tmp_path)
    assert failed
    # What was measured by then is kept.
    assert [row.name for row in rows] == ["first", "slow"]
    assert rows[1].note == "cut after 1 s: the second takes long"
