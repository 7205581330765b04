"""Decoding happens once, gives the images that are there, and survives damage."""

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import image_folder, parquet_folder, picture
from PIL import Image
from test_datasets import load

from cifar_accel.data.decode import load_dataset
from cifar_accel.errors import BadInput


def test_a_second_start_decodes_nothing(tmp_path):
    said = []
    folder = str(parquet_folder(tmp_path / "data"))
    first = load_dataset(folder, str(tmp_path / "cache"), 32, said.append)
    second = load_dataset(folder, str(tmp_path / "cache"), 32, said.append)
    assert len(said) == 1
    assert first.fingerprint == second.fingerprint


def test_other_content_under_the_same_name_is_another_data_set(tmp_path):
    said = []
    folder = parquet_folder(tmp_path / "data")
    load_dataset(str(folder), str(tmp_path / "cache"), 32, said.append)
    parquet_folder(folder, rows=16)
    data = load_dataset(str(folder), str(tmp_path / "cache"), 32, said.append)
    assert len(data.train) == 16
    assert len(said) == 2


def test_many_processes_decode_once(tmp_path):
    said = []
    folder = str(image_folder(tmp_path / "data"))

    def start(i):
        return load_dataset(folder, str(tmp_path / "cache"), 32, said.append)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(start, range(4)))
    assert len(said) == 1
    assert len({data.fingerprint for data in found}) == 1


DAMAGE = {
    "labels cut short": ("train_labels.npy", lambda f: f.write_bytes(f.read_bytes()[:90])),
    "no labels": ("train_labels.npy", lambda f: f.write_bytes(b"")),
    "other labels": ("train_labels.npy", lambda f: np.save(f, np.zeros(3, np.int64))),
    "labels of another kind": ("train_labels.npy", lambda f: np.save(f, np.zeros(12))),
    "no images": ("test_images.npy", lambda f: f.unlink()),
    "a list": ("meta.json", lambda f: f.write_text("[1]")),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_cache_is_made_anew(tmp_path, how):
    name, damage = DAMAGE[how]
    folder = str(parquet_folder(tmp_path / "data"))
    first = load_dataset(folder, str(tmp_path / "cache"), 32)
    damage(next(tmp_path.glob(f"cache/decoded-*/{name}")))
    said = []
    again = load_dataset(folder, str(tmp_path / "cache"), 32, said.append)
    assert "is damaged" in said[0]
    assert np.array_equal(again.train.labels, first.train.labels)
    assert np.array_equal(again.test.images, first.test.images)


def test_arrays_of_older_versions_are_read(tmp_path):
    """They hold coarse labels, which nothing reads any more, under the same key."""
    folder = str(parquet_folder(tmp_path / "data"))
    first = load_dataset(folder, str(tmp_path / "cache"), 32)
    cached = tmp_path / "cache" / f"decoded-{first.fingerprint}"
    for split in ("train", "test"):
        np.save(cached / f"{split}_coarse.npy", np.arange(12) % 2)
    meta = json.loads((cached / "meta.json").read_text())
    meta["coarse_classes"] = ["insect", "mammal"]
    (cached / "meta.json").write_text(json.dumps(meta))
    said = []
    again = load_dataset(folder, str(tmp_path / "cache"), 32, said.append)
    assert not said
    assert np.array_equal(again.train.images, first.train.images)


def test_the_fingerprint_never_changes_between_versions(tmp_path):
    """A resumed run compares it: names, sizes and bytes of the files, hashed."""
    root = tmp_path / "data"
    folders = [root / split / name for split in ("train", "test") for name in ("cat", "dog")]
    for folder in folders:
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "a.bmp")
    content = hashlib.blake2b(digest_size=16)
    for folder in folders:
        file = folder / "a.bmp"
        content.update(f"{file.relative_to(root)}\0{file.stat().st_size}\0".encode())
        content.update(file.read_bytes())
    key = hashlib.blake2b(f"1 {content.hexdigest()}".encode(), digest_size=12).hexdigest()
    assert load(root, tmp_path).fingerprint == key


def test_sixteen_bit_and_rotated_images(tmp_path):
    folder = image_folder(tmp_path / "data")
    ramp = (np.arange(32 * 32).reshape(32, 32) * 64).astype(np.uint16)
    Image.fromarray(ramp).save(folder / "train" / "cat" / "0.png")
    image = Image.open(io.BytesIO(picture(7)))
    exif = image.getexif()
    upside_down = 3
    exif[0x0112] = upside_down
    image.save(folder / "train" / "cat" / "1.png", exif=exif)
    images = load(folder, tmp_path).train.images
    assert np.array_equal(images[0], np.stack([ramp >> 8] * 3))
    assert np.array_equal(images[1], np.asarray(image)[::-1, ::-1].transpose(2, 0, 1))


def test_images_of_unequal_size_are_brought_to_one(tmp_path):
    folder = image_folder(tmp_path / "data", sizes=((40, 60), (32, 32), (64, 48)))
    for side in (24, 16, 24):
        assert load(folder, tmp_path, side).train.images.shape == (6, 3, side, side)
    made = sorted(p.name[-4:] for p in tmp_path.glob("cache/decoded-*") if p.is_dir())
    assert made == ["16px", "24px"]


def test_a_data_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="--data-dir .*: Not a directory"):
        load_dataset("digits", str(tmp_path / "file" / "below"), 32)
