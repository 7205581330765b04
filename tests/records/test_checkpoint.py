"""Checkpoint folders: what comes back from one, and what no kill, disk or stranger may do to it."""

import json
import math
import os
import resource
import shutil
import signal

import pytest
import torch

from cifar_accel.errors import BadInput
from cifar_accel.files import adapter
from cifar_accel.records import checkpoint
from cifar_accel.records.folder import Opened
from cifar_accel.records.state import State


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny model, one optimizer step further at each call; gives the checkpoint folder."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)

    def save(step, keep=3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        state = {"step": step}
        return checkpoint.save_checkpoint(
            tmp_path, model.state_dict(), optimizer.state_dict(), None, state, keep
        )

    save.model = model
    save.optimizer = optimizer
    save.run = tmp_path
    return save


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip_a_bit(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def edit_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


# ---- writing


def test_weights_optimizer_and_state_come_back_bit_for_bit(saved):
    path = saved(7)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    checkpoint.load_checkpoint(path, model, optimizer, None)
    assert checkpoint.fault(path) is None
    assert checkpoint.read_state(path) == State(step=7)
    assert torch.equal(model.weight, saved.model.weight)
    for a, b in zip(optimizer.state.values(), saved.optimizer.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_its_files_have_the_rights_of_any_new_file(saved, tmp_path):
    (tmp_path / "new").touch()
    for file in saved(1).iterdir():
        assert file.stat().st_mode == (tmp_path / "new").stat().st_mode, file.name


def test_a_state_that_is_not_finite_is_not_written(saved):
    state = {"step": 1, "gradient_norm": math.inf}
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.save_checkpoint(saved.run, saved.model.state_dict(), {}, None, state, 1)
    assert names(saved.run) == []


def test_older_checkpoints_go_once_the_new_one_is_safe(saved):
    for step in range(1, 6):
        saved(step, keep=2)
    kept = [path.name for path in checkpoint.list_checkpoints(saved.run)]
    assert kept == ["step-00000005", "step-00000004"]


def test_a_damaged_newer_checkpoint_does_not_push_out_the_good_one(saved):
    """A run that went back behind a damaged checkpoint keeps the one it writes next."""
    flip_a_bit(saved(9, keep=1))
    good = saved(5, keep=1)
    assert checkpoint.newest_valid(saved.run, lambda line: None) == good


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(saved):
    flip_a_bit(saved(4))
    path = saved(4)
    assert checkpoint.fault(path) is None
    assert names(saved.run) == ["step-00000004"]


def test_a_strangers_folder_of_the_same_step_stays(saved):
    older = saved(1)
    stranger = saved.run / "checkpoints" / "step-00000002"
    stranger.mkdir()
    (stranger / "text").write_text("mine")
    with pytest.raises(OSError, match="is in the way"):
        saved(2)
    assert (stranger / "text").read_text() == "mine"
    assert names(saved.run) == ["step-00000001", "step-00000002"]
    assert checkpoint.fault(older) is None


def test_a_kill_between_the_two_renames_leaves_the_older_one(saved, monkeypatch):
    """The damaged checkpoint has lost its name, and the new one does not have it yet."""
    older = saved(1)
    flip_a_bit(saved(2))
    rename = os.rename

    def killed_before_the_second(source, target):
        if str(source).endswith("step-00000002.tmp"):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed_before_the_second)
        # A process that was killed cleans nothing up.
        patch.setattr(shutil, "rmtree", lambda *args, **options: None)
        with pytest.raises(KeyboardInterrupt):
            saved(2)
    left = ["step-00000001", "step-00000002.old.tmp", "step-00000002.tmp"]
    assert names(saved.run) == left
    assert checkpoint.newest_valid(saved.run, print) == older
    saved(3)
    assert names(saved.run) == ["step-00000001", "step-00000003"]


def test_a_full_disk_costs_the_new_checkpoint_only(saved):
    """The system refuses to let files grow: a real OSError in the middle of the write."""
    good = saved(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
        with pytest.raises(OSError):
            saved(2, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.fault(good) is None
    assert names(saved.run) == ["step-00000001"]


def test_leftovers_of_a_kill_do_not_count(saved):
    good = saved(1)
    (saved.run / "checkpoints" / "step-00000002.tmp").mkdir()
    (saved.run / "checkpoints" / "step-2").mkdir()
    assert checkpoint.newest_valid(saved.run, print) == good


# ---- reading


def name_a_file_outside(path):
    edit_manifest(path, lambda m: m["files"].update({"../x": m["files"]["state.json"]}))


# What may have become of a checkpoint, and the words that name it.
DAMAGE = {
    "one bit": (flip_a_bit, "SHA-256"),
    "cut short": (lambda path: (path / "optimizer.pt").write_bytes(b"short"), "size"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "cannot be read"),
    "no state": (lambda path: (path / "state.json").unlink(), "cannot be read"),
    "a manifest that is a list": (
        lambda path: (path / "manifest.json").write_text("[]"),
        "cannot be read",
    ),
    "a path in the manifest": (name_a_file_outside, "outside"),
    "a newer format": (
        lambda path: edit_manifest(path, lambda m: m.update(format=99)),
        "newer version",
    ),
    "a manifest of nothing": (
        lambda path: edit_manifest(path, lambda m: m["files"].clear()),
        "names no model",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(saved, what):
    damage, words = DAMAGE[what]
    older, newer = saved(1), saved(2)
    damage(newer)
    said = []
    assert checkpoint.newest_valid(saved.run, said.append) == older
    assert len(said) == 1
    assert words in said[0]
    assert "step-00000002" in said[0]


# ---- where a run goes on


def test_a_run_without_a_whole_checkpoint_begins_anew_and_says_so(saved):
    flip_a_bit(saved(1))
    said = []
    opened = Opened(saved.run, sources=[saved.run])
    assert checkpoint.choose(opened, said.append) is None
    assert "step-00000001 is passed over" in said[0]
    assert said[1] == f"resume: {saved.run} holds no whole checkpoint: the run begins anew"


def test_a_run_that_was_named_and_has_no_whole_checkpoint_is_refused(saved, tmp_path):
    flip_a_bit(saved(1))
    opened = Opened(tmp_path / "other", sources=[saved.run], by_path=True)
    with pytest.raises(BadInput, match=f"--resume {saved.run}: holds no whole checkpoint"):
        checkpoint.choose(opened, print)
    # Begun there by an earlier start, which was killed before it saved anything.
    opened = Opened(tmp_path, sources=[tmp_path / "own", saved.run], by_path=True)
    with pytest.raises(BadInput, match=f"--resume {saved.run}: holds no whole checkpoint"):
        checkpoint.choose(opened, print)
    good = saved(2)
    assert checkpoint.choose(opened, print) == good


# ---- loading one


def test_a_checkpoint_of_another_model_is_refused(saved):
    path = saved(1)
    other = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(other.parameters())
    with pytest.raises(BadInput, match="another model or optimizer"):
        checkpoint.load_checkpoint(path, other, optimizer, None)


def train_one_step(model, optimizer, images):
    model(images).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_moments_take_the_layout_of_the_weights(tmp_path):
    """Written in one memory format and read in another, the fused optimizer goes on the same."""
    torch.manual_seed(1)
    images = torch.randn(2, 3, 8, 8)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        train_one_step(model, optimizer, images)
        path = checkpoint.save_checkpoint(
            tmp_path, model.state_dict(), optimizer.state_dict(), None, {"step": 1}, 1
        )
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=layout)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        checkpoint.load_checkpoint(path, model, optimizer, None)
        train_one_step(model, optimizer, images)
        results.append(model.weight.detach().clone())
    torch.testing.assert_close(results[1], results[0])


# ---- earlier formats

# A state of format 3, and the same one as formats 1 and 2 held it.
STATE = {
    "step": 8,
    "window": {"loss": 2.5, "correct": 3.0, "images": 32.0, "seconds": 0.5, "waiting": 0.25},
    "epoch": {"loss": 9.0, "correct": 20.0, "images": 128.0},
    "gradient_norm": 0.5,
    "evaluated_step": 4,
}
OF_FORMAT_2 = STATE | {
    "window": [2.5, 3.0, 32.0, 0.5, 0.25],
    "epoch": [9.0, 20.0, 128.0],
    "due": True,
}
OF_FORMAT_1 = {"step": 8, "window": [2.5, 3.0, 32.0, 0.5], "epoch": [9.0, 20.0, 128.0]}


def test_a_state_of_an_earlier_format_is_upgraded():
    read = adapter(State).validate_python
    assert checkpoint.upgrade(STATE) == STATE
    assert read(checkpoint.upgrade(OF_FORMAT_2)) == read(STATE)
    of_format_1 = read(checkpoint.upgrade(OF_FORMAT_1))
    expected = {"gradient_norm": 0.0, "evaluated_step": -1}
    expected["window"] = STATE["window"] | {"waiting": 0.0}
    assert of_format_1 == read(STATE | expected)


@pytest.mark.parametrize("window", [None, "text", {}, [], [1.0], [0.0] * 6])
def test_a_window_that_is_none_is_left_for_the_reader_of_types(window):
    assert checkpoint.upgrade({"window": window})["window"] == window


@pytest.mark.parametrize("text", ["[]", "{", "1", ""])
def test_a_state_that_is_no_table_is_refused(saved, text):
    path = saved(1)
    (path / "state.json").write_text(text)
    with pytest.raises(BadInput, match=r"state\.json is none that this trainer writes"):
        checkpoint.read_state(path)
