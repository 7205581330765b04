"""Where each tensor lies, its dtype, and where the host waits, on a GPU that is not there."""

from dataclasses import replace
from types import SimpleNamespace

import fake_cuda
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from cifar_accel import run as run_module
from cifar_accel import train
from cifar_accel.data.decode import load_dataset
from cifar_accel.errors import BadInput
from cifar_accel.machine.processes import join_processes
from cifar_accel.machine.signals import StopRequest
from cifar_accel.options.recipes import recipe_defaults
from cifar_accel.records.folder import Opened

# Rows after steps 2 and 4, and an evaluation after the last.
STEPS, LOG_EVERY = 4, 2
# The host asks for what was summed and watched before the first step and at each row, for the
# figures of the evaluation, and, since that is the last, for the likeliest classes and the logits.
WAITS = {
    ("numbers", "train.collect"): 3,
    ("numbers", "evaluate.evaluate"): 1,
    ("download", "evaluate.of_all_ranks"): 2,
}

CASES = {
    # The two policies, and the larger size, at which a chunk of images is less than a step.
    "nfnet": {"recipe": "report", "model": "test_nfnet"},
    "nfnet at 224 px": {"recipe": "report", "model": "test_nfnet", "image_size": 224},
    "vit at 224 px": {"recipe": "report", "image_size": 224, "interpolation": "bicubic"},
    "convnext": {"model": "test_convnext", "image_size": 224, "reprob": 0.3, "color_jitter": 0.4},
    "resnet": {"model": "test_resnet", "bce_loss": True},
    # What changes the step.
    "mixup and cutmix": {"mixup": 0.5, "cutmix": 1.0, "mixup_prob": 1.0},
    "average": {"model": "test_resnet", "model_ema": True},
    "clipping and accumulation": {"clip_grad": 1.0, "accumulation": 2},
    "clipping by value": {"clip_grad": 1.0, "clip_mode": "value"},
    "adaptive clipping": {"model": "test_nfnet", "clip_grad": 0.1, "clip_mode": "agc"},
    "held-out images": {"validation_fraction": 0.1},
}
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# adamw is every other test's.
OPTIMIZERS = "sgdm sgd muon lamb lion".split()


def same(run):
    """No change of a run."""
    return run


@pytest.fixture
def drive(cache, monkeypatch, tmp_path):
    """Train `STEPS` steps of a run, and evaluate; gives what was watched."""
    data = load_dataset("digits", cache, 32, str)
    # Models are made on the CPU; data is there already.
    build_model = fake_cuda.really(run_module.build_model)
    monkeypatch.setattr(run_module, "build_model", build_model)
    monkeypatch.setattr(run_module, "forward_flops", lambda model, image_size: 1)
    splits = lambda args: run_module.cut_splits(args, data, 8)  # noqa: E731
    monkeypatch.setattr(run_module, "load_splits", splits)

    def forget():
        # Accelerate's states outlive an Accelerator.
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    def driven(recipe="plain", precision="no", accumulation=1, change=same, room=2**40, **options):
        few = {"max_steps": STEPS, "log_every": LOG_EVERY, "limit_test": 48}
        small = {"model": "test_vit", "batch_size": 16, "image_size": 32, "pretrained": False}
        rest = {"dataset": "digits", "device": "cuda", "save_every": "none", "warmup_epochs": 0.0}
        args = replace(recipe_defaults(recipe), **few | small | rest | options)
        origin = dict.fromkeys(vars(args), "")
        forget()
        with fake_cuda.pretended() as watch:
            watch.room = room
            ranks = join_processes("cuda", precision)
            ranks.accumulation = accumulation
            run, state = run_module.set_up(
                args, origin, Opened(path=tmp_path), ranks, StopRequest()
            )
            fake_cuda.give_gradients(run.watch.parameters, monkeypatch)
            # The host reads how many images were evaluated. Elsewhere 0 says that all is well.
            evaluate = watch.reading(len(run.data.evaluation.split), train.evaluate)
            monkeypatch.setattr(train, "evaluate", evaluate)
            # Setting up waits for uploads, rightly.
            watch.waits.clear()
            train.fit(change(run), state, SimpleNamespace(step=lambda: None, row=lambda row: None))
        return watch

    yield driven
    # The tests that follow in this process are on another device.
    forget()


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_at_rows_alone(drive, case):
    assert drive(**CASES[case]).waits == WAITS


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", ["test_nfnet", "test_vit"])
def test_the_model_computes_in_the_precision(drive, model, precision):
    watch = drive(model=model, precision=precision)
    assert watch.waits == WAITS
    assert set(watch.products) == {PRECISIONS[precision]}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_waits(drive, optimizer):
    assert drive(optimizer=optimizer).waits == WAITS


def test_in_fp16_an_optimizer_that_is_not_fused_waits_once_a_step(drive):
    """Of torch's gradient scaler, for whether to take the step."""
    in_steps = {("number", "step.take_step"): STEPS}
    assert drive(optimizer="lamb", precision="fp16").waits == WAITS | in_steps


def test_images_that_the_device_has_no_room_for(drive):
    with pytest.raises(BadInput, match="no room on cuda for .* MiB of images; --pipeline timm"):
        drive(room=2**10)


# ---- that the tests above can fail


def with_criterion(compute):
    """A change of a run: its loss is `compute` of logits and targets."""
    return lambda run: replace(run, criterion=compute)


def test_a_number_that_is_read_is_seen(drive):
    watch = drive(change=with_criterion(lambda logits, targets: logits.sum() * logits.max().item()))
    assert watch.waits == WAITS | {("number", "step.take_step"): STEPS}


def test_an_upload_that_blocks_is_seen(drive):
    change = with_criterion(lambda logits, targets: (logits * torch.ones(10).to("cuda")).sum())
    watch = drive(change=change)
    assert watch.waits == WAITS | {("upload", "step.take_step"): STEPS}


def test_a_download_is_seen(drive):
    watch = drive(change=with_criterion(lambda logits, targets: logits.cpu().sum()))
    assert watch.waits["download", "step.take_step"] == STEPS


def test_a_tensor_that_stayed_on_the_host_is_seen(drive):
    change = with_criterion(lambda logits, targets: (logits * torch.ones(10)).sum())
    with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        drive(change=change)


def test_a_size_that_only_the_device_knows_is_seen(drive):
    with pytest.raises(DynamicOutputShapeException):
        drive(change=with_criterion(lambda logits, targets: logits[targets > 0].sum()))


def test_a_product_in_another_precision_is_seen(drive, monkeypatch):
    # Accelerate's mixed precision, forgotten.
    monkeypatch.setattr(torch, "autocast", lambda *words, **more: torch.no_grad())
    assert torch.float32 in drive(precision="bf16").products
