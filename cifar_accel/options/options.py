"""Every option once: its type with its bounds, its default, and what it means.

`TrainingArguments` is the command line, the help text, docs/options.md and `config.json` at once.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import AfterValidator, Field, FiniteFloat
from tyro.conf import Positional

from cifar_accel.options.values import check_sizes, parse_sizes

# Channel means and deviations of ImageNet's training images, on a scale from 0 to 1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Data sets that have names of their own; data/sources.py says what they are.
BUILT_IN = ("cifar100", "cifar10", "digits")

# Numbers with their bounds. tyro, which reads the words, passes over the bounds; pydantic checks
# them afterwards, all at once (`check_bounds` in parsing.py).
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
PositiveShare = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
# Counts stay far from the end of 64-bit integers, since products of two of them are formed.
PositiveInt = Annotated[int, Field(gt=0, le=10**9)]
NotNegativeInt = Annotated[int, Field(ge=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# The bounds stand around the None: tyro would print those of a part of a union in its complaints.
NotNegativeOrNone = Annotated[float | None, Field(ge=0, allow_inf_nan=False)]
PositiveIntOrNone = Annotated[int | None, Field(gt=0, le=10**9)]
NotNegativeIntOrNone = Annotated[int | None, Field(ge=0, le=10**9)]

# One size, or a text of several. To read it is to check it.
SizeOrSizes = PositiveInt | Annotated[str, AfterValidator(check_sizes)]

# `Volatile[int]` is an int that may differ between a run and its continuation: it changes where or
# how the run goes, not what it computes.
_VOLATILE = "volatile"
T = TypeVar("T")
Volatile = Annotated[T, _VOLATILE]


@dataclass(frozen=True)
class TrainingArguments:
    """Fine-tune or train a timm model on CIFAR-100, or other images, on one or more devices."""

    # A comment right above a field heads a section of docs/options.md; its further lines are the
    # prose of that section.

    # What is trained
    model: str = "nfnet"
    """nfnet, vit, any timm model, or local-dir:PATH (with config.json and model.safetensors)."""
    pretrained: bool = True
    """Start from the model's published weights (a download, unless the model is a local-dir)."""
    checkpoint: str | None = None
    """Weights to start from instead: a run folder, a .safetensors or a .pth file."""
    model_kwargs: tuple[str, ...] = ()
    """More arguments of the timm model, as in patch_size=4 drop_path_rate=0.1."""
    image_size: SizeOrSizes = 32
    """Side of the input in pixels; 64:0.4,96:0.7,128: 64 until 40 % of the steps, 96 until 70 %."""

    # Data
    dataset: str = "cifar100"
    """cifar100, cifar10, digits, a folder (hub parquet, or train/CLASS/*.png), or a hub id."""
    data_dir: Volatile[str] = "~/.cache/cifar_accel"
    """Where downloads and the decoded arrays are kept."""
    limit_train: NotNegativeInt = 0
    """Use this many training images, a seeded stratified subset (0: all)."""
    limit_test: NotNegativeInt = 0
    """Use this many test images, a seeded stratified subset (0: all)."""
    validation_fraction: ShareBelowOne = 0.0
    """Share of each class's training images held out; the test set is read once, at the end."""
    stored_size: PositiveInt | None = None
    """Side of decoded copies of large or unequal images (unset: what crops need, capped)."""
    pipeline: Literal["device", "timm"] = "device"
    """device: images live and are augmented on the device; timm: PIL in worker processes."""
    workers: Volatile[NotNegativeIntOrNone] = None
    """Worker processes of the timm pipeline per training process (unset: 8, or fewer cores)."""

    # Augmentation and loss
    # The names are timm's. Where a value turns the option off, it is none or 0.
    aa: str = "none"
    """AutoAugment policy in timm's notation, for example rand-m15-n2."""
    scale: tuple[PositiveShare, PositiveShare] | None = None
    """Least and largest area of the random resized crop, as shares; none: no such crop."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Least and largest aspect ratio of the random resized crop."""
    crop_padding: NotNegativeInt = 0
    """Random crop after reflecting this many pixels (instead of the random resized crop)."""
    hflip: Share = 0.0
    """Probability of a left-right flip."""
    vflip: Share = 0.0
    """Probability of an upside-down flip."""
    alternating_flip: bool = False
    """Flip each image left-right in every other epoch, not at random in every epoch as --hflip."""
    color_jitter: NotNegative = 0.0
    """Range of random brightness, contrast and saturation (0.4: factors from 0.6 to 1.4)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling when an image is resized."""
    crop_pct: PositiveShare = 1.0
    """Test images are resized to image_size / crop_pct and their centre is taken (1: all of it)."""
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] | None = None
    """Channel means subtracted from images scaled to [0, 1]; none: the model's own."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Channel deviations that images are divided by; none: the model's own."""
    reprob: Share = 0.0
    """Probability that a random rectangle of an image is erased (set to the mean)."""
    mixup: NotNegative = 0.0
    """Mixup alpha."""
    cutmix: NotNegative = 0.0
    """CutMix alpha; with Mixup too, each batch takes one of them, with equal chances."""
    mixup_prob: Share = 1.0
    """Probability that a batch is mixed."""
    smoothing: ShareBelowOne = 0.0
    """Label smoothing."""
    bce_loss: bool = False
    """Binary cross-entropy over the classes in place of softmax cross-entropy."""

    # Optimization
    epochs: PositiveInt = 25
    """Passes over the training set."""
    budget: str | None = None
    """Choose sizes and epochs that take this long, with start and end: 30m, 2h (finetune)."""
    plan_of: Volatile[str | None] = None
    """A run folder whose sizes and epochs --budget takes over (a study's first seed's)."""
    batch_size: PositiveInt = 256
    """Images in one optimizer step, over all processes and accumulation steps."""
    micro_batch_size: Volatile[PositiveIntOrNone] = None
    """Most images that one device takes at once; accumulation follows from it (unset: no limit)."""
    optimizer: str = "adamw"
    """adamw, sgdm, or another optimizer of timm by name."""
    learning_rate: Positive = 5e-4
    """Peak learning rate."""
    weight_decay: NotNegative = 1e-2
    """Weight decay."""
    decay_all: bool = True
    """Decay every parameter; else gains, biases, norms and position embeddings are spared."""
    layer_decay: PositiveShare = 1.0
    """Factor by which each layer's learning rate is below that of the layer after it; 1: none."""
    momentum: NotNegative = 0.9
    """Momentum of sgdm (and of timm's optimizers that have one)."""
    amsgrad: bool = False
    """The amsgrad form of adamw."""
    scheduler: str = "cosine"
    """cosine, linear_decay, constant or one_cycle; a function of the optimizer step."""
    warmup_epochs: NotNegativeOrNone = None
    """Epochs of linear warm-up (unset: a fifth; one_cycle 3/10; linear_decay and constant 0)."""
    warmup_lr: NotNegative = 1e-5
    """Learning rate at the first step of a warm-up."""
    min_lr: NotNegative = 1e-6
    """Learning rate at the end of cosine."""
    clip_grad: NotNegative = 0.0
    """Gradient clipping: the largest norm, value, or (agc) ratio to the weights' norm; 0: none."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """How gradients are clipped; agc is NFNet's adaptive way (0.01 is usual), classifier spared."""
    model_ema: bool = False
    """Keep an exponential moving average of the weights; it is what is evaluated and saved."""
    model_ema_decay: Share = 0.9998
    """Decay of that average per step; after n steps it is at most 1 - (n + 1)^(-2/3)."""

    # Run
    seed: Seed = 3407
    """Everything random follows from it."""
    device: Volatile[Literal["auto", "cpu", "cuda", "mps"]] = "auto"
    """auto takes cuda, else mps, else cpu."""
    compile: bool = False
    """Compile the model with torch.compile."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """torch.compile's mode; reduce-overhead replays the step as a CUDA graph."""
    memory_format: Volatile[Literal["auto", "contiguous", "channels_last"]] = "auto"
    """Layout of images and weights; auto: what was faster for the model family on CPUs."""
    max_steps: Volatile[NotNegativeInt] = 0
    """Stop after this many optimizer steps (0: no limit); the schedule is not rescaled."""
    max_time: Volatile[str | None] = None
    """Stop in order, with a checkpoint, at the first step after this long: 90m, 2h, 1h30m."""
    log_every: Volatile[PositiveInt] = 50
    """Optimizer steps between two log lines."""
    dry_run: Volatile[bool] = False
    """Print what would be trained, the origin of every value and what is amiss; train nothing."""
    profile: Volatile[NotNegativeInt] = 0
    """Trace this many steps, after 3 of warm-up, with torch's profiler into RUN/profile."""

    # Saving and tracking
    save_dir: Volatile[str] = "checkpoint"
    """Parent of the run folders."""
    run_name: Volatile[str | None] = None
    """Run folder below save_dir (unset: MODEL/OPTIMIZER-SCHEDULER-sSEED)."""
    save_every: Volatile[str] = "1epoch"
    """How often a resumable checkpoint is written: 1epoch, 500steps, 10m (minutes), or none."""
    keep_checkpoints: Volatile[PositiveInt] = 2
    """Resumable checkpoints kept; older ones are removed once a new one is safe."""
    save_epochs: Volatile[int] = -1
    """Keep the weights of every so many epochs as model-epoch-XXXX (-1: of the last only)."""
    resume: Volatile[str] = "auto"
    """auto (go on with the run in its folder), never (fresh folder), or a folder to go on from."""
    tracker: Volatile[Literal["wandb", "none"]] = "wandb"
    """Tracker beside metrics.jsonl; wandb goes offline by itself without a key or a network."""
    project: Volatile[str] = "cifar_accel"
    """wandb project."""
    group: Volatile[str | None] = None
    """wandb group (a study's name)."""
    log_model: Volatile[bool] = False
    """Log the finished model/ to the tracker as an artifact too."""

    # Recipe
    recipe: str = "report"
    """Set of defaults: report, plain, finetune or digits; every flag overrides it."""

    @property
    def sizes(self) -> tuple[tuple[int, float], ...]:
        """Sides of the model's input in turn, with the share of the steps at which each ends."""
        return parse_sizes(self.image_size)

    @property
    def input_size(self) -> int:
        """The last and largest of them: that of evaluations and of the saved model."""
        return self.sizes[-1][0]


@dataclass(frozen=True)
class EvaluateArguments:
    """Evaluate a trained model on its test set, or on other images by their classes' names."""

    run: Positional[str]
    """A run folder, its model/, or a local-dir model of timm (which needs --dataset)."""
    dataset: str | None = None
    """Other images than the run's, or where these lie now; a folder of classes will do."""
    image_size: PositiveInt | None = None
    """Another input size in pixels than the model's own."""
    json: bool = False
    """Print JSON, with every class; shares are of 1."""
    predictions: str | None = None
    """Write a CSV file here: image, label, prediction, probability."""
    data_dir: str | None = None
    """Where downloads and decoded arrays are kept (unset: as in the run)."""
    batch_size: PositiveInt = 256
    """Images at once on one device."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes cuda, else mps, else cpu."""
    tracker: Literal["wandb", "none"] = "none"
    """Also log the figures to wandb, as a run of job type evaluate in the run's group."""


@dataclass(frozen=True)
class PredictArguments:
    """Say what a trained model takes images for: the likeliest classes with their probabilities."""

    model: Positional[str]
    """A run folder, its model/, or a local-dir model of timm."""
    images: Positional[tuple[str, ...]]
    """Image files, folders of them, or - for one path a line on stdin."""
    top_k: PositiveInt = 5
    """How many classes of each image."""
    json: bool = False
    """Print JSON: [{"file", "predictions": [{"label", "probability"}]}]."""
    csv: bool = False
    """Print CSV: file, rank, label, probability."""
    batch_size: PositiveInt = 64
    """Images at once on the device."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes cuda, else mps, else cpu."""


@dataclass(frozen=True)
class ExportArguments:
    """Write a trained model in a form for other programs, or push it to the Hugging Face hub."""

    model: Positional[str]
    """A run folder, its model/, or a local-dir model of timm."""
    out: str | None = None
    """The folder to write to; without --format: config.json, model.safetensors and a model card."""
    format: Literal["onnx", "torch"] | None = None
    """onnx: model.onnx; torch: model.pt2 of torch.export. Both take uint8 images of one size."""
    push: str | None = None
    """A repository of the hub, USER/NAME: what --out alone writes is uploaded there."""
    private: bool = False
    """With --push: nobody else sees the repository, if it is new."""
    dataset: str | None = None
    """With --format: the images on which the exported model is checked (unset: the run's)."""


@dataclass(frozen=True)
class StudyArguments:
    """Run every run of a study file that is not finished. Options after -- go to every run."""

    file: Positional[str]
    """A YAML file in wandb's sweep format (method: grid), or with a list `runs` of option sets."""
    save_dir: str | None = None
    """Parent of the run folders (unset: as the file says)."""
    jobs: PositiveInt = 1
    """Runs at a time, one process each: on a GPU of its own, or on its share of the cores."""
    status: bool = False
    """Say how each run stands; train and write nothing."""
    dry_run: bool = False
    """Print the plan and the command of each run; train and write nothing."""
    verbose: bool = False
    """Show all that the runs print."""


@dataclass(frozen=True)
class ReportArguments:
    """Print tables of all runs below a folder; write report.md and report.html there."""

    folder: Positional[str]
    """A folder with run folders at any depth below it."""


@dataclass(frozen=True)
class CompareArguments:
    """Say what the runs of two settings tell of their difference, and what they do not."""

    a: Positional[str]
    """A run folder, or a folder of runs of one setting; without B, of several settings."""
    b: Positional[str | None] = None
    """A run folder, or a folder of runs of the setting that A is compared with."""
    baseline: str | None = None
    """Without B: the setting to compare with, a part of its name or a folder (unset: the first)."""
    margin: NotNegative = 0.5
    """Settings that differ by less than this many points of accuracy are the same."""
    json: bool = False
    """Print JSON, with accuracies and differences as shares of 1."""


# The options that may differ between a run and its continuation.
VOLATILE = frozenset(
    name
    for name, hint in get_type_hints(TrainingArguments, include_extras=True).items()
    if _VOLATILE in getattr(hint, "__metadata__", ())
)


def flag(field: str) -> str:
    """`learning_rate` -> `--learning-rate`."""
    return "--" + field.replace("_", "-")


def in_words(value: Any) -> str:
    """An option's value as it would be written on the command line."""
    if value is None:
        return "none"
    # JSON has lists for tuples.
    if isinstance(value, tuple | list):
        return " ".join(map(str, value)) or "-"
    return str(value)
