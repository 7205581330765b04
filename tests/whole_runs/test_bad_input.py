"""Bad input gets one line and exit code 2, and leaves nothing behind."""

import subprocess
import sys

import pytest
import torch
from conftest import (
    FRESH,
    TINY,
    TWO,
    contents,
    folder_with_a_cut_image,
    folder_with_an_empty_class,
    image_folder,
    parquet_folder,
    summary,
)
from safetensors.torch import save_file

from cifar_accel.cli import main, train_command

# Options that are refused before torch is loaded, and a part of the line that says so.
FLAGS = [
    (["--learnin-rate", "1"], "--learning-rate"),
    (["--epochs", "many"], "--epochs"),
    (["--pipeline", "tfdata"], "'device'"),
    (["--recipe", "reprot"], "did you mean report?"),
    (["--epochs", "0"], "--epochs 0: must be greater than 0"),
    (["--epochs", "-3"], "--epochs -3"),
    (["--batch-size", "0"], "--batch-size 0"),
    (["--learning-rate", "0"], "--learning-rate 0"),
    (["--learning-rate", "nan"], "--learning-rate nan"),
    (["--learning-rate", "-1"], "--learning-rate -1"),
    (["--image-size", "0"], "--image-size 0"),
    (["--image-size", "64:0.7,96:0.4,128"], "--image-size 64:0.7,96:0.4,128: sizes and shares"),
    (["--recipe", "finetune"], "--recipe finetune: needs weights to start from"),
    (["--budget", "30m"], "--budget has no effect without --recipe finetune"),
    (["--plan-of", "x"], "--plan-of has no effect without --budget"),
    (["--recipe", "finetune", "--pretrained", "--budget", "soon"], "--budget soon: write hours"),
    (
        "--recipe finetune --pretrained --budget 30m --max-time 1h".split(),
        "leave --max-time and --max-steps away",
    ),
    (
        "--recipe finetune --pretrained --budget 30m --image-size 64".split(),
        "--budget chooses --image-size, --epochs or both",
    ),
    (["--layer-decay", "0"], "--layer-decay 0: must be greater than 0"),
    (["--layer-decay", "1.1"], "--layer-decay 1.1: must be less than or equal to 1"),
    (["--warmup-epochs", "9"], "longer than the run (--epochs 4)"),
    (["--mixup-prob", "2"], "--mixup-prob 2: must be less than or equal to 1"),
    (["--hflip", "-0.5"], "--hflip -0.5: must be greater than or equal to 0"),
    (["--crop-pct", "0"], "--crop-pct 0: must be greater than 0"),
    (["--smoothing", "1"], "--smoothing 1: must be less than 1"),
    (["--workers", "-1", "--pipeline", "timm"], "--workers -1: must be greater than or equal to 0"),
    (["--mixup-prob", "0.5"], "has no effect without --mixup"),
    (["--amsgrad", "--optimizer", "sgdm"], "has no effect without --optimizer adamw"),
    (["--momentum", "0.5"], "has no effect"),
    (
        ["--color-jitter", "0.4", "--aa", "rand-m9", "--pipeline", "timm"],
        "has no effect without --aa none",
    ),
    (["--clip-mode", "agc"], "has no effect without --clip-grad"),
    (["--model-ema-decay", "0.9"], "has no effect without --model-ema"),
    (["--ratio", "0.5", "2"], "has no effect without --scale"),
    (["--workers", "2"], "has no effect without --pipeline timm"),
    (["--min-lr", "1e-5", "--scheduler", "constant"], "has no effect without --scheduler cosine"),
    (["--warmup-lr", "1e-4", "--warmup-epochs", "0"], "has no effect without a warm-up"),
    (["--scale", "2", "3"], "--scale 2: must be less than or equal to 1"),
    (["--scale", "0.5", "1", "--ratio", "0.5", "inf"], "--ratio"),
    (["--seed", "99999999999999999999999"], "--seed"),
    (["--save-every", "often"], "1epoch, 500steps or 10m"),
    (["--save-epochs", "0"], "--save-epochs 0"),
    (["--max-time", "2 hours"], "--max-time 2 hours: write hours, minutes or seconds"),
    (["--max-time", "0m"], "--max-time 0m"),
    (["--dry-run=perhaps"], "true or false"),
    (["--scale", "0.9", "0.1"], "--scale 0.9 0.1: must be an increasing pair"),
    (["--crop-padding", "4", "--scale", "0.1", "1"], "give one of them"),
    (["--std", "1", "1", "0"], "--std"),
    (["--model-kwargs", "patch"], "name=value"),
    (["--run-name", "../elsewhere"], "relative path"),
    (["--pretrained=perhaps"], "true or false"),
    (["--aa", "rand-m9-n2x"], "'n2x' is not one of"),
    (["--aa", "rand-m9-foo"], "'foo' is not one of"),
    (["--aa", "rand-m-5"], "'m' is not one of"),
    (["--aa", "rand-m9-m10"], "'m10' is given twice"),
    (["--aa", "rand-m9-n0"], "'n0' must be 1 or greater"),
    (["--aa", "rand-m9-p1.5"], "'p1.5' must be above 0 and at most 1"),
    (["--aa", "rand-mmax0"], "'mmax0' must be 1 or greater"),
    (["--aa", "rand-inc2"], "'inc2' must be 0 or 1"),
    (["--aa", "rand-n16-tweights"], "more than the 15 operations"),
    (["--aa", "augmix-m5", "--pipeline", "device"], "needs --pipeline timm"),
    (["--alternating-flip", "--hflip", "0"], "has no effect without --hflip 0.5"),
    (["--validation-fraction", "1"], "--validation-fraction 1: must be less than 1"),
    (["--resume", "nowhere"], "/nowhere: no such folder"),
    (["--lr", "0.1"], "here --lr is --learning-rate"),
    (["--mixed-precision", "bf16"], "precision is the launcher's"),
    (["--epochs", "1" + "0" * 400], "--epochs 1000"),
    (["--batch-size", "1" + "0" * 12], "--batch-size 1000"),
    (["--learning-rate", "inf"], "--learning-rate inf: must be a finite number"),
    (["--max-time", "9" * 400 + "h"], "--max-time 9"),
    (["--mean", "nan", "0", "0"], "--mean"),
    (["--std", "nan", "1", "1"], "--std"),
    (["--run-name", ""], "must be a relative path"),
    (["--run-name", "./."], "must be a relative path"),
    (["--run-name", "x" * 300], "File name too long"),
    (["--resume", "x" * 5000], "File name too long"),
    (["--save-dir", "~nobody-of-that-name/x"], "home directory"),
    (["--data-dir", "~nobody-of-that-name/x"], "home directory"),
    (["--model-kwargs", "x=" + "-" * 100_000 + "1"], "x"),
    (["--save-dir", "/dev/null"], "--save-dir /dev/null"),
    (["--save-dir", "/proc/x"], "--save-dir /proc/x"),
]

# Options that only the loaded libraries, or the data, show to be wrong.
LOADED = [
    (["--model", "nfnett"], "did you mean nfnet"),
    (["--model", "test_nfnet.r161_in1k"], "no weights 'r161_in1k'"),
    (["--model", "local-dir:nowhere"], "holds no config.json"),
    (
        ["--model", "test_vit", "--image-size", "30"],
        "--image-size 30: --model test_vit cannot take it",
    ),
    (
        ["--model", "mixer_s16_224", "--image-size", "32:0.5,64"],
        "--image-size 32:0.5,64: --model mixer_s16_224 takes one size only",
    ),
    (
        ["--model", "test_resnet", "--image-size", "32:0.95,64"],
        "a model with batch norm needs at least 10% of the steps at the last size",
    ),
    (["--model-kwargs", "colour=red"], "colour"),
    (["--dataset", "cifar1000"], "did you mean cifar100"),
    (["--dataset", "nowhere/at/all"], "no such folder"),
    (["--dataset", "x" * 300], "File name too long"),
    (["--optimizer", "sgmd"], "did you mean sgdm"),
    (["--scheduler", "cosin"], "did you mean cosine"),
    (["--batch-size", "300"], "larger than the training set"),
    (["--limit-train", "99999"], "there are only 1,438 images"),
    (["--checkpoint", "nowhere.pth"], "no such file"),
    (["--pipeline", "timm", "--aa", "rnd-m9"], "--aa rnd-m9: unknown; timm has rand-"),
    (["--pipeline", "timm", "--aa", "rand-m99-n99x"], "'n99x' is not one of"),
    (["--crop-padding", "12"], "--crop-padding 12: must be smaller than the images' side of 8"),
    (["--optimizer", "adahessian"], "second derivatives"),
    (["--model", "/tmp"], "did you mean local-dir:/tmp"),
    (["--device", "cuda"], "--device cuda"),
    (["--validation-fraction", "0.001"], "leaves"),
]

# What a launcher or a shell may have left in the environment.
ENVIRONMENT = [
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed precision fp8: unknown here"),
    ({"ACCELERATE_MIXED_PRECISION": "fp16", "CUDA_VISIBLE_DEVICES": ""}, "needs a GPU"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "0"}, "gradient_accumulation_steps 0"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "-2"}, "gradient_accumulation_steps -2"),
]

# Words of the other commands.
COMMANDS = [
    (["evalute", "x"], "did you mean evaluate"),
    (["evaluate", "nowhere"], "nowhere: no such folder"),
    (["predict", "nowhere", "a.png"], "nowhere: no such folder"),
    (["export", "nowhere", "--out", "out"], "nowhere: no such folder"),
    (["evaluate", "nowhere", "--batch-size", "0"], "--batch-size 0: must be greater than 0"),
    (["report", "nowhere"], "no such folder"),
    (["compare", "nowhere"], "no such folder"),
    (["report", "."], "no run folder"),
    (["study", "nowhere.yaml"], "No such file"),
    (["study"], "file"),
]

# Folders that are no data set.
DATA = [
    (lambda path: image_folder(path, splits=("train",)), "has no test images"),
    (folder_with_an_empty_class, "class folder holds no image"),
    (folder_with_a_cut_image, "1.png is not a whole image"),
    (lambda path: parquet_folder(path, columns=("img", "text")), "no label column"),
    (lambda path: parquet_folder(path, columns=("text", "label")), "no image column"),
    (lambda path: path.mkdir() or path, "neither *.parquet files nor a train/ folder"),
]

# A hub at an address where nobody listens.
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}


def is_one_line(err: str) -> bool:
    """Whether a complaint is one line of ours."""
    return err.startswith("cifar_accel: ") and err.count("\n") == 1 and err.endswith("\n")


def words_as_id(value):
    return " ".join(value)[:40] if isinstance(value, list) else ""


# ---- options and environment


@pytest.mark.parametrize("options, message", FLAGS + LOADED, ids=words_as_id)
def test_one_line_and_exit_2(in_process, words, tmp_path, options, message):
    if options[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has what the case lacks")
    code, _, err = in_process(train_command, *words("--tracker", "none", *options))
    assert code == 2
    assert message in err
    assert is_one_line(err), err
    assert not (tmp_path / "ck").exists(), "nothing is left behind"


def test_flags_are_checked_in_a_fresh_process():
    command = [sys.executable, "-m", "cifar_accel", "--modle", "vit"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean --model?" in done.stderr
    assert is_one_line(done.stderr), done.stderr


@pytest.mark.parametrize(
    "command, words",
    [
        ("train", "--dataset digits --model test_vit --no-pretrained"),
        ("train", "--dataset digits --model test_vit --no-pretrained --dry-run"),
        ("evaluate", "folder"),
        ("predict", "folder image.png"),
        ("export", "folder --out other"),
    ],
)
def test_what_openmp_reads_is_set_before_torch_is_loaded(command, words, tmp_path):
    code = f"""
import os, sys
from importlib.abc import MetaPathFinder
class Ending(MetaPathFinder):
    def find_spec(self, name, *rest):
        if name == "torch":
            sys.exit(os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Ending())
from cifar_accel.cli import main
main({[command, *words.split()]!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr.strip() == "10000"


def test_a_complaint_is_one_line_where_the_terminal_has_no_box_characters():
    code = (
        "import sys; from cifar_accel.cli import train_command; "
        "sys.stdout.reconfigure(encoding='ascii'); train_command(['--epochs', 'many'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Error parsing --epochs: invalid literal" in done.stderr
    assert "----" not in done.stderr
    assert is_one_line(done.stderr), done.stderr


@pytest.mark.parametrize("environment, message", ENVIRONMENT, ids=str)
def test_a_bad_environment_is_one_line(trainer, environment, message):
    refused = trainer("--tracker", "none", env=environment, check=2)
    assert message in refused.stderr
    assert is_one_line(refused.stderr), refused.stderr
    assert refused.run is None


def test_half_an_environment_of_a_launcher(trainer):
    """WORLD_SIZE without the rest must not train as several main processes."""
    refused = trainer(env={"WORLD_SIZE": "2"}, check=2)
    assert "MASTER_ADDR" in refused.stderr
    assert is_one_line(refused.stderr), refused.stderr


def test_a_batch_that_two_processes_cannot_share(trainer):
    refused = trainer("--batch-size", "31", launcher=TWO, check=1)
    message = "--batch-size 31: cannot be divided by 2 processes; 30 or 32 can"
    assert message in refused.stderr


@pytest.mark.parametrize("options, message", COMMANDS, ids=words_as_id)
def test_the_other_commands(in_process, options, message):
    code, _, err = in_process(main, *options)
    assert code == 2
    assert message in err
    assert is_one_line(err), err


def test_the_line_and_the_traceback_behind_it(in_process, words, monkeypatch):
    monkeypatch.setenv("CIFAR_ACCEL_DEBUG", "1")
    code, _, err = in_process(train_command, *words("--epochs", "0"))
    assert code == 2
    assert err.startswith("Traceback") and "check_bounds" in err
    assert err.endswith("\ncifar_accel: --epochs 0: must be greater than 0\n")


def test_a_bug_is_no_bad_input(in_process, words, monkeypatch):
    """What no line explains comes with its traceback, as Python prints it for a lost exception."""

    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr("cifar_accel.cli.open_run", broken)
    with pytest.raises(ValueError, match="a bug"):
        in_process(train_command, *words())


# ---- data, weights and networks


@pytest.mark.parametrize("make, message", DATA)
def test_bad_data(in_process, words, tmp_path, make, message):
    folder = make(tmp_path / "data")
    code, _, err = in_process(train_command, *words("--dataset", folder, "--limit-train", 0))
    assert code == 2
    assert message in err
    assert is_one_line(err), err
    assert not (tmp_path / "ck").exists()


def test_weights_of_another_model(in_process, words, tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"weight": torch.zeros(2)}, file)
    code, _, err = in_process(train_command, *words("--checkpoint", file))
    assert code == 2
    assert "does not fit --model" in err
    assert is_one_line(err), err


@pytest.mark.parametrize("model", ["nfnet", "vit"])
def test_no_network_for_the_weights(trainer, tmp_path, model):
    """Up to the network and no further."""
    environment = NO_HUB | {"HF_HOME": str(tmp_path / "hf")}
    own_model = ("--no-pretrained", "--model", "test_nfnet")
    base = [word for word in TINY if word not in own_model]
    refused = trainer(
        "--model", model, base=base, env=environment, launcher=FRESH, check=2, timeout=60
    )
    assert "downloading the weights timm/" in refused.stdout
    assert "cannot be reached" in refused.stderr
    assert "--no-pretrained" in refused.stderr
    assert is_one_line(refused.stderr), refused.stderr
    assert refused.run is None


def test_no_network_for_a_hub_data_set(trainer, tmp_path):
    environment = NO_HUB | {"HF_HOME": str(tmp_path / "hf")}
    options = ("--dataset", "uoft-cs/cifar100", "--data-dir", str(tmp_path / "d"))
    refused = trainer(*options, env=environment, launcher=FRESH, check=2, timeout=60)
    assert "cannot be reached" in refused.stderr
    assert is_one_line(refused.stderr), refused.stderr


# ---- run folders


def test_a_folder_that_cannot_be_written(tmp_path, trainer):
    folder = tmp_path / "ck"
    folder.write_text("a file")
    refused = trainer(check=2)
    assert "is a file" in refused.stderr
    assert folder.read_text() == "a file"


def test_a_run_of_another_configuration(trainer):
    same = ("--max-steps", "2", "--tracker", "none", "--run-name", "a")
    trainer(*same)
    refused = trainer(*same, "--learning-rate", "1e-3", "--mixup", "0.1", check=2)
    assert "(--mixup 0.0 -> 0.1; --learning-rate 0.003 -> 0.001)" in refused.stderr
    assert is_one_line(refused.stderr), refused.stderr


def test_a_run_is_never_overwritten_by_the_continuation_of_another(trainer):
    quiet = ("--tracker", "none")
    source = trainer(*quiet, "--run-name", "step-source", "--max-steps", "8").run
    victim = trainer(*quiet, "--run-name", "victim", "--max-steps", "9", "--seed", "7").run
    before = contents(victim)
    refused = trainer(*quiet, "--run-name", "victim", "--resume", str(source), check=2)
    assert "holds another run already" in refused.stderr
    assert contents(victim) == before
    # A run may be called step-something, as checkpoints are, and is still a run.
    again = trainer(*quiet, "--run-name", "step-source", "--max-steps", "9")
    assert "after step 8" in again.stdout


def test_a_run_that_ended_before_its_first_line_blocks_nothing(trainer):
    same = ("--run-name", "a", "--tracker", "none")
    first = trainer(*same, "--learning-rate", "1e30", "--warmup-epochs", "0", check=1)
    assert not (first.run / "metrics.jsonl").exists()
    second = trainer(*same, "--max-steps", "2")
    assert summary(second.run)["status"] == "finished"


def test_an_unfinished_run_cannot_be_evaluated(trainer, in_process):
    done = trainer("--learning-rate", "1e30", "--tracker", "none", check=1)
    assert summary(done.run)["status"] == "failed"
    code, _, err = in_process(main, "evaluate", done.run)
    assert code == 2
    assert "the run is not finished" in err
