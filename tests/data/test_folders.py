"""Folders as data sets: which files are read, what a label means, and what is refused."""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import image_folder, parquet_folder, picture
from PIL import Image

from cifar_accel.data.decode import load_dataset
from cifar_accel.data.sources import find_source
from cifar_accel.errors import BadInput


def pixels_of(file: bytes) -> np.ndarray:
    """uint8 [3, H, W]."""
    return np.asarray(Image.open(io.BytesIO(file))).transpose(2, 0, 1)


def load(folder: Path, tmp_path: Path, image_size=32):
    return load_dataset(str(folder), str(tmp_path / "cache"), image_size, lambda line: None)


def parquet_file(file: Path, labels, names=None, metadata=None) -> Path:
    """A parquet file whose image i is `picture(i)`, of 8 pixels; `metadata` in place of names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": picture(i, (8, 8)), "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table({"img": cells, "label": pa.array(labels, pa.int64())})
    if names is not None:
        metadata = json.dumps({"info": {"features": {"label": {"names": names}}}})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, file, row_group_size=2)
    return file


def refused(folder: Path, tmp_path: Path) -> str:
    """What loading `folder` is refused with; one line."""
    with pytest.raises(BadInput, match="--dataset") as caught:
        load(folder, tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


# ---- what a label means

COLOURS = ["red", "green", "blue"]


def test_labels_are_mapped_by_name_in_every_file(tmp_path):
    folder = tmp_path / "data"
    parquet_file(folder / "train-0.parquet", [0, 1, 2], COLOURS)
    parquet_file(folder / "train-1.parquet", [0, 1, 2], ["blue", "red", "green"])
    parquet_file(folder / "train-2.parquet", [0, 1, 0], ["blue", "red"])
    parquet_file(folder / "test-0.parquet", [0, 1, 1], ["blue", "green"])
    data = load(folder, tmp_path)
    assert data.train.labels.tolist() == [0, 1, 2, 2, 0, 1, 2, 0, 2]
    assert data.test.labels.tolist() == [2, 1, 1]
    assert data.train.classes == data.test.classes == COLOURS


def test_both_splits_of_every_source_have_the_same_classes(tmp_path):
    unnamed = tmp_path / "unnamed"
    parquet_file(unnamed / "train-0.parquet", [0, 2])
    parquet_file(unnamed / "test-0.parquet", [1])
    images = image_folder(tmp_path / "images")
    for name in ("digits", str(parquet_folder(tmp_path / "named")), str(unnamed), str(images)):
        train, test = (raw for _, raw in find_source(name, tmp_path, print).read())
        assert train.classes == test.classes
        for raw in (train, test):
            assert raw.labels.dtype == np.int64
            assert 0 <= raw.labels.min() <= raw.labels.max() < len(raw.classes)


def test_an_image_folder_maps_labels_by_name(tmp_path):
    folder = image_folder(tmp_path / "data")
    for file in (folder / "test" / "cat").iterdir():
        file.unlink()
    (folder / "test" / "cat").rmdir()
    data = load(folder, tmp_path)
    assert data.test.labels.tolist() == [1, 1, 1]


def another_name(root):
    parquet_file(root / "train-0.parquet", [0, 1], COLOURS)
    parquet_file(root / "test-0.parquet", [0], ["green", "pink"])


def names_in_one_training_file(root):
    parquet_file(root / "train-0.parquet", [0, 1], COLOURS)
    parquet_file(root / "train-1.parquet", [0, 1])
    parquet_file(root / "test-0.parquet", [0], COLOURS)


def names_in_the_test_file(root):
    parquet_file(root / "train-0.parquet", [0, 1])
    parquet_file(root / "test-0.parquet", [0], COLOURS)


def a_class_in_the_test_split_alone(root):
    parquet_file(root / "train-0.parquet", [0, 1])
    parquet_file(root / "test-0.parquet", [2])


def a_label_below_zero(root):
    parquet_file(root / "train-0.parquet", [0, 1, -1])
    parquet_file(root / "test-0.parquet", [0])


def a_label_that_is_an_id(root):
    parquet_file(root / "train-0.parquet", [0, 2_000_000_000])
    parquet_file(root / "test-0.parquet", [0])


def a_name_twice(root):
    parquet_file(root / "train-0.parquet", [0, 1], ["red", "red"])
    parquet_file(root / "test-0.parquet", [0], COLOURS)


def another_label_column(root):
    import pyarrow.parquet as pq

    parquet_file(root / "train-0.parquet", [0, 1])
    table = pq.read_table(parquet_file(root / "test-0.parquet", [0]))
    table = table.append_column("fine_label", table.column("label"))
    pq.write_table(table, root / "test-0.parquet")


@pytest.mark.parametrize(
    "make, message",
    [
        (another_name, "test-0.parquet: 'pink' is no class of the training split"),
        (names_in_one_training_file, "train-1.parquet (folder ., label without names)"),
        (names_in_the_test_file, "train-0.parquet (folder ., label without names)"),
        (a_class_in_the_test_split_alone, "test-0.parquet: a label is not in 0..1"),
        (a_label_below_zero, "train-0.parquet: a label is not in 0..1"),
        (a_label_that_is_an_id, "has the label 2000000000"),
        (a_name_twice, "train-0.parquet gives two classes one name"),
        (another_label_column, "test-0.parquet (folder ., fine_label without names)"),
    ],
)
def test_labels_without_one_meaning_are_refused(tmp_path, make, message):
    make(tmp_path / "data")
    assert message in refused(tmp_path / "data", tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [
        "[]",
        "no JSON",
        b"\xff",
        "[" * 200_000,
        '{"info": null}',
        '{"info": {"features": []}}',
        '{"info": {"features": {"label": []}}}',
        '{"info": {"features": {"label": {"names": 5}}}}',
        '{"info": {"features": {"label": {"names": "abc"}}}}',
        '{"info": {"features": {"label": {"names": [1, 2]}}}}',
    ],
    ids=lambda text: str(text)[:50],
)
def test_malformed_metadata_is_one_line(tmp_path, metadata):
    folder = tmp_path / "data"
    parquet_file(folder / "train-0.parquet", [0, 1], ["a", "b"])
    parquet_file(folder / "test-0.parquet", [0, 1], metadata=metadata)
    assert "test-0.parquet: its metadata has no list of names" in refused(folder, tmp_path)


@pytest.mark.parametrize("metadata", ["{}", '{"info": {"features": {"label": {"dtype": "int8"}}}}'])
def test_metadata_without_names(tmp_path, metadata):
    folder = tmp_path / "data"
    parquet_file(folder / "train-0.parquet", [0, 1], metadata=metadata)
    parquet_file(folder / "test-0.parquet", [0], metadata=metadata)
    assert load(folder, tmp_path).train.classes == ["0", "1"]


# ---- which files are read


@pytest.mark.parametrize(
    "train, test",
    [
        ("train-0", "test-0"),
        ("data/train-0", "data/test-0"),
        ("train/0000", "test/0000"),
        ("config/train/0000", "config/test/0000"),
        ("Train/part-0", "validation/part-0"),
    ],
)
def test_layouts_of_parquet_files(tmp_path, train, test):
    folder = tmp_path / "data"
    parquet_file(folder / f"{train}.parquet", [0, 1, 0])
    parquet_file(folder / f"{test}.parquet", [0, 1])
    data = load(folder, tmp_path)
    assert (len(data.train), len(data.test)) == (3, 2)


@pytest.mark.parametrize(
    "paths",
    [
        ("default/train-0", "default/test-0", "other/train-0", "other/test-0"),
        ("default/train/0", "other/test/0"),
        ("train-0", "test-0", "old/train-0"),
    ],
)
def test_two_data_sets_in_one_folder_are_refused(tmp_path, paths):
    for path in paths:
        parquet_file(tmp_path / "data" / f"{path}.parquet", [0, 1], ["a", "b"])
    message = refused(tmp_path / "data", tmp_path)
    # One file of each is named.
    folders = {str(Path(path).parent).split("/")[0] for path in paths}
    assert all(f"(folder {folder}, label with names)" in message for folder in folders)
    assert "give one of the folders" in message


def test_hidden_parquet_files_are_left_out(tmp_path):
    said = []
    # A hidden folder above the data set is none of its own.
    folder = tmp_path / ".cache" / "data"
    parquet_file(folder / "train-0.parquet", [0, 1])
    parquet_file(folder / "test-0.parquet", [0, 1])
    plain = load_dataset(str(folder), str(tmp_path / "cache"), 32, said.append)
    assert not any("left out" in line for line in said)
    parquet_file(folder / ".ipynb_checkpoints" / "train-0.parquet", [1, 1])
    (folder / "._test-0.parquet").write_bytes(b"\0\5\x16\7")
    data = load_dataset(str(folder), str(tmp_path / "cache"), 32, said.append)
    assert data.fingerprint == plain.fingerprint
    (line,) = [line for line in said if "left out" in line]
    assert line.endswith("hidden or of another kind: 2 ('._test-0.parquet', '.ipynb_checkpoints')")


def test_hidden_files_and_other_kinds_are_left_out_of_image_folders(tmp_path):
    said = []
    folder = image_folder(tmp_path / "data")
    plain = load_dataset(str(folder), str(tmp_path / "cache"), 32, said.append)
    assert not any("left out" in line for line in said)
    hidden = folder / "train" / ".ipynb_checkpoints"
    hidden.mkdir()
    for i in range(2):
        (hidden / f"{i}.png").write_bytes(picture(i))
    (folder / "train" / ".empty").mkdir()
    (folder / "train" / "cat" / "._0.png").write_bytes(b"\0\5\x16\7")
    (folder / "test" / "dog" / "a.gif").write_bytes(b"GIF89a")
    (folder / "test" / "dog" / "folder.png").mkdir()
    (folder / "test" / "dog" / "folder.png" / "notes").write_text("")
    data = load_dataset(str(folder), str(tmp_path / "cache"), 32, said.append)
    assert data.train.classes == ["cat", "dog"]
    assert data.fingerprint == plain.fingerprint
    (line,) = [line for line in said if "left out" in line]
    assert line.endswith("5 ('._0.png', '.gif', '.ipynb_checkpoints', 'notes')")


def test_file_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    images = image_folder(tmp_path / f"images-{name}")
    file = images / "train" / "cat" / "0.png"
    file.rename(file.with_name(f"{name}.png"))
    assert len(load(images, tmp_path).train) == 6
    rows = tmp_path / f"parquet-{name}"
    parquet_file(tmp_path / "train-0.parquet", [0, 1])
    rows.mkdir()
    for split in ("train", "test"):
        (rows / f"{split}-{name}.parquet").write_bytes((tmp_path / "train-0.parquet").read_bytes())
    assert len(load(rows, tmp_path).train) == 2


def test_digests_of_older_versions_are_kept(tmp_path):
    """Runs compare the digest of their data when they go on: names and bytes, in their order."""
    folder = tmp_path / "data"
    for file in (
        "train/b/0.png",
        "train/b/1.PNG",
        "train/b/x/0.jpg",
        "train/\u00e9/0.png",
        "test/b/0.png",
    ):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(file.encode())
    expected = hashlib.blake2b(digest_size=16)
    for file in (
        "train/b/0.png",
        "train/b/1.PNG",
        "train/b/x/0.jpg",
        "train/\u00e9/0.png",
        "test/b/0.png",
    ):
        content = file.encode()
        expected.update(f"{file}\0{len(content)}\0".encode() + content)
    assert find_source(str(folder), tmp_path, print).identity() == expected.hexdigest()


# ---- the images of several files


def test_images_of_several_files_stay_in_pieces(tmp_path):
    """One piece would hold at most 2 GiB."""
    folder = tmp_path / "data"
    parquet_file(folder / "train-0.parquet", range(3))
    parquet_file(folder / "train-1.parquet", range(5))
    parquet_file(folder / "test-0.parquet", range(2))
    raws = dict(find_source(str(folder), tmp_path, print).read())
    items = raws["train"].items
    assert items.num_chunks > 1
    expected = [picture(i, (8, 8)) for i in (*range(3), *range(5))]
    assert [items[i].as_py() for i in range(len(items))] == expected
    assert raws["train"].item_name(2) == f"row 2 of {folder / 'train-0.parquet'}"
    assert raws["train"].item_name(3) == f"row 0 of {folder / 'train-1.parquet'}"
    assert raws["test"].item_name(1) == f"row 1 of {folder / 'test-0.parquet'}"


def test_kinds_of_image_columns_may_differ_between_files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "data"
    parquet_file(folder / "train-0.parquet", [0, 1])
    cells = pa.array([picture(7, (8, 8))], pa.large_binary())
    pq.write_table(pa.table({"img": cells, "label": [0]}), folder / "train-1.parquet")
    parquet_file(folder / "test-0.parquet", [0, 1])
    data = load(folder, tmp_path)
    assert np.array_equal(data.train.images[2], pixels_of(picture(7, (8, 8))))


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


def flat_splits(root):
    """Splits of other names, their images not in folders of classes."""
    for name in ("Training", "Validation"):
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(picture(0, (32, 32)))
    return root


def no_classes(root):
    (root / "train").mkdir(parents=True)
    (root / "test").mkdir()
    return root


def damaged_second_file(root):
    parquet_folder(root)
    (root / "train-00001-of-00002.parquet").write_bytes(b"PAR1 nothing of the kind")
    return root


def damaged_rows(root):
    """The footer is whole, and the pages are not."""
    parquet_folder(root)
    file = root / "test-00000-of-00001.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + bytes(100) + whole[104:])
    return root


def class_name_that_is_not_utf8(root):
    image_folder(root)
    (root / "train" / "cat").rename(root / "train" / os.fsdecode(b"caf\xe9"))
    return root


def broken_link(root):
    image_folder(root)
    (root / "train" / "dog" / "link.png").symlink_to("nowhere")
    return root


def no_training_files(root):
    parquet_folder(root)
    (root / "train-00000-of-00001.parquet").unlink()
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
        (lambda p: str(image_folder(p / "a", splits=("test",))), "nor a train/ folder"),
        (lambda p: str(flat_splits(p / "a")), "has Training/ and no train/; put the class folders"),
        (lambda p: str(no_classes(p / "a")), "train: is empty"),
        (lambda p: str(empty_class(p / "a")), "class folder holds no image"),
        (lambda p: str(unknown_class(p / "a")), "'wolf' is no class of the training split"),
        (lambda p: str(cut_image(p / "a")), "1.png is not a whole image"),
        (lambda p: str(parquet_folder(p / "a", columns=("text", "label"))), "no image column"),
        (lambda p: str(parquet_folder(p / "a", columns=("img", "text"))), "no label column"),
        (lambda p: str(no_training_files(p / "a")), "no parquet file is named train-*.parquet"),
        (
            lambda p: str(damaged_second_file(p / "a")),
            "train-00001-of-00002.parquet cannot be read",
        ),
        (lambda p: str(damaged_rows(p / "a")), "test-00000-of-00001.parquet cannot be read"),
        (lambda p: str(broken_link(p / "a")), "link.png"),
        (lambda p: str(class_name_that_is_not_utf8(p / "a")), "this class is not UTF-8"),
        (lambda p: str(cut_cell(p / "a")), "train-00000-of-00001.parquet is not"),
        (lambda p: str(words_for_labels(p / "a")), "must hold whole numbers without gaps"),
        (lambda p: str(a_label_too_many(p / "a")), "1.parquet: a label is not in 0..3"),
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
