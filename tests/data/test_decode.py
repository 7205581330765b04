"""Decoding happens once, gives the images that are there, and survives damage."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import forked_runs
import numpy as np
import pytest
from conftest import image_folder, parquet_folder, picture, wait_for
from filelock import FileLock
from PIL import Image
from test_folders import load

from cifar_accel.data.decode import (
    MOST_STORED,
    _resize_and_cut,
    load_dataset,
    load_images,
    size_to_store,
)
from cifar_accel.errors import BadInput
from cifar_accel.options.options import TrainingArguments


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of its own of 200 KiB; skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def cache_folder(cache: Path) -> Path:
    """The one folder of arrays below `cache`."""
    (folder,) = cache.glob("decoded-*/")
    return folder


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
    assert len([line for line in said if "decoding" in line]) == 1
    assert len({data.fingerprint for data in found}) == 1


def test_a_process_that_waits_says_so(tmp_path):
    said = []
    cache = tmp_path / "cache"
    key = load_dataset("digits", str(tmp_path / "other"), 32).fingerprint
    lock = FileLock(cache / f"decoded-v2-{key}.lock")
    cache.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with lock:
            waiting = pool.submit(load_dataset, "digits", str(cache), 32, said.append)
            wait_for(lambda: said, 10)
            assert "waiting for another process" in said[0]
            assert lock.lock_file in said[0]
        assert len(waiting.result().train) == 1438
    # Nothing is left that somebody could wait for.
    assert os.listdir(cache) == [f"decoded-v2-{key}"]


def test_a_lock_file_is_left_where_there_are_no_locks(tmp_path, stub):
    """A killed process left it, of a system that has locks: the wait has no end, so it is said."""
    cache = tmp_path / "cache"
    key = load_dataset("digits", str(tmp_path / "other"), 32).fingerprint
    lock = cache / f"decoded-v2-{key}.lock"
    cache.mkdir()
    lock.touch()
    environment = stub("int flock(int fd, int how) { errno = ENOSYS; return -1; }")
    code = "import sys; from cifar_accel.data.decode import load_dataset as load; "
    code += "load('digits', sys.argv[1], 32, lambda line: print(line, flush=True))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    process = subprocess.Popen([*command, cache], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = process.stdout.readline().decode()
    assert said.endswith(f"if there is none, remove {lock}\n")
    lock.unlink()
    assert "decoding" in process.communicate(timeout=30)[0].decode()
    assert process.returncode == 0
    assert os.listdir(cache) == [f"decoded-v2-{key}"]


def test_a_signal_ends_the_wait(tmp_path):
    """As any signal before the first step: exit code 143, nothing left behind."""
    cache = tmp_path / "cache"
    key = load_dataset("digits", str(tmp_path / "other"), 32).fingerprint
    cache.mkdir()
    words = "--dataset digits --recipe digits --model test_nfnet --no-pretrained --tracker none"
    places = ["--data-dir", cache, "--save-dir", tmp_path / "ck"]
    log = tmp_path / "log"
    log.touch()
    with FileLock(cache / f"decoded-v2-{key}.lock"):
        training = forked_runs.Training([*words.split(), *places], log)
        wait_for(lambda: "waiting for another process" in log.read_text(), 60)
        os.kill(training.ranks[0].pid, signal.SIGTERM)
        assert training.wait(20)
    assert training.codes == [143]


# ---- arrays that are there


def flip_a_bit(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "labels cut short": ("train_labels.npy", lambda f: f.write_bytes(f.read_bytes()[:90])),
    "no labels": ("train_labels.npy", lambda f: f.write_bytes(b"")),
    "other labels": ("train_labels.npy", lambda f: np.save(f, np.zeros(3, np.int64))),
    "labels of another kind": ("train_labels.npy", lambda f: np.save(f, np.zeros(12))),
    "one other label": ("test_labels.npy", lambda f: flip_a_bit(f, -8)),
    "one other pixel": ("train_images.npy", lambda f: flip_a_bit(f, 1000)),
    "another name of a class": ("classes.json", lambda f: flip_a_bit(f, 3)),
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


def test_a_folder_of_arrays_says_which_data_set_it_holds(tmp_path):
    folder = str(parquet_folder(tmp_path / "data"))
    load_dataset(folder, str(tmp_path / "cache"), 32)
    (meta,) = tmp_path.glob("cache/decoded-*/meta.json")
    assert meta.read_text().startswith(json.dumps({"name": folder})[:-1])


def test_files_that_change_while_they_are_decoded_are_refused(tmp_path):
    folder = parquet_folder(tmp_path / "data")
    others = parquet_folder(tmp_path / "others", rows=8)

    def change_files(line):
        for file in others.glob("*.parquet"):
            file.replace(folder / file.name)

    with pytest.raises(BadInput, match="its files changed while they were read"):
        load_dataset(str(folder), str(tmp_path / "cache"), 32, change_files)
    assert not list(tmp_path.glob("cache/decoded-*/"))
    assert len(load_dataset(str(folder), str(tmp_path / "cache"), 32, print).test) == 8


def test_arrays_of_other_versions_are_not_looked_at(tmp_path):
    """Their labels may have been joined by position. The fingerprint stays, for runs go on."""
    folder = str(parquet_folder(tmp_path / "data"))
    first = load_dataset(folder, str(tmp_path / "cache"), 32)
    made = cache_folder(tmp_path / "cache")
    old = made.rename(made.with_name(f"decoded-{first.fingerprint}"))
    (old / "meta.json").write_text(json.dumps({"name": folder, "classes": ["other"] * 4}))
    said = []
    again = load_dataset(folder, str(tmp_path / "cache"), 32, said.append)
    assert "decoding" in said[0]
    assert again.fingerprint == first.fingerprint
    assert again.train.classes == first.train.classes
    assert old.is_dir()


def test_arrays_on_a_disk_that_may_only_be_read(tmp_path, disk):
    """As another user's: no lock is taken and nothing written."""
    folder = str(parquet_folder(tmp_path / "data"))
    first = load_dataset(folder, str(disk), 32)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    said = []
    again = load_dataset(folder, str(disk), 32, said.append)
    assert not said
    assert np.array_equal(again.train.images, first.train.images)

    # Where something must be made, it is said that it cannot.
    parquet_folder(tmp_path / "data", rows=8)
    with pytest.raises(BadInput, match="--data-dir .*: Read-only file system"):
        load_dataset(folder, str(disk), 32)


def test_whole_arrays_need_no_lock(tmp_path):
    folder = str(parquet_folder(tmp_path / "data"))
    first = load_dataset(folder, str(tmp_path / "cache"), 32)
    with FileLock(tmp_path / "cache" / f"decoded-v2-{first.fingerprint}.lock"):
        load_dataset(folder, str(tmp_path / "cache"), 32)


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


# ---- images


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


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused(tmp_path, kind):
    folder = image_folder(tmp_path / "data")
    Image.fromarray(np.ones((32, 32), kind)).save(folder / "train" / "cat" / "0.png", "TIFF")
    with pytest.raises(BadInput, match="32 bits a pixel"):
        load(folder, tmp_path)


def test_images_of_unequal_size_are_brought_to_one(tmp_path):
    folder = image_folder(tmp_path / "data", sizes=((40, 60), (32, 32), (64, 48)))
    for side in (24, 16, 24):
        assert load(folder, tmp_path, side).train.images.shape == (6, 3, side, side)
    made = sorted(p.name[-4:] for p in tmp_path.glob("cache/decoded-*") if p.is_dir())
    assert made == ["16px", "24px"]


def load_for(args, said=None):
    return load_images(args, said.append if said is not None else lambda line: None)


def test_what_is_never_seen_of_the_images_is_said(tmp_path):
    """At the first start and at every later one."""
    folder = image_folder(tmp_path / "data", sizes=((60, 157), (32, 32), (48, 64)))
    args = TrainingArguments(
        dataset=str(folder), data_dir=str(tmp_path / "cache"), stored_size=24, scale=None
    )
    first, again = [], []
    load_for(args, first)
    load_for(args, again)
    assert "large or of unequal size; each is brought to 24x24" in first[-2]
    # (1 - 60/157 + 0 + 1 - 48/64) / 3, and 24 * 24 of 157 * 60 + 32 * 32 + 64 * 48 pixels.
    assert first[-1] == again[-1]
    assert "copies of 24x24 have 13% of the images' pixels" in again[-1]
    assert "loses 29% of its area on average, 62% at most (157x60)" in again[-1]
    assert len(again) == 1


def test_images_of_one_size_that_are_not_square(tmp_path):
    folder = str(image_folder(tmp_path / "data", sizes=((30, 40),)))
    said = []
    data = load_dataset(folder, str(tmp_path / "cache"), 32, said.append)
    assert data.train.images.shape[2:] == (30, 40)
    assert said[-1] == "data: of images of 40x30 a test sees the centre; 25% are cut away"


@pytest.mark.parametrize(
    "options, side",
    [
        # The smallest crop of the report has 8 % of the area; its test cuts an eighth away.
        (dict(image_size=32, scale=(0.08, 1.0), crop_pct=0.875), 114),
        (dict(image_size=32, scale=None, crop_pct=0.875), 37),
        (dict(image_size="64:0.4,96:0.7,128"), 128),
        (dict(image_size=224, scale=(0.08, 1.0)), MOST_STORED),
        (dict(image_size=640), 640),
    ],
)
def test_no_crop_enlarges_a_copy(options, side):
    assert size_to_store(TrainingArguments(**options)) == side


def test_a_budget_may_still_choose_larger_images():
    assert size_to_store(TrainingArguments(image_size=128), grows_to=224) == 224


def test_large_images_of_one_size_are_copied_too(tmp_path):
    """But a run of an earlier version keeps them; either finds what the other has made."""
    folder = image_folder(tmp_path / "data", sizes=((510, 520),))
    new = TrainingArguments(
        dataset=str(folder), data_dir=str(tmp_path / "cache"), image_size=48, stored_size=64
    )
    old = replace(new, stored_size=None)
    for args, shape in ((new, (64, 64)), (old, (510, 520)), (new, (64, 64)), (old, (510, 520))):
        assert load_for(args).train.images.shape[2:] == shape
    # Whoever asks for large copies has large images.
    assert load_for(replace(new, stored_size=600)).train.images.shape[2:] == (510, 520)
    # Those arrays stay for others when a run needs copies of another size.
    load_for(replace(new, stored_size=96))
    lines = []
    load_images(replace(new, stored_size=600), lines.append)
    assert not any("decoding" in line for line in lines)


def test_a_data_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="--data-dir .*: Not a directory"):
        load_dataset("digits", str(tmp_path / "file" / "below"), 32)


@pytest.mark.parametrize("images", [72, 120])
def test_a_disk_that_fills_up(tmp_path, disk, images):
    """In the second split, and in the first: a mapped file would end the process with SIGBUS."""
    folder = str(parquet_folder(tmp_path / "data", rows=images))
    with pytest.raises(BadInput, match="--data-dir .*: No space left on device"):
        load_dataset(folder, str(disk), 32)
    assert not list(disk.iterdir())


def test_arrays_that_fill_a_disk(disk):
    with pytest.raises(BadInput, match="--data-dir .*: No space left on device"):
        load_dataset("digits", str(disk), 32)
    assert not list(disk.iterdir())


def resized_whole(image: Image.Image, side: int) -> Image.Image:
    """Resized, then cut to its centre, as every version has done it."""
    scale = side / min(image.size)
    w, h = (max(side, round(v * scale)) for v in image.size)
    left, top = (w - side) // 2, (h - side) // 2
    resized = image.resize((w, h), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + side, top + side))


SIZES = [(32, 32), (40, 60), (64, 48), (375, 500), (157, 60), (8, 80), (100, 10), (1, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_are_resized_as_ever(size):
    image = Image.open(io.BytesIO(picture(1, size)))
    for side in (8, 24, 96):
        assert _resize_and_cut(image, side).tobytes() == resized_whole(image, side).tobytes()


@pytest.mark.parametrize("size", [(1, 999), (700, 3), (20, 402)], ids=str)
def test_of_a_very_long_image_the_middle_is_the_same(size):
    y, x = np.mgrid[: size[0], : size[1]]
    smooth = np.stack([128 + 100 * np.sin((x + y) / 5 + c) for c in range(3)], -1)
    image = Image.fromarray(smooth.astype(np.uint8))
    for side in (8, 24, 96):
        new, old = (np.asarray(f(image, side), int) for f in (_resize_and_cut, resized_whole))
        assert abs(new - old).max() <= 2


def test_one_image_cannot_take_all_memory(tmp_path):
    """A huge one that comes first, and one of 20,000 x 1: both small files."""
    folder = image_folder(tmp_path / "data")
    Image.new("L", (3000, 3000)).save(folder / "train" / "cat" / "0.png")
    Image.new("RGB", (20_000, 1)).save(folder / "train" / "cat" / "1.png")
    for i in range(100):
        (folder / "train" / "dog" / f"more-{i}.png").write_bytes(picture(i, (8, 8)))

    # All images of the size of the first would be a file of 2.8 GB.
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000_000, 200_000_000))
from cifar_accel.data.decode import load_dataset
load_dataset(sys.argv[1], sys.argv[2], 224)
# getrusage would count what the parent held.
print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
"""
    command = [sys.executable, "-c", code, folder, tmp_path / "cache"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 700_000, "KiB at the peak"


# ---- images that are not whole


def damage_images(folder: Path, n: int) -> list[str]:
    """Put `n` files that are no images into an image folder; their names as they are found."""
    files = []
    for i in range(n):
        files.append(folder / ("train" if i < 8 else "test") / "cat" / f"broken-{i:02}.png")
        files[-1].write_bytes(b"no image")
    return [str(file) for file in files]


@pytest.mark.parametrize("sizes", [((32, 32),), ((40, 60), (32, 32))], ids=["equal", "unequal"])
def test_all_damaged_images_are_named_at_once(tmp_path, sizes):
    folder = image_folder(tmp_path / "data", sizes)
    names = damage_images(folder, 12)
    with pytest.raises(BadInput) as caught:
        load(folder, tmp_path)
    said = str(caught.value)
    assert said.startswith("--dataset: 12 images are not whole: ")
    assert said.endswith(f"{', '.join(names[:10])} and 2 more")


def test_damaged_rows_of_parquet_are_named_at_once(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = parquet_folder(tmp_path / "data")
    file = folder / "test-00000-of-00001.parquet"
    table = pq.read_table(file)
    cells = table.column("img").to_pylist()
    for i in (3, 7):
        cells[i]["bytes"] = b"no image"
    pq.write_table(table.set_column(0, "img", pa.array(cells)), file)
    with pytest.raises(BadInput, match="2 images are not whole: row 3 of .*, row 7 of .*"):
        load(folder, tmp_path)


def test_a_class_of_damaged_images_alone(tmp_path):
    folder = image_folder(tmp_path / "data")
    for file in (folder / "train").rglob("*.png"):
        file.write_bytes(b"")
    said = []
    with pytest.raises(BadInput, match="--dataset: 6 images are not whole"):
        load_dataset(str(folder), str(tmp_path / "cache"), 32, said.append)
    assert len(said) == 1


def test_a_broken_link_is_named(tmp_path):
    """And not the data folder, which is not at fault."""
    folder = image_folder(tmp_path / "data")
    file = folder / "train" / "cat" / "0.png"
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="^--dataset.*0.png"):
        load(folder, tmp_path)
