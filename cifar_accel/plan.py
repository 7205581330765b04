"""The run on paper: how batches are cut, how many steps there are, and what is due after each.

A training follows a `Plan`, `--dry-run` prints it, and config.json records it. Loads no torch.
"""

from dataclasses import dataclass
from typing import Any

from cifar_accel.data.order import Order
from cifar_accel.errors import BadInput
from cifar_accel.optim import schedules
from cifar_accel.options.options import TrainingArguments
from cifar_accel.options.values import parse_interval


@dataclass(frozen=True)
class Plan:
    """What follows from the options, the number of training images and the number of processes.

    "After step s" means after s optimizer steps are taken: s = 0 is before the first.
    """

    args: TrainingArguments
    # How this process's share of each global batch is found.
    order: Order

    @property
    def accumulation(self) -> int:
        """Micro-batches in one optimizer step of one process."""
        return self.order.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return self.order.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole schedule."""
        return self.args.epochs * self.steps_per_epoch

    @property
    def stop_step(self) -> int:
        """The last optimizer step: --max-steps may cut the schedule, and never rescales it."""
        return min(self.args.max_steps or self.total_steps, self.total_steps)

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of warm-up."""
        return round((self.args.warmup_epochs or 0) * self.steps_per_epoch)

    @property
    def evaluation_batch_size(self) -> int:
        """Most images that one device evaluates at once: 256 keep any device busy.

        Without gradients there is room for that; a --micro-batch-size of the user holds here too.
        """
        return self.args.micro_batch_size or max(256, self.order.micro_batch_size)

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        return schedules.learning_rate(step, self.total_steps, self.warmup_steps, self.args)

    @property
    def parts(self) -> list[tuple[int, int, int]]:
        """The sizes in turn, each with its first step and the one after its last."""
        ends = [round(share * self.total_steps) for _, share in self.args.sizes]
        sizes = [size for size, _ in self.args.sizes]
        return list(zip(sizes, [0, *ends[:-1]], ends, strict=True))

    def image_size(self, step: int) -> int:
        """Side in pixels of the images of optimizer step `step`, counted from 0."""
        for size, _, end in self.parts:
            if step < end:
                return size
        return self.args.input_size

    def work(self, steps: int) -> float:
        """What the first `steps` steps take, in steps at the last size: time goes with pixels."""
        return sum(
            (min(steps, end) - min(steps, begin)) * (size / self.args.input_size) ** 2
            for size, begin, end in self.parts
        )

    # ---- what is due after a step

    def row_after(self, step: int) -> bool:
        """Whether a row is logged: every --log-every steps, at an evaluation, and at a new size."""
        return (
            step % self.args.log_every == 0
            or self.evaluation_after(step)
            or self.image_size(step) != self.image_size(step - 1)
        )

    def evaluation_after(self, step: int) -> bool:
        """Whether the model is evaluated: after each epoch and after the last step."""
        return step % self.steps_per_epoch == 0 or step == self.stop_step

    def checkpoint_after(self, step: int) -> bool:
        """Whether a checkpoint is written, though not by the clock (see `save_minutes`)."""
        count, unit = parse_interval(self.args.save_every)
        if unit == "never":
            return False
        # A larger --max-steps goes on from there.
        if step == self.stop_step:
            return True
        if unit == "epoch":
            return step % (count * self.steps_per_epoch) == 0
        return unit == "step" and step % count == 0

    @property
    def save_minutes(self) -> int | None:
        """Minutes between two checkpoints, where --save-every counts in minutes."""
        count, unit = parse_interval(self.args.save_every)
        return count if unit == "minute" else None

    def weights_after(self, step: int) -> str | None:
        """The folder that keeps the weights of this step beyond the run's end, or None."""
        # --save-epochs counts whole epochs; -1 asks for none but the last, which is always kept.
        epoch, rest = divmod(step, self.steps_per_epoch)
        if self.args.save_epochs < 1 or rest or epoch % self.args.save_epochs:
            return None
        return f"model-epoch-{epoch:04d}"

    # ---- in words

    def lines(self, origin: dict[str, str] | None = None) -> dict[str, str]:
        """Batch, steps and schedule for the screen, by name; `origin` is that of the options."""
        args = self.args
        epochs = f"{args.epochs} epoch{'s' * (args.epochs > 1)}"
        steps = f"{epochs} x {self.steps_per_epoch:,} = {self.total_steps:,}"
        steps += self.sizes_left_out()
        if self.stop_step < self.total_steps:
            steps += f", stopping after {self.stop_step:,}"
        derived = {name: " (derived)" for name, of in (origin or {}).items() if of == "derived"}
        peak = f"peak {args.learning_rate:g}{derived.get('learning_rate', '')}"
        how = derived.get("warmup_epochs", "")
        warmup = f"warm-up {args.warmup_epochs:g} epochs{how} = {self.warmup_steps:,} steps"
        return {
            "batch": self.order.arithmetic(),
            "steps": steps,
            "schedule": f"{args.scheduler}, {peak}, {warmup}",
        }

    def sizes_left_out(self) -> str:
        """A word on sizes whose share of the steps is less than one step; or nothing."""
        names = [f"{size} px" for size, begin, end in self.parts if begin == end]
        return f" (none at {', '.join(names)})" if names else ""

    def rates(self) -> str:
        """The learning rate at the steps that show its shape."""
        # Start, end of the warm-up, half-way, end.
        shown = {0, self.warmup_steps, self.total_steps // 2, self.total_steps - 1}
        return ", ".join(f"{self.learning_rate(step):.3g} at {step:,}" for step in sorted(shown))

    def facts(self) -> dict[str, Any]:
        """What config.json records of the plan."""
        return {
            "processes": self.order.world,
            "device_batch_size": self.order.micro_batch_size,
            "accumulation_steps": self.accumulation,
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
            "stop_step": self.stop_step,
        }


def make_plan(
    args: TrainingArguments, samples: int, world: int = 1, rank: int = 0, accumulation: int = 1
) -> Plan:
    """The plan of process `rank` of `world` over `samples` training images.

    `accumulation` is the launcher's; --micro-batch-size may ask for more. Raises BadInput when the
    global batch cannot be cut into equal parts, or an epoch would have no step.
    """
    if accumulation < 1:
        raise BadInput(f"the launcher's gradient_accumulation_steps {accumulation}: must be >= 1")

    # The last, incomplete batch of an epoch is dropped, so there must be a whole one.
    if samples < args.batch_size:
        raise BadInput(
            f"--batch-size {args.batch_size}: larger than the training set ({samples:,} images): "
            "an epoch has no step"
        )

    # The share of one process.
    share, rest = divmod(args.batch_size, world)
    if rest or not share:
        near = f"{share * world} or {(share + 1) * world}" if share else str(world)
        raise BadInput(
            f"--batch-size {args.batch_size}: cannot be divided by {world} processes; {near} can"
        )

    # Its micro-batches: as many as the launcher or --micro-batch-size asks for.
    if args.micro_batch_size:
        if accumulation > 1:
            raise BadInput(
                f"--micro-batch-size and the launcher's gradient_accumulation_steps {accumulation} "
                "are both given"
            )
        accumulation = share // largest_micro_batch(args, share)
    if share % accumulation:
        raise BadInput(
            f"--batch-size {args.batch_size}: {share} images a process cannot be divided by the "
            f"launcher's gradient_accumulation_steps {accumulation}"
        )
    # Mixing pairs neighbours, so that a pair never lies in two processes.
    size = share // accumulation
    if (args.mixup or args.cutmix) and size % 2:
        raise BadInput(
            f"--batch-size {args.batch_size}: --mixup and --cutmix mix pairs, and {size} images at "
            "once are no whole number of pairs; make it even"
        )
    return Plan(args, Order(args.seed, samples, args.batch_size, world, rank, accumulation))


def micro_batch_sizes(args: TrainingArguments, share: int) -> list[int]:
    """The sizes that cut the `share` of a process into equal micro-batches, largest first."""
    sizes = [share // parts for parts in range(1, share + 1) if share % parts == 0]
    # Pairs are mixed, and a pair lies in one micro-batch.
    if args.mixup or args.cutmix:
        sizes = [size for size in sizes if size % 2 == 0]
    return sizes


def largest_micro_batch(args: TrainingArguments, share: int) -> int:
    """The largest micro-batch of at most --micro-batch-size images. Raises BadInput."""
    assert args.micro_batch_size
    for size in micro_batch_sizes(args, share):
        if size <= args.micro_batch_size:
            return size
    raise BadInput(
        f"--micro-batch-size {args.micro_batch_size}: the {share} images of a process cannot be "
        "cut so into equal parts (with --mixup or --cutmix, of an even size)"
    )
