"""The training loop, written by hand on Accelerate. Read it from `train` downwards.

"All ranks enter" marks what every process must reach together; "the host waits" marks where the
host waits for the device. Everything else runs ahead of the device.
"""

import math
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cifar_accel.console import FAILED, STOPPED, say
from cifar_accel.data.batches import Batch, Pipeline
from cifar_accel.errors import BadInput, Diverged, PeerLost, Stopped, TrainingError
from cifar_accel.evaluate import Outputs, evaluate
from cifar_accel.files import write_json
from cifar_accel.machine.processes import join_processes, peers_expected
from cifar_accel.machine.signals import StoppedAtOnce, StopRequest
from cifar_accel.machine.speed import compiled_graphs, peak_memory_mib
from cifar_accel.options.options import TrainingArguments
from cifar_accel.options.recipes import PLANNED
from cifar_accel.outputs import (
    Log,
    keep_weights,
    mark_preempted,
    save_card,
    save_checkpoint,
    save_predictions,
    save_weights,
    show_predictions,
    write_summary,
)
from cifar_accel.records.folder import Opened
from cifar_accel.records.meters import Clock
from cifar_accel.records.predictions import keeps_logits
from cifar_accel.records.state import State, Totals, Window
from cifar_accel.run import Run, device_peak, set_up
from cifar_accel.step import take_step
from cifar_accel.timing import fit_to_budget
from cifar_accel.trial import check_memory, memory_explained


def train(
    args: TrainingArguments, origin: dict[str, str], opened: Opened | None, stop: StopRequest
) -> dict[str, Any]:
    """Run the training that `args` describe, from wherever its run folder stands. All ranks enter.

    Args:
        args: resolved options (see options/resolve.py).
        origin: where each came from.
        opened: what is to be done with the run folder, on the main process; None on the others.
        stop: what may ask for an end before the last step.

    Returns:
        What summary.json holds; its `status` is finished or preempted.

    Raises:
        BadInput: found before the first step.
        TrainingError: the loss is not finite, the device is out of memory, or a process is gone.
    """
    # Find the other processes, and learn from the main one what to do with the run folder. The lock
    # stays with the main process.
    ranks = join_processes(args.device)
    if opened:
        opened = replace(opened, lock=None)
    opened = ranks.from_main(opened)
    if opened is None:
        raise BadInput("RANK is set and is not 0, but WORLD_SIZE says one process: unset RANK")
    if opened.finished:
        return opened.finished

    # Sizes and epochs that fit the time, unless an earlier start or another run has chosen them.
    splits = None
    if args.budget and not opened.derived.keys() & PLANNED:
        args, origin, splits = fit_to_budget(args, origin, opened, ranks, stop)

    # Everything that can be refused is refused here, before the run folder says anything new.
    run, state = set_up(args, origin, opened, ranks, stop, splits)
    check_memory(run)

    # From here on every end is recorded: finished, preempted or failed.
    log = Log(run, state)
    try:
        with peers_expected():
            summary = train_to_its_end(run, state, log)
    except BaseException as e:
        failure = recorded(e, run, state, log)
        if failure is e:
            raise
        raise failure from e
    log.tracker.finish(summary, 0 if summary["status"] == "finished" else STOPPED)
    return summary


def train_to_its_end(run: Run, state: State, log: Log) -> dict[str, Any]:
    """Train to the last step, or to where all ranks agree to stop; what summary.json then holds."""
    try:
        with closing(log):
            log.open()
            fit(run, state, log)
        return finish(run, state, log)
    except Stopped:
        save_checkpoint(run, state, log)
        say(f"stopped by {mark_preempted(run, state)}")
        summary = write_summary(run, state, "preempted")
        # Until all is written: a launcher ends everybody when the first process ends.
        run.ranks.wait_for_all()
        return summary


def fit(run: Run, state: State, log: Log) -> None:
    """Train from `state.step` to the plan's last step. All ranks enter. Raises Stopped.

    Each turn first settles what is due after `state.step` steps, then takes one more; the last turn
    only settles. A checkpoint comes before the evaluation and the row of its step, so a resumed run
    begins by settling that step again.
    """
    plan, stop = run.plan, run.stop
    first_step = state.step
    # One stream for all epochs, so that workers read on over their borders.
    micro_batches = run.data.train.training_batches(
        plan.order, state.step, plan.stop_step, plan.image_size
    )
    run.model.module.train()
    # A signal no longer ends the process at once: there is something to save.
    stop.training = True
    stop.last_act = partial(write_preempted, run, state)
    with closing(micro_batches), Clock(state) as clock:
        while True:
            # Ranks agree on what is due: on steps by counting, on signals and minutes by asking.
            step = state.step
            stops, minutes_up = agree(run, clock.minutes_up(plan.save_minutes))
            saves = minutes_up or plan.checkpoint_after(step)
            if stops or saves or plan.row_after(step):
                # What is done now may take one rank long.
                run.ranks.be_patient()
                # While the clock runs, since the device may be at work still.
                collect(run, state)
            if stops:
                raise Stopped
            # Settle this step; neither saving nor evaluating counts as training.
            with clock.paused():
                if saves:
                    save_checkpoint(run, state, log)
                    clock.checkpoint_written()
                if plan.row_after(step) and state.window_is_open:
                    settle(run, state, log)
            if step >= plan.stop_step:
                return
            # --max-time counts once this process has taken a step and settled it.
            stop.has_progressed = step > first_step

            # Take the next one. The first of a process may compile.
            run.ranks.be_patient(step == first_step)
            try:
                with stop.watched():
                    take_step(run, step, micro_batches, clock)
            except Stopped:
                # By a signal, before the step began: it is settled like any other, above.
                continue
            state.step += 1
            if run.model.average:
                run.model.average.update(run.model.module, state.step)
            log.step()


def finish(run: Run, state: State, log: Log) -> dict[str, Any]:
    """Save the weights, read the test set where that is still to do, and write summary.json.

    All ranks enter. Raises Stopped, and TrainingError when there is no room for the weights.
    """
    # A stop right after a row leaves nothing to settle, but nobody remembers what the model said.
    # Where --max-steps now ends the run there, its weights are still to be evaluated.
    if state.evaluated_step != state.step or not run.outputs:
        evaluation_row(run, state)
    # The last evaluation may have been of the test set already.
    test = state.evaluation
    if run.data.test is not run.data.evaluation:
        say("test: reading the test set, once")
        test = evaluate_split(run, run.data.test, "the test set's evaluation", "test")
    predictions = save_predictions(run, state)
    try:
        save_weights(run, "model")
    except OSError as e:
        reason = e.strerror or e
        raise TrainingError(
            f"the weights are not written: {reason}; the same command tries again"
        ) from e
    if run.model.compiled:
        needed = f"each size in training, and evaluation, need one each: {len(run.args.sizes) + 1}"
        say(f"compiled  {compiled_graphs()} graphs ({needed})")
    images = f"{test['evaluated_images']:,} {run.data.tested_on} images"
    counted = f"{test['accuracy']:.2%} on {images}"
    say(f"result    accuracy {counted}; {run.folder.path}")
    # A run is finished when all ranks have come so far.
    run.ranks.wait_for_all()
    summary = write_summary(run, state, "finished", test=test)
    save_card(run, summary)
    if judged := predictions.get(run.data.tested_on):
        show_predictions(run, state, log, judged)
    return summary


# ---- what is due after a step


def agree(run: Run, minutes_up: bool = False) -> tuple[bool, bool]:
    """Whether any rank was asked to stop, and whether a checkpoint by the clock is due on any.

    All ranks enter, at every step and evaluation batch.
    """
    asked = run.stop.asked()
    with run.stop.watched():
        stops, saves = run.ranks.any(asked, minutes_up)
    if stops:
        # Each rank names the reason of the first that has one.
        reasons = [reason for reason in run.ranks.gather(run.stop.reason) if reason]
        run.stop.reason = run.stop.reason or reasons[0]
    return stops, saves


def collect(run: Run, state: State) -> None:
    """Move the sums from the device to the state. All ranks enter; the host waits once.

    Raises Diverged when a step was not finite.
    """
    # One row a rank: bad or not, step, gradient norm, loss; then its sums of loss and correct
    # answers. A loss may be bad on one rank alone.
    report = torch.cat([run.watch.report(), run.sums.values[None]], 1)
    reports = run.ranks.accelerator.gather(report).tolist()
    bad_reports = [report for report in reports if report[0]]
    if bad_reports:
        # The earliest bad step, and of its ranks the one whose loss is to blame.
        first = min(bad_reports, key=lambda report: (report[1], math.isfinite(report[3])))
        raise diverged(run, *first[1:4])
    # Nothing was summed where a resume has taken no step yet.
    if run.sums.images:
        state.gradient_norm = reports[0][2]
        loss, correct = (sum(report[place] for report in reports) for place in (4, 5))
        run.sums.move_to(state, loss, correct)


def diverged(run: Run, step: float, norm: float, loss: float) -> Diverged:
    """Write diverged.json on the main process, and the error that says what was not finite."""
    step = int(step)
    rate = run.plan.learning_rate(step)
    samples = run.plan.order.samples_of(step).tolist()
    file = run.folder.path / "diverged.json"
    if run.ranks.is_main:
        facts = {"step": step, "learning_rate": rate, "gradient_norm": str(norm), "loss": str(loss)}
        # A full disk costs the file, not the message.
        with suppress(OSError):
            write_json(file, facts | {"samples": samples})
    # The first few on the screen; the file has them all.
    shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
    return Diverged(
        f"step {step:,} is not finite: loss {loss:.4g}, gradient norm {norm:.4g}, learning rate "
        f"{rate:.3g}, training images {shown} (all in {file}); no checkpoint holds it"
    )


def settle(run: Run, state: State, log: Log) -> None:
    """Evaluation, row and kept weights, as they are due after `state.step`. All ranks enter."""
    figures = {}
    if run.plan.evaluation_after(state.step):
        figures = evaluation_row(run, state)
    row = training_row(run, state) | figures
    # Who reads the screen may have stopped reading.
    with run.stop.watched():
        log.row(row)
    if name := run.plan.weights_after(state.step):
        keep_weights(run, name)


def training_row(run: Run, state: State) -> dict[str, float]:
    """A row of means over the window, which it closes; at an epoch's end, the epoch's sums too.

    Rate and norm are of the last step; peak memory and compiled graphs since the start.
    """
    window = state.window
    images_per_s = window.images / window.seconds
    row = {
        "step": state.step,
        "epoch": round(state.step / run.plan.steps_per_epoch, 4),
        "time_s": round(state.time_s, 3),
        "train/loss": window.loss / window.images,
        "train/accuracy": window.correct / window.images,
        # Of the step that was just taken.
        "train/lr": run.plan.learning_rate(state.step - 1),
        "train/image_size": run.plan.image_size(state.step - 1),
        "train/images_per_s": round(images_per_s, 1),
        "train/input_share": round(window.waiting / window.seconds, 4),
        "train/peak_memory_mib": round(peak_memory_mib(run.ranks.device), 1),
    }
    # A gradient scaler passes over steps whose norm is not finite; 0 stands for a norm that nobody
    # took, at a step that was no row's before --max-steps made it the last.
    if state.gradient_norm and math.isfinite(state.gradient_norm):
        row["train/gradient_norm"] = state.gradient_norm
    if peak := device_peak(run):
        flops = run.model.flops[run.plan.image_size(state.step - 1)]
        mfu = images_per_s * flops / (peak * run.ranks.world)
        row["train/mfu"] = round(mfu, 4)
    if run.model.compiled:
        row["train/compiled_graphs"] = compiled_graphs()

    # The means of a whole epoch go into summary.json.
    state.window = Window()
    if state.step % run.plan.steps_per_epoch == 0:
        state.train_loss = state.epoch.loss / state.epoch.images
        state.epoch = Totals()
    return row


def evaluation_row(run: Run, state: State) -> dict[str, float]:
    """Evaluate, and remember the best accuracy. All ranks enter; the host waits at the end."""
    name = f"the evaluation after step {state.step:,}"
    is_last = state.step >= run.plan.stop_step
    kept_as = run.data.evaluated_on if is_last else None
    result = evaluate_split(run, run.data.evaluation, name, kept_as)
    state.evaluation = result
    state.evaluated_step = state.step
    state.best_accuracy = max(state.best_accuracy, result["accuracy"])
    return {f"eval/{name}": value for name, value in result.items() if name != "evaluated_images"}


def evaluate_split(
    run: Run, pipeline: Pipeline, name: str, kept_as: str | None = None
) -> dict[str, float]:
    """Exact figures of the run's weights over one split. All ranks enter.

    What the model says is kept in the run's `outputs`, under the name `kept_as` if there is one.
    Raises Stopped, and Diverged with `name`.
    """
    # Each rank has its own batch-norm statistics: the main one's are saved, so they are evaluated.
    run.ranks.take_main_buffers(run.model.evaluated)
    size = run.plan.evaluation_batch_size
    batches = pipeline.evaluation_batches(size, run.ranks.world, run.ranks.rank)
    images, classes = len(pipeline.split), len(pipeline.split.classes)
    outputs = Outputs(keeps_logits(images, classes)) if kept_as else None
    try:
        # Closed however this ends: workers that are left behind would keep the process alive.
        with closing(batches):
            figures = evaluate(
                run.ranks.accelerator,
                run.model.evaluated,
                unless_stopped(run, batches),
                images,
                run.model.layout,
                name,
                outputs,
            )
            if outputs and kept_as:
                run.outputs[kept_as] = outputs.of_all_ranks(run.ranks.accelerator, images)
            return figures
    except (RuntimeError, MemoryError) as e:
        failure = memory_explained(e, run, size, where=" in an evaluation")
        if failure is e:
            raise
        raise failure from None


def unless_stopped(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Pass `batches` on, asking all ranks before each; they have equally many. Raises Stopped."""
    alone = run.ranks.world == 1
    batch: Batch | None
    while True:
        batch = None
        # The images may never come.
        with suppress(Stopped), run.stop.watched(), run.stop.interruptible(alone):
            batch = next(batches, None)
        if agree(run)[0]:
            raise Stopped
        if batch is None:
            return
        yield batch


# ---- around the loop


def write_preempted(run: Run, state: State) -> None:
    """Say in the run folder that the training stopped, and that the same command goes on."""
    mark_preempted(run, state)
    write_summary(run, state, "preempted")


def recorded(error: BaseException, run: Run, state: State, log: Log) -> BaseException:
    """Say in summary.json and to the tracker how a training failed; what to raise for it.

    All ranks enter, each for itself.
    """
    # Another process may be the first to end of what all were asked to.
    if isinstance(error, PeerLost) and run.stop.reason is not None:
        error = StoppedAtOnce()
    if isinstance(error, KeyboardInterrupt):
        # A signal before the first step, or a second Ctrl-C. Checkpoints that are there are kept.
        write_preempted(run, state)
        log.tracker.finish({"status": "preempted"}, STOPPED)
        return error
    # In an evaluation it was explained already; what comes here is nearly always a step's.
    error = memory_explained(error, run, run.plan.order.micro_batch_size)
    # A disk or a network that fails in mid-run is no bug.
    if isinstance(error, OSError):
        error = TrainingError(f"{error}; the same command goes on from the last checkpoint")
    reason = f"{type(error).__name__}: {error}"
    write_summary(run, state, "failed", error=reason)
    log.tracker.finish({"status": "failed", "error": reason}, FAILED)
    return error
