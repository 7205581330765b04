"""What a run writes besides its log: checkpoints, weights and summary.json."""

import os
import shutil
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError

from cifar_accel.errors import Diverged
from cifar_accel.files import sync, write_json
from cifar_accel.models.weights import save_model
from cifar_accel.records import checkpoint
from cifar_accel.run import Run, State


def save(run: Run, state: State) -> None:
    """Write a checkpoint. All ranks enter, the main process writes; a failure costs the checkpoint, not the run."""
    if not torch.isfinite(
        torch.nn.utils.get_total_norm(list(run.module.parameters()))
    ):  # the host waits
        raise Diverged(f"the weights are not finite after step {state.step:,}")
    if not run.is_main or (run.args.save_every == "none" and not run.stop.asked()):
        return
    scaler = run.accelerator.scaler
    state.scaler = scaler.state_dict() if scaler is not None else None
    ema = run.ema.module.state_dict() if run.ema else None
    optimizer = run.optimizer.optimizer.state_dict()
    try:
        checkpoint.save_checkpoint(
            run.path,
            run.module.state_dict(),
            optimizer,
            ema,
            asdict(state),
            run.args.keep_checkpoints,
        )
    except OSError as e:
        run.say(
            f"warning: no checkpoint at step {state.step:,}: {e.strerror or e}; training goes on"
        )


def keep_epoch(run: Run, epoch: int) -> None:
    """Keep the weights of an epoch; a failure costs them, not the run."""
    try:
        keep_weights(run, f"model-epoch-{epoch:04d}")
    except OSError as e:
        run.say(
            f"warning: the weights of epoch {epoch} are not kept: {e.strerror or e}; training goes on"
        )


def keep_weights(run: Run, name: str) -> None:
    """Write the weights as a timm model folder of the run folder; the main process alone does.

    Each file appears whole or not at all, and what else lies in the folder stays.
    """
    if not run.is_main:
        return
    final, scratch = run.path / name, run.path / f"{name}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        save_model(run.result, scratch, run.args, run.train.split.classes)
        final.mkdir(exist_ok=True)
        for file in sorted(scratch.iterdir()):  # config.json, then model.safetensors
            sync(file)
            os.replace(file, final / file.name)
        scratch.rmdir()
    except BaseException as e:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(e, SafetensorError):
            raise OSError(f"{final} cannot be written ({e})") from e
        raise


def write_summary(
    run: Run,
    state: State,
    status: str,
    test: dict[str, float] | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    """Write summary.json on the main process and return its content. `test` holds the figures that count."""
    test = test or (
        {} if run.args.validation_fraction else state.evaluation
    )  # the test set is read at the end
    summary = {
        "status": status,
        "train_loss": state.train_loss,
        "accuracy": test.get("accuracy"),
        "top5_accuracy": test.get("top5_accuracy"),
        "test_loss": test.get("loss"),
        "best_accuracy": state.best_accuracy,
        "epochs": state.step / run.order.steps_per_epoch,
        "steps": state.step,
        "total_steps": run.total_steps,
        "images_per_s": state.step * run.order.batch_size / state.time_s if state.time_s else None,
        "time_s": state.time_s,
        "wall_s": state.wall_s,
        "evaluated_images": test.get("evaluated_images"),
        "error": error,
    }
    if run.is_main:
        try:
            write_json(run.path / "summary.json", summary)
        except OSError as e:
            run.say(f"warning: {run.path / 'summary.json'} cannot be written ({e.strerror or e})")
    return summary
