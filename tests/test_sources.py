import hashlib
import io
import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_accel.data.datasets import hold_out, limit
from cifar_accel.data.decode import load_dataset
from cifar_accel.errors import BadInput


def picture(seed: int, size=(32, 32), ending="png") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(
        out, {"jpg": "jpeg"}.get(ending, ending)
    )
    return out.getvalue()


def image_folder(root: Path, sizes=((32, 32),), per_class=3, splits=("train", "test")) -> Path:
    for split in splits:
        for c, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                seed = 1000 * c + i + (500 if split == "test" else 0)
                (folder / f"{i}.png").write_bytes(picture(seed, sizes[i % len(sizes)]))
    return root


def parquet_folder(
    root: Path, rows=12, columns=("img", "fine_label", "coarse_label"), names=True, broken=None
) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(parents=True, exist_ok=True)
    for split, start in (("train", 0), ("test", rows)):
        images = [{"bytes": picture(start + i), "path": f"{i}.png"} for i in range(rows)]
        if broken is not None and split == "train":
            images[broken]["bytes"] = images[broken]["bytes"][:200]
        values = {
            "img": images,
            "fine_label": [i % 4 for i in range(rows)],
            "coarse_label": [i % 2 for i in range(rows)],
        }
        values |= {"text": ["x"] * rows, "label": values["fine_label"]}
        table = pa.table({c: values[c] for c in columns})
        if names:
            label = {"names": ["ant", "bee", "cow", "dog"], "_type": "ClassLabel"}
            coarse = {"names": ["insect", "mammal"], "_type": "ClassLabel"}
            features = {"fine_label": label, "label": label, "coarse_label": coarse}
            table = table.replace_schema_metadata(
                {"huggingface": json.dumps({"info": {"features": features}})}
            )
        pq.write_table(table, root / f"{split}-00000-of-00001.parquet")
    return root


def test_digits(cache):
    data = load_dataset("digits", cache, 32)
    assert data.train.images.shape == (1438, 3, 8, 8) and data.test.images.shape == (359, 3, 8, 8)
    assert data.train.images.max() == 255 and np.bincount(data.test.labels).min() >= 34
    from sklearn.datasets import load_digits

    every = np.concatenate([data.train.images, data.test.images])[:, 0].reshape(-1, 64)
    source = np.round(load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, every)) == sorted(map(bytes, source))


def test_real_cifar100(cifar, cache):
    data = load_dataset(cifar, cache, 32)
    assert (
        len(data.train),
        len(data.test),
        len(data.train.classes),
        len(data.train.coarse_classes),
    ) == (
        50_000,
        10_000,
        100,
        20,
    )
    assert np.all(np.bincount(data.train.labels) == 500) and np.all(
        np.bincount(data.test.coarse_labels) == 500
    )
    np.testing.assert_allclose(
        data.train.images.mean((0, 2, 3)) / 255, (0.5071, 0.4865, 0.4409), atol=1e-4
    )
    assert data.train.classes[:3] == ["apple", "aquarium_fish", "baby"]
    # Each fine class lies in one coarse class, and apples are fruit.
    pairs = set(zip(data.train.labels.tolist(), data.train.coarse_labels.tolist(), strict=True))
    assert len(pairs) == 100 and data.train.coarse_classes[dict(pairs)[0]] == "fruit_and_vegetables"


def test_a_second_start_decodes_nothing(tmp_path):
    said = []
    folder = parquet_folder(tmp_path / "data")
    first = load_dataset(str(folder), str(tmp_path / "cache"), 32, said.append)
    assert len(said) == 1
    second = load_dataset(str(folder), str(tmp_path / "cache"), 32, said.append)
    assert len(said) == 1 and first.fingerprint == second.fingerprint
    parquet_folder(folder, rows=16)  # other content under the same name
    assert (
        len(load_dataset(str(folder), str(tmp_path / "cache"), 32, said.append).train) == 16
        and len(said) == 2
    )


def test_many_processes_decode_once(tmp_path):
    said = []
    folder = str(image_folder(tmp_path / "data"))
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(
                lambda i: load_dataset(folder, str(tmp_path / "cache"), 32, said.append), range(4)
            )
        )
    assert len(said) == 1 and len({d.fingerprint for d in found}) == 1


def test_parquet_in_hub_layout(tmp_path):
    data = load_dataset(str(parquet_folder(tmp_path / "data")), str(tmp_path / "cache"), 32)
    assert data.train.classes == ["ant", "bee", "cow", "dog"] and data.train.coarse_classes == [
        "insect",
        "mammal",
    ]
    assert (
        data.train.labels.tolist() == [i % 4 for i in range(12)]
        and data.test.coarse_labels.tolist() == [0, 1] * 6
    )
    decoded = np.asarray(Image.open(io.BytesIO(picture(12 + 5)))).transpose(2, 0, 1)
    assert np.array_equal(data.test.images[5], decoded)
    plain = parquet_folder(tmp_path / "plain", columns=("img", "label"), names=False)
    assert load_dataset(str(plain), str(tmp_path / "cache"), 32).train.classes == [
        "0",
        "1",
        "2",
        "3",
    ]


def test_validation_files_are_not_training_files(tmp_path):
    folder = parquet_folder(tmp_path / "data")
    (folder / "test-00000-of-00001.parquet").rename(folder / "validation-00000-of-00001.parquet")
    data = load_dataset(str(folder), str(tmp_path / "cache"), 32)  # in place of a test split
    assert (len(data.train), len(data.test)) == (12, 12)
    parquet_folder(folder, rows=8)
    data = load_dataset(str(folder), str(tmp_path / "cache"), 32)  # beside one: left out
    assert (len(data.train), len(data.test)) == (8, 8)


DAMAGE = {
    "labels cut short": ("train_labels.npy", lambda f: f.write_bytes(f.read_bytes()[:90])),
    "no labels": ("train_labels.npy", lambda f: f.write_bytes(b"")),
    "other labels": ("train_labels.npy", lambda f: np.save(f, np.zeros(3, np.int64))),
    "labels of another kind": ("train_labels.npy", lambda f: np.save(f, np.zeros(12))),
    "a list": ("meta.json", lambda f: f.write_text("[1]")),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_cache_is_made_anew(tmp_path, how):
    folder, said, (name, damage) = parquet_folder(tmp_path / "data"), [], DAMAGE[how]
    first = load_dataset(str(folder), str(tmp_path / "cache"), 32)
    damage(next(tmp_path.glob(f"cache/decoded-*/{name}")))
    again = load_dataset(str(folder), str(tmp_path / "cache"), 32, said.append)
    assert "is damaged" in said[0] and len(again.train) == 12
    assert np.array_equal(again.train.labels, first.train.labels)


def test_sixteen_bit_and_rotated_images(tmp_path):
    folder = image_folder(tmp_path / "data")
    ramp = (np.arange(32 * 32).reshape(32, 32) * 64).astype(np.uint16)
    Image.fromarray(ramp).save(folder / "train" / "cat" / "0.png")
    image = Image.open(io.BytesIO(picture(7)))
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(folder / "train" / "cat" / "1.png", exif=exif)
    train = load_dataset(str(folder), str(tmp_path / "cache"), 32).train
    assert np.array_equal(train.images[0], np.stack([ramp >> 8] * 3))
    assert np.array_equal(train.images[1], np.asarray(image)[::-1, ::-1].transpose(2, 0, 1))


def test_image_folder(tmp_path):
    data = load_dataset(str(image_folder(tmp_path / "data")), str(tmp_path / "cache"), 48)
    assert data.train.classes == ["cat", "dog"] and data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.images.shape == (6, 3, 32, 32)  # of one size: left as they are
    assert np.array_equal(
        data.test.images[4], np.asarray(Image.open(io.BytesIO(picture(1501)))).transpose(2, 0, 1)
    )


def test_images_of_unequal_size_are_brought_to_one(tmp_path):
    folder = image_folder(tmp_path / "data", sizes=((40, 60), (32, 32), (64, 48)))
    shapes = [
        load_dataset(str(folder), str(tmp_path / "cache"), side).train.images.shape
        for side in (24, 16, 24)
    ]
    assert shapes == [(6, 3, 24, 24), (6, 3, 16, 16), (6, 3, 24, 24)]


def test_torchvisions_cifar_files(tmp_path, monkeypatch):
    """The download's own format, made here, md5 included: a wrong md5 is never unpickled."""
    from torchvision import datasets

    root, base = tmp_path / "cache", tmp_path / "cache" / "cifar-100-python"
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in (("train", 30), ("test", 10)):
        rows = {
            "data": rng.integers(0, 256, (n, 3072), np.uint8),
            "fine_labels": [i % 5 for i in range(n)],
            "coarse_labels": [i % 5 // 3 for i in range(n)],
        }
        (base / split).write_bytes(pickle.dumps(rows))
    (base / "meta").write_bytes(
        pickle.dumps({"fine_label_names": list("abcde"), "coarse_label_names": ["x", "y"]})
    )

    def md5(name):
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", md5("train")]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", md5("test")]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", datasets.CIFAR100.meta | {"md5": md5("meta")})
    with tarfile.open(root / "cifar-100-python.tar.gz", "w:gz") as tar:
        tar.add(base, "cifar-100-python")
    data = load_dataset("cifar100", str(root), 32)
    assert (len(data.train), len(data.test), data.train.classes, data.train.coarse_classes) == (
        30,
        10,
        list("abcde"),
        ["x", "y"],
    )
    rows = pickle.loads((base / "test").read_bytes())
    assert np.array_equal(data.test.images.reshape(10, -1), rows["data"])
    assert data.test.coarse_labels.tolist() == rows["coarse_labels"]


def test_limits_and_held_out_images(cache):
    train = load_dataset("digits", cache, 32).train
    small = limit(train, 100, "--limit-train", 1)
    assert len(small) == 100 and np.bincount(small.labels).min() >= 9
    kept, held = hold_out(train, 0.2, 1)
    assert len(kept) + len(held) == len(train) and np.bincount(held.labels).min() >= 27
    assert limit(train, 0, "--limit-train", 1) is train


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: "no-such-set", "unknown"),
        (lambda p: "cifar-100", "did you mean cifar100"),
        (lambda p: str(p / "nowhere"), "no such folder"),
        (lambda p: str(p), "neither *.parquet files nor a train/ folder"),
        (lambda p: str(image_folder(p / "a", splits=("train",))), "no test/"),
        (lambda p: str(parquet_folder(p / "a", columns=("text", "label"))), "no image column"),
        (lambda p: str(parquet_folder(p / "a", columns=("img", "text"))), "no label column"),
        (lambda p: str(parquet_folder(p / "a", broken=7)), "row 7"),
        (lambda p: str(_empty_class(p / "a")), "class folder holds no image"),
        (lambda p: str(_cut(p / "a")), "1.png is not a whole image"),
        (lambda p: str(_unknown_class(p / "a")), "no class of this name"),
        (lambda p: str(_no_parquet(p / "a")), "cannot be read as parquet"),
    ],
)
def test_bad_data_is_named(tmp_path, make, message):
    with pytest.raises(BadInput, match="--dataset") as caught:
        load_dataset(make(tmp_path), str(tmp_path / "cache"), 32)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not [p for p in tmp_path.glob("cache/*") if p.suffix != ".lock"], "nothing half-written"


def _empty_class(root):
    image_folder(root)
    (root / "train" / "eel").mkdir()
    return root


def _cut(root):
    image_folder(root)
    file = root / "train" / "dog" / "1.png"
    file.write_bytes(file.read_bytes()[:-1500])
    return root


def _unknown_class(root):
    image_folder(root)
    (root / "test" / "dog").rename(root / "test" / "wolf")
    return root


def _no_parquet(root):
    parquet_folder(root)
    for file in root.glob("*.parquet"):
        file.write_bytes(b"PAR1 nothing of the kind")
    return root
