"""A tracker is called by a thread: nothing that it does ends the training, or holds it up."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cifar_accel.records import trackers


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Starts a tracker with the functions given; gives it and what was said."""

    def call(log, finish=lambda summary, code: None, abandon=lambda: None):
        opened = trackers.Tracker("an-id", log, finish, abandon=abandon)
        monkeypatch.setitem(trackers.TRACKERS, "mine", lambda say, run: opened)
        run = trackers.TrackedRun("project", "name", None, "train", {}, tmp_path, None)
        said = []
        return trackers.start_tracker("mine", said.append, run), said

    return call


def test_calls_are_made_in_order(start):
    calls = []
    tracker, said = start(calls.append, lambda summary, code: calls.append((summary, code)))
    for step in range(3):
        tracker.log({"step": step})
    tracker.finish({"status": "finished"}, 0)
    assert calls == [{"step": 0}, {"step": 1}, {"step": 2}, ({"status": "finished"}, 0)]
    assert tracker.id == "an-id"
    assert not said


def test_a_failure_is_said_once(start):
    def fail(row):
        raise ConnectionError("no route")

    tracker, said = start(fail)
    tracker.log({"step": 1})
    tracker.log({"step": 2})
    tracker.finish({}, 0)
    assert said == [
        "warning: mine tracking stopped (ConnectionError: no route); metrics.jsonl goes on"
    ]


def test_a_tracker_that_hangs_is_given_up(start, monkeypatch):
    monkeypatch.setattr(trackers, "FINISH_TIMEOUT_S", 0.1)
    free = threading.Event()
    abandoned = []
    tracker, said = start(lambda row: free.wait(60), abandon=lambda: abandoned.append(True))
    began = time.monotonic()
    tracker.log({"step": 1})
    assert time.monotonic() - began < 1
    tracker.finish({}, 0)
    free.set()
    assert time.monotonic() - began < 10
    assert abandoned == [True]
    assert said == ["warning: mine does not answer and is given up; metrics.jsonl is complete"]


def test_a_tracker_that_hangs_is_given_up_by_ctrl_c_too(start):
    """What it has running would be waited for when Python ends."""
    free = threading.Event()
    abandoned = []
    tracker, _ = start(lambda row: free.wait(60), abandon=lambda: abandoned.append(True))
    tracker.log({"step": 1})
    # A shell that runs the tests in the background has them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    main_thread = threading.main_thread().ident
    threading.Timer(0.5, signal.pthread_kill, [main_thread, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        tracker.finish({}, 0)
    signal.signal(signal.SIGINT, before)
    free.set()
    assert abandoned == [True]


def test_a_tracker_that_does_not_open_is_silent(monkeypatch, tmp_path):
    def fail(say, run):
        raise OSError("first line\nsecond line")

    monkeypatch.setitem(trackers.TRACKERS, "mine", fail)
    run = trackers.TrackedRun("project", "name", None, "train", {}, tmp_path, None)
    said = []
    assert trackers.start_tracker("mine", said.append, run) is trackers.SILENT
    assert said == ["warning: no mine tracking (OSError: first line)"]


def test_no_tracker_needs_no_thread(tmp_path):
    run = trackers.TrackedRun("project", "name", None, "train", {}, tmp_path, None)
    assert trackers.start_tracker("none", print, run) is trackers.SILENT


@pytest.mark.parametrize("name", ["WANDB_RUN_ID", "WANDB_PROJECT"])
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_name_that_wandb_refuses_is_one_honest_line(tmp_path, name, mode):
    """It is no fault of the server, and the training goes on without a tracker."""
    code = (
        "from pathlib import Path; from cifar_accel.records.trackers import *; "
        "run = TrackedRun('project', 'name', None, 'train', {}, Path(), None); "
        "assert start_tracker('wandb', print, run) is SILENT"
    )
    wandb = {"WANDB_MODE": mode, "WANDB_BASE_URL": "http://127.0.0.1:9", name: "a/b"}
    wandb["WANDB_API_KEY"] = "0123456789" * 4
    command = [sys.executable, "-c", code]
    out = subprocess.check_output(command, env=os.environ | wandb, text=True, cwd=tmp_path)
    assert out.startswith("warning: no wandb tracking (UsageError: ")
    assert "cannot contain" in out
    assert out.count("\n") == 1
