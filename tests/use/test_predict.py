"""`cifar-accel predict`: what is printed, and what becomes of files that are no images."""

import csv
import io
import json
import os
import subprocess
import zlib

import numpy as np
import pytest
from conftest import BIN
from PIL import Image

from cifar_accel.console import _Output

DIGITS = {str(digit) for digit in range(10)}


def test_a_table(command, run, pictures):
    code, out, err = command("predict", run, *pictures)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 15
    # Columns are aligned, and a file is named once.
    assert len(set(map(len, lines))) == 1
    assert [line.split()[0] for line in lines[::5]] == [str(file) for file in pictures]
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[:5]]
    assert shares == sorted(shares, reverse=True)
    assert {line.split()[-2] for line in lines} <= DIGITS


def test_json_and_csv_say_the_same(command, model, pictures):
    words = ("predict", model, pictures[0].parent, "--top-k", 2, "--batch-size", 2)
    read = json.loads(command(*words, "--json")[1])
    assert [entry["file"] for entry in read] == [str(file) for file in pictures]
    assert [len(entry["predictions"]) for entry in read] == [2, 2, 2]
    assert read[0]["predictions"][0].keys() == {"label", "probability"}

    rows = list(csv.DictReader(io.StringIO(command(*words, "--csv")[1])))
    flat = [(entry["file"], p) for entry in read for p in entry["predictions"]]
    for row, (file, prediction) in zip(rows, flat, strict=True):
        assert (row["file"], row["label"]) == (file, prediction["label"])
        assert float(row["probability"]) == pytest.approx(prediction["probability"], abs=1e-6)
    assert [row["rank"] for row in rows] == ["1", "2"] * 3


def test_paths_on_stdin(model, pictures):
    """As find prints them, in any encoding, from a pipe, with the line ends of any system."""
    odd = pictures[0].with_name(os.fsdecode(b"o\xffdd.png"))
    pictures[0].rename(odd)
    given = b"".join(os.fsencode(file) + b"\n" for file in (odd, pictures[1]))
    given += os.fsencode(pictures[2]) + b"\r\n\n"
    words = [BIN / "cifar-accel", "predict", model, "-", "--json", "--top-k", "1"]
    done = subprocess.run(words, input=given, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [entry["file"] for entry in json.loads(done.stdout)] == [
        str(odd),
        *map(str, pictures[1:]),
    ]


def png_of(side: int) -> bytes:
    """A PNG file of side x side black pixels, made without holding them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    head = side.to_bytes(4) * 2 + bytes([1, 0, 0, 0, 0])
    data = zlib.compress(bytes(side * (side // 8 + 1)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_images_of_every_kind(command, model, tmp_path):
    """CMYK, 16 bits, grey, animated, transparent, tiny and large ones; each has its answer."""
    folder = tmp_path / "kinds"
    folder.mkdir()
    Image.new("CMYK", (40, 50), (10, 20, 30, 0)).save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)).save(folder / "sixteen.png")
    Image.new("L", (20, 90), 77).save(folder / "grey.png")
    Image.new("RGBA", (30, 30), (1, 2, 3, 4)).save(folder / "clear.png")
    Image.new("1", (1, 1)).save(folder / "one.png")
    frames = [Image.new("RGB", (30, 30), (80 * i, 0, 0)) for i in range(3)]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    (folder / "large.png").write_bytes(png_of(10_000))
    code, out, err = command("predict", model, folder, "--top-k", 1)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 7
    # An animation is its first frame.
    frames[0].save(folder / "still.webp")
    (found,) = json.loads(command("predict", model, folder / "still.webp", "--json")[1])
    (moving,) = json.loads(command("predict", model, folder / "moving.webp", "--json")[1])
    assert found["predictions"] == moving["predictions"]


@pytest.mark.parametrize("form", [(), ("--json",), ("--csv",)])
def test_a_bad_image_is_named_and_the_rest_go_on(command, model, pictures, form):
    folder = pictures[0].parent
    (folder / "huge.png").write_bytes(png_of(30_000))
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes(pictures[0].read_bytes()[:500])
    (folder / "none").mkdir()
    gone = folder / "gone.png"
    code, out, err = command("predict", model, folder, folder / "none", gone, "~no-one/a", *form)
    assert code == 1
    assert "~no-one/a: there is no such home directory" in err
    for name in ("huge.png", "text.png", "cut.png", "gone.png"):
        assert f"{folder / name} is not a whole image" in err
    assert f"{folder / 'none'}: this folder holds no image" in err
    assert err.count("\n") == 6
    for file in pictures:
        assert str(file) in out
    assert "text.png" not in out


def test_hidden_files_of_a_folder_are_left_out(command, model, pictures):
    hidden = pictures[0].parent / ".cache"
    hidden.mkdir()
    (hidden / "a.png").write_bytes(pictures[0].read_bytes())
    assert ".cache" not in command("predict", model, pictures[0].parent)[1]


@pytest.mark.parametrize(
    "words, complaint",
    [
        ((), "give image files, folders, or - for paths on stdin"),
        (("a.png", "--json", "--csv"), "contradict each other"),
        (("a.png", "--top-k", "0"), "--top-k 0: must be greater than 0"),
    ],
)
def test_bad_input_is_one_line(command, model, words, complaint):
    code, out, err = command("predict", model, *words)
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1


def test_a_reader_that_goes_away_ends_it(model, pictures):
    """As `| head` does: no complaint, and no work for nobody."""
    many = [str(pictures[0])] * 20_000
    words = [BIN / "cifar-accel", "predict", model, *many, "--batch-size", "10"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
    # A reader that stays is none that is gone.
    assert not _Output.reader_is_gone


def test_a_file_whose_name_begins_like_a_home(command, model, pictures, monkeypatch):
    monkeypatch.chdir(pictures[0].parent)
    pictures[0].rename("~a.png")
    code, out, err = command("predict", model, pictures[0].parent, "--top-k", "1")
    assert (code, err) == (0, "")
    assert "~a.png" in out


def test_words_that_name_nothing(command, model, pictures):
    code, _, err = command("predict", model, "", pictures[0])
    assert code == 1
    assert "an empty word names no image" in err


def test_a_full_disk_behind_stdout_is_one_line(model, pictures):
    words = [BIN / "cifar-accel", "predict", model, pictures[0]]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "cifar_accel: stdout: No space left on device\n"


def test_of_several_processes_one_predicts(command, model, pictures, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert command("predict", model, pictures[0]) == (0, "", "")
    assert command("export", model, "--out", "somewhere") == (0, "", "")
