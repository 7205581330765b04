"""Bad input gets one line and exit code 2, and leaves nothing behind."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import FRESH, TINY, contents, summary
from safetensors.torch import save_file
from test_sources import _cut, _empty_class, image_folder, parquet_folder

from cifar_accel.cli import main, train_command

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
    (["--warmup-epochs", "9"], "longer than the run (--epochs 4)"),
    (["--mixup-prob", "2"], "--mixup-prob 2: must be less than or equal to 1"),
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
    (["--scale", "2", "3"], "increasing pair above 0 and at most 1"),
    (["--scale", "0.5", "1", "--ratio", "0.5", "inf"], "--ratio"),
    (["--seed", "99999999999999999999999"], "--seed"),
    (["--save-every", "often"], "1epoch, 500steps or 10m"),
    (["--save-epochs", "0"], "--save-epochs 0"),
    (["--max-time", "2 hours"], "--max-time 2 hours: write hours, minutes or seconds"),
    (["--max-time", "0m"], "--max-time 0m"),
    (["--dry-run=perhaps"], "true or false"),
    (["--scale", "0.9", "0.1"], "increasing pair"),
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
    (["--validation-fraction", "1"], "--validation-fraction 1"),
    (["--resume", "nowhere"], "/nowhere: no such folder"),
    (["--lr", "0.1"], "here --lr is --learning-rate"),
    (["--mixed-precision", "bf16"], "precision is the launcher's"),
    (["--epochs", "1" + "0" * 400], "--epochs 1000"),
    (["--batch-size", "1" + "0" * 12], "--batch-size 1000"),
    (["--learning-rate", "inf"], "--learning-rate inf"),
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
LOADED = [
    (["--model", "nfnett"], "did you mean nfnet"),
    (["--model", "test_nfnet.r161_in1k"], "no weights 'r161_in1k'"),
    (["--model", "local-dir:nowhere"], "holds no config.json"),
    (
        ["--model", "test_vit", "--image-size", "30"],
        "--image-size 30: --model test_vit cannot take it",
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


@pytest.mark.parametrize("about, message", ENVIRONMENT)
def test_a_bad_environment_is_one_line(trainer, about, message):
    refused = trainer("--tracker", "none", env=about, check=2)
    assert message in refused.stderr and refused.stderr.count("\n") == 1 and refused.run is None


@pytest.mark.parametrize(
    "words, message", FLAGS + LOADED, ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else ""
)
def test_one_line_and_exit_2(in_process, tmp_path, cache, words, message):
    if words[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has what the case lacks")
    base = [*TINY, "--data-dir", cache, "--save-dir", str(tmp_path / "ck"), "--tracker", "none"]
    code, _, err = in_process(train_command, *base, *words)
    assert code == 2 and message in err
    assert err.count("\n") == 1 and err.startswith("cifar_accel: ") and "Traceback" not in err
    assert not (tmp_path / "ck").exists(), "nothing is left behind"


def test_flags_are_checked_in_a_fresh_process():
    done = subprocess.run(
        [sys.executable, "-m", "cifar_accel", "--modle", "vit"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Perhaps you meant: --model" in done.stderr


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: image_folder(p, splits=("train",)), "no test/"),
        (_empty_class, "class folder holds no image"),
        (_cut, "1.png is not a whole image"),
        (lambda p: parquet_folder(p, columns=("img", "text")), "no label column"),
        (lambda p: parquet_folder(p, columns=("text", "label")), "no image column"),
        (lambda p: p.mkdir() or p, "neither *.parquet files nor a train/ folder"),
    ],
)
def test_bad_data(in_process, tmp_path, cache, make, message):
    base = [
        *TINY,
        "--data-dir",
        cache,
        "--save-dir",
        str(tmp_path / "ck"),
        "--dataset",
        str(make(tmp_path / "data")),
    ]
    code, _, err = in_process(train_command, *base)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "ck").exists()


def test_weights_of_another_model(in_process, tmp_path, cache):
    save_file({"weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    base = [
        *TINY,
        "--data-dir",
        cache,
        "--save-dir",
        str(tmp_path / "ck"),
        "--checkpoint",
        str(tmp_path / "w.safetensors"),
    ]
    code, _, err = in_process(train_command, *base)
    assert code == 2 and "does not fit --model" in err and err.count("\n") == 1


def test_a_run_of_another_configuration(trainer):
    trainer("--max-steps", "2", "--tracker", "none", "--run-name", "a")
    refused = trainer(
        "--max-steps", "2", "--run-name", "a", "--learning-rate", "1e-3", "--mixup", "0.1", check=2
    )
    assert "(--mixup 0.0 -> 0.1; --learning-rate 0.003 -> 0.001)" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_run_is_never_overwritten_by_the_continuation_of_another(trainer):
    source = trainer("--max-steps", "8", "--tracker", "none", "--run-name", "step-source").run
    victim = trainer(
        "--max-steps", "9", "--tracker", "none", "--run-name", "victim", "--seed", "7"
    ).run
    before = contents(victim)
    refused = trainer("--run-name", "victim", "--resume", str(source), "--tracker", "none", check=2)
    assert "holds another run already" in refused.stderr
    assert contents(victim) == before
    # A run may be called step-something and is still a run
    again = trainer("--max-steps", "9", "--tracker", "none", "--run-name", "step-source")
    assert "after step 8" in again.stdout


def test_a_run_that_ended_before_its_first_line_blocks_nothing(trainer, tmp_path):
    first = trainer(
        "--learning-rate",
        "1e30",
        "--warmup-epochs",
        "0",
        "--run-name",
        "a",
        "--tracker",
        "none",
        check=1,
    )
    assert not (first.run / "metrics.jsonl").exists()
    assert (
        summary(trainer("--max-steps", "2", "--run-name", "a", "--tracker", "none").run)["status"]
        == "finished"
    )


def test_a_folder_that_cannot_be_written(tmp_path, trainer):
    folder = tmp_path / "ck"
    folder.write_text("a file")
    refused = trainer(check=2)
    assert "is a file" in refused.stderr and folder.read_text() == "a file"


def test_a_batch_that_two_processes_cannot_share(trainer):
    two = (
        str(os.path.dirname(sys.executable)) + "/torchrun",
        "--standalone",
        "--nproc_per_node",
        "2",
    )
    refused = trainer("--batch-size", "31", launcher=two, check=1)
    assert "--batch-size 31: cannot be divided by 2 processes; 30 or 32 can" in refused.stderr


def test_half_an_environment_of_a_launcher(trainer):
    """WORLD_SIZE without the rest of what a launcher sets must not train as several main processes."""
    refused = trainer(env={"WORLD_SIZE": "2"}, check=2)
    assert "MASTER_ADDR" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.parametrize("model", ["nfnet", "vit"])
def test_no_network_for_the_weights(trainer, tmp_path, model):
    """Up to the network and no further: the hub's address is one where nobody listens."""
    nowhere = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
    }
    base = [w for w in TINY if w not in ("--no-pretrained", "--model", "test_nfnet")]
    refused = trainer("--model", model, base=base, env=nowhere, launcher=FRESH, check=2, timeout=60)
    assert "downloading the weights timm/" in refused.stdout
    assert "cannot be reached" in refused.stderr and "--no-pretrained" in refused.stderr
    assert refused.stderr.count("\n") == 1 and refused.run is None


def test_no_network_for_a_hub_data_set(trainer, tmp_path):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    words = ("--dataset", "uoft-cs/cifar100", "--data-dir", str(tmp_path / "d"))
    refused = trainer(*words, env=nowhere, launcher=FRESH, check=2, timeout=60)
    assert "cannot be reached" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["evalute", "x"], "did you mean evaluate"),
        (["evaluate", "nowhere"], "is no run folder"),
        (["report", "nowhere"], "no such folder"),
        (["report", "."], "no run folder"),
        (["study", "nowhere.yaml"], "No such file"),
    ],
)
def test_the_other_commands(in_process, words, message):
    code, _, err = in_process(main, *words)
    assert code == 2 and message in err and err.count("\n") == 1


def test_an_unfinished_run_cannot_be_evaluated(trainer, in_process):
    done = trainer("--learning-rate", "1e30", "--tracker", "none", check=1)
    assert summary(done.run)["status"] == "failed"
    code, _, err = in_process(main, "evaluate", done.run)
    assert code == 2 and "has no model/ yet" in err
