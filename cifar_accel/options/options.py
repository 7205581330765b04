"""Every option once: typed, with its doc line, default and unit.

`TrainingArguments` is the command line, the help text, the documentation and `config.json` at once.
"""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TrainingArguments:
    """Fine-tune or train a timm model on CIFAR-100 (or another image set) on one or more devices."""

    # What is trained
    model: str = "nfnet"
    """nfnet, vit, any timm model name, or local-dir:PATH (a folder with config.json and model.safetensors)."""
    pretrained: bool = True
    """Start from the model's published weights (a download, unless the model is a local-dir)."""
    checkpoint: str | None = None
    """Weights to start from: a run folder, a .safetensors or a .pth file; replaces the published weights."""
    model_kwargs: tuple[str, ...] = ()
    """Further arguments of the timm model, as name=value, for example patch_size=4 drop_path_rate=0.1."""
    image_size: int = 32
    """Side of the square model input in pixels; images are resized to it."""

    # Data
    dataset: str = "cifar100"
    """cifar100, cifar10, digits, a folder (hub parquet layout, or train/CLASS/*.png), or a hub id."""
    data_dir: str = "~/.cache/cifar_accel"
    """Where downloads and the decoded arrays are kept."""
    limit_train: int = 0
    """Use this many training images, a seeded stratified subset (0: all)."""
    limit_test: int = 0
    """Use this many test images, a seeded stratified subset (0: all)."""
    validation_fraction: float = 0.0
    """Share of the training images held out, by class, for the evaluations; the test set is read once, at the end."""
    pipeline: Literal["device", "timm"] = "device"
    """Input: device (images live on the device, augmented there in batches) or timm (PIL transforms in workers)."""
    workers: int | None = None
    """Worker processes of the timm pipeline per training process (unset: 8, or fewer where there are fewer cores)."""

    # Augmentation, loss: timm's flag names; none or 0 turns one off
    aa: str = "none"
    """AutoAugment policy in timm's notation, for example rand-m15-n2."""
    scale: tuple[float, float] | None = None
    """Area range of the random resized crop, as a share of the image; none: no such crop."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect range of the random resized crop."""
    crop_padding: int = 0
    """Random crop of the image padded by this many reflected pixels (in place of the random resized crop)."""
    hflip: float = 0.0
    """Probability of a left-right flip."""
    vflip: float = 0.0
    """Probability of an upside-down flip."""
    alternating_flip: bool = False
    """Flip every image left-right in every other epoch, at random in the first, in place of --hflip's coin."""
    color_jitter: float = 0.0
    """Range of random brightness, contrast and saturation (0.4 means a factor of 0.6 to 1.4)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling when an image is resized."""
    crop_pct: float = 1.0
    """Test images are resized to image_size / crop_pct and cut to the centre (1: nothing is cut)."""
    mean: tuple[float, float, float] | None = None
    """Channel means subtracted from images scaled to [0, 1]; none: the model's own."""
    std: tuple[float, float, float] | None = None
    """Channel deviations divided by; none: the model's own."""
    reprob: float = 0.0
    """Probability that a random rectangle of an image is erased (set to the mean)."""
    mixup: float = 0.0
    """Mixup alpha."""
    cutmix: float = 0.0
    """CutMix alpha; with Mixup too, each batch takes one of them, half and half."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed."""
    smoothing: float = 0.0
    """Label smoothing."""
    bce_loss: bool = False
    """Binary cross-entropy over the classes in place of softmax cross-entropy."""

    # Optimization
    epochs: int = 25
    """Passes over the training set."""
    batch_size: int = 256
    """Images in one optimizer step, over all processes and accumulation steps."""
    micro_batch_size: int | None = None
    """Most images that one device takes at once; accumulation follows from it (unset: no limit)."""
    optimizer: str = "adamw"
    """adamw, sgdm, or another optimizer of timm by name."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    weight_decay: float = 1e-2
    """Weight decay."""
    decay_all: bool = True
    """Decay every parameter; else gains, biases, norms and position embeddings are spared."""
    momentum: float = 0.9
    """Momentum of sgdm (and of timm's optimizers that have one)."""
    amsgrad: bool = False
    """The amsgrad form of adamw."""
    scheduler: str = "cosine"
    """cosine, linear_decay, constant or one_cycle; a function of the optimizer step."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up (unset: epochs / 5; 0 for linear_decay and constant; 0.3 epochs for one_cycle)."""
    warmup_lr: float = 1e-5
    """Learning rate at the first step of a warm-up."""
    min_lr: float = 1e-6
    """Learning rate at the end of cosine."""
    clip_grad: float = 0.0
    """Gradient clipping: the largest norm, value, or (agc) ratio to the weights' norm; 0: none."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """How gradients are clipped; agc is NFNet's adaptive clipping (0.01 is usual), which spares the classifier."""
    model_ema: bool = False
    """Keep an exponential moving average of the weights; it is what is evaluated and saved."""
    model_ema_decay: float = 0.9998
    """Decay of that average per step."""

    # Run
    seed: int = 3407
    """Everything random follows from it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes cuda, else mps, else cpu."""
    compile: bool = False
    """Compile the model with torch.compile."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """torch.compile's mode; reduce-overhead replays the step as a CUDA graph."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Layout of images and weights; auto takes what was measured to be faster for the model's family and device."""
    max_steps: int = 0
    """Stop after this many optimizer steps (0: no limit); the schedule is not rescaled."""
    max_time: str | None = None
    """Stop in order, with a checkpoint, at the first step after so long since the start: 90m, 2h, 1h30m."""
    log_every: int = 50
    """Optimizer steps between two log lines."""
    dry_run: bool = False
    """Print what would be trained, where every value comes from, and what is amiss on this machine; train nothing."""
    profile: int = 0
    """Trace this many optimizer steps, after 3 of warm-up, with torch's profiler into profile/ of the run folder."""

    # Saving and tracking
    save_dir: str = "checkpoint"
    """Parent of the run folders."""
    run_name: str | None = None
    """Run folder below save_dir (unset: MODEL/OPTIMIZER-SCHEDULER-sSEED)."""
    save_every: str = "1epoch"
    """How often a resumable checkpoint is written: 1epoch, 500steps, 10m (minutes), or none."""
    keep_checkpoints: int = 2
    """Resumable checkpoints kept; older ones are removed once a new one is safe."""
    save_epochs: int = -1
    """Keep the weights of every so many epochs as model-epoch-XXXX (-1: of the last only)."""
    resume: str = "auto"
    """auto (go on with the run in its folder), never (a fresh folder), or a run or checkpoint folder to go on from."""
    tracker: Literal["wandb", "none"] = "wandb"
    """Experiment tracker beside metrics.jsonl; wandb works offline by itself without a key or a network."""
    project: str = "cifar_accel"
    """wandb project."""
    group: str | None = None
    """wandb group (a study's name)."""
    recipe: str = "report"
    """Set of defaults: report, plain or digits; every flag overrides it."""


@dataclass(frozen=True)
class EvaluateArguments:
    """Evaluate the weights of a run folder on its test set, or on another."""

    run: Positional[str]
    """A run folder (with config.json and model/)."""
    dataset: str | None = None
    """Another data set than the run's, or the place where it lies now."""
    data_dir: str | None = None
    """Where downloads and decoded arrays are kept (unset: as in the run)."""
    batch_size: int = 256
    """Images at once on one device."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes cuda, else mps, else cpu."""
    tracker: Literal["wandb", "none"] = "none"
    """Also log the figures to wandb, as a run of job type evaluate in the run's group."""


@dataclass(frozen=True)
class StudyArguments:
    """Run every run of a study file that is not finished. Options after -- go to every run."""

    file: Positional[str]
    """A YAML file in wandb's sweep format (method: grid), or with a list `runs` of option sets."""
    save_dir: str | None = None
    """Parent of the run folders (unset: as the file says)."""


@dataclass(frozen=True)
class ReportArguments:
    """Write report.md and report.html with the tables and plots of all runs below a folder, and print the tables."""

    folder: Positional[str]
    """A folder with run folders at any depth below it."""


# Options that may differ between a run and its continuation: they change where or how it runs, not what it computes.
VOLATILE = frozenset(
    "data_dir workers micro_batch_size device memory_format max_steps max_time dry_run log_every profile save_dir "
    "run_name save_every keep_checkpoints save_epochs resume tracker project group".split()
)


def flag(field: str) -> str:
    """`learning_rate` -> `--learning-rate`."""
    return "--" + field.replace("_", "-")
