import json
from pathlib import Path

import pytest
from filelock import FileLock
from made_runs import make_run

from cifar_accel.launch.study import has_its_plan
from cifar_accel.launch.study_file import Study
from cifar_accel.launch.study_runs import (
    StudyRun,
    as_flags,
    in_time,
    is_finished,
    name_runs,
    plan_runs,
    standing,
    time_left,
    user_of,
)
from cifar_accel.options.options import TrainingArguments

# ---- words and folders


def test_every_kind_of_value_has_its_words():
    options = {"pretrained": False, "max_time": None, "model_kwargs": ["a=1", "b=2"]}
    words = ["--no-pretrained", "--max-time=none", "--model-kwargs", "a=1", "b=2"]
    assert list(as_flags(options)) == words


def test_seeds_of_a_setting_share_the_plan_of_a_budget():
    grid = [
        {"optimizer": optimizer, "seed": seed} for optimizer in ("adamw", "lion") for seed in (1, 2)
    ]
    runs = [{"recipe": "finetune", "budget": "30m", "model": "test_vit", **point} for point in grid]
    planned = plan_runs("study.yaml", Study("study", runs), [])
    taken_over = [[word for word in run.words if "plan-of" in word] for run in planned]
    folders = [run.folder for run in planned]
    assert taken_over == [[], [f"--plan-of={folders[0]}"], [], [f"--plan-of={folders[2]}"]]
    # Without a budget there is nothing to share.
    plain = plan_runs("study.yaml", Study("study", [{"seed": 1}, {"seed": 2}]), [])
    assert not any("plan-of" in word for run in plain for word in run.words)


def test_runs_of_a_grid_get_names_of_their_own():
    runs = [{"learning_rate": rate, "seed": seed} for rate in (0.1, 0.2) for seed in (1, 2)]
    assert name_runs(runs, ["m/adamw-s1", "m/adamw-s2"] * 2) == [
        "m/adamw-s1-learning_rate=0.1",
        "m/adamw-s2-learning_rate=0.1",
        "m/adamw-s1-learning_rate=0.2",
        "m/adamw-s2-learning_rate=0.2",
    ]
    assert name_runs([{"seed": 1}, {"seed": 2}], ["a", "b"]) == ["a", "b"]


# ---- how a run stands


@pytest.mark.parametrize("words, whole", [([], False), (["--max-steps=8"], True)])
def test_a_run_that_was_cut_short_by_hand_is_not_finished(tmp_path, words, whole):
    run = make_run(tmp_path / "a", {"steps": 8})
    config = json.loads((run / "config.json").read_text())
    config["command"] = ["program", *words]
    (run / "config.json").write_text(json.dumps(config))
    assert is_finished(run, words) == whole


def test_how_a_run_stands_is_told_by_its_folder(tmp_path):
    def told(folder: Path, state="to do") -> str:
        return standing(StudyRun(folder, [], TrainingArguments(), state=state))

    assert told(tmp_path / "new") == "to do"
    done = make_run(tmp_path / "done", {"accuracy": 0.75, "wall_s": 240})
    assert told(done, "finished") == "finished, accuracy 75.00%, 4 min"
    failed = make_run(tmp_path / "failed", {"status": "failed", "error": "the disk is full"})
    assert told(failed) == "failed, the disk is full"
    assert told(make_run(tmp_path / "stopped", {"status": "preempted"})) == "to do, begun before"


def test_a_lock_is_looked_at_and_left_as_it_is(tmp_path):
    lock_file = tmp_path / ".lock"
    assert user_of(tmp_path) is None
    with FileLock(lock_file):
        assert user_of(tmp_path) == "another process"
        lock_file.write_text("process 7 on here\n")
        assert user_of(tmp_path) == "process 7 on here"
        run = StudyRun(tmp_path, [], TrainingArguments())
        assert standing(run) == "in progress elsewhere, process 7 on here"
    assert user_of(tmp_path) is None
    assert lock_file.read_text() == "process 7 on here\n"
    # To look does not keep the lock.
    with FileLock(lock_file, timeout=0):
        pass


def test_a_plan_is_there_once_its_run_has_begun_or_ended(tmp_path):
    first = StudyRun(tmp_path / "first", [], TrainingArguments(), state="running")
    run = StudyRun(tmp_path / "second", [], TrainingArguments(), plan_of=first)
    assert has_its_plan(first)
    assert not has_its_plan(run)
    first.state = "failed"
    assert has_its_plan(run)
    first.state = "elsewhere"
    make_run(first.folder)
    assert has_its_plan(run)


# ---- time


def timed_run(folder: Path, wall_s: object = None, **options) -> StudyRun:
    """A run of the study: finished after `wall_s` seconds, or to do."""
    if wall_s is None:
        return StudyRun(folder, [], TrainingArguments(**options))
    make_run(folder, {"wall_s": wall_s})
    return StudyRun(folder, [], TrainingArguments(**options), state="finished")


def test_time_left_is_that_of_the_finished_runs_by_model_and_size(tmp_path):
    to_do = [timed_run(tmp_path / "a", epochs=10), timed_run(tmp_path / "b", epochs=20)]
    assert time_left(to_do, 1) == "time left not known yet"
    # An epoch of 25 and of 35 s: 30 epochs are left.
    done = [timed_run(tmp_path / f"d{n}", 100 * n, epochs=10) for n in (2.5, 3.5)]
    assert time_left(done + to_do, 1) == "about 15 min left"
    assert time_left(done + to_do, 2) == "about 8 min left"
    assert time_left(done, 1) == "nothing left"
    # What is of another size, or failed, is not told by them.
    to_do[1] = timed_run(tmp_path / "c", epochs=20, image_size=64)
    assert time_left(done + to_do, 1) == "about 5 min left, and 1 of a kind that is not timed yet"
    to_do[1].state = "failed"
    assert time_left(done + to_do, 1) == "about 5 min left"


@pytest.mark.parametrize("spoilt", [-1, float("nan"), float("inf"), "long", [3]])
def test_a_spoilt_time_tells_nothing(tmp_path, spoilt):
    runs = [timed_run(tmp_path / "done", spoilt), timed_run(tmp_path / "new")]
    assert time_left(runs, 1) == "time left not known yet"
    assert standing(runs[0]) == "finished, without figures"


def test_seconds_as_a_person_reads_them():
    assert [in_time(seconds) for seconds in (0, 99, 120, 9000)] == ["0 s", "99 s", "2 min", "2.5 h"]
