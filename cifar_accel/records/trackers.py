"""Experiment trackers: where figures go beside metrics.jsonl, from the main process alone.

A tracker is a function that takes `say` and a `TrackedRun`, and returns an open `Tracker`.
"""

import netrc
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple
from urllib.parse import urlparse

import numpy as np
import psutil
from numpy.typing import NDArray

from cifar_accel.errors import first_line
from cifar_accel.files import last_part
from cifar_accel.options.options import TrainingArguments

# Seconds that a tracker has to send what is still to be sent; then it is given up.
FINISH_TIMEOUT_S = 30
# As many more where the model is uploaded.
UPLOAD_TIMEOUT_S = 600

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
    # Short words by which runs are found, and a line in which there may be anything.
    tags: tuple[str, ...] = ()
    notes: str | None = None
    # Whether the finished model goes to the tracker as well.
    log_model: bool = False


class ShownMistake(NamedTuple):
    """An image that the model gets wrong."""

    # uint8 [H, W, 3], and its place in the data set's split.
    image: NDArray[np.uint8]
    place: int
    true: str
    taken_for: str
    # The model's probability of what it is taken for.
    probability: float | None


@dataclass(frozen=True)
class Findings:
    """What a finished model says of its test images, as far as a tracker shows it."""

    # int64 [N]: true and predicted classes, as places in `classes`.
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    classes: list[str]
    # (name, accuracy, images) of each class.
    by_class: list[tuple[str, float, int]]
    # (true, taken for, images), most often first.
    confused: list[tuple[str, str, int]]
    # Those of which the model is surest.
    mistakes: list[ShownMistake]
    # More figures of the same images, by name.
    figures: dict[str, float]


def tags_of(args: TrainingArguments, tested_on: str) -> tuple[str, ...]:
    """By what a run is found again: recipe, model, data set, and what it is judged by.

    64 characters at most each, which is what wandb takes.
    """
    names = (args.recipe, last_part(args.model), last_part(args.dataset), tested_on)
    return tuple(name[:64] for name in names if name)


@dataclass(frozen=True)
class Tracker:
    """An open tracker."""

    # The id by which a later start goes on with the run.
    id: str | None
    # Logs one row.
    log: Callable[[dict[str, Any]], None]
    # Closes the tracker with a summary and an exit code, and says where the run is to be seen.
    finish: Callable[[dict[str, Any], int], None]
    # Shows what a model says after so many steps; the findings are made when they are needed.
    show: Callable[[int, Callable[[], Findings]], None] = lambda step, findings: None
    # Ends the processes of a tracker that did not close in time.
    abandon: Callable[[], None] = lambda: None


SILENT = Tracker(id=None, log=lambda row: None, finish=lambda summary, code: None)


def start_tracker(kind: str, say: Callable[[str], None], run: TrackedRun) -> Tracker:
    """Open tracker `kind`; whatever fails in it, now or later, is said once and never ends the run.

    Nor does it hold the run up: a thread makes the calls, in order, and `finish` waits for it for
    at most `FINISH_TIMEOUT_S` seconds, and longer for a model that is to be uploaded.
    """
    try:
        tracker = TRACKERS[kind](say, run)
    except Exception as error:
        # A tracker is a library with a network behind it: there is no telling how it fails.
        say(f"warning: no {kind} tracking ({type(error).__name__}: {first_line(error)})")
        return SILENT
    if tracker is SILENT:
        return SILENT
    return _in_a_thread(kind, say, tracker, run.log_model)


def _in_a_thread(
    kind: str, say: Callable[[str], None], tracker: Tracker, log_model: bool
) -> Tracker:
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

    def show(step: int, findings: Callable[[], Findings]) -> None:
        calls.put(partial(tracker.show, step, findings))

    def finish(summary: dict[str, Any], code: int) -> None:
        uploads = log_model and summary.get("status") == "finished"
        patience = FINISH_TIMEOUT_S + (UPLOAD_TIMEOUT_S if uploads else 0)
        calls.put(partial(tracker.finish, summary, code))
        calls.put(None)
        try:
            done.wait(patience)
        # However the wait ends, by Ctrl-C too: the tracker's processes would be waited for.
        finally:
            if not done.is_set():
                say(f"warning: {kind} does not answer and is given up; metrics.jsonl is complete")
                tracker.abandon()

    # A daemon does not keep the process alive when it hangs.
    threading.Thread(target=make_calls, daemon=True).start()
    return Tracker(tracker.id, log, finish, show)


# ---- wandb

# Groups of wandb's config, each with the first of its options in the order of TrainingArguments.
GROUPS = {"model": "model", "dataset": "data", "aa": "augment", "epochs": "optim", "seed": "run"}
# What is known only once a run is set up, where it does not belong to `run`.
DERIVED_GROUPS = {
    "model": "parameters forward_gflops input_mean input_std",
    "data": "classes data_fingerprint train_images held_out_images test_images tested_on",
    "optim": "device_batch_size accumulation_steps steps_per_epoch total_steps stop_step",
}

# Figures of a row that say how fast the run goes, and are losses of nothing.
PERFORMANCE = "images_per_s input_share peak_memory_mib mfu compiled_graphs".split()

# What figures of summary.json are called; what the rows have said already is left out.
RESULTS = {
    "accuracy": "test/accuracy",
    "top5_accuracy": "test/top5_accuracy",
    "test_loss": "test/loss",
    "evaluated_images": "test/images",
    "train_loss": "train/loss_of_last_epoch",
    "images_per_s": "perf/images_per_s_of_all",
    "wall_s": "perf/wall_s",
}
SAID_BY_ROWS = {"best_accuracy", "epochs", "steps", "total_steps", "time_s"}

# wandb keeps this many rows of a table, and shows a confusion matrix as one.
MOST_TABLE_ROWS = 10_000


def start_wandb(say: Callable[[str], None], run: TrackedRun) -> Tracker:
    """Open a wandb run that never prompts and never hangs: offline without a key or a network."""
    mode = wandb_mode()
    opened = _init_wandb(mode, say, run)
    # Every figure has the optimizer step as its horizontal axis, not the number of the call.
    opened.define_metric("trainer/step")
    opened.define_metric("*", step_metric="trainer/step")
    # Rows say the last value; the summary has the best beside what was tested in the end.
    for name, best in (("accuracy", "max"), ("top5_accuracy", "max"), ("loss", "min")):
        opened.define_metric(f"eval/{name}", step_metric="trainer/step", summary=best)
    if mode == "disabled":
        return SILENT
    if opened.url:
        say(f"wandb: {opened.url}")
    else:
        say(f"wandb: offline, in {Path(opened.dir).parent}")

    def or_warn(what: str, call: Callable[[], None]) -> None:
        """Make a call without which the run is whole: how it ended is to be told in any case."""
        try:
            call()
        except Exception as error:
            say(f"warning: wandb got no {what} ({type(error).__name__}: {first_line(error)})")

    def log(row: dict[str, Any]) -> None:
        opened.log(wandb_row(row))

    def show(step: int, findings: Callable[[], Findings]) -> None:
        def log_objects() -> None:
            found = findings()
            opened.summary.update(found.figures)
            opened.log({"trainer/step": step, **wandb_objects(found)})

        or_warn("confusions and mistakes", log_objects)

    def finish(summary: dict[str, Any], code: int) -> None:
        opened.summary.update(wandb_summary(summary))
        if summary.get("status") == "preempted":
            # Without it a part that was stopped counts as failed.
            opened.mark_preempting()
        if summary.get("status") == "failed":
            opened.alert(f"{run.name[:50]} failed", str(summary.get("error")), level="ERROR")
        if summary.get("status") == "finished" and run.log_model:
            or_warn("model", partial(_log_model, opened, run, summary))
        opened.finish(exit_code=code)
        if opened.settings.mode == "offline" or not opened.url:
            folders = f"{run.folder / 'wandb'}/offline-run-*-{opened.id}"
            say(f"wandb: to see it online: wandb sync {folders}")

    return Tracker(opened.id, log, finish, show, _kill_wandb_service)


def wandb_config(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of config.json in groups: model, data, augment, optim and run."""
    derived = {name: group for group, names in DERIVED_GROUPS.items() for name in names.split()}
    known = {option.name for option in fields(TrainingArguments)}
    nested: dict[str, dict[str, Any]] = {}
    group = "run"
    for name, value in options.items():
        group = GROUPS.get(name, group)
        own = group if name in known else derived.get(name, "run")
        nested.setdefault(own, {})[name] = value
    return nested


def wandb_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl as wandb gets it: performance apart from losses."""
    names = {f"train/{name}": f"perf/{name}" for name in PERFORMANCE}
    names |= {"step": "trainer/step", "time_s": "perf/time_s"}
    return {names.get(name, name): value for name, value in row.items()}


def wandb_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """What summary.json says that the rows have not said."""
    figures = {
        RESULTS.get(name, name): value
        for name, value in summary.items()
        if value is not None and name not in SAID_BY_ROWS
    }
    # wandb knows the best of this start alone.
    if best := summary.get("best_accuracy"):
        figures["eval/accuracy"] = {"max": best}
    return figures


def wandb_objects(findings: Findings) -> dict[str, Any]:
    """Confusion matrix (or pairs, of more classes than a table takes), mistakes and classes."""
    import wandb

    classes = [list(of_class) for of_class in findings.by_class[:MOST_TABLE_ROWS]]
    shown = {"test/classes": wandb.Table(["class", "accuracy", "images"], classes)}
    if findings.mistakes:
        mistakes = wandb.Table(["image", "label", "prediction", "probability", "index"])
        for image, place, true, taken_for, probability in findings.mistakes:
            mistakes.add_data(wandb.Image(image), true, taken_for, probability, place)
        shown["test/mistakes"] = mistakes
    if len(findings.classes) ** 2 <= MOST_TABLE_ROWS:
        shown["test/confusion"] = wandb.plot.confusion_matrix(
            y_true=findings.labels.tolist(),
            preds=findings.predicted.tolist(),
            class_names=findings.classes,
            title="True and predicted class",
            split_table=True,
        )
    else:
        pairs = [list(pair) for pair in findings.confused]
        shown["test/confused"] = wandb.Table(["label", "prediction", "images"], pairs)
    return shown


def _log_model(opened: Any, run: TrackedRun, summary: dict[str, Any]) -> None:
    """Log the run's model folder as an artifact; offline wandb keeps a copy of it."""
    import wandb

    # Of a name wandb takes 128 letters, digits and a few marks.
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in f"model-{run.name}")
    artifact = wandb.Artifact(name[:128], type="model", metadata=summary)
    artifact.add_dir(str(run.folder / "model"))
    opened.log_artifact(artifact)


def _init_wandb(mode: str, say: Callable[[str], None], run: TrackedRun) -> Any:
    """An open wandb run: in `mode`, or offline where the server does not answer."""
    # Read when wandb is imported.
    os.environ.setdefault("WANDB_SILENT", "true")
    # What waits to be sent lies in the run folder too, and not in the user's home.
    os.environ.setdefault("WANDB_DATA_DIR", str(run.folder / "wandb"))
    import wandb

    settings = wandb.Settings(
        init_timeout=WANDB_INIT_TIMEOUT_S,
        finish_timeout=WANDB_FINISH_TIMEOUT_S + (UPLOAD_TIMEOUT_S if run.log_model else 0),
        console="off",
        # Seconds. By default rows are held for 15 s, and lost with the process.
        x_file_stream_transmit_interval=1,
    )
    # A later start leaves what may have been written on the page since.
    described: dict[str, Any] = {}
    if run.run_id is None:
        # A list in the environment would else be passed over.
        more = os.environ.get("WANDB_TAGS", "").split(",")
        described["tags"] = list(filter(None, (*run.tags, *more)))
        described["notes"] = os.environ.get("WANDB_NOTES", run.notes)
    init: Any = partial(
        wandb.init,
        project=os.environ.get("WANDB_PROJECT", run.project),
        name=run.name,
        group=run.group,
        job_type=run.job_type,
        config=wandb_config(run.config),
        **described,
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
