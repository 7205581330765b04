"""metrics.jsonl: one line a logged step, whatever happened to the file."""

import json
import math

import pytest

from cifar_accel.records.metrics import Metrics, read_metrics


def row(step):
    return {"step": step, "epoch": step / 8, "train/loss": 1.5}


def write_rows(file, *steps):
    metrics = Metrics(file, print)
    for step in steps:
        metrics.write(row(step))
    metrics.close()


def test_rows_come_back(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write_rows(file, 3, 6, 8)
    assert read_metrics(file) == [row(3), row(6), row(8)]


def test_what_is_no_row_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write_rows(file, 3)
    with open(file, "ab") as f:
        f.write(b'\xff\n[1]\nnothing\n{"step": "5", "epoch": 1}\n{"step": 5}\n{"step": 6, "epo')
    assert read_metrics(file) == [row(3)]


def test_a_run_that_goes_on_drops_the_rows_it_logs_again(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write_rows(file, 3, 6, 8)
    with open(file, "a") as f:
        f.write('{"step": 9, "epo')
    Metrics(file, print).truncate(6)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [row(3), row(6)]
    write_rows(file, 8)
    assert read_metrics(file) == [row(3), row(6), row(8)]


def test_a_figure_that_is_not_finite_is_not_written(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write_rows(file, 3)
    with pytest.raises(ValueError, match="not JSON compliant"):
        Metrics(file, print).write(row(6) | {"eval/loss": math.nan})
    assert read_metrics(file) == [row(3)]


def test_rows_of_earlier_versions_stay_as_they_are(tmp_path):
    """They may hold what JSON does not have, and numbers beyond a float."""
    file = tmp_path / "metrics.jsonl"
    old = f'{{"step": 3, "epoch": 1, "eval/loss": NaN, "eval/accuracy": 1{"0" * 399}}}\n'
    file.write_text(old + json.dumps(row(6)) + "\n")
    Metrics(file, print).truncate(3)
    assert file.read_text() == old
    assert read_metrics(file)[0]["eval/accuracy"] == 10**399


def test_a_line_of_brackets_is_no_row(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write_rows(file, 3)
    with open(file, "a") as f:
        f.write("[" * 200_000 + "\n")
    assert read_metrics(file) == [row(3)]


def test_other_processes_write_nothing(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write_rows(file, 3)
    other = Metrics(file, print, enabled=False)
    other.truncate(0)
    other.write(row(6))
    other.close()
    assert read_metrics(file) == [row(3)]


def test_a_folder_that_is_gone_costs_one_warning(tmp_path):
    said = []
    metrics = Metrics(tmp_path / "gone" / "metrics.jsonl", said.append)
    metrics.write(row(3))
    metrics.write(row(6))
    assert len(said) == 1
    assert "No such file" in said[0]
    (tmp_path / "gone").mkdir()
    metrics.write(row(8))
    assert read_metrics(metrics.path) == [row(3), row(6), row(8)]
