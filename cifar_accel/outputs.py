"""What a run writes: its folder at the start, rows, checkpoints, weights, and how it ended.

Functions here may be entered by all ranks; the main process alone writes.
"""

import math
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from cifar_accel.console import say
from cifar_accel.errors import Diverged
from cifar_accel.files import read_json, share, sync, write_json, write_text
from cifar_accel.machine.speed import Profiler
from cifar_accel.models.weights import save_model
from cifar_accel.records import checkpoint, trackers
from cifar_accel.records.metrics import Metrics
from cifar_accel.records.predictions import Predictions, of_outputs, write_predictions
from cifar_accel.records.progress import Progress
from cifar_accel.records.state import State
from cifar_accel.records.summary import read_config, starting_weights
from cifar_accel.run import Model, Run
from cifar_accel.use.card import FILE as CARD
from cifar_accel.use.card import model_card
from cifar_accel.use.details import findings


def open_folder(run: Run, state: State) -> dict[str, Any]:
    """Take away what speaks of an earlier start, and write config.json; the main process alone.

    Returns what config.json holds.
    """
    # What an earlier start left to say of its end.
    path, began_in = run.folder.path, run.folder.began_in
    for name in ("summary.json", "PREEMPTED", "diverged.json"):
        (path / name).unlink(missing_ok=True)
    # Checkpoints after the step that this start goes on from: it may have gone back.
    for aside in checkpoint.set_later_aside(path, state.step):
        say(f"resume: a checkpoint after step {state.step:,} is kept as {aside}")

    # A continued run keeps its first start's config.json and adds a line for this one.
    config = run.folder.config
    old = read_config(path) or config
    # Killed before its first checkpoint, a run has its tracker's id in config.json alone.
    state.tracker_id = state.tracker_id or old.get("tracker_id")
    if state.step:
        again = {"step": state.step}
        again |= {key: config[key] for key in ("command", "versions", "hardware")}
        config = old | {"resumed": [*old.get("resumed", []), again]}
    else:
        # By these a later start knows weights that lie elsewhere then.
        config = config | {"weights": starting_weights(run.args)}
    write_json(path / "config.json", config | {"tracker_id": state.tracker_id})

    # A run that begins at another's checkpoint begins with that one's rows.
    elsewhere = began_in if began_in and began_in.resolve() != path.resolve() else None
    if elsewhere and (elsewhere / "metrics.jsonl").exists():
        shutil.copy(elsewhere / "metrics.jsonl", path)
    return config


def open_tracker(run: Run, state: State, config: dict[str, Any]) -> trackers.Tracker:
    """Open the tracker and add its run's id to config.json; the main process alone."""
    tracked = trackers.TrackedRun(
        project=run.args.project,
        name=str(run.args.run_name),
        group=run.args.group,
        job_type="train",
        config=run.folder.config["options"],
        folder=run.folder.path,
        run_id=state.tracker_id,
        tags=trackers.tags_of(run.args, run.data.tested_on),
        notes=shlex.join(["python", "-m", "cifar_accel", *run.folder.config["command"][1:]]),
        log_model=run.args.log_model,
    )
    tracker = trackers.start_tracker(run.args.tracker, say, tracked)
    # --tracker none on this start: keep the id for the next.
    state.tracker_id = tracker.id or state.tracker_id
    write_json(run.folder.path / "config.json", config | {"tracker_id": state.tracker_id})
    return tracker


class Log:
    """Where the figures of a running training go: metrics.jsonl, the tracker, the progress bar.

    All ranks have one; the main process alone writes.
    """

    def __init__(self, run: Run, state: State):
        self.run = run
        self.state = state
        file = run.folder.path / "metrics.jsonl"
        self.metrics = Metrics(file, say, enabled=run.ranks.is_main)
        self.tracker = trackers.SILENT
        # The step of the last checkpoint: the one that this start resumed from, or none at step 0.
        self.saved_step = state.step
        self.progress: Progress | None = None
        self.profiler: Profiler | None = None

    def open(self) -> None:
        """Open the folder and the tracker, and drop the rows that this start will write again."""
        # The tracker comes after the folder: it lies in it.
        run, state, plan = self.run, self.state, self.run.plan
        if run.ranks.is_main:
            config = open_folder(run, state)
            self.tracker = open_tracker(run, state, config)
        # A checkpoint is written before the row of its step, which is then settled again. After a
        # step whose window is empty there is nothing to settle.
        self.metrics.truncate(state.step - 1 if state.window_is_open else state.step)
        if run.ranks.is_main:
            steps = (plan.steps_per_epoch, plan.total_steps, state.step, plan.stop_step)
            self.progress = Progress(*steps, run.data.evaluated_on, plan.work)
        if run.args.profile and run.ranks.is_main:
            self.profiler = Profiler(run.folder.path / "profile", run.args.profile, say)

    def step(self) -> None:
        """One optimizer step is done."""
        if self.progress:
            self.progress.step(self.state.step)
        if self.profiler:
            self.profiler.step()

    def row(self, row: dict[str, Any]) -> None:
        """Log one row everywhere."""
        self.metrics.write(row)
        self.tracker.log(row)
        if self.progress:
            self.progress.log(row)

    def close(self) -> None:
        """Close the files and the bar; the tracker waits for `finish`."""
        self.metrics.close()
        if self.progress:
            self.progress.close()
        if self.profiler:
            self.profiler.close()


def save_checkpoint(run: Run, state: State, log: Log) -> None:
    """Write a checkpoint of `state`. All ranks enter, and the host waits for the device.

    A step that was just saved or resumed from is not saved again. A failure to write costs the
    checkpoint, not the run. Raises Diverged when weights, average or buffers are not finite: such a
    checkpoint would replace a good one.
    """
    if state.step == log.saved_step:
        return
    # Batch norm's statistics are each rank's own, so the ranks ask each other.
    if run.ranks.any(not is_finite(run.model))[0]:
        raise Diverged(f"the weights are not finite after step {state.step:,}")
    written = not run.ranks.is_main or write_checkpoint(run, state, log)
    # All wait for the main process here, and know whether there is a checkpoint now.
    if not run.ranks.any(not written)[0]:
        log.saved_step = state.step


def write_checkpoint(run: Run, state: State, log: Log) -> bool:
    """Write a checkpoint on the main process; whether there was room for it."""
    # Rows that waited for room come first, or a resume would lack them.
    log.metrics.flush()
    # Only fp16 has a loss scaler.
    scaler = run.ranks.accelerator.scaler
    if not math.isfinite(state.gradient_norm):
        # It passed over the step. JSON has no such number, and 0 is no norm that anyone took.
        state.gradient_norm = 0.0
    state.scaler = scaler.state_dict() if scaler is not None else None
    average = run.model.average
    try:
        checkpoint.save_checkpoint(
            run.folder.path,
            run.model.module.state_dict(),
            run.optimizer.optimizer.state_dict(),
            average.module.state_dict() if average else None,
            asdict(state),
            run.args.keep_checkpoints,
        )
    except OSError as e:
        reason = e.strerror or e
        say(f"warning: no checkpoint at step {state.step:,}: {reason}; training goes on")
        return False
    return True


def is_finite(model: Model) -> bool:
    """Whether weights, average and buffers are all finite numbers. The host waits."""
    # Batch norm's statistics are buffers, and so is its integer count of batches.
    tensors = [*model.module.parameters(), *model.module.buffers()]
    if model.average:
        tensors += [*model.average.module.parameters(), *model.average.module.buffers()]
    floats = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    # The largest magnitude of all, which is finite only when every number is.
    largest = torch.nn.utils.get_total_norm(floats, norm_type=float("inf"))
    return bool(torch.isfinite(largest))


def save_weights(run: Run, name: str) -> None:
    """Write the weights as a timm model folder `name` of the run folder; the main process does.

    Each file appears whole or not at all, and what else lies in the folder stays. Raises OSError.
    """
    if not run.ranks.is_main:
        return
    # Written beside the folder, then moved into it file by file.
    final, scratch = run.folder.path / name, run.folder.path / f"{name}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        save_model(run.model.evaluated, scratch, run.args, run.data.train.split.classes)
        final.mkdir(exist_ok=True)
        # config.json, then model.safetensors.
        for file in sorted(scratch.iterdir()):
            share(file)
            sync(file)
            os.replace(file, final / file.name)
    except SafetensorError as e:
        # How safetensors reports a write that failed.
        raise OSError(str(e)) from e
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def no_room_is_a_warning(path: Path) -> Iterator[None]:
    """Around what a run can do without: a full disk costs the file or folder, not the run."""
    try:
        yield
    except OSError as e:
        say(f"warning: {path} cannot be written ({e.strerror or e})")


def keep_weights(run: Run, name: str) -> None:
    """Keep the weights of an epoch, where there is room."""
    with no_room_is_a_warning(run.folder.path / name):
        save_weights(run, name)


def save_card(run: Run, summary: dict[str, Any]) -> None:
    """Write the model card into `model/`, where there is room; the main process does."""
    if not run.ranks.is_main:
        return
    folder = run.folder.path / "model"
    model = read_json(folder / "config.json")
    classes = run.data.train.split.classes
    with no_room_is_a_warning(folder / CARD):
        write_text(folder / CARD, model_card(model, classes, run.folder.config, summary))


def save_predictions(run: Run, state: State) -> dict[str, Predictions]:
    """Write what the model says of each image, where there is room; the main process does.

    Returns it, by the kind of the images; {} on other processes.
    """
    if not run.ranks.is_main:
        return {}
    splits = {"test": run.data.test.split, run.data.evaluated_on: run.data.evaluation.split}
    predictions = {}
    for kind, tensors in run.outputs.items():
        split = splits[kind]
        outputs = {name: values.numpy() for name, values in tensors.items()}
        predictions[kind] = of_outputs(
            split.labels, split.classes, outputs, state.data, split.places
        )
    with no_room_is_a_warning(run.folder.path / "predictions.safetensors"):
        write_predictions(run.folder.path, predictions)
    return predictions


def show_predictions(run: Run, state: State, log: Log, predictions: Predictions) -> None:
    """Let the tracker show what the model says of the images that count, by its own thread."""
    images = run.data.test.split.images
    log.tracker.show(state.step, partial(findings, predictions, images))


# ---- how it ended


def write_summary(
    run: Run,
    state: State,
    status: str,
    test: dict[str, float] | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    """Write summary.json on the main process and return its content.

    Args:
        status: finished, preempted or failed.
        test: the figures that count; unset while the test split was not read.
        error: what ended it.
    """
    figures = test or {}
    # Where the test split is what is evaluated all along.
    if not test and run.data.test is run.data.evaluation:
        figures = state.evaluation
    # Earlier versions went on after an evaluation that was not finite.
    figures = {name: value for name, value in figures.items() if math.isfinite(value)}
    # Training speed over all starts; a run that took no step has none.
    images = state.step * run.plan.order.batch_size
    summary = {
        "status": status,
        "train_loss": state.train_loss,
        "accuracy": figures.get("accuracy"),
        "top5_accuracy": figures.get("top5_accuracy"),
        "test_loss": figures.get("loss"),
        "best_accuracy": state.best_accuracy,
        "epochs": state.step / run.plan.steps_per_epoch,
        "steps": state.step,
        "total_steps": run.plan.total_steps,
        "images_per_s": images / state.time_s if state.time_s else None,
        "time_s": state.time_s,
        "wall_s": state.wall_s,
        "evaluated_images": figures.get("evaluated_images"),
        "tested_on": run.data.tested_on,
        "error": error,
    }
    if run.ranks.is_main:
        file = run.folder.path / "summary.json"
        with no_room_is_a_warning(file):
            write_json(file, summary)
    return summary


def mark_preempted(run: Run, state: State) -> str:
    """Write PREEMPTED on the main process; returns what it says: why, when, and how to go on."""
    text = (
        f"{run.stop.reason} after step {state.step:,}; "
        f"the same command {next_start(run, state.step)}"
    )
    if run.ranks.is_main:
        file = run.folder.path / "PREEMPTED"
        with no_room_is_a_warning(file):
            file.write_bytes(os.fsencode(text + "\n"))
    return text


def next_start(run: Run, step: int) -> str:
    """Where the next start of the same command begins, by the checkpoints that are there."""
    path, resume = run.folder.path, run.args.resume
    # By what is on the disk, not by what was to be written: the last save may have found no room.
    kept = checkpoint.list_checkpoints(path)
    at = checkpoint.step_of(kept[0]) if kept else 0
    # --resume PATH: this run's own folder means going back there again, another's only a beginning.
    if resume not in ("auto", "never"):
        if path.resolve() in Path(resume).resolve().parents:
            return f"goes back to {resume}, and one without --resume goes on from step {at:,}"
        if not kept:
            return f"goes on from {resume}"
    if not at:
        return "begins anew"
    return "goes on from there" if at == step else f"goes on from step {at:,}"
