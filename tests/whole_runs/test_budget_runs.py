"""--budget: a plan that fits the time, kept by every later start."""

import re
import time
from dataclasses import fields, replace

import pytest
from conftest import TWO, rows, sha256, summary

from cifar_accel import timing
from cifar_accel.budget import LAST_SIZES, Fitted, growing_to, one_size
from cifar_accel.errors import DoesNotFit
from cifar_accel.files import read_json
from cifar_accel.machine.processes import join_processes
from cifar_accel.machine.signals import StopRequest
from cifar_accel.machine.speed import peak_memory_mib
from cifar_accel.models.finetune import fit_to_model
from cifar_accel.options.recipes import recipe_defaults
from cifar_accel.options.values import parse_sizes
from cifar_accel.records.folder import Opened
from cifar_accel.run import load_splits
from cifar_accel.timing import Start, fit_to_budget, what_fits, what_to_try, with_room

# A tiny model whose weights are of a run of its own.
BUDGET = "--recipe finetune --batch-size 32 --limit-train 256 --limit-test 100 --tracker none"


@pytest.fixture
def weights(trainer):
    """A finished run to start from, and the options that do."""
    trained = trainer(*"--model test_vit --epochs 1 --run-name start --tracker none".split())
    return f"--dataset digits --model local-dir:{trained.run}/model {BUDGET}".split()


def planned(run):
    """What a run trains: its sizes and its epochs."""
    options = read_json(run / "config.json")["options"]
    return options["image_size"], options["epochs"], options["warmup_epochs"]


def test_a_plan_fits_the_time_and_is_kept(trainer, weights):
    words = ["--run-name", "a", "--budget", "20s", "--save-every", "none", "--log-every", "1"]
    began = time.monotonic()
    first = trainer(*words, base=weights)
    took = time.monotonic() - began
    # Beside other tests it is no stopwatch.
    assert took < 40
    run = first.run
    size, epochs, warmup = planned(run)
    assert epochs > 1
    assert warmup == pytest.approx(epochs / 5, abs=1e-4)
    assert read_json(run / "config.json")["provenance"]["epochs"] == "derived"
    assert summary(run)["status"] == "finished"
    # The schedule reaches its end, at the last of the sizes.
    last = rows(run)[-1]
    assert last["train/lr"] < 1e-4
    assert str(last["train/image_size"]) == str(size).rpartition(",")[2]
    # A table, with the one that is taken first.
    table = re.findall(r"budget +(\S+) +(\d+) +[\d.]+ +[\d.]+(  <- this)?", first.stdout)
    assert table[0] == (str(size), str(epochs), "  <- this")

    # Another seed may take the plan over.
    words = ["--run-name", "b", "--seed", "1", "--budget", "20s", "--plan-of", str(run)]
    other = trainer(*words, base=weights)
    assert planned(other.run) == (size, epochs, warmup)
    refused = trainer(*words[:-2], "--plan-of", "nowhere", "--run-name", "c", base=weights, check=2)
    assert "has no plan of --budget 20s" in refused.stderr
    for given, name in ((["--limit-train", "128"], "limit-train"), (["--epochs", "1"], "epochs")):
        refused = trainer(*words, *given, "--dry-run", base=weights, check=2)
        assert f"--plan-of {run}: is of another --{name}" in refused.stdout

    # Timing leaves nothing behind: flags that say the same train the same.
    flags = ["--image-size", str(size), "--epochs", str(epochs), "--run-name", "d"]
    assert sha256(trainer(*flags, base=weights).run) == sha256(run)
    # A look at the run sees it finished, and not another plan.
    seen = trainer("--run-name", "a", "--budget", "20s", "--dry-run", base=weights)
    assert "is finished" in seen.stdout
    assert "timing a few steps" not in seen.stdout


@pytest.mark.parametrize(
    "model, words, growing, single, sides",
    [
        ("test_vit", (), LAST_SIZES, (), (64, 96, 128)),
        # It takes its own size alone.
        ("crossvit_9_240", (), (), (240,), (240,)),
        # It takes any size, but one a run.
        ("mixer_s32_224", (), (), LAST_SIZES, (64, 96, 128)),
        # Its patches fit into few sides.
        ("test_vit", ("patch_size=32",), (128,), (64, 96, 160, 192, 224), (64, 96, 128)),
    ],
)
def test_only_sizes_that_the_model_takes_are_tried(model, words, growing, single, sides):
    args = replace(recipe_defaults("finetune"), model=model, model_kwargs=words)
    args, origin = fit_to_model(args, {field.name: "recipe" for field in fields(args)})
    choices, first = what_to_try(args, origin)
    assert first == sides
    expected = [*map(growing_to, growing), *map(one_size, single)]
    assert sorted(choices) == sorted(expected)


def test_a_model_with_batch_norm_begins_nearer_to_its_last_size():
    args = replace(recipe_defaults("finetune"), model="test_resnet")
    args, origin = fit_to_model(args, {field.name: "recipe" for field in fields(args)})
    choices, _ = what_to_try(args, origin)
    assert parse_sizes("96:0.6,128") in choices
    assert parse_sizes("64:0.4,96:0.7,128") not in choices


@pytest.fixture
def start(tmp_path):
    """What --budget has before it times a step: options, their origin, and the rest of a start."""
    args = replace(
        recipe_defaults("finetune"),
        model="test_vit",
        pretrained=False,
        dataset="digits",
        batch_size=32,
        limit_train=256,
        limit_test=100,
        data_dir=str(tmp_path / "data"),
        run_name="a",
        warmup_epochs=0.0,
        budget="1000h",
    )
    origin = {field.name: "recipe" for field in fields(args)}
    args, origin = fit_to_model(args, origin)
    return args, origin, Start(tmp_path, join_processes("cpu"), StopRequest(), load_splits(args))


def test_a_size_that_does_not_fit_takes_larger_ones_with_it(start, monkeypatch):
    """And leaves nothing behind: the launcher's accumulation holds for those that follow."""
    args, origin, start = start
    start.ranks.accumulation = 4
    tried = []

    def has_room_below_96(run):
        tried.append(run.args.input_size)
        assert run.plan.accumulation == 4
        if run.args.input_size >= 96:
            raise DoesNotFit("too large")

    monkeypatch.setattr(timing, "check_memory", has_room_below_96)
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    best = what_fits(args, origin, start, 3.6e6)
    assert tried == [64, 96, 32, 48]
    assert best.parts[-1] == (64, 1.0)
    assert not start.ranks.accelerator._models


def test_a_long_plan_is_regularised_as_a_long_run_is(start, monkeypatch):
    """`fit_to_model` has seen the recipe's few epochs alone."""
    args, origin, start = start
    monkeypatch.setattr(timing, "what_fits", lambda *words: Fitted(one_size(64), 40, 1.0))
    rest = (start.ranks, start.stop, start.splits)
    planned, _, _ = fit_to_budget(args, origin, Opened(start.path), *rest)
    origin = origin | {"image_size": "flag", "epochs": "flag"}
    by_flags, _ = fit_to_model(replace(args, image_size=64, epochs=40), origin)
    assert planned.cutmix == by_flags.cutmix == 1.0
    assert planned.model_kwargs == by_flags.model_kwargs != ()


def test_what_memory_has_no_room_for_is_not_chosen(monkeypatch):
    """A host that has as much left as is taken has room for twice the pixels."""
    ranks = join_processes("cpu")
    taken = peak_memory_mib(ranks.device) * 2**20
    monkeypatch.setattr(timing, "free_memory", lambda device: taken)
    choices = [one_size(side) for side in (64, 96, 128, 192)]
    assert with_room(choices, ranks, 96) == choices[:3]
    assert with_room(choices[3:], ranks, 96) == choices[3:]


def test_a_name_that_is_wrong_is_told_before_anything_is_timed(trainer):
    for words in (("--budget", "20s"), ("--dry-run",)):
        refused = trainer("--model", "test_vitt", *words, base=BUDGET.split(), check=2)
        assert "has no such model" in refused.stdout + refused.stderr
        assert "Traceback" not in refused.stderr


def test_a_later_start_keeps_the_plan_though_the_time_is_over(trainer, weights, tmp_path):
    # Three epochs of the largest size take no more than seconds of it, on a busy machine too.
    words = ["--run-name", "a", "--budget", "5m", "--save-every", "5steps", "--epochs", "3"]
    first = trainer(*words, base=weights)
    plan = planned(first.run)
    # As if it had been stopped on its way: on two processes it goes on with the plan.
    (first.run / "summary.json").unlink()
    for folder in sorted((first.run / "checkpoints").iterdir())[1:]:
        folder.rename(tmp_path / folder.name)
    # A look at it says so, and not what the recipe has.
    seen = trainer(*words, "--dry-run", base=weights).stdout
    assert re.search(rf"--image-size +{plan[0]} +derived", seen)
    assert "by --budget" not in seen
    assert "timing" not in seen
    again = trainer(*words, base=weights, launcher=TWO)
    assert "resume: from" in again.stdout
    assert "timing" not in again.stdout
    assert planned(again.run) == plan
    assert summary(again.run)["steps"] == summary(again.run)["total_steps"]


def test_too_short_a_time_names_the_shortest(trainer, weights, tmp_path):
    refused = trainer("--run-name", "a", "--budget", "5s", base=weights, check=2)
    assert re.search(r"--budget 5s: too short; the shortest is \d+m", refused.stderr)
    assert not (tmp_path / "ck" / "a").exists()


@pytest.mark.parametrize("given", [("--image-size", "32:0.5,48"), ("--epochs", "2")])
def test_what_is_given_is_kept(trainer, weights, given):
    done = trainer("--run-name", "a", "--budget", "20s", *given, base=weights)
    size, epochs, _ = planned(done.run)
    if given[0] == "--epochs":
        assert epochs == 2
    else:
        assert size == given[1]
        assert epochs > 1
