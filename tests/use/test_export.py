"""`cifar-accel export`: what other programs read, by these programs themselves."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import cifar_accel
from cifar_accel.files import read_json
from cifar_accel.use import export
from cifar_accel.use.classifier import load

DIGITS = [str(digit) for digit in range(10)]


def resized(files: list[Path], side: int, interpolation: Image.Resampling) -> np.ndarray:
    """uint8 [n, 3, side, side], by Pillow alone: the shorter side, then the centre."""
    arrays = []
    for file in files:
        image = Image.open(file).convert("RGB")
        scale = side / min(image.size)
        image = image.resize([max(side, int(v * scale)) for v in image.size], interpolation)
        left, top = (round((v - side) / 2) for v in image.size)
        cut = image.crop((left, top, left + side, top + side))
        arrays.append(np.asarray(cut).transpose(2, 0, 1))
    return np.stack(arrays)


def assert_says_what_the_model_says(run_exported, model: Path, pictures: list[Path]) -> None:
    """Of one, two and three images."""
    classifier = load(model)
    expected = classifier.probabilities([classifier.prepare(file) for file in pictures])
    pixels = resized(pictures, 32, Image.Resampling.BILINEAR)
    for count in (1, 2, 3):
        said = run_exported(pixels[:count])
        assert said.shape == (count, 10)
        np.testing.assert_allclose(said, expected[:count], atol=2e-6)
        np.testing.assert_allclose(said.sum(1), 1, atol=1e-5)


def test_onnx(command, run, pictures, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    code, out, err = command("export", run, "--format", "onnx", "--out", tmp_path / "out")
    assert (code, err) == (0, ""), err
    # The digits that the run was trained on are at hand.
    assert "checked   on 256 images of digits:\n" in out
    assert "256 of 256 top-1 equal" in out
    file = tmp_path / "out" / "model.onnx"
    assert [f.name for f in file.parent.iterdir()] == ["model.onnx"]

    session = onnxruntime.InferenceSession(file)
    (given,) = session.get_inputs()
    assert (given.name, given.type) == ("images", "tensor(uint8)")
    assert given.shape == ["batch", 3, 32, 32]

    def run_onnx(images):
        return session.run(["probabilities"], {"images": images})[0]

    assert_says_what_the_model_says(run_onnx, run, pictures)
    described = session.get_modelmeta().custom_metadata_map
    assert json.loads(described["classes"]) == DIGITS
    assert described["image_size"] == "32"
    assert (
        "shorter side to 32 pixels (bilinear, antialiased), then the centre"
        in (described["resizing"])
    )
    assert described["version"].startswith(f"cifar_accel {cifar_accel.__version__}")


def test_torch(command, model, pictures, tmp_path):
    out_folder = tmp_path / "out"
    code, out, err = command("export", model, "--format", "torch", "--out", out_folder)
    assert (code, err) == (0, "")
    # A model alone has no data at hand.
    assert "checked   on 256 random images (no data at hand; --dataset names some):\n" in out
    described = {"metadata.json": ""}
    program = torch.export.load(out_folder / "model.pt2", extra_files=described)
    module = program.module()
    assert_says_what_the_model_says(
        lambda images: module(torch.from_numpy(images)).numpy(force=True), model, pictures
    )
    assert json.loads(json.loads(described["metadata.json"])["classes"]) == DIGITS


def test_a_vit_of_several_sizes(trainer, command, tmp_path):
    """It resamples its position embeddings in the forward pass."""
    words = ("--model", "test_vit", "--image-size", "32:0.5,48", "--epochs", "1")
    run = trainer(*words, "--tracker", "none").run
    code, out, err = command("export", run, "--format", "torch", "--out", tmp_path / "out")
    assert code == 0, err
    assert "[batch, 3, 48, 48]" in out


def test_it_is_checked_on_the_images_that_are_named(command, model, pictures, tmp_path):
    data = pictures[0].parent / "cat"
    data.mkdir()
    for file in pictures:
        file.rename(data / file.name)
    words = ("export", model, "--format", "torch", "--out", tmp_path / "out")
    code, out, _ = command(*words, "--dataset", data.parent)
    assert code == 0
    assert f"checked   on 3 images of {data.parent}:\n" in out
    assert "3 of 3 top-1 equal" in out


def test_what_differs_is_not_written(command, model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", 0.0)
    code, _, err = command("export", model, "--format", "torch", "--out", tmp_path / "out")
    assert code == 1
    assert "the exported model differs by 0 or more: nothing is written" in err
    assert not list((tmp_path / "out").iterdir())


# ---- the folder for the hub


def test_the_hubs_folder(command, run, pictures, tmp_path):
    out_folder = tmp_path / "out"
    code, _, err = command("export", run, "--out", out_folder)
    assert (code, err) == (0, "")
    names = sorted(file.name for file in out_folder.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    assert cifar_accel.predict(out_folder, pictures) == cifar_accel.predict(run, pictures)
    # It is the folder of the run, as it stands.
    for name in names:
        assert (out_folder / name).read_bytes() == (run / "model" / name).read_bytes()
    # Its rights are the folder's: a colleague can read it.
    assert (out_folder / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_a_model_of_an_earlier_version(command, model, tmp_path):
    """It has no card, and a number of classes that transformers trips over."""
    (model / "README.md").unlink()
    config = read_json(model / "config.json")
    config["model_args"]["num_classes"] = 10
    (model / "config.json").write_text(json.dumps(config))
    assert command("export", model, "--out", tmp_path / "out")[0] == 0
    assert "num_classes" not in read_json(tmp_path / "out" / "config.json")["model_args"]
    assert "Nothing is recorded" in (tmp_path / "out" / "README.md").read_text()


def test_what_was_added_to_a_card_goes_along(command, run, tmp_path):
    card = run / "model" / "README.md"
    card.write_text(card.read_text() + "\nLicence: mine.\n")
    assert command("export", run, "--out", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "README.md").read_text() == card.read_text()


@pytest.mark.parametrize("place", ["run", "moved", "exported"])
def test_transformers_reads_it_with_its_names(place, run, command, pictures, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = run / "model"
    if place == "moved":
        folder = folder.rename(tmp_path / "moved")
    if place == "exported":
        command("export", run, "--out", tmp_path / "out")
        folder = tmp_path / "out"
    classify = transformers.pipeline("image-classification", model=str(folder))
    said = classify([str(file) for file in pictures], top_k=10)
    expected = load(folder).predict(pictures, top_k=10)
    for theirs, ours in zip(said, expected, strict=True):
        shares = {entry["label"]: entry["score"] for entry in theirs}
        assert shares == pytest.approx(dict(ours), abs=1e-5)


def test_timm_reads_it(model):
    made = timm.create_model(f"local-dir:{model}", pretrained=True)
    assert made.pretrained_cfg["label_names"] == DIGITS


# ---- what is refused


@pytest.mark.parametrize(
    "words, complaint",
    [
        ((), "give either --out DIR, or --push REPO"),
        (("--out", "a", "--push", "b"), "give either --out DIR, or --push REPO"),
        (("--push", "b", "--format", "onnx"), "--format goes with --out"),
        (("--out", "a", "--private"), "--private is for --push"),
        (("--out", "a", "--dataset", "digits"), "--dataset is what --format is checked on"),
        (("--push", "a b"), "--push a b: Repo id must use alphanumeric"),
        (("--push", "a/b/c"), "--push a/b/c: Repo id must be in the form"),
        (("--push", "a/b"), "--push a/b: no key of the hub; hf auth login, or set HF_TOKEN"),
    ],
)
def test_bad_input_is_one_line(command, model, words, complaint, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    code, out, err = command("export", model, *words)
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_what_is_there_is_not_written_over(command, model, tmp_path):
    out = tmp_path / "out"
    assert command("export", model, "--out", out)[0] == 0
    before = {file: file.read_bytes() for file in out.iterdir()}
    code, _, err = command("export", model, "--out", out)
    assert code == 2
    assert "holds config.json already" in err
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    code, _, err = command("export", model, "--out", out / "config.json")
    assert code == 2
    assert "out/config.json" in err


def test_a_model_that_torch_cannot_export_is_one_line(command, model, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no way\nat all")

    monkeypatch.setattr("torch.export.export", fail)
    code, _, err = command("export", model, "--format", "torch", "--out", tmp_path / "out")
    assert code == 2
    assert "--format torch: torch cannot export it (RuntimeError: no way)\n" in err


def test_packages_that_are_missing_are_named(command, model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("onnx_is_not_here", "numpy"))
    code, _, err = command("export", model, "--format", "onnx", "--out", tmp_path / "out")
    assert code == 2
    assert "needs more; pip install onnx_is_not_here\n" in err


# ---- a hub on this machine


class Hub(BaseHTTPRequestHandler):
    """A hub that knows no key; it remembers what it was asked."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.answer(200)

    def do_GET(self):
        self.answer(401)

    do_POST = do_GET

    def answer(self, code):
        Hub.asked.append(f"{self.command} {self.path}")
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        """Say nothing on stderr."""


@pytest.fixture
def hub(monkeypatch):
    """Let the hub be on this machine, and have a key."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()


def test_a_hub_that_refuses_the_key(command, model, hub):
    code, out, err = command("export", model, "--push", "ann/net")
    assert code == 2
    assert err.startswith("cifar_accel: --push ann/net: ")
    assert "401" in err
    assert "hf_secret" not in out + err
    assert err.count("\n") == 1
    assert "POST /api/repos/create" in Hub.asked


def test_a_hub_out_of_reach(command, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, _, err = command("export", model, "--push", "ann/net")
    assert code == 2
    assert "http://127.0.0.1:9 cannot be reached" in err
    assert "export --out DIR writes the same folder here" in err
