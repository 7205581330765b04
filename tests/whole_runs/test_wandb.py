"""What wandb is told of a run, read back from its offline files record by record."""

import json
import os
import signal
import threading
from pathlib import Path

import forked_runs
import pytest
from conftest import (
    image_folder,
    options_of_run,
    rows,
    summary,
    wandb_inspect,
    wandb_runs,
    wandb_summary,
)
from wandb_server import wandb_server

from cifar_accel.records import checkpoint
from cifar_accel.records.trackers import wandb_row

WANDB = ("--tracker", "wandb", "--run-name", "a")


def records(run: Path, kind: str) -> list[dict]:
    """The records of one kind in a run's only offline file."""
    (file,) = wandb_runs(run)
    read = [json.loads(line) for line in wandb_inspect(file).splitlines()]
    return [record[kind] for record in read if record["type"] == kind]


def table(run: Path, name: str) -> list[list]:
    """The rows of a table that was logged."""
    (file,) = run.glob(f"wandb/offline-run-*/files/media/table/**/{name}_*.table.json")
    return json.loads(file.read_text())["data"]


def test_a_run_as_wandb_sees_it(trainer):
    run = trainer(*WANDB, "--group", "study").run
    (told,) = records(run, "run")
    assert told["job_type"] == "train"
    assert told["run_group"] == "study"
    assert told["tags"] == ["digits", "test_nfnet", "digits", "test"]
    assert told["notes"].startswith("python -m cifar_accel --dataset digits")

    # Options in groups, each once.
    (file,) = wandb_runs(run)
    seen = wandb_summary(file)
    config = {name: group for name, group in seen["config"].items() if not name.startswith("_")}
    assert list(config) == sorted(["model", "data", "augment", "optim", "run"])
    flat = {name: value for group in config.values() for name, value in group.items()}
    assert len(flat) == sum(map(len, config.values()))
    assert flat == options_of_run(run)
    assert config["optim"]["learning_rate"] == 3e-3
    assert config["data"]["classes"] == 10
    assert config["augment"]["smoothing"] == 0.1
    assert config["model"]["parameters"] > 0
    assert config["run"]["seed"] == 3407

    # Every metric is drawn over the optimizer step.
    metrics = records(run, "metric")
    assert {m.get("step_metric") for m in metrics if m.get("name") != "trainer/step"} == {
        "trainer/step"
    }
    assert "*" in [m.get("glob_name") for m in metrics]

    # The figures: no two names for one thing.
    figures = seen["summary"]
    assert figures["test/accuracy"] == summary(run)["accuracy"]
    assert figures["test/images"] == 100
    assert figures["test/accuracy_low"] < figures["test/accuracy"] < figures["test/accuracy_high"]
    assert 0 < figures["test/calibration_error"] < 1
    best = max(row["eval/accuracy"] for row in rows(run) if "eval/accuracy" in row)
    assert figures["eval/accuracy"] == {"max": best}
    for name in ("accuracy", "best_accuracy", "test_loss", "epochs", "steps", "time_s"):
        assert name not in figures
    assert not [name for name in figures if name.startswith("train/images_per_s")]
    assert figures["perf/images_per_s"] == rows(run)[-1]["train/images_per_s"]

    # What it is at the end.
    assert sorted(row[0] for row in table(run, "classes")) == [str(d) for d in range(10)]
    right = sum(share * images for _, share, images in table(run, "classes"))
    assert right / 100 == pytest.approx(summary(run)["accuracy"])
    wrong = 100 - round(right)
    mistakes = table(run, "mistakes")
    assert len(mistakes) == min(64, wrong)
    shares = [probability for *_, probability, _ in mistakes]
    assert shares == sorted(shares, reverse=True)
    matrix = table(run, "confusion_table")
    assert len(matrix) == 100
    assert sum(count for *_, count in matrix) == 100
    assert sum(count for true, taken_for, count in matrix if true == taken_for) == round(right)
    # Nothing of it lies outside of the run folder.
    staged = [a["manifest"]["contents"] for a in records(run, "artifact")]
    places = [c["local_path"] for contents in staged for c in contents]
    assert places and all(place.startswith(str(run)) for place in places)


def test_more_classes_than_a_table_takes_are_pairs():
    import numpy as np

    from cifar_accel.records.trackers import Findings, wandb_objects

    classes = [str(c) for c in range(101)]
    labels = np.arange(101)
    by_class = [(name, 0.0, 1) for name in classes]
    pairs = [("1", "2", 1)]
    shown = wandb_objects(Findings(labels, labels[::-1], classes, by_class, pairs, [], {}))
    assert shown["test/confused"].data == [["1", "2", 1]]
    assert "test/confusion" not in shown
    few = Findings(labels[:100], labels[:100], classes[:100], by_class[:100], pairs, [], {})
    assert "test/confusion" in wandb_objects(few)


def test_a_row_keeps_losses_and_performance_apart():
    row = {"step": 3, "epoch": 1, "time_s": 2.0, "train/loss": 1.0, "train/mfu": 0.5}
    assert wandb_row(row) == {
        "trainer/step": 3,
        "epoch": 1,
        "perf/time_s": 2.0,
        "train/loss": 1.0,
        "perf/mfu": 0.5,
    }


def test_the_model_goes_along_where_that_is_asked_for(trainer):
    run = trainer(*WANDB, "--epochs", "1", "--log-model").run
    (model,) = [a for a in records(run, "artifact") if a["type"] == "model"]
    assert model["name"] == "model-a"
    assert json.loads(model["metadata"])["accuracy"] == summary(run)["accuracy"]
    paths = {content["path"]: content for content in model["manifest"]["contents"]}
    assert paths.keys() == {"README.md", "config.json", "model.safetensors"}
    weights = (run / "model" / "model.safetensors").read_bytes()
    assert Path(paths["model.safetensors"]["local_path"]).read_bytes() == weights


def test_a_model_for_no_tracker_is_refused(trainer):
    done = trainer("--tracker", "none", "--log-model", check=2)
    assert "--log-model has no effect without --tracker wandb" in done.stderr


def test_a_divergence_is_an_alert(trainer):
    run = trainer(*WANDB, "--learning-rate", "1e38", "--optimizer", "sgdm", check=1).run
    assert summary(run)["status"] == "failed"
    (alert,) = records(run, "alert")
    assert alert["level"] == "ERROR"
    assert alert["title"] == "a failed"
    assert alert["text"].startswith("Diverged: step ")
    (file,) = wandb_runs(run)
    assert wandb_summary(file)["exit_code"] == 1


def test_an_evaluation_is_a_run_of_its_own(trainer, command, tmp_path):
    """With the figures and the images that were judged, not those of the training."""
    run = trainer("--tracker", "none", "--epochs", "1").run
    data = image_folder(tmp_path / "data")
    for split in ("train", "test"):
        for old, new in (("cat", "3"), ("dog", "5")):
            (data / split / old).rename(data / split / new)
    code, out, err = command("evaluate", run, "--dataset", data, "--tracker", "wandb", "--json")
    assert code == 0, err
    (told,) = records(run, "run")
    assert told["job_type"] == "evaluate"
    assert told["tags"][2:] == ["data", "test"]
    (file,) = wandb_runs(run)
    seen = wandb_summary(file)
    assert seen["summary"]["test/accuracy"] == json.loads(out)["accuracy"]
    assert seen["summary"]["test/images"] == 6
    assert seen["config"]["data"]["dataset"] == str(data)
    assert seen["config"]["data"]["data_fingerprint"] != options_of_run(run)["data_fingerprint"]


# ---- stopped from the web, and by a signal


def stop_in_mid_run(stop) -> None:
    """Hook: `stop` from a thread of its own once 10 steps are taken, as wandb's does."""
    from cifar_accel import train

    take_step = train.take_step

    def take_step_and_stop(run, step, *more):
        if step == 10:
            thread = threading.Thread(target=stop)
            thread.start()
            thread.join()
        take_step(run, step, *more)

    train.take_step = take_step_and_stop


def stop_by_wandb() -> None:
    """What wandb does when somebody presses Stop on its page."""
    from wandb.sdk.lib.interrupt import interrupt_main

    stop_in_mid_run(interrupt_main)


def stop_by_the_scheduler() -> None:
    stop_in_mid_run(lambda: os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.parametrize("stop", [stop_by_wandb, stop_by_the_scheduler])
def test_a_part_that_is_stopped_is_no_failure(words, tmp_path, stop):
    """wandb's Stop is a first Ctrl-C: a checkpoint, and the same command goes on."""
    out = tmp_path / "out"
    first = forked_runs.finish(words(*WANDB), out, hook=stop)
    assert first.codes == [143], out.read_text()
    run = tmp_path / "ck" / "a"
    assert (run / "PREEMPTED").exists()
    assert checkpoint.step_of(checkpoint.list_checkpoints(run)[0]) == 10
    # It says so before it ends, or wandb would call it failed.
    assert len(records(run, "preempting")) == 1
    (file,) = wandb_runs(run)
    assert wandb_summary(file)["exit_code"] == 143
    assert wandb_summary(file)["summary"]["status"] == "preempted"

    assert forked_runs.finish(words(*WANDB), out).codes == [0]
    files = wandb_runs(run)
    ids = {file.stem for file in files}
    assert (len(files), len(ids)) == (2, 1)
    assert wandb_summary(files[-1])["summary"]["status"] == "finished"


# ---- a server that takes it


def online(server) -> dict[str, str]:
    """The environment of a training that tells `server`."""
    key = "0123456789" * 4
    return {"WANDB_MODE": "online", "WANDB_API_KEY": key, "WANDB_BASE_URL": server.address}


def test_a_server_that_takes_a_run(trainer):
    """It gets every row and the summary; of objects that it refuses one line is said."""
    with wandb_server() as server:
        done = trainer(*WANDB, env=online(server))
        assert server.complete.wait(30)
    assert f"wandb: {server.address}/ann/cifar_accel/runs/" in done.stdout
    assert "warning: wandb got no confusions and mistakes" in done.stdout
    logged = [row["trainer/step"] for row in server.files["wandb-history.jsonl"]]
    assert logged == [row["step"] for row in rows(done.run)]
    figures = server.files["wandb-summary.json"][-1]
    assert figures["test/accuracy"] == summary(done.run)["accuracy"]
    assert server.exit_code == 0
    config = json.loads(server.variables["UpsertBucket"][0]["config"])
    assert config["optim"]["value"]["learning_rate"] == 3e-3


def test_stop_on_the_web_is_a_first_ctrl_c(trainer):
    """wandb's own process learns of it from the server, and interrupts the training."""
    with wandb_server() as server:
        server.stops = True
        done = trainer(*WANDB, "--epochs", "2000", check=143, env=online(server))
    assert "stopped by SIGINT after step" in done.stdout
    assert (done.run / "PREEMPTED").exists()
    assert checkpoint.list_checkpoints(done.run)
