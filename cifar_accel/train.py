"""The hand-written training loop on Accelerate, and what stands around it.

Read it from `train` downwards. "All ranks enter" marks what every process must reach together; "the host waits" marks
where the host waits for the device. Everything else runs ahead of the device.
"""

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

from cifar_accel.data.batches import Batch, Pipeline
from cifar_accel.data.order import random_bits
from cifar_accel.errors import Diverged, OutOfMemory, PeerLost, Stopped, TrainingError
from cifar_accel.evaluate import evaluate
from cifar_accel.files import write_json
from cifar_accel.machine import memory
from cifar_accel.machine.processes import start_processes
from cifar_accel.machine.signals import StopRequest
from cifar_accel.machine.speed import Profiler, compiled_graphs, peak_memory_mib
from cifar_accel.optim.gradients import clip_gradients, gradient_norm
from cifar_accel.optim.schedules import learning_rate
from cifar_accel.options.options import TrainingArguments
from cifar_accel.options.values import parse_interval
from cifar_accel.outputs import keep_epoch, keep_weights, save, write_summary
from cifar_accel.records import checkpoint, trackers
from cifar_accel.records.folder import Opened
from cifar_accel.records.meters import Clock, Sums
from cifar_accel.records.metrics import Metrics
from cifar_accel.records.progress import Progress
from cifar_accel.records.summary import read_config
from cifar_accel.run import Run, State, evaluation_batch_size, set_up, warmup_steps


def train(
    args: TrainingArguments,
    origin: dict[str, str],
    say: Callable[[str], None],
    opened: Opened | None,
    stop: StopRequest,
) -> dict[str, Any]:
    """Run the training that `args` describe, from wherever its run folder stands. All ranks enter.

    Args:
        args: resolved options (see `config.resolve`).
        origin: where each came from.
        say: prints a line on the main process.
        opened: what is to be done with the run folder, on the main process; None on the others.
        stop: what may ask for an end before the last step.

    Returns:
        What summary.json holds; its `status` is finished or preempted.

    Raises:
        BadInput: bad input, found before the first step.
        TrainingError: the loss is not finite, the device is out of memory, or another process is gone.
    """
    opened, accelerator = start_processes(args, opened, say)
    if opened.finished:
        return opened.finished
    run, state = set_up(args, origin, say, opened, accelerator, stop)
    memory.look_ahead(run)
    tracker = trackers.SILENT
    try:
        if run.is_main:
            tracker = begin(run, state)
        summary = finish(run, state, fit(run, state, tracker))
    except KeyboardInterrupt:  # a signal before the first step, or a second Ctrl-C
        mark_preempted(run, state)
        write_summary(run, state, "preempted")
        tracker.finish({"status": "preempted"}, 143)
        raise
    except BaseException as e:
        e = explained(e, run)
        write_summary(run, state, "failed", error=f"{type(e).__name__}: {e}")
        tracker.finish({"status": "failed"}, 1)
        raise e
    tracker.finish(summary, 0 if summary["status"] == "finished" else 143)
    return summary


def begin(run: Run, state: State) -> trackers.Tracker:
    """Write config.json, take away what speaks of an earlier start, and open the tracker; the main process alone."""
    for name in ("summary.json", "PREEMPTED", "diverged.json"):
        (run.path / name).unlink(missing_ok=True)
    for path in checkpoint.set_later_aside(run.path, state.step):
        run.say(f"resume: a checkpoint after step {state.step:,} is kept as {path}")
    config_file = run.path / "config.json"
    old = read_config(run.path) or run.config
    state.tracker_id = state.tracker_id or old.get(
        "tracker_id"
    )  # killed before its first checkpoint
    again = {"step": state.step, **{k: run.config[k] for k in ("command", "versions", "hardware")}}
    config = old | {"resumed": [*old.get("resumed", []), again]} if state.step else run.config
    write_json(config_file, config | {"tracker_id": state.tracker_id})
    if (
        run.began_in
        and run.began_in.resolve() != run.path.resolve()
        and (run.began_in / "metrics.jsonl").exists()
    ):
        shutil.copy(run.began_in / "metrics.jsonl", run.path)
    tracker = trackers.start_tracker(
        run.args.tracker,
        run.say,
        project=run.args.project,
        name=run.args.run_name,
        group=run.args.group,
        job_type="train",
        config=run.config["options"],
        folder=run.path,
        run_id=state.tracker_id,
    )
    state.tracker_id = (
        tracker.id or state.tracker_id
    )  # a start without a tracker does not end its run
    write_json(config_file, config | {"tracker_id": state.tracker_id})
    return tracker


# What torch says when the other end of a connection is gone: gloo, then NCCL.
PEER_LOST = (
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "Timed out waiting",
    "remote process exited",
)


def explained(e: BaseException, run: Run) -> BaseException:
    """What to raise in place of `e`: a line for the user where the cause is known."""
    if memory.is_out_of_memory(e):
        e = e.with_traceback(None)  # its frames hold the step's tensors
        try:
            return OutOfMemory(memory.advice(run))
        except Exception as again:  # a device that fails at more than its memory
            return OutOfMemory(f"out of memory on {run.accelerator.device}, and then: {again}")
    text = " ".join(str(e).split())
    if (
        run.order.world > 1
        and isinstance(e, RuntimeError)
        and any(sign in text for sign in PEER_LOST)
    ):
        return PeerLost(
            f"another process of this run is gone ({text[:120]}); the same command goes on"
        )
    if isinstance(e, OSError):
        return TrainingError(f"{e}; the same command goes on from the last checkpoint")
    return e


def fit(run: Run, state: State, tracker: trackers.Tracker) -> str:
    """The loop, from state.step to run.stop_step; returns "finished" or "preempted". All ranks enter."""
    args, steps_per_epoch = run.args, run.order.steps_per_epoch
    batches = run.train.training_batches(run.order, state.step, run.stop_step)
    sums, clock = Sums(run.accelerator), Clock(state)
    metrics = Metrics(run.path / "metrics.jsonl", run.say, enabled=run.is_main)
    metrics.truncate(state.step - state.due)
    progress = Progress(
        run.total_steps, steps_per_epoch, state.step, run.stop_step, enabled=run.is_main
    )
    profiler = (
        Profiler(run.path / "profile", args.profile, run.say)
        if args.profile and run.is_main
        else None
    )
    run.stop.training = True
    run.model.train()
    stopped = False
    while not stopped and (state.due or state.step < run.stop_step):
        due = state.due  # a stop came between this step and its row: it is taken already
        rate = learning_rate(state.step - due, run.total_steps, warmup_steps(args, run.order), args)
        if not due:
            optimizer_step(run, state.step, rate, batches, sums, clock)
            state.step += 1
            if run.ema:
                run.ema.update(run.module, state.step)
            progress.step()
            if profiler:
                profiler.step()

        # What is due after it. All ranks agree: on the steps by counting, on stops and minutes by asking.
        epoch, rest = divmod(state.step, steps_per_epoch)
        last = state.step == run.stop_step
        evaluates = due or rest == 0 or last
        stopped, minutes_up = agree(run, clock.minutes_up(args.save_every))
        logs = state.due = due or row_due(run, state.step)
        saves = (
            stopped or last or minutes_up or save_due(args.save_every, state.step, steps_per_epoch)
        )
        if logs or saves:
            look(run, state, sums)  # the host waits
            clock.stop()
            if logs:
                try:
                    evaluated = evaluation_row(run, state) if evaluates else {}
                except Stopped:
                    stopped = saves = True
                else:
                    row = training_row(run, state, rate) | evaluated
                    state.due = False
                    for log in (metrics.write, tracker.log, progress.log):
                        log(row)
            if (
                rest == 0
                and not state.due
                and args.save_epochs > 0
                and epoch % args.save_epochs == 0
            ):
                keep_epoch(run, epoch)
            if saves:
                metrics.flush()
                save(run, state)
                clock.saved = time.perf_counter()
            clock.start()
        run.stop.progressed = True
    clock.stop()
    metrics.close()
    batches.close()
    progress.close()
    if profiler:
        profiler.close()
    return "finished" if state.step >= run.stop_step and not state.due else "preempted"


def optimizer_step(
    run: Run, step: int, rate: float, batches: Iterator[Batch], sums: Sums, clock: Clock
) -> None:
    """One step of the optimizer over the global batch, cut into micro-batches. All ranks enter; nobody waits."""
    args, accelerator, accumulation = run.args, run.accelerator, run.order.accumulation
    criterion = (
        BinaryCrossEntropy() if args.bce_loss else SoftTargetCrossEntropy()
    )  # targets carry any smoothing
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    losses = []
    for micro in range(accumulation):
        if run.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # a graph may overwrite what the last replay returned
        with clock.waiting():
            images, labels, targets = next(batches)
        seed_dropout(run, step, micro)
        with accelerator.no_sync(run.model) if micro < accumulation - 1 else nullcontext():
            logits = run.model(images.contiguous(memory_format=run.memory_format))
            loss = criterion(logits, targets)
            sums.add(
                loss, logits, targets.argmax(1) if args.mixup or args.cutmix else labels
            )  # the larger part's
            accelerator.backward(
                loss / accumulation
            )  # DDP averages over the ranks: the mean of the global batch
        losses.append(loss.detach())
    accelerator.unscale_gradients(run.optimizer)
    norm = None
    if args.clip_grad or row_due(run, step + 1) or accelerator.device.type != "cpu":
        norm = gradient_norm(run.guard.parameters)
    if args.clip_grad and norm is not None:
        clip_gradients(run.module, norm, args)
    optimizer = (
        run.optimizer if accelerator.scaler else run.optimizer.optimizer
    )  # the wrapper looks for packages
    if run.guard.allows(norm, losses):
        optimizer.step()
    run.optimizer.optimizer.zero_grad(set_to_none=True)


# ---- what the loop calls


def seed_dropout(run: Run, step: int, micro: int) -> None:
    """Seed what the model itself draws (dropout, stochastic depth), so that a resume draws the same."""
    value = int(
        dropout_seeds(run.args.seed, step // 256, int(run.order.positions(micro)[0]))[step % 256]
    )
    torch.default_generator.manual_seed(value)
    if run.accelerator.device.type == "cuda":
        torch.cuda.default_generators[run.accelerator.device.index or 0].manual_seed(value)
    elif run.accelerator.device.type == "mps":
        torch.mps.manual_seed(value)


@lru_cache(maxsize=64)
def dropout_seeds(seed: int, block: int, position: int) -> NDArray[np.uint64]:
    """Seeds of steps 256 * block and the 255 after it, for the micro-batch that begins at `position`: uint64 [256]."""
    return random_bits(seed, "dropout", np.arange(256) + 256 * block, position) >> np.uint64(1)


def agree(run: Run, minutes_up: bool = False) -> tuple[bool, bool]:
    """Whether any rank was asked to stop, and whether a checkpoint by the clock is due on any.

    All ranks enter, at every step and evaluation batch.
    """
    stop, save = any_rank(run, run.stop.asked(), minutes_up)
    if stop and run.stop.reason is None:
        run.stop.reason = "a signal to another of its processes"
    return stop, save


def any_rank(run: Run, *flags: bool) -> list[bool]:
    """Each flag, true when it is true on any rank. All ranks enter; on the host alone, over gloo."""
    if run.host_group is None:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32)
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, group=run.host_group)
    return [bool(v) for v in votes]


def row_due(run: Run, step: int) -> bool:
    """Whether a row is logged after `step`: every --log-every steps, and where an evaluation is."""
    return (
        step % run.args.log_every == 0
        or step % run.order.steps_per_epoch == 0
        or step == run.stop_step
    )


def save_due(save_every: str, step: int, steps_per_epoch: int) -> bool:
    """Whether a checkpoint is due after `step` by epochs or steps."""
    count, unit = parse_interval(save_every)
    return (
        unit in ("epoch", "step")
        and step % (count * (steps_per_epoch if unit == "epoch" else 1)) == 0
    )


def look(run: Run, state: State, sums: Sums) -> None:
    """Move the sums to the state. All ranks enter; the host waits. Raises Diverged when a step was not finite."""
    report = run.guard.report().to(run.accelerator.device)
    reports = run.accelerator.gather(report).tolist()  # a loss may be bad on one rank alone
    # The earliest, and of its ranks the one whose loss is to blame.
    bad, step, norm, loss = max(reports, key=lambda r: (r[0], -r[1], not math.isfinite(r[3])))
    if not bad:
        if sums.images:  # else a resume that has taken no step yet
            state.gradient_norm = norm
        return sums.move_to(state)
    step = int(step)
    rate = learning_rate(step, run.total_steps, warmup_steps(run.args, run.order), run.args)
    samples = run.order.samples_of(step).tolist()
    if run.is_main:
        with suppress(OSError):
            about = {
                "step": step,
                "learning_rate": rate,
                "gradient_norm": str(norm),
                "loss": str(loss),
            }
            write_json(run.path / "diverged.json", {**about, "samples": samples})
    shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
    raise Diverged(
        f"step {step:,} is not finite: loss {loss:.4g}, gradient norm {norm:.4g}, learning rate {rate:.3g}, training "
        f"images {shown} (all in {run.path / 'diverged.json'}); its update was not applied"
    )


def training_row(run: Run, state: State, rate: float) -> dict[str, float]:
    """Means since the last row, which starts a new window; at the end of an epoch, a new epoch too."""
    loss, correct, images, spent, waited = state.window
    if state.step % run.order.steps_per_epoch == 0:
        state.train_loss = state.epoch[0] / state.epoch[2]
        state.epoch = [0.0, 0.0, 0.0]
    state.window = [0.0] * 5
    speed = images / spent
    row = {
        "step": state.step,
        "epoch": round(state.step / run.order.steps_per_epoch, 4),
        "time_s": round(state.time_s, 3),
        "train/loss": loss / images,
        "train/accuracy": correct / images,
        "train/lr": rate,
        "train/images_per_s": round(speed, 1),
        "train/input_share": round(waited / spent, 4),
        "train/peak_memory_mib": round(peak_memory_mib(run.accelerator.device), 1),
    }
    if math.isfinite(state.gradient_norm):  # a gradient scaler passes over steps where it is not
        row["train/gradient_norm"] = state.gradient_norm
    if run.peak_flops:
        row["train/mfu"] = round(speed * run.flops / (run.peak_flops * run.order.world), 4)
    if run.compiled:
        row["train/compiled_graphs"] = compiled_graphs()
    return row


def evaluation_row(run: Run, state: State) -> dict[str, float]:
    """Evaluate and remember the best accuracy. All ranks enter; the host waits at the end."""
    result = evaluate_split(run, run.evaluation)
    state.evaluation, state.evaluated_step = result, state.step
    state.best_accuracy = max(state.best_accuracy, result["accuracy"])
    return {f"eval/{name}": value for name, value in result.items() if name != "evaluated_images"}


def evaluate_split(run: Run, pipeline: Pipeline) -> dict[str, float]:
    """Exact figures of the run's weights over one split. All ranks enter. Raises Stopped when they agreed to stop."""
    if run.host_group is not None:
        for buffer in (
            run.result.buffers()
        ):  # each rank has its own batch-norm statistics: the main one's are saved
            torch.distributed.broadcast(buffer, 0)
    world, rank = run.accelerator.num_processes, run.accelerator.process_index
    size = evaluation_batch_size(run.args, run.order)
    rounds = math.ceil(
        math.ceil(len(pipeline.split) / world) / size
    )  # of the rank with the largest share
    batches = unless_stopped(run, pipeline.evaluation_batches(size, world, rank), rounds)
    fill_to = size if run.compiled else 0  # a compiled model sees one shape
    run.evaluating = True  # out of memory here needs another remedy
    result = evaluate(
        run.accelerator, run.result, batches, len(pipeline.split), run.memory_format, fill_to
    )
    run.evaluating = False
    return result


def unless_stopped(run: Run, batches: Iterator[Batch], rounds: int) -> Iterator[Batch]:
    """Pass `batches` on, asking all ranks before each; a rank with fewer of them is asked as often."""
    for _ in range(rounds):
        if agree(run)[0]:
            raise Stopped
        yield from itertools.islice(batches, 1)


# ---- after the loop


def finish(run: Run, state: State, status: str) -> dict[str, Any]:
    """Save the weights, read the test set where that is still to do, and write summary.json. All ranks enter."""
    test = None
    if status == "finished":
        try:
            if state.evaluated_step != state.step:  # --max-steps now ends it where it was stopped
                evaluation_row(run, state)
            if run.args.validation_fraction:
                run.say("test: reading the test set, once")
                test = evaluate_split(run, run.test)
        except Stopped:
            status = "preempted"
            save(run, state)
    if status == "finished":
        try:
            keep_weights(run, "model")
        except OSError as e:
            raise TrainingError(
                f"the weights are not written: {e.strerror or e}; the same command tries again"
            ) from e
        shown = test or state.evaluation
        if run.compiled:
            run.say(f"compiled  {compiled_graphs()} graphs (training and evaluation need one each)")
        run.say(
            f"result    accuracy {shown['accuracy']:.2%} on {shown['evaluated_images']:,} test images; {run.path}"
        )
    any_rank(run, False)  # all have come so far
    if run.is_main and status == "preempted":
        run.say(f"stopped by {mark_preempted(run, state)}")
    return write_summary(run, state, status, test=test)


def mark_preempted(run: Run, state: State) -> str:
    """Write PREEMPTED on the main process, and return what it says: why and when, and where the next start begins."""
    kept = checkpoint.list_checkpoints(run.path)  # the last save may have found no room
    at = checkpoint.step_of(kept[0]) if kept else 0
    begins = (
        "goes on from there"
        if at == state.step
        else f"goes on from step {at:,}"
        if at
        else "begins anew"
    )
    if run.args.resume not in ("auto", "never"):
        if run.path.resolve() in Path(run.args.resume).resolve().parents:
            begins = (
                f"goes back to {run.args.resume}, and one without --resume goes on from step {at:,}"
            )
        elif not kept:
            begins = f"goes on from {run.args.resume}"
    text = f"{run.stop.reason} after step {state.step:,}; the same command {begins}"
    if run.is_main:
        with suppress(OSError):  # a full disk
            (run.path / "PREEMPTED").write_text(text + "\n")
    return text
