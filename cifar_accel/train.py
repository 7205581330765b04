"""The hand-written training loop on Accelerate, and what stands around it.

Read it from `train` downwards. "All ranks enter" marks what every process must reach together; "the host waits" marks
where the host waits for the device. Everything else runs ahead of the device.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

from cifar_accel import checkpoint, tracking
from cifar_accel.config import TrainingArguments, parse_interval
from cifar_accel.data.order import Order, random_bits
from cifar_accel.data.pipelines import Pipeline
from cifar_accel.data.sources import Dataset, Split, hold_out, limit, load_dataset
from cifar_accel.evaluate import evaluate, make_accelerator
from cifar_accel.model import ALIASES, build_model, check_name, input_statistics, save_model
from cifar_accel.optim import build_optimizer, check_names, clip_gradients, learning_rate
from cifar_accel.progress import Progress
from cifar_accel.run_folder import Opened, describe_config, read_json, write_json


class Diverged(RuntimeError):
    """The loss or the weights are no longer finite."""


@dataclass
class State:
    """All of a run that changes, besides weights and optimizer; this is what a checkpoint's state.json holds."""

    step: int = 0  # finished optimizer steps
    time_s: float = 0.0  # spent training; stands still during evaluation and saving
    wall_s: float = 0.0  # spent altogether, over all starts
    window: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])  # loss sum, correct, images, seconds
    epoch: list[float] = field(
        default_factory=lambda: [0.0, 0.0, 0.0]
    )  # loss sum, correct, images since the epoch began
    train_loss: float | None = None  # mean over the last whole epoch
    evaluation: dict[str, float] = field(default_factory=dict)  # the last one
    best_accuracy: float = 0.0
    tracker_id: str | None = None
    scaler: dict[str, Any] | None = None  # fp16 loss scale
    data: str = ""  # fingerprint of the data set


@dataclass
class Run:
    """Everything that is set up once and does not change."""

    args: TrainingArguments
    say: Callable[[str], None]
    accelerator: Accelerator
    path: Path
    module: torch.nn.Module  # the bare model; what evaluation and saving use
    model: torch.nn.Module  # the same, wrapped for training
    ema: ModelEmaV3 | None
    optimizer: Any
    order: Order
    train: Pipeline
    evaluation: Pipeline  # the held-out images, or the test split
    test: Pipeline
    total_steps: int
    stop_step: int
    config: dict[str, Any]
    stop: "StopRequest"
    host_group: Any  # gloo group of all ranks for what the hosts agree on; None with one process

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def result(self) -> torch.nn.Module:
        """The weights that are evaluated and saved: the average if one is kept."""
        return self.ema.module if self.ema else self.module


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and an orderly end; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
    tracker = tracking.Tracker(None, lambda row: None, lambda summary, code: None)
    if run.is_main:
        old = read_json(config_file) or run.config
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
    args, accelerator, model, optimizer = run.args, run.accelerator, run.model, run.optimizer
    criterion = BinaryCrossEntropy() if args.bce_loss else SoftTargetCrossEntropy()  # targets carry any smoothing
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    batches = run.train.training_batches(run.order, state.step, run.stop_step)
    sums = Sums(accelerator)
    metrics = tracking.Metrics(run.path / "metrics.jsonl", run.say)
    if run.is_main:
        metrics.truncate(state.step)
    progress = Progress(run.total_steps, run.order.steps_per_epoch, state.step, run.stop_step, enabled=run.is_main)
    clock = Clock(state)
    model.train()
    while state.step < run.stop_step:
        # One optimizer step over the global batch
        rate = learning_rate(state.step, run.total_steps, warmup_steps(args, run.order), args)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        for micro in range(run.order.accumulation):
            images, _, targets = next(batches)
            images = images.contiguous(memory_format=memory_format)
            seed_dropout(run, state.step, micro)
            last_micro = micro == run.order.accumulation - 1
            with nullcontext() if last_micro else accelerator.no_sync(model):
                logits = model(images)
                loss = criterion(logits, targets)
                accelerator.backward(loss / run.order.accumulation)  # DDP averages over the ranks: the global mean
            sums.add(loss, logits, targets)
        if args.clip_grad:
            accelerator.unscale_gradients(optimizer)
            clip_gradients(run.module, args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if run.ema:
            run.ema.update(run.module, state.step)
        progress.step()

        # What is due after it. All ranks agree: on the steps by counting, on signals and minutes by asking.
        epoch, rest = divmod(state.step, run.order.steps_per_epoch)
        last = state.step == run.stop_step
        stop, minutes_up = agree(run, run.stop.signal is not None, clock.minutes_up(args.save_every))
        logs = state.step % args.log_every == 0 or rest == 0 or last
        saves = stop or last or minutes_up or save_due(args.save_every, state.step, run.order.steps_per_epoch)
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
                keep_weights(run, f"model-epoch-{epoch:04d}")
            if saves:
                save(run, state)
                clock.saved = time.perf_counter()
            clock.start()
        if stop and not last:
            break
    clock.stop()
    batches.close()
    progress.close()
    return "finished" if state.step == run.stop_step else "preempted"


# ---- what the loop calls


class Sums:
    """Loss, correct answers and images since the last look, kept on the device."""

    def __init__(self, accelerator: Accelerator):
        wide = torch.float32 if accelerator.device.type == "mps" else torch.float64  # mps has no float64
        self.accelerator = accelerator
        self.values = torch.zeros(3, dtype=wide, device=accelerator.device)

    def add(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Count one micro-batch; correct means that the largest logit is at the largest target."""
        correct = (logits.argmax(1) == targets.argmax(1)).sum()
        self.values += torch.stack([loss.detach() * len(targets), correct, loss.new_tensor(len(targets))])

    def move_to(self, state: State) -> None:
        """Add the sums over all ranks to the state's window and epoch, and start anew. All ranks enter; the host waits.

        Raises Diverged on every rank when the loss is not finite.
        """
        loss, correct, images = self.accelerator.reduce(self.values).tolist()
        if loss != loss or abs(loss) == float("inf"):
            raise Diverged(f"the loss became {loss} by step {state.step:,}")
        self.values.zero_()
        for sums in (state.window, state.epoch):
            for i, value in enumerate((loss, correct, images)):
                sums[i] += value


class Clock:
    """Keeps state.time_s and the window's seconds (training only) and state.wall_s (everything)."""

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
    loss, correct, images, spent = state.window
    if state.step % run.order.steps_per_epoch == 0:
        state.train_loss = state.epoch[0] / state.epoch[2]
        state.epoch = [0.0, 0.0, 0.0]
    state.window = [0.0, 0.0, 0.0, 0.0]
    return {
        "step": state.step,
        "epoch": round(state.step / run.order.steps_per_epoch, 4),
        "time_s": round(state.time_s, 3),
        "train/loss": loss / images,
        "train/accuracy": correct / images,
        "train/lr": rate,
        "train/images_per_s": round(images / spent, 1),
    }


def evaluation_row(run: Run, state: State) -> dict[str, float]:
    """Evaluate and remember the best accuracy. All ranks enter; the host waits at the end."""
    result = evaluate_split(run, run.evaluation)
    state.evaluation = result
    state.best_accuracy = max(state.best_accuracy, result["accuracy"])
    return {f"eval/{name}": value for name, value in result.items() if name != "evaluated_images"}


def evaluate_split(run: Run, pipeline: Pipeline) -> dict[str, float]:
    """Exact figures of the run's weights over one split. All ranks enter."""
    world, rank = run.accelerator.num_processes, run.accelerator.process_index
    batches = pipeline.evaluation_batches(evaluation_batch_size(run.args, run.order), world, rank)
    return evaluate(run.accelerator, run.result, batches, len(pipeline.split), run.args.channels_last)


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
    save_model(run.result, scratch, run.args, run.train.split.classes)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(scratch, final)


# ---- before the loop


def start_processes(
    args: TrainingArguments, opened: Opened | None, say: Callable[[str], None]
) -> tuple[Opened, Accelerator]:
    """Join the other processes and learn from the main one what to do with the run folder. All ranks enter.

    Raises ValueError when the device is not there or the processes do not find each other.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        say(f"processes: waiting for all {world}")
    accelerator = make_accelerator(args.device)
    return broadcast_object_list([opened and replace(opened, lock=None)])[0], accelerator


def set_up(
    args: TrainingArguments,
    origin: dict[str, str],
    say: Callable[[str], None],
    opened: Opened,
    accelerator: Accelerator,
    stop: StopRequest,
) -> tuple[Run, State]:
    """Load the data, make the model and the optimizer, and resume. All ranks enter. Raises ValueError for bad input."""
    check_names(args)
    check_name(args)
    data, held_out = load_splits(args, say)
    order = make_order(args, len(data.train), accelerator)
    total_steps = args.epochs * order.steps_per_epoch
    stop_step = min(args.max_steps or total_steps, total_steps)
    say(f"model: making {name_of(args)}")
    module: Any = build_model(args, len(data.train.classes), say)
    module.to(accelerator.device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    ema = ModelEmaV3(module, args.model_ema_decay) if args.model_ema else None
    if args.compile:
        module.compile()
    model, optimizer = accelerator.prepare(module, build_optimizer(module, args))
    state = resume(opened, accelerator, module, optimizer, ema, data.fingerprint, say)
    mean, std = input_statistics(args, module)

    def pipeline(split: Split) -> Pipeline:
        return Pipeline(args, split, accelerator.device, mean, std)

    config = describe_config(
        args,
        origin,
        {
            "mixed_precision": accelerator.mixed_precision,
            "processes": accelerator.num_processes,
            "device_batch_size": order.micro_batch_size,
            "accumulation_steps": order.accumulation,
            "steps_per_epoch": order.steps_per_epoch,
            "total_steps": total_steps,
            "stop_step": stop_step,
            "device_name": str(accelerator.device),
            "memory_format": "channels_last" if args.channels_last else "contiguous",
            "train_images": len(data.train),
            "held_out_images": len(held_out),
            "test_images": len(data.test),
            "classes": len(data.train.classes),
            "data_fingerprint": data.fingerprint,
            "input_mean": mean,
            "input_std": std,
            "parameters": sum(p.numel() for p in module.parameters()),
        },
    )
    run = Run(
        args=args,
        say=say,
        accelerator=accelerator,
        path=opened.path,
        module=module,
        model=model,
        ema=ema,
        optimizer=optimizer,
        order=order,
        train=pipeline(data.train),
        evaluation=pipeline(held_out),
        test=pipeline(data.test),
        total_steps=total_steps,
        stop_step=stop_step,
        config=config,
        stop=stop,
        host_group=torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None,
    )
    announce(run, origin)
    return run, state


def load_splits(args: TrainingArguments, say: Callable[[str], None]) -> tuple[Dataset, Split]:
    """The data set, cut as the options say, and the split that is evaluated while training."""
    local_main = os.environ.get("LOCAL_RANK", "0") == "0"
    data = load_dataset(args.dataset, args.data_dir, args.image_size, say if local_main else lambda line: None)
    train_split = limit(data.train, args.limit_train, "--limit-train", args.seed)
    test = limit(data.test, args.limit_test, "--limit-test", args.seed)
    held_out = test
    if args.validation_fraction:
        train_split, held_out = hold_out(train_split, args.validation_fraction, args.seed)
    if args.pipeline == "device" and args.scale and max(train_split.images.shape[2:]) > args.image_size:
        say("warning: the device pipeline shrinks crops without antialiasing; --pipeline timm does not")
    return replace(data, train=train_split, test=test), held_out


def make_order(args: TrainingArguments, samples: int, accelerator: Accelerator) -> Order:
    """Cut the global batch over processes and accumulation steps. Raises ValueError when it cannot be cut equally."""
    world = accelerator.num_processes
    size, rest = divmod(args.batch_size, world)
    if rest or not size:
        near = f"{size * world} or {(size + 1) * world}" if size else str(world)
        raise ValueError(f"--batch-size {args.batch_size}: cannot be divided by {world} processes; {near} can")
    accumulation = accelerator.gradient_accumulation_steps  # what `accelerate launch` was told
    accelerator.gradient_accumulation_steps = 1  # the loop divides the loss itself
    if accumulation > 1 and args.micro_batch_size:
        raise ValueError(
            f"--micro-batch-size and the launcher's gradient_accumulation_steps {accumulation} are both given"
        )
    if args.micro_batch_size:
        accumulation = next(a for a in range(1, size + 1) if size % a == 0 and size // a <= args.micro_batch_size)
    if size % accumulation:
        raise ValueError(
            f"--batch-size {args.batch_size}: {size} images a process cannot be divided by the launcher's "
            f"gradient_accumulation_steps {accumulation}"
        )
    if samples < args.batch_size:
        raise ValueError(
            f"--batch-size {args.batch_size}: larger than the training set ({samples:,} images): an epoch has no step"
        )
    return Order(args.seed, samples, args.batch_size, world, accelerator.process_index, accumulation)


def warmup_steps(args: TrainingArguments, order: Order) -> int:
    """Optimizer steps of warm-up."""
    return round((args.warmup_epochs or 0) * order.steps_per_epoch)


def resume(
    opened: Opened,
    accelerator: Accelerator,
    module: torch.nn.Module,
    optimizer: Any,
    ema: ModelEmaV3 | None,
    fingerprint: str,
    say: Callable[[str], None],
) -> State:
    """The state to start from: that of the newest whole checkpoint, or a fresh one. All ranks enter; rank 0 chooses."""
    source = opened.resume_from
    chosen: Path | None = None
    if source is not None and accelerator.is_main_process:
        if source.name.startswith("step-"):
            problem = checkpoint.fault(source)
            if problem:
                raise ValueError(f"--resume {source}: {problem}")
            chosen = source
        else:
            chosen = checkpoint.newest_valid(source, say)
    name = broadcast_object_list([chosen and str(chosen)])[0]
    if name is None:
        return State(data=fingerprint)
    state = State(**checkpoint.read_state(Path(name)))
    if state.data != fingerprint:
        raise ValueError(f"--resume {name}: was trained on other images than --dataset now holds")
    checkpoint.load_checkpoint(Path(name), module, optimizer.optimizer, ema.module if ema else None)
    if accelerator.scaler is not None and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    if accelerator.is_main_process:
        (opened.path / "PREEMPTED").unlink(missing_ok=True)
    say(f"resume: from {name}, after step {state.step:,}")
    return state


def name_of(args: TrainingArguments) -> str:
    """The model's full name in timm."""
    return ALIASES.get(args.model, args.model)


def announce(run: Run, origin: dict[str, str]) -> None:
    """Print every derived value once, with its reason."""
    args, order, config = run.args, run.order, run.config["options"]
    precision = {"no": "fp32"}.get(config["mixed_precision"], config["mixed_precision"])
    origin_of = {"ACCELERATE_MIXED_PRECISION": "from the launcher"}
    reason = next((why for name, why in origin_of.items() if name in os.environ), "the default")
    warmup = warmup_steps(args, order)
    how = " (derived)" if origin["warmup_epochs"] == "derived" else ""
    workers = f", {args.workers} workers" if args.pipeline == "timm" else ""
    lines = {
        "run": str(run.path),
        "device": f"{config['device_name']}, precision {precision} ({reason})",
        "data": f"{args.dataset}: {config['train_images']:,} training, {config['test_images']:,} test images, "
        f"{config['classes']} classes; {args.pipeline} pipeline{workers}",
        "batch": f"{args.batch_size} = {order.world} process{'es' * (order.world > 1)} "
        f"x {order.micro_batch_size} images x "
        f"{order.accumulation} accumulation step{'s' * (order.accumulation > 1)}",
        "steps": f"{args.epochs} epochs x {order.steps_per_epoch:,} = {run.total_steps:,}"
        + (f", stopping after {run.stop_step:,}" if run.stop_step < run.total_steps else ""),
        "schedule": f"{args.scheduler}, peak {args.learning_rate:g}, "
        f"warm-up {args.warmup_epochs:g} epochs{how} = {warmup:,} steps",
        "model": f"{name_of(args)}, {config['parameters'] / 1e6:.2f} M parameters; {args.optimizer}",
    }
    for name, text in lines.items():
        run.say(f"{name:<9} {text}")


# ---- after the loop


def finish(run: Run, state: State, status: str) -> dict[str, Any]:
    """Save the weights, read the test set where that is still to do, and write summary.json. All ranks enter."""
    test = state.evaluation
    if status == "finished":
        if run.args.validation_fraction:
            run.say("test: reading the test set, once")
            test = evaluate_split(run, run.test)
        keep_weights(run, "model")
    run.accelerator.wait_for_everyone()
    if run.is_main and status == "preempted":
        name = signal.Signals(run.stop.signal or signal.SIGTERM).name
        (run.path / "PREEMPTED").write_text(f"{name} after step {state.step}; the same command goes on from there\n")
        run.say(f"stopped by {name} after step {state.step:,}; the same command goes on from there")
    return write_summary(run, state, status, test=test)


def write_summary(
    run: Run, state: State, status: str, test: dict[str, float] | None = None, error: str | None = None
) -> dict[str, Any]:
    """Write summary.json on the main process and return its content. `test` holds the figures that count."""
    test = test or state.evaluation
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
