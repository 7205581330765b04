"""What each --resume value does with what a run folder may hold: start, go on, leave, refuse."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import contents

from cifar_accel.errors import BadInput
from cifar_accel.options.options import TrainingArguments
from cifar_accel.records.folder import check_images, folder_of, open_run
from cifar_accel.records.summary import starting_weights

FACTS = {
    "mixed_precision": "no",
    "classes": 10,
    "data_fingerprint": "f17f",
    "input_mean": [0.5] * 3,
    "input_std": [0.5] * 3,
}
FINISHED = {
    "status": "finished",
    "steps": 100,
    "total_steps": 100,
    "train_loss": 0.1,
    "accuracy": 0.9,
}


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(save_dir=str(tmp_path / "ck"), run_name="a")


def write_run(args, row=True, checkpoint=True, summary=None):
    """A run folder as a training of `args` leaves it."""
    run = folder_of(args)
    run.mkdir(parents=True)
    config = {"options": asdict(args) | FACTS, "provenance": {}, "tracker_id": "abc"}
    (run / "config.json").write_text(json.dumps(config))
    if row:
        (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.1}\n')
    if checkpoint:
        folder = run / "checkpoints" / "step-00000001"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    if summary:
        (run / "summary.json").write_text(json.dumps(summary))
    return run


def opened(args, said=None):
    """What `open_run` decides; gives the lock back."""
    result = open_run(args, "no", [].append if said is None else said.append)
    result.lock.release()
    return result


# ---- --resume auto


def test_a_folder_that_is_not_there_starts_a_run(args):
    result = opened(args)
    assert result.starts_anew
    result.discard()
    assert not result.path.parent.exists(), "a refusal later on leaves nothing"


def test_an_unfinished_run_goes_on(args):
    run = write_run(args)
    assert opened(args).sources == [run]


def test_a_run_without_a_row_goes_on_with_its_tracker(args):
    run = write_run(args, row=False, checkpoint=False)
    assert opened(args).sources == [run]
    assert "abc" in (run / "config.json").read_text()


def test_a_finished_run_is_left_alone(args):
    run = write_run(args, summary=FINISHED)
    before, said = contents(run), []
    result = opened(args, said)
    assert result.finished == FINISHED
    assert "is finished (step 100, accuracy 90.00%)" in said[0]
    assert contents(run) == before


@pytest.mark.parametrize("max_steps, finished", [(0, False), (60, False), (50, True), (40, True)])
def test_a_run_cut_short_goes_on_where_it_is_allowed_more(args, max_steps, finished):
    write_run(args, summary=FINISHED | {"steps": 50})
    result = opened(replace(args, max_steps=max_steps))
    assert bool(result.finished) == finished
    assert bool(result.sources) != finished


def test_a_run_of_other_options_is_refused(args):
    run = write_run(args)
    before = contents(run)
    with pytest.raises(BadInput, match=r"another configuration \(--mixup 0\.0 -> 0\.5\)"):
        opened(replace(args, mixup=0.5))
    assert contents(run) == before


def test_options_that_change_no_result_may_differ(args):
    run = write_run(args)
    assert opened(replace(args, log_every=7, project="other")).sources == [run]


def test_a_run_of_another_precision_is_refused(args):
    write_run(args)
    with pytest.raises(BadInput, match="--mixed-precision no -> bf16"):
        open_run(args, "bf16", print)


def test_another_run_that_did_nothing_is_forgotten(args):
    run = write_run(args, row=False, checkpoint=False)
    assert opened(replace(args, mixup=0.5)).starts_anew
    assert not (run / "config.json").exists()


def test_work_without_a_config_is_refused(args):
    run = write_run(args)
    (run / "config.json").unlink()
    with pytest.raises(BadInput, match=r"no config\.json that says which"):
        opened(args)


def test_a_strangers_config_without_work_stays(args):
    run = folder_of(args)
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"architecture": "mine"}')
    assert opened(args).starts_anew
    assert (run / "config.json").read_text() == '{"architecture": "mine"}'


# ---- runs inside runs


@pytest.mark.parametrize(
    "first, second",
    [
        ("exp/model", "exp"),
        ("exp", "exp/model"),
        ("exp/model-epoch-0002", "exp"),
        ("exp", "exp/checkpoints/step-00000001"),
        ("exp", "exp/wandb/x"),
    ],
)
def test_a_run_cannot_lie_where_another_writes(args, first, second):
    write_run(replace(args, run_name=first))
    before = contents(Path(args.save_dir))
    with pytest.raises(BadInput, match=f"--run-name {second}: a run in .*{second} and the one in "):
        opened(replace(args, run_name=second))
    assert contents(Path(args.save_dir)) == before


@pytest.mark.parametrize("first, second", [("exp/lr1", "exp"), ("exp", "exp/lr1")])
def test_a_run_may_lie_beside_what_another_writes(args, first, second):
    write_run(replace(args, run_name=first))
    assert opened(replace(args, run_name=second)).starts_anew


def test_a_saved_model_is_no_run(args):
    run = write_run(args)
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text('{"architecture": "test_vit"}')
    assert opened(args).sources == [run]


# ---- data and weights that moved


def test_images_may_lie_elsewhere_and_are_compared_when_they_are_read(args, tmp_path):
    run = write_run(replace(args, dataset="old/place"), checkpoint=False)
    with pytest.raises(BadInput, match=r"--dataset old/place -> .*new\)"):
        opened(replace(args, dataset=str(tmp_path / "new")))
    (tmp_path / "new").mkdir()
    result = opened(replace(args, dataset=str(tmp_path / "new")))
    assert result.sources == [run]
    check_images(result, "new/place", FACTS["data_fingerprint"])
    with pytest.raises(BadInput, match="--dataset new/place: holds other images than old/place"):
        check_images(result, "new/place", "another")


def test_a_run_that_did_nothing_may_begin_on_other_images(args):
    write_run(args, row=False, checkpoint=False)
    check_images(opened(args), args.dataset, "another")


def test_a_finished_run_reads_no_images_and_so_takes_no_other_folder(args, tmp_path):
    run = write_run(args, summary=FINISHED)
    with pytest.raises(BadInput, match=f"the run in {run} is finished, on cifar100"):
        opened(replace(args, dataset=str(tmp_path)))


def write_weights(path, text):
    """Weights as each of the two options takes them: a folder of timm's, and its file."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_text(text)
    return path


@pytest.mark.parametrize("option", ["model", "checkpoint"])
def test_weights_are_known_by_their_content(args, tmp_path, option):
    same = write_weights(tmp_path / "same", "weights")
    other = write_weights(tmp_path / "other", "others")

    def at(path):
        value = f"local-dir:{path}" if option == "model" else str(path)
        return replace(args, **{option: value})

    # Written by a start that found them where they lie no more.
    run = write_run(at(tmp_path / "old"))
    config = json.loads((run / "config.json").read_text())
    with pytest.raises(BadInput, match=f"--{option} .*old -> .*same"):
        opened(at(same))
    config["weights"] = starting_weights(at(same))
    (run / "config.json").write_text(json.dumps(config))
    assert opened(at(same)).sources == [run]
    for path in (other, tmp_path / "nowhere"):
        with pytest.raises(BadInput, match=f"--{option} .*old -> .*{path.name}"):
            opened(at(path))


# ---- more epochs


@pytest.mark.parametrize("resume", ["auto", "its folder"])
def test_more_epochs_of_a_finished_run_name_the_way(args, resume):
    run = write_run(args, summary=FINISHED)
    resume = resume if resume == "auto" else str(run)
    way = f"to train on from its weights: --checkpoint {run} --run-name NEW --epochs N"
    with pytest.raises(BadInput, match=f"--epochs 25 -> 30.*{way}"):
        opened(replace(args, epochs=30, resume=resume))
    with pytest.raises(BadInput) as refusal:
        opened(replace(args, mixup=0.5, resume=resume))
    assert way not in str(refusal.value)


# ---- --resume never


def test_never_takes_a_folder_of_its_own(args):
    run = write_run(args)
    before = contents(run)
    result = opened(replace(args, resume="never"))
    assert result.path.name == "a-2"
    assert result.starts_anew
    assert contents(run) == before


# ---- --resume PATH


@pytest.fixture
def source(args):
    """An unfinished run to go on from."""
    return write_run(replace(args, run_name="source"))


@pytest.mark.parametrize("part", ["", "checkpoints/step-00000001"])
def test_a_path_goes_on_in_an_empty_folder(args, source, part):
    path = source / part
    assert opened(replace(args, resume=str(path))).sources == [path]


def test_a_path_of_the_same_run_goes_back_even_when_it_is_finished(args):
    run = write_run(args, summary=FINISHED)
    path = run / "checkpoints" / "step-00000001"
    result = opened(replace(args, resume=str(path)))
    assert result.sources == [path]
    assert result.finished is None


def test_a_path_of_other_options_is_refused(args, source):
    with pytest.raises(BadInput, match="another configuration"):
        opened(replace(args, resume=str(source), mixup=0.5))


def test_a_path_into_a_folder_with_another_run_is_refused(args, source):
    run = write_run(args)
    before = contents(run)
    with pytest.raises(BadInput, match="holds another run already"):
        opened(replace(args, resume=str(source)))
    assert contents(run) == before


def test_a_run_begun_at_a_path_goes_on_where_it_stands(args, source):
    again = replace(args, resume=str(source))
    run = write_run(again)
    result = opened(again)
    assert result.sources == [run, source]


def test_a_run_begun_at_a_path_that_is_gone_goes_on_where_it_stands(args, tmp_path):
    again = replace(args, resume=str(tmp_path / "gone"))
    run = write_run(again)
    assert opened(again).sources == [run]


def test_a_run_begun_at_a_path_is_left_alone_once_finished(args, source):
    again = replace(args, resume=str(source))
    write_run(again, summary=FINISHED)
    assert opened(again).finished == FINISHED


# ---- the lock


def test_the_lock_names_its_owner(args):
    first = open_run(args, "no", print)
    owner = f"process {os.getpid()} on {platform.node()}"
    assert (first.path / ".lock").read_text() == f"{owner}\n"
    with pytest.raises(BadInput, match=f"is in use by {owner}; wait for it"):
        open_run(args, "no", print)
    first.lock.release()
    opened(args)


HOLD = """
import sys, time
from cifar_accel.options.options import TrainingArguments
from cifar_accel.records.folder import open_run
opened = open_run(TrainingArguments(save_dir=sys.argv[1], run_name="a"), "no", print)
(opened.path / "config.json").touch()
print("held", flush=True)
time.sleep(60)
"""


def test_a_file_system_without_locks(args, stub):
    """The lock is a record there: a living process is named, a dead one does not count."""
    environment = stub("int flock(int fd, int operation) { errno = ENOSYS; return -1; }")
    command = [sys.executable, "-W", "ignore", "-c", HOLD, args.save_dir]
    options = {"env": environment, "text": True, "stderr": subprocess.PIPE}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, **options)
    assert first.stdout.readline() == "held\n"

    refused = subprocess.run(command, **options).stderr.splitlines()[-1]
    file = f"{args.save_dir}/a/.lock"
    assert f"is in use by {first.pid} on {platform.node()}" in refused
    assert refused.endswith(f"if it is gone, remove {file}")

    first.kill()
    first.wait()
    second = subprocess.Popen(command, stdout=subprocess.PIPE, **options)
    assert second.stdout.readline() == "held\n"
    second.kill()
    second.wait()
