import json
import resource
import signal

import pytest
import torch

from cifar_accel.errors import BadInput
from cifar_accel.records import checkpoint


@pytest.fixture
def saved(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)

    def save(step, keep=3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return checkpoint.save_checkpoint(
            tmp_path, model.state_dict(), optimizer.state_dict(), None, {"step": step}, keep
        )

    save.model, save.optimizer, save.run = model, optimizer, tmp_path
    return save


def test_weights_optimizer_and_state_come_back_bit_for_bit(saved):
    path = saved(7)
    model, optimizer = torch.nn.Linear(3, 2), None
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    checkpoint.load_checkpoint(path, model, optimizer, None)
    assert checkpoint.fault(path) is None and checkpoint.read_state(path) == {"step": 7}
    assert torch.equal(model.weight, saved.model.weight)
    for a, b in zip(optimizer.state.values(), saved.optimizer.state.values(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_older_checkpoints_go_once_the_new_one_is_safe(saved):
    for step in range(1, 6):
        saved(step, keep=2)
    assert [p.name for p in checkpoint.list_checkpoints(saved.run)] == [
        "step-00000005",
        "step-00000004",
    ]


def test_a_damaged_newer_checkpoint_does_not_push_out_the_good_one(saved):
    """A run that went back behind a damaged checkpoint keeps the one it writes next."""
    flip_a_bit(saved(9, keep=1))
    good = saved(5, keep=1)
    assert checkpoint.newest_valid(saved.run, lambda line: None) == good


def flip_a_bit(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def edit_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = {
    "SHA-256": flip_a_bit,
    "size": lambda p: (p / "optimizer.pt").write_bytes(b"short"),
    "cannot be read": lambda p: (p / "manifest.json").unlink(),
    "cannot be read ": lambda p: (p / "state.json").unlink(),
    "outside": lambda p: edit_manifest(
        p, lambda m: m["files"].update({"../x": m["files"]["state.json"]})
    ),
    "newer version": lambda p: edit_manifest(p, lambda m: m.update(format=99)),
    "names no model": lambda p: edit_manifest(p, lambda m: m["files"].clear()),
    "cannot be read  ": lambda p: (p / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(saved, words):
    older, newer = saved(1), saved(2)
    DAMAGE[words](newer)
    said = []
    assert checkpoint.newest_valid(saved.run, said.append) == older
    assert len(said) == 1 and words.strip() in said[0] and "step-00000002" in said[0]


def test_a_full_disk_costs_the_new_checkpoint_only(saved):
    """The system refuses to let files grow: a real OSError in the middle of the write."""
    good = saved(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
        with pytest.raises(OSError):
            saved(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.list_checkpoints(saved.run) == [good] and checkpoint.fault(good) is None
    assert [p.name for p in (saved.run / "checkpoints").iterdir()] == ["step-00000001"]


def test_leftovers_of_a_kill_do_not_count(saved):
    good = saved(1)
    (saved.run / "checkpoints" / "step-00000002.tmp").mkdir()
    (saved.run / "checkpoints" / "step-2").mkdir()
    assert checkpoint.newest_valid(saved.run, print) == good


def test_a_checkpoint_of_another_model_is_refused(saved):
    path, other = saved(1), torch.nn.Linear(4, 2)
    with pytest.raises(BadInput, match="another model or optimizer"):
        checkpoint.load_checkpoint(path, other, torch.optim.AdamW(other.parameters()), None)


def test_moments_take_the_layout_of_the_weights(tmp_path):
    """A checkpoint written in one memory format and read in the other: the fused optimizer goes on the same."""
    results = []
    for written, read in (
        (torch.contiguous_format,) * 2,
        (torch.contiguous_format, torch.channels_last),
    ):
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=written)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        x = torch.randn(2, 3, 8, 8)

        def step(model, optimizer, x=x):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        step(model, optimizer)
        path = checkpoint.save_checkpoint(
            tmp_path, model.state_dict(), optimizer.state_dict(), None, {"step": 1}, 1
        )
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=read)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        checkpoint.load_checkpoint(path, model, optimizer, None)
        step(model, optimizer)
        results.append(model.weight.detach().clone())
    torch.testing.assert_close(results[1], results[0])
