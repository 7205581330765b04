"""Options: defaults, where values come from, what one means for another, and their page."""

import io
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from cifar_accel.errors import BadInput
from cifar_accel.options.options import VOLATILE, TrainingArguments, flag
from cifar_accel.options.parsing import parse_training
from cifar_accel.options.recipes import RECIPES
from cifar_accel.options.resolve import NEEDS
from cifar_accel.options.values import parse_duration, parse_interval, parse_keywords, parse_sizes
from tools.options_page import PAGE, page, sections_of

FIELDS = [field.name for field in fields(TrainingArguments)]

# The setting of the course report, by option.
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
    recipe="report",
    warmup_epochs=5,
    run_name="nfnet/adamw-cosine-s3407",
    aa="rand-m15-n2",
    scale=(0.08, 1.0),
    vflip=0.5,
    mixup=0.8,
    mixup_prob=0.7,
    amsgrad=True,
    decay_all=True,
    crop_pct=0.875,
    smoothing=0.1,
)


def python(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True)


def test_the_defaults_are_the_reports():
    args, origin = parse_training([])
    assert {name: getattr(args, name) for name in REPORT} == REPORT
    assert (origin["aa"], origin["mixup"]) == ("recipe", "recipe")
    assert origin["epochs"] == "default"
    assert (origin["warmup_epochs"], origin["run_name"]) == ("derived", "derived")


def test_every_option_is_documented():
    shown = python("-m", "cifar_accel", "--help")
    assert shown.returncode == 0
    for name in FIELDS:
        assert flag(name) in shown.stdout, name
    # The bounds of a type are no matter of the help text.
    assert "Annotated" not in shown.stdout and "FieldInfo" not in shown.stdout


@pytest.mark.parametrize(
    "words",
    [["--epochs", "3"], ["--epochs", "0"], ["--learnin-rate", "1"], ["--help"]],
    ids=lambda words: words[0],
)
def test_parsing_imports_nothing_heavy(words):
    heavy = ("torch", "timm", "numpy", "accelerate", "wandb", "matplotlib")
    code = (
        "import contextlib, sys\n"
        "import cifar_accel.cli\n"
        "with contextlib.suppress(SystemExit, cifar_accel.cli.BadInput):\n"
        f"    cifar_accel.cli.parse_training({words})\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "words, name, value, origin",
    [
        (["--pretrained=False"], "pretrained", False, "flag"),
        (["--no-pretrained"], "pretrained", False, "flag"),
        (["--model-ema=true"], "model_ema", True, "flag"),
        (["--model_ema=TRUE"], "model_ema", True, "flag"),
        (["--scale", "none"], "scale", None, "flag"),
        (["--scale=none"], "scale", None, "flag"),
        (["--crop-padding", "4"], "scale", None, "derived"),
        (["--recipe=plain", "--scale", "0.5", "1"], "crop_padding", 0, "derived"),
        (["--recipe", "digits", "--recipe=plain"], "crop_padding", 4, "recipe"),
        (["--optimizer", "sgdm"], "amsgrad", False, "derived"),
        (["--scheduler", "linear_decay"], "warmup_epochs", 0, "derived"),
        (["--scheduler", "one_cycle", "--epochs", "10"], "warmup_epochs", 3, "derived"),
        (["--epochs", "3"], "warmup_epochs", 0.6, "derived"),
        (["--checkpoint", "x.pth"], "pretrained", False, "derived"),
        (["--mixup", "0"], "mixup_prob", 1.0, "derived"),
        (["--mixup", "none"], "mixup", 0, "flag"),
        (["--hflip=none"], "hflip", 0, "flag"),
        (["--workers", "none", "--pipeline", "timm"], "workers", None, "flag"),
        (["--aa", "none"], "aa", "none", "flag"),
        (["--aa", "augmix-m5"], "pipeline", "timm", "derived"),
        (["--aa", "rand-m9-t3a"], "pipeline", "timm", "derived"),
        (["--mean", "0.5", "0.5", "0.5"], "mean", (0.5, 0.5, 0.5), "flag"),
        (["--model-kwargs", "a=4", "b=0.1"], "model_kwargs", ("a=4", "b=0.1"), "flag"),
    ],
)
def test_a_default_yields_to_what_the_user_says(words, name, value, origin):
    args, origins = parse_training(words)
    assert (getattr(args, name), origins[name]) == (value, origin)


def test_names_in_another_case_are_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--model NFNet --optimizer SGDM --scheduler=Cosine --dataset CIFAR10 --recipe Plain"
    words += " --device CPU --tracker=None --interpolation Bicubic"
    args, origin = parse_training(words.split())
    assert (args, origin) == parse_training(words.lower().split())
    assert (args.model, args.dataset, args.run_name) == (
        "nfnet",
        "cifar10",
        "nfnet/sgdm-cosine-s3407",
    )


def test_the_case_of_folders_and_hub_ids_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_training(["--dataset", "Me/Images"])[0].dataset == "Me/Images"
    assert parse_training(["--dataset", "Birds"])[0].dataset == "Birds"
    (tmp_path / "CIFAR10").mkdir()
    args, _ = parse_training(["--dataset", "CIFAR10", "--model", "local-dir:Mine"])
    assert args.dataset == str(tmp_path / "CIFAR10")
    assert args.model == f"local-dir:{tmp_path / 'Mine'}"


def test_a_folder_called_as_a_data_set_of_our_own(tmp_path, monkeypatch):
    """A clone of that name in the current directory is not what the default means."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar100").mkdir()
    assert parse_training([])[0].dataset == "cifar100"
    assert parse_training(["--dataset", "cifar100"])[0].dataset == "cifar100"
    assert parse_training(["--dataset", "./cifar100"])[0].dataset == str(tmp_path / "cifar100")


@pytest.mark.parametrize(
    "words, hint",
    [
        ("--optim sgd", "did you mean --optimizer?"),
        ("--lr-scheduler cosine", "did you mean --scheduler?"),
        ("--epoch 3", "did you mean --epochs, --save-epochs?"),
        ("--output-dir x", "here --output-dir is --save-dir"),
        ("--wandb", "here --wandb is --tracker wandb"),
        ("--freeze 3", "here --freeze is missing: every weight is trained"),
        ("--foo", "--help lists all options)"),
        ("--scale 1", "Error parsing --scale"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_usage_error_has_two_lines_of_a_screen(in_process, monkeypatch, words, hint, encoding):
    # tyro draws its boxes for the encoding of stdout.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    code, _, err = in_process(parse_training, *words.split())
    assert code == 2
    assert hint in err
    assert len(err) <= 200 and err.count("\n") == 1


@pytest.mark.parametrize("name", ["a\nb", "a\n--recipe=plain", "\x1b[31m", "a\x9b", "a\tb", "\x7f"])
def test_a_run_name_has_no_control_characters(name):
    with pytest.raises(BadInput, match="holds a control character"):
        parse_training(["--run-name", name])
    assert parse_training(["--run-name", "é ü"])[0].run_name == "é ü"


@pytest.mark.parametrize("option", ["--run-name", "--save-dir", "--dataset"])
def test_what_is_not_utf_8_is_refused_for_no_config_could_say_it(option):
    with pytest.raises(BadInput, match="is not UTF-8"):
        parse_training([option, "a\udcff"])


@pytest.mark.parametrize("value", ["0.5", "1"])
def test_a_bound_that_is_allowed_is_allowed(value):
    args, _ = parse_training(["--mixup-prob", value, "--crop-pct", value, "--seed", str(2**63 - 1)])
    assert (args.mixup_prob, args.crop_pct, args.seed) == (float(value), float(value), 2**63 - 1)


def test_of_several_bad_values_the_first_option_is_named():
    with pytest.raises(BadInput, match="^--image-size -2: must be greater than 0$"):
        parse_training(["--batch-size", "0", "--hflip", "9", "--image-size", "-2"])


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    args, _ = parse_training(["--dataset", "images", "--model", "local-dir:weights"])
    assert args.dataset == str(tmp_path / "images")
    assert args.model == f"local-dir:{tmp_path / 'weights'}"
    assert args.run_name.startswith("weights/")


def test_recipes_and_needs_name_options_that_exist():
    for names in (*RECIPES.values(), NEEDS):
        assert set(names) <= set(FIELDS)


def test_what_is_computed_is_not_volatile():
    assert {"max_steps", "workers", "save_dir", "resume", "dry_run", "group"} <= VOLATILE
    assert not VOLATILE & {"seed", "epochs", "batch_size", "dataset", "compile", "mixup", "recipe"}
    assert set(FIELDS) > VOLATILE


def test_intervals():
    assert parse_interval("1epoch") == (1, "epoch")
    assert parse_interval("500steps") == (500, "step")
    assert parse_interval("10m") == (10, "minute")
    assert parse_interval("none") == (0, "never")


def test_durations():
    assert parse_duration("45s") == 45
    assert parse_duration("90m") == 5400
    assert parse_duration("1h30m") == 5400


@pytest.mark.parametrize(
    "words, rate, origin",
    [
        ("--recipe plain --optimizer sgdm", 0.02, "derived"),
        ("--recipe plain --optimizer lion", 1e-4, "derived"),
        ("--recipe finetune --optimizer sgdm", 0.04, "derived"),
        ("--recipe digits --optimizer muon", 5e-4, "derived"),
        ("--recipe plain --optimizer sgdm --learning-rate 5e-4", 5e-4, "flag"),
        ("--recipe plain", 5e-4, "default"),
        # The report trained by SGD at the rate of AdamW.
        ("--recipe report --optimizer sgdm", 5e-4, "default"),
    ],
)
def test_a_rate_that_nobody_gave_follows_the_optimizer(words, rate, origin):
    args, origins = parse_training(words.split())
    assert args.learning_rate == rate
    assert origins["learning_rate"] == origin


def test_sizes():
    assert parse_sizes(96) == parse_sizes("96") == ((96, 1.0),)
    assert parse_sizes("64:0.4,96:.7,128") == ((64, 0.4), (96, 0.7), (128, 1.0))
    args = replace(TrainingArguments(), image_size="64:0.4,96:.7,128")
    assert args.input_size == 128
    # One size stays a number in config.json, as every version had it.
    assert parse_training(["--image-size", "96"])[0].image_size == 96


@pytest.mark.parametrize(
    "text",
    ["x", "64:0.4", "64:0.4,64", "96:0.4,64", "64:0.4,96:0.3,128", "64:0,96", "64:1,96"],
)
def test_sizes_that_do_not_add_up_are_refused(text):
    with pytest.raises(BadInput, match=f"--image-size {text}: .*64:0.4,96:0.7,128"):
        parse_training(["--image-size", text])


def test_keywords():
    words = ["a=4", "b=0.5", "c=gelu", "d=(1, 2)", "e=x=y"]
    assert parse_keywords(words) == {"a": 4, "b": 0.5, "c": "gelu", "d": (1, 2), "e": "x=y"}


def test_the_page_of_the_options_is_up_to_date():
    """When this fails: `python -m tools.options_page`."""
    assert PAGE.read_text() == page()


def test_the_page_has_every_option_once():
    in_sections = [name for section in sections_of(TrainingArguments) for name in section.options]
    assert in_sections == FIELDS
    text = page()
    for name in FIELDS:
        rows = text.count(f"\n| `{flag(name)}`")
        assert rows == (2 if name in NEEDS else 1), name
