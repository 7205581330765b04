"""--budget: a plan that fits the time, kept by every later start."""

import re
import time

import pytest
from conftest import TWO, rows, summary

from cifar_accel.files import read_json

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
    assert "holds no run of --budget 20s" in refused.stderr


def test_a_later_start_keeps_the_plan_though_the_time_is_over(trainer, weights, tmp_path):
    words = ["--run-name", "a", "--budget", "15s", "--save-every", "5steps"]
    first = trainer(*words, base=weights)
    plan = planned(first.run)
    # As if it had been stopped on its way: on two processes it goes on with the plan.
    (first.run / "summary.json").unlink()
    for folder in sorted((first.run / "checkpoints").iterdir())[1:]:
        folder.rename(tmp_path / folder.name)
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
