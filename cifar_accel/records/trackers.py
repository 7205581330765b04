"""Experiment trackers: where figures go beside metrics.jsonl, from the main process alone.

A tracker is a function that takes `say` and a `TrackedRun`, and returns an open `Tracker`.
"""

import netrc
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlparse

import psutil

from cifar_accel.errors import first_line

# Seconds that a tracker has to send what is still to be sent; then it is given up.
FINISH_TIMEOUT_S = 30

# wandb's own limits, shorter than ours: it then says itself what went wrong.
WANDB_INIT_TIMEOUT_S = 10
WANDB_FINISH_TIMEOUT_S = 20


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it opens."""

    project: str
    name: str
    # The name of the study.
    group: str | None
    # "train" or "evaluate".
    job_type: str
    # The options, as `options` of config.json.
    config: dict[str, Any]
    # The run folder; wandb/ lies in it.
    folder: Path
    # The tracker's id of the run to go on with; None begins a new one.
    run_id: str | None


@dataclass(frozen=True)
class Tracker:
    """An open tracker."""

    # The id by which a later start goes on with the run.
    id: str | None
    # Logs one row.
    log: Callable[[dict[str, Any]], None]
    # Closes the tracker with a summary and an exit code, and says where the run is to be seen.
    finish: Callable[[dict[str, Any], int], None]
    # Ends the processes of a tracker that did not close in time.
    abandon: Callable[[], None] = lambda: None


SILENT = Tracker(id=None, log=lambda row: None, finish=lambda summary, code: None)


def start_tracker(kind: str, say: Callable[[str], None], run: TrackedRun) -> Tracker:
    """Open tracker `kind`; whatever fails in it, now or later, is said once and never ends the run.

    Nor does it hold the run up: a thread makes the calls, in order, and `finish` waits for it for
    at most `FINISH_TIMEOUT_S` seconds.
    """
    try:
        tracker = TRACKERS[kind](say, run)
    except Exception as error:
        # A tracker is a library with a network behind it: there is no telling how it fails.
        say(f"warning: no {kind} tracking ({type(error).__name__}: {first_line(error)})")
        return SILENT
    if tracker is SILENT:
        return SILENT
    return _in_a_thread(kind, say, tracker)


def _in_a_thread(kind: str, say: Callable[[str], None], tracker: Tracker) -> Tracker:
    """The same tracker, whose calls return at once and are made by a thread."""
    # Not by joining the thread: Ctrl-C in a join makes Python take it for finished.
    done = threading.Event()
    # None is the last.
    calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def make_calls() -> None:
        try:
            for call in iter(calls.get, None):
                call()
        except Exception as error:
            say(
                f"warning: {kind} tracking stopped ({type(error).__name__}: {error}); "
                "metrics.jsonl goes on"
            )
        finally:
            done.set()

    def log(row: dict[str, Any]) -> None:
        calls.put(partial(tracker.log, row))

    def finish(summary: dict[str, Any], code: int) -> None:
        calls.put(partial(tracker.finish, summary, code))
        calls.put(None)
        try:
            done.wait(FINISH_TIMEOUT_S)
        # However the wait ends, by Ctrl-C too: the tracker's processes would be waited for.
        finally:
            if not done.is_set():
                say(f"warning: {kind} does not answer and is given up; metrics.jsonl is complete")
                tracker.abandon()

    # A daemon does not keep the process alive when it hangs.
    threading.Thread(target=make_calls, daemon=True).start()
    return Tracker(tracker.id, log, finish)


# ---- wandb


def start_wandb(say: Callable[[str], None], run: TrackedRun) -> Tracker:
    """Open a wandb run that never prompts and never hangs: offline without a key or a network."""
    mode = wandb_mode()
    opened = _init_wandb(mode, say, run)
    # Every figure has the optimizer step as its horizontal axis, not the number of the call.
    opened.define_metric("trainer/step")
    for prefix in ("train", "eval", "test"):
        opened.define_metric(f"{prefix}/*", step_metric="trainer/step")
    if mode == "disabled":
        return SILENT
    if opened.url:
        say(f"wandb: {opened.url}")
    else:
        say(f"wandb: offline, in {Path(opened.dir).parent}")

    def log(row: dict[str, Any]) -> None:
        figures = dict(row)
        figures["trainer/step"] = figures.pop("step")
        opened.log(figures)

    def finish(summary: dict[str, Any], code: int) -> None:
        known = {name: value for name, value in summary.items() if value is not None}
        opened.summary.update(known)
        opened.finish(exit_code=code)
        if opened.settings.mode == "offline" or not opened.url:
            folders = f"{run.folder / 'wandb'}/offline-run-*-{opened.id}"
            say(f"wandb: to see it online: wandb sync {folders}")

    return Tracker(opened.id, log, finish, _kill_wandb_service)


def _init_wandb(mode: str, say: Callable[[str], None], run: TrackedRun) -> Any:
    """An open wandb run: in `mode`, or offline where the server does not answer."""
    # Read when wandb is imported.
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    settings = wandb.Settings(
        init_timeout=WANDB_INIT_TIMEOUT_S,
        finish_timeout=WANDB_FINISH_TIMEOUT_S,
        console="off",
        # Seconds. By default rows are held for 15 s, and lost with the process.
        x_file_stream_transmit_interval=1,
    )
    init: Any = partial(
        wandb.init,
        project=os.environ.get("WANDB_PROJECT", run.project),
        name=run.name,
        group=run.group,
        job_type=run.job_type,
        config=run.config,
        dir=str(run.folder),
        id=run.run_id or secrets.token_hex(4),
        settings=settings,
    )
    # An offline run cannot ask the server for the run to go on with: `resume` would be an error.
    # Its parts have one id, and are joined when they are synchronised.
    if mode == "offline":
        return init(mode="offline")
    try:
        return init(mode=mode, resume="allow")
    except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError) as error:
        reason = first_line(error)
    # The service still waits for the server.
    wandb.teardown()
    opened = init(mode="offline")
    # Said only now: what wandb refuses offline too, such as a name, is not the server's fault.
    say(f"wandb: offline, no run on the server ({reason})")
    return opened


def _kill_wandb_service() -> None:
    """Kill wandb's own process, which would else be waited for when this one ends."""
    for process in psutil.Process().children(recursive=True):
        # It may end by itself meanwhile.
        with suppress(psutil.Error):
            if "wandb" in process.name():
                process.kill()


def wandb_mode() -> str:
    """WANDB_MODE; else online where wandb would find a key, and offline where it would not."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    # Where `wandb login` puts it.
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        keys = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return "offline"
    return "online" if keys.authenticators(urlparse(server).hostname or "") else "offline"


# A new tracker is one function like start_wandb and one line here, and its name in the type of
# TrainingArguments.tracker.
TRACKERS: dict[str, Callable[[Callable[[str], None], TrackedRun], Tracker]] = {
    "wandb": start_wandb,
    "none": lambda say, run: SILENT,
}
