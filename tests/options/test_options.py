import subprocess
import sys
from dataclasses import fields

import pytest

from cifar_accel.options.options import TrainingArguments
from cifar_accel.options.parsing import parse_training
from cifar_accel.options.recipes import RECIPES
from cifar_accel.options.values import parse_interval, parse_keywords

REPORT = dict(
    seed=3407,
    image_size=32,
    epochs=25,
    learning_rate=5e-4,
    weight_decay=1e-2,
    batch_size=256,
    checkpoint=None,
    save_epochs=-1,
    save_dir="checkpoint",
    optimizer="adamw",
    scheduler="cosine",
    model="nfnet",
    dataset="cifar100",
)


def test_the_defaults_are_the_reports():
    args, origin = parse_training([])
    assert {name: getattr(args, name) for name in REPORT} == REPORT
    assert (args.recipe, args.warmup_epochs, args.run_name) == (
        "report",
        5,
        "nfnet/adamw-cosine-s3407",
    )
    assert (args.aa, args.scale, args.vflip, args.mixup, args.mixup_prob) == (
        "rand-m15-n2",
        (0.08, 1.0),
        0.5,
        0.8,
        0.7,
    )
    assert (args.amsgrad, args.decay_all, args.crop_pct, args.smoothing) == (True, True, 0.875, 0.1)
    assert {origin[n] for n in ("aa", "mixup")} == {"recipe"}
    assert (origin["epochs"], origin["warmup_epochs"], origin["run_name"]) == (
        "default",
        "derived",
        "derived",
    )


def test_every_option_is_documented():
    shown = subprocess.run(
        [sys.executable, "-m", "cifar_accel", "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0
    for field in fields(TrainingArguments):
        assert "--" + field.name.replace("_", "-") in shown.stdout, field.name


def test_parsing_imports_nothing_heavy():
    code = (
        "import sys; from cifar_accel.options.parsing import parse_training; parse_training(['--epochs', '3']);"
        "print([m for m in ('torch', 'timm', 'numpy', 'accelerate', 'wandb', 'matplotlib') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize(
    "words, name, value, origin",
    [
        (["--pretrained=False"], "pretrained", False, "flag"),
        (["--no-pretrained"], "pretrained", False, "flag"),
        (["--model-ema=true"], "model_ema", True, "flag"),
        (["--scale", "none"], "scale", None, "flag"),
        (["--scale=none"], "scale", None, "flag"),
        (["--crop-padding", "4"], "scale", None, "derived"),
        (["--recipe=plain", "--scale", "0.5", "1"], "crop_padding", 0, "derived"),
        (["--optimizer", "sgdm"], "amsgrad", False, "derived"),
        (["--scheduler", "linear_decay"], "warmup_epochs", 0, "derived"),
        (["--scheduler", "one_cycle", "--epochs", "10"], "warmup_epochs", 3, "derived"),
        (["--epochs", "3"], "warmup_epochs", 0.6, "derived"),
        (["--checkpoint", "x.pth"], "pretrained", False, "derived"),
        (["--mixup", "0"], "mixup_prob", 1.0, "derived"),
        (["--mixup", "none"], "mixup", 0, "flag"),
        (["--hflip=none"], "hflip", 0, "flag"),
        (["--mean", "0.5", "0.5", "0.5"], "mean", (0.5, 0.5, 0.5), "flag"),
        (
            ["--model-kwargs", "patch_size=4", "drop_rate=0.1"],
            "model_kwargs",
            ("patch_size=4", "drop_rate=0.1"),
            "flag",
        ),
    ],
)
def test_a_default_yields_to_what_the_user_says(words, name, value, origin):
    args, origins = parse_training(words)
    assert (getattr(args, name), origins[name]) == (value, origin)


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    args, _ = parse_training(["--dataset", "images", "--model", "local-dir:weights"])
    assert (args.dataset, args.model) == (
        str(tmp_path / "images"),
        f"local-dir:{tmp_path / 'weights'}",
    )
    assert args.run_name.startswith("weights/")


def test_recipes_name_options_that_exist():
    known = {f.name for f in fields(TrainingArguments)}
    assert all(set(recipe) <= known for recipe in RECIPES.values())


def test_intervals_and_keywords():
    assert [parse_interval(t) for t in ("1epoch", "500steps", "10m", "none")] == [
        (1, "epoch"),
        (500, "step"),
        (10, "minute"),
        (0, "never"),
    ]
    assert parse_keywords(["a=4", "b=0.5", "c=gelu", "d=(1, 2)"]) == {
        "a": 4,
        "b": 0.5,
        "c": "gelu",
        "d": (1, 2),
    }
