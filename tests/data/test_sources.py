"""What names stand for: built-in data sets, and those of the hub."""

import hashlib
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import parquet_folder

from cifar_accel.data.decode import load_dataset
from cifar_accel.data.sources import find_source, hub_marker
from cifar_accel.errors import BadInput
from cifar_accel.options.options import BUILT_IN

# ---- built-in data sets


def test_digits(cache):
    from sklearn.datasets import load_digits

    data = load_dataset("digits", cache, 32)
    assert data.train.images.shape == (1438, 3, 8, 8)
    assert data.test.images.shape == (359, 3, 8, 8)
    assert data.train.images.max() == 255
    assert np.bincount(data.test.labels).min() >= 34
    # Every digit once, in either split.
    every = np.concatenate([data.train.images, data.test.images])[:, 0].reshape(-1, 64)
    source = np.round(load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, every)) == sorted(map(bytes, source))


def test_real_cifar100(cifar, cache):
    data = load_dataset(cifar, cache, 32)
    assert len(data.train) == 50_000
    assert len(data.test) == 10_000
    assert data.train.classes[:3] == ["apple", "aquarium_fish", "baby"]
    assert np.bincount(data.train.labels).tolist() == [500] * 100
    assert np.bincount(data.test.labels).tolist() == [100] * 100
    means = data.train.images.mean((0, 2, 3)) / 255
    np.testing.assert_allclose(means, (0.5071, 0.4865, 0.4409), atol=1e-4)


def test_names_of_our_own_are_those_that_options_know():
    with pytest.raises(BadInput, match=f"there are {', '.join(BUILT_IN)}, a folder or a hub id"):
        find_source("nothing", Path("data"), print)


class Command:
    """A shell command that unpickling runs."""

    def __init__(self, text):
        self.text = text

    def __reduce__(self):
        return os.system, (self.text,)


def test_torchvisions_cifar_files(tmp_path, monkeypatch):
    """The download's own format, made here, md5 included: a wrong md5 is never unpickled."""
    from torchvision import datasets

    root = tmp_path / "cache"
    base = root / "cifar-100-python"
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in (("train", 30), ("test", 10)):
        pixels = rng.integers(0, 256, (n, 3072), np.uint8)
        content = {"data": pixels, "fine_labels": [i % 5 for i in range(n)]}
        (base / split).write_bytes(pickle.dumps(content))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": list("abcde")}))

    def md5(name):
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", md5("train")]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", md5("test")]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", datasets.CIFAR100.meta | {"md5": md5("meta")})
    with tarfile.open(root / "cifar-100-python.tar.gz", "w:gz") as tar:
        tar.add(base, "cifar-100-python")
    data = load_dataset("cifar100", str(root), 32)
    assert len(data.train) == 30
    assert data.train.classes == list("abcde")
    content = pickle.loads((base / "test").read_bytes())
    assert np.array_equal(data.test.images.reshape(10, -1), content["data"])
    assert data.test.labels.tolist() == content["fine_labels"]

    # What has another md5 is downloaded anew, which fails here, and never unpickled.
    other = tmp_path / "other"
    shutil.copytree(base, other / base.name)
    (other / base.name / "train").write_bytes(pickle.dumps(Command(f"touch {tmp_path}/ran")))
    monkeypatch.setattr(datasets.CIFAR100, "url", "http://127.0.0.1:9/nothing")
    source = find_source("cifar100", other, print)
    with pytest.raises(BadInput, match="cannot be downloaded"):
        list(source.read())
    assert not (tmp_path / "ran").exists()


# ---- the hub


def test_a_whole_hub_data_set_is_read_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = tmp_path / "cache" / "hub" / "datasets--some--set"
    parquet_folder(repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    hub_marker(tmp_path / "cache", "some/set").touch()
    data = load_dataset("some/set", str(tmp_path / "cache"), 32, lambda line: None)
    assert len(data.train) == 12


def test_a_hub_data_set_that_broke_off_is_not_taken_for_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "hub" / "datasets--some--set").mkdir(parents=True)
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE forbids to ask the hub"):
        load_dataset("some/set", str(tmp_path), 32)


def test_a_hub_data_set_that_was_removed_is_downloaded_again(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_marker(tmp_path, "some/set").touch()
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE forbids to ask the hub"):
        load_dataset("some/set", str(tmp_path), 32)
