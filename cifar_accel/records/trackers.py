"""Where figures go: metrics.jsonl always, an experiment tracker beside it; both on the main process alone.

A tracker is a function that takes (project, name, group, job_type, config, folder, run id) and returns a `Tracker`.
"""

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

import psutil


@dataclass
class Tracker:
    """An open tracker: its run id, a function that logs one row, one that closes it and says where it is, and one that
    ends whatever processes it has, when it did not close in time."""

    id: str | None
    log: Callable[[dict[str, Any]], None]
    finish: Callable[[dict[str, Any], int], None]
    abandon: Callable[[], None] = lambda: None


SILENT = Tracker(None, lambda row: None, lambda summary, code: None)


CLOSING_S = 30  # that a tracker may take for what is still to be written


def start_tracker(kind: str, say: Callable[[str], None], **about: Any) -> Tracker:
    """Open tracker `kind`; any failure of it, now or later, is said once and never ends the run.

    Nor does it hold the run up: a thread of its own makes the calls, in order, and the last has `CLOSING_S` seconds.
    """
    try:
        opened = TRACKERS[kind](say, **about)
    except Exception as e:
        say(
            f"warning: no {kind} tracking ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})"
        )
        return SILENT
    if opened is SILENT:
        return SILENT
    calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def work() -> None:
        try:
            while call := calls.get():
                call()
        except Exception as e:
            say(
                f"warning: {kind} tracking stopped ({type(e).__name__}: {e}); metrics.jsonl goes on"
            )

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def finish(summary: dict[str, Any], code: int) -> None:
        calls.put(partial(opened.finish, summary, code))
        calls.put(None)
        thread.join(CLOSING_S)
        if thread.is_alive():
            say(f"warning: {kind} does not answer and is given up; metrics.jsonl is complete")
            opened.abandon()

    return Tracker(opened.id, lambda row: calls.put(partial(opened.log, row)), finish)


def start_wandb(
    say: Callable[[str], None],
    *,
    project: str,
    name: str,
    group: str | None,
    job_type: str,
    config: dict[str, Any],
    folder: Path,
    run_id: str | None,
) -> Tracker:
    """Open a wandb run that never prompts and never hangs: offline without a key or a network.

    `config` are the hyper-parameters, `folder` is where wandb/ lies, `run_id` is that of the run to go on with.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    mode: Any = wandb_mode()
    about: dict[str, Any] = dict(
        project=os.environ.get("WANDB_PROJECT", project),
        name=name,
        group=group,
        job_type=job_type,
        config=config,
        dir=str(folder),
        id=run_id or secrets.token_hex(4),
        resume="allow",
    )
    # The service would otherwise hold rows for 15 s, and lose them with the process.
    settings = wandb.Settings(
        init_timeout=10, finish_timeout=20, console="off", x_file_stream_transmit_interval=1
    )
    if mode == "offline":
        about.pop(
            "resume"
        )  # an offline run cannot ask; the same id joins the parts when they are synchronised
    try:
        run = wandb.init(mode=mode, settings=settings, **about)
    except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError) as e:
        say(f"wandb: offline, the server does not answer ({str(e).splitlines()[0]})")
        wandb.teardown()
        about.pop("resume", None)
        run = wandb.init(mode="offline", settings=settings, **about)
    run.define_metric("trainer/step")
    for prefix in ("train", "eval", "test"):
        run.define_metric(f"{prefix}/*", step_metric="trainer/step")
    if mode == "disabled":
        return SILENT
    say(f"wandb: {run.url or 'offline, in ' + str(Path(run.dir).parent)}")

    def log(row: dict[str, Any]) -> None:
        run.log({"trainer/step" if key == "step" else key: value for key, value in row.items()})

    def finish(summary: dict[str, Any], code: int) -> None:
        run.summary.update({k: v for k, v in summary.items() if v is not None})
        run.finish(exit_code=code)
        if run.settings.mode == "offline" or not run.url:
            say(f"wandb: to see it online: wandb sync {folder / 'wandb'}/offline-run-*-{run.id}")

    return Tracker(run.id, log, finish, kill_wandb_service)


def kill_wandb_service() -> None:
    """Kill wandb's own process, which would else be waited for when this one ends."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "wandb" in process.name():
                process.kill()


def wandb_mode() -> str:
    """WANDB_MODE, else online where wandb would find a key (nobody is asked for one), else offline."""
    return os.environ.get("WANDB_MODE") or ("online" if _wandb_key() else "offline")


def _wandb_key() -> bool:
    """Whether wandb would find a key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc
    from urllib.parse import urlparse

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


# A new tracker is one function like start_wandb and one line here (and its name in TrainingArguments.tracker).
TRACKERS: dict[str, Callable[..., Tracker]] = {
    "wandb": start_wandb,
    "none": lambda say, **about: SILENT,
}
