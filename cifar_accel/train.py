"""The hand-written training loop on Accelerate, and what stands around it.

Read it from `train` downwards. "All ranks enter" marks what every process must reach together; "the host waits" marks
where the host waits for the device. Everything else runs ahead of the device.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

from cifar_accel import checkpoint, tracking
from cifar_accel.config import TrainingArguments, parse_interval
from cifar_accel.data.order import Order, random_bits
from cifar_accel.data.pipelines import Batch, Pipeline
from cifar_accel.evaluate import evaluate
from cifar_accel.instruments import Profiler, compiled_graphs, peak_memory_mib
from cifar_accel.model import save_model
from cifar_accel.optim import clip_gradients, learning_rate
from cifar_accel.prepare import Run, State, StopRequest, set_up, start_processes, warmup_steps
from cifar_accel.progress import Progress
from cifar_accel.run_folder import Opened, read_json, sync, write_json


class Diverged(RuntimeError):
    """The loss or the weights are no longer finite."""


def train(
    args: TrainingArguments, origin: dict[str, str], say: Callable[[str], None], opened: Opened | None
) -> dict[str, Any]:
    """Run the training that `args` describe, from wherever its run folder stands. All ranks enter.

    Args:
        args: resolved options (see `config.resolve`).
        origin: where each came from.
        say: prints a line on the main process.
        opened: what is to be done with the run folder, on the main process; None on the others.

    Returns:
        What summary.json holds; its `status` is finished or preempted.

    Raises:
        ValueError: bad input, found before the first step.
        Diverged: the loss is not finite.
    """
    stop = StopRequest()
    opened, accelerator = start_processes(args, opened, say)
    if opened.finished:
        return opened.finished
    run, state = set_up(args, origin, say, opened, accelerator, stop)
    config_file = run.path / "config.json"
    tracker = tracking.SILENT
    if run.is_main:
        for name in ("summary.json", "PREEMPTED"):  # they speak of an earlier start
            (run.path / name).unlink(missing_ok=True)
        old = read_json(config_file) or run.config
        state.tracker_id = state.tracker_id or old.get("tracker_id")  # killed before its first checkpoint
        again = {"step": state.step, **{k: run.config[k] for k in ("command", "versions", "hardware")}}
        write_json(config_file, old | {"resumed": [*old.get("resumed", []), again]} if state.step else run.config)
        tracker = tracking.start_tracker(
            args.tracker,
            say,
            project=args.project,
            name=args.run_name,
            group=args.group,
            job_type="train",
            config=run.config["options"],
            folder=run.path,
            run_id=state.tracker_id,
        )
        state.tracker_id = tracker.id
        write_json(config_file, read_json(config_file) | {"tracker_id": tracker.id})
    try:
        status = fit(run, state, tracker)
        summary = finish(run, state, status)
    except BaseException as e:
        write_summary(run, state, "failed", error=f"{type(e).__name__}: {e}")
        tracker.finish({"status": "failed"}, 1)
        if isinstance(e, ValueError):  # no longer the user's: the input was checked before the first step
            raise RuntimeError(str(e)) from e
        raise
    tracker.finish(summary, 0 if status == "finished" else 143)
    return summary


def fit(run: Run, state: State, tracker: tracking.Tracker) -> str:
    """The loop, from state.step to run.stop_step; returns "finished" or "preempted". All ranks enter."""
    args, steps_per_epoch = run.args, run.order.steps_per_epoch
    batches = run.train.training_batches(run.order, state.step, run.stop_step)
    sums = Sums(run.accelerator)
    metrics = tracking.Metrics(run.path / "metrics.jsonl", run.say)
    if run.is_main:
        metrics.truncate(state.step)
    progress = Progress(run.total_steps, steps_per_epoch, state.step, run.stop_step, enabled=run.is_main)
    clock = Clock(state)
    profiler = Profiler(run.path / "profile", args.profile, run.say) if args.profile and run.is_main else None
    run.stop.training = True
    run.model.train()
    while state.step < run.stop_step:
        rate = learning_rate(state.step, run.total_steps, warmup_steps(args, run.order), args)
        optimizer_step(run, state.step, rate, batches, sums, clock)
        state.step += 1
        if run.ema:
            run.ema.update(run.module, state.step)
        progress.step()
        if profiler:
            profiler.step()

        # What is due after it. All ranks agree: on the steps by counting, on signals and minutes by asking.
        epoch, rest = divmod(state.step, steps_per_epoch)
        last = state.step == run.stop_step
        stop, minutes_up = agree(run, run.stop.signal is not None, clock.minutes_up(args.save_every))
        logs = state.step % args.log_every == 0 or rest == 0 or last
        if stop and run.stop.signal is None:
            run.stop.signal = signal.SIGTERM  # it reached another rank
        saves = stop or last or minutes_up or save_due(args.save_every, state.step, steps_per_epoch)
        if logs or saves:
            sums.move_to(state)  # the host waits
            clock.stop()
            if logs:
                row = training_row(run, state, rate) | (evaluation_row(run, state) if rest == 0 or last else {})
                if run.is_main:
                    metrics.write(row)
                    tracker.log(row)
                progress.log(row)
            if rest == 0 and args.save_epochs > 0 and epoch % args.save_epochs == 0:
                try:
                    keep_weights(run, f"model-epoch-{epoch:04d}")
                except OSError as e:
                    run.say(f"warning: the weights of epoch {epoch} are not kept: {e.strerror or e}; training goes on")
            if saves:
                save(run, state)
                clock.saved = time.perf_counter()
            clock.start()
        if stop and not last:
            break
    clock.stop()
    batches.close()
    progress.close()
    if profiler:
        profiler.close()
    return "finished" if state.step >= run.stop_step else "preempted"


def optimizer_step(run: Run, step: int, rate: float, batches: Iterator[Batch], sums: "Sums", clock: "Clock") -> None:
    """One step of the optimizer over the global batch, cut into micro-batches. All ranks enter; nobody waits."""
    args, accelerator, accumulation = run.args, run.accelerator, run.order.accumulation
    criterion = BinaryCrossEntropy() if args.bce_loss else SoftTargetCrossEntropy()  # targets carry any smoothing
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    for micro in range(accumulation):
        if run.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # a graph may overwrite what the last replay returned
        with clock.waiting():
            images, _, targets = next(batches)
        seed_dropout(run, step, micro)
        with accelerator.no_sync(run.model) if micro < accumulation - 1 else nullcontext():
            logits = run.model(images.contiguous(memory_format=run.memory_format))
            loss = criterion(logits, targets)
            accelerator.backward(loss / accumulation)  # DDP averages over the ranks: the mean of the global batch
        sums.add(loss, logits, targets)
    if args.clip_grad:
        accelerator.unscale_gradients(run.optimizer)
        clip_gradients(run.module, args)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


# ---- what the loop calls


class Sums:
    """Loss, correct answers and images since the last look, kept on the device."""

    def __init__(self, accelerator: Accelerator):
        wide = torch.float32 if accelerator.device.type == "mps" else torch.float64  # mps has no float64
        self.accelerator = accelerator
        self.values = torch.zeros(2, dtype=wide, device=accelerator.device)
        self.images = 0  # of all ranks: they take equal shares

    def add(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Count one micro-batch; correct means that the largest logit is at the largest target."""
        correct = (logits.argmax(1) == targets.argmax(1)).sum()
        self.values += torch.stack([loss.detach() * len(targets), correct])
        self.images += len(targets) * self.accelerator.num_processes

    def move_to(self, state: State) -> None:
        """Add the sums over all ranks to the state's window and epoch, and start anew. All ranks enter; the host waits.

        Raises Diverged on every rank when the loss is not finite.
        """
        loss, correct = self.accelerator.reduce(self.values).tolist()
        if loss != loss or abs(loss) == float("inf"):
            raise Diverged(f"the loss became {loss} by step {state.step:,}")
        for sums in (state.window, state.epoch):
            for i, value in enumerate((loss, correct, self.images)):
                sums[i] += value
        self.values.zero_()
        self.images = 0


class Clock:
    """Keeps state.time_s and the window's seconds (training only, and waiting) and state.wall_s (everything)."""

    def __init__(self, state: State):
        self.state, self.training = state, True
        self.mark = self.saved = time.perf_counter()

    def stop(self) -> None:
        """Training pauses, the device being done."""
        now = time.perf_counter()
        self.state.wall_s += now - self.mark
        if self.training:
            self.state.time_s += now - self.mark
            self.state.window[3] += now - self.mark
        self.mark, self.training = now, False

    def start(self) -> None:
        """Training goes on."""
        self.stop()
        self.training = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The host waits for input, or makes it."""
        began = time.perf_counter()
        yield
        self.state.window[4] += time.perf_counter() - began

    def minutes_up(self, save_every: str) -> bool:
        """Whether a checkpoint by the clock is due."""
        count, unit = parse_interval(save_every)
        return unit == "minute" and time.perf_counter() - self.saved > 60 * count


def seed_dropout(run: Run, step: int, micro: int) -> None:
    """Seed what the model itself draws (dropout, stochastic depth), so that a resume draws the same."""
    value = int(random_bits(run.args.seed, "dropout", step, run.order.positions(micro)[0])[0] >> 1)
    torch.default_generator.manual_seed(value)
    if run.accelerator.device.type == "cuda":
        torch.cuda.default_generators[run.accelerator.device.index or 0].manual_seed(value)
    elif run.accelerator.device.type == "mps":
        torch.mps.manual_seed(value)


def agree(run: Run, *flags: bool) -> list[bool]:
    """Each flag, true when it is true on any rank. All ranks enter, every step; on the host alone, over gloo."""
    if run.host_group is None:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32)
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, group=run.host_group)
    return [bool(v) for v in votes]


def save_due(save_every: str, step: int, steps_per_epoch: int) -> bool:
    """Whether a checkpoint is due after `step` by epochs or steps."""
    count, unit = parse_interval(save_every)
    return unit in ("epoch", "step") and step % (count * (steps_per_epoch if unit == "epoch" else 1)) == 0


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
    if run.peak_flops:
        row["train/mfu"] = round(speed * run.flops / (run.peak_flops * run.order.world), 4)
    if run.compiled:
        row["train/compiled_graphs"] = compiled_graphs()
    return row


def evaluation_row(run: Run, state: State) -> dict[str, float]:
    """Evaluate and remember the best accuracy. All ranks enter; the host waits at the end."""
    result = evaluate_split(run, run.evaluation)
    state.evaluation = result
    state.best_accuracy = max(state.best_accuracy, result["accuracy"])
    return {f"eval/{name}": value for name, value in result.items() if name != "evaluated_images"}


def evaluate_split(run: Run, pipeline: Pipeline) -> dict[str, float]:
    """Exact figures of the run's weights over one split. All ranks enter."""
    if run.host_group is not None:
        for buffer in run.result.buffers():  # each rank has its own batch-norm statistics: the main one's are saved
            torch.distributed.broadcast(buffer, 0)
    world, rank = run.accelerator.num_processes, run.accelerator.process_index
    size = evaluation_batch_size(run.args, run.order)
    batches = pipeline.evaluation_batches(size, world, rank)
    fill_to = size if run.compiled else 0  # a compiled model sees one shape
    return evaluate(run.accelerator, run.result, batches, len(pipeline.split), run.memory_format, fill_to)


def evaluation_batch_size(args: TrainingArguments, order: Order) -> int:
    """Images evaluated at once on one device: a limit that the user set holds here too."""
    return args.micro_batch_size or max(256, order.micro_batch_size)


def save(run: Run, state: State) -> None:
    """Write a checkpoint. All ranks enter, the main process writes; a failure costs the checkpoint, not the run."""
    if not torch.isfinite(torch.nn.utils.get_total_norm(list(run.module.parameters()))):  # the host waits
        raise Diverged(f"the weights are not finite after step {state.step:,}")
    if not run.is_main or (run.args.save_every == "none" and run.stop.signal is None):
        return
    scaler = run.accelerator.scaler
    state.scaler = scaler.state_dict() if scaler is not None else None
    ema = run.ema.module.state_dict() if run.ema else None
    optimizer = run.optimizer.optimizer.state_dict()
    try:
        checkpoint.save_checkpoint(
            run.path, run.module.state_dict(), optimizer, ema, asdict(state), run.args.keep_checkpoints
        )
    except OSError as e:
        run.say(f"warning: no checkpoint at step {state.step:,}: {e.strerror or e}; training goes on")


def keep_weights(run: Run, name: str) -> None:
    """Write the weights as a timm model folder of the run folder, whole or not at all; the main process alone does."""
    if not run.is_main:
        return
    final, scratch = run.path / name, run.path / f"{name}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        save_model(run.result, scratch, run.args, run.train.split.classes)
        for file in scratch.iterdir():
            sync(file)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(scratch, final)
    except BaseException as e:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(e, SafetensorError):
            raise OSError(f"{final} cannot be written ({e})") from e
        raise


# ---- after the loop


def finish(run: Run, state: State, status: str) -> dict[str, Any]:
    """Save the weights, read the test set where that is still to do, and write summary.json. All ranks enter."""
    test = None
    if status == "finished":
        if run.args.validation_fraction:
            run.say("test: reading the test set, once")
            test = evaluate_split(run, run.test)
        keep_weights(run, "model")
        shown = test or state.evaluation
        if run.compiled:
            run.say(f"compiled  {compiled_graphs()} graphs (training and evaluation need one each)")
        run.say(f"result    accuracy {shown['accuracy']:.2%} on {shown['evaluated_images']:,} test images; {run.path}")
    run.accelerator.wait_for_everyone()
    if run.is_main and status == "preempted":
        name = signal.Signals(run.stop.signal or signal.SIGTERM).name
        with suppress(OSError):  # a full disk
            (run.path / "PREEMPTED").write_text(
                f"{name} after step {state.step}; the same command goes on from there\n"
            )
        run.say(f"stopped by {name} after step {state.step:,}; the same command goes on from there")
    return write_summary(run, state, status, test=test)


def write_summary(
    run: Run, state: State, status: str, test: dict[str, float] | None = None, error: str | None = None
) -> dict[str, Any]:
    """Write summary.json on the main process and return its content. `test` holds the figures that count."""
    test = test or ({} if run.args.validation_fraction else state.evaluation)  # the test set is read at the end
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
