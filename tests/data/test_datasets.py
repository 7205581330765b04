"""What --dataset may name, and the bad data that is refused in one line."""

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import image_folder, parquet_folder, picture
from PIL import Image

from cifar_accel.data.datasets import hold_out, hub_marker, limit
from cifar_accel.data.decode import load_dataset
from cifar_accel.errors import BadInput


def pixels_of(file: bytes) -> np.ndarray:
    """uint8 [3, H, W]."""
    return np.asarray(Image.open(io.BytesIO(file))).transpose(2, 0, 1)


def load(folder: Path, tmp_path: Path, image_size=32):
    return load_dataset(str(folder), str(tmp_path / "cache"), image_size, lambda line: None)


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


# ---- folders


def test_parquet_in_hub_layout(tmp_path):
    data = load(parquet_folder(tmp_path / "data"), tmp_path)
    assert data.train.classes == ["ant", "bee", "cow", "dog"]
    assert data.train.labels.tolist() == [i % 4 for i in range(12)]
    assert np.array_equal(data.test.images[5], pixels_of(picture(12 + 5)))


def test_classes_without_names_are_numbers(tmp_path):
    folder = parquet_folder(tmp_path / "data", columns=("img", "label"), names=False)
    assert load(folder, tmp_path).train.classes == ["0", "1", "2", "3"]


def test_other_columns_are_left_alone(tmp_path):
    folder = parquet_folder(tmp_path / "data", columns=("text", "coarse_label", "img", "label"))
    assert load(folder, tmp_path).train.labels.tolist() == [i % 4 for i in range(12)]


def test_validation_files_stand_in_for_a_test_split(tmp_path):
    folder = parquet_folder(tmp_path / "data")
    (folder / "test-00000-of-00001.parquet").rename(folder / "validation-00000-of-00001.parquet")
    data = load(folder, tmp_path)
    assert len(data.train) == 12
    assert len(data.test) == 12


def test_validation_files_are_not_training_files(tmp_path):
    folder = parquet_folder(tmp_path / "data")
    (folder / "test-00000-of-00001.parquet").rename(folder / "validation-00000-of-00001.parquet")
    parquet_folder(folder, rows=8)
    data = load(folder, tmp_path)
    assert len(data.train) == 8
    assert len(data.test) == 8


def test_image_folder(tmp_path):
    data = load(image_folder(tmp_path / "data"), tmp_path, image_size=48)
    assert data.train.classes == ["cat", "dog"]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    # Of one size, so they stay as they are.
    assert data.train.images.shape == (6, 3, 32, 32)
    assert np.array_equal(data.test.images[4], pixels_of(picture(1501)))


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
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE forbids to download it"):
        load_dataset("some/set", str(tmp_path), 32)


def test_a_hub_data_set_that_was_removed_is_downloaded_again(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_marker(tmp_path, "some/set").touch()
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE forbids to download it"):
        load_dataset("some/set", str(tmp_path), 32)


# ---- parts of a split


def test_limits(cache):
    train = load_dataset("digits", cache, 32).train
    small = limit(train, 100, "--limit-train", 1)
    assert len(small) == 100
    assert np.bincount(small.labels).min() >= 9
    assert limit(train, 0, "--limit-train", 1) is train
    with pytest.raises(BadInput, match="--limit-train 1439: there are only 1,438 images"):
        limit(train, 1439, "--limit-train", 1)


def test_held_out_images_are_not_trained_on(cache):
    train = load_dataset("digits", cache, 32).train
    numbered = np.arange(len(train))
    train = train.subset(numbered)
    train.images[:, 0, 0, 0] = numbered % 256
    train.images[:, 0, 0, 1] = numbered // 256
    kept, held = hold_out(train, 0.2, 1)
    assert np.bincount(held.labels).min() >= 27
    both = np.concatenate([kept.images, held.images])[:, 0, 0, :2].astype(int)
    assert sorted(both[:, 0] + 256 * both[:, 1]) == numbered.tolist()


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_neither_part_may_be_empty(cache, fraction):
    with pytest.raises(BadInput, match="--validation-fraction"):
        hold_out(load_dataset("digits", cache, 32).train, fraction, 1)


# ---- bad data


def empty_class(root):
    image_folder(root)
    (root / "train" / "eel").mkdir()
    return root


def cut_image(root):
    image_folder(root)
    file = root / "train" / "dog" / "1.png"
    file.write_bytes(file.read_bytes()[:-1500])
    return root


def unknown_class(root):
    image_folder(root)
    (root / "test" / "dog").rename(root / "test" / "wolf")
    return root


def no_classes(root):
    (root / "train").mkdir(parents=True)
    (root / "test").mkdir()
    return root


def no_parquet(root):
    parquet_folder(root)
    for file in root.glob("*.parquet"):
        file.write_bytes(b"PAR1 nothing of the kind")
    return root


def no_test_files(root):
    parquet_folder(root)
    (root / "test-00000-of-00001.parquet").unlink()
    return root


def rewritten(root, change):
    """A parquet folder, its training table changed."""
    import pyarrow.parquet as pq

    file = parquet_folder(root) / "train-00000-of-00001.parquet"
    pq.write_table(change(pq.read_table(file)), file)
    return root


def cut_cell(root):
    import pyarrow as pa

    def cut(table):
        cells = table.column("img").to_pylist()
        cells[7]["bytes"] = cells[7]["bytes"][:200]
        return table.set_column(0, "img", pa.array(cells))

    return rewritten(root, cut)


def words_for_labels(root):
    import pyarrow as pa

    return rewritten(root, lambda table: table.set_column(1, "fine_label", pa.array(["x"] * 12)))


def a_label_too_many(root):
    import pyarrow as pa

    return rewritten(root, lambda table: table.set_column(1, "fine_label", pa.array([4] * 12)))


def no_rows(root):
    return rewritten(root, lambda table: table.slice(0, 0))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: "no-such-set", "unknown"),
        (lambda p: "cifar-100", "did you mean cifar100"),
        (lambda p: str(p / "nowhere"), "no such folder"),
        (lambda p: str(p), "neither *.parquet files nor a train/ folder"),
        (lambda p: str(image_folder(p / "a", splits=("train",))), "no test/"),
        (lambda p: str(no_classes(p / "a")), "train: is empty"),
        (lambda p: str(empty_class(p / "a")), "class folder holds no image"),
        (lambda p: str(unknown_class(p / "a")), "no class of this name"),
        (lambda p: str(cut_image(p / "a")), "1.png is not a whole image"),
        (lambda p: str(parquet_folder(p / "a", columns=("text", "label"))), "no image column"),
        (lambda p: str(parquet_folder(p / "a", columns=("img", "text"))), "no label column"),
        (lambda p: str(no_test_files(p / "a")), "no parquet file is named test-*.parquet"),
        (lambda p: str(no_parquet(p / "a")), "cannot be read as parquet"),
        (lambda p: str(cut_cell(p / "a")), "row 7 of train-00000-of-00001.parquet"),
        (lambda p: str(words_for_labels(p / "a")), "must hold whole numbers without gaps"),
        (lambda p: str(a_label_too_many(p / "a")), "a label of the train split is not in 0..3"),
        (lambda p: str(no_rows(p / "a")), "the train split holds no image"),
    ],
)
def test_bad_data_is_named(tmp_path, make, message):
    with pytest.raises(BadInput, match="--dataset") as caught:
        load_dataset(make(tmp_path), str(tmp_path / "cache"), 32)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    half_written = [p for p in tmp_path.glob("cache/*") if p.suffix != ".lock"]
    assert not half_written
