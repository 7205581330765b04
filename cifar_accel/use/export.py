"""A trained model for programs without this package: ONNX, torch.export, or the hub's folder."""

import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

import cifar_accel
from cifar_accel.console import FAILED
from cifar_accel.data.decode import MOST_STORED, decoded_images, load_dataset
from cifar_accel.errors import BadInput, first_line
from cifar_accel.files import home, read_json, write_json, write_text
from cifar_accel.models.weights import CROP_MODE, for_transformers
from cifar_accel.network import require_network
from cifar_accel.options.options import ExportArguments, TrainingArguments
from cifar_accel.records.summary import read_summary
from cifar_accel.use.card import FILE as CARD
from cifar_accel.use.card import model_card
from cifar_accel.use.classifier import Classifier, batches, class_names, find_model, read_classifier
from cifar_accel.use.load import FinishedRun

# Images on which an exported model is compared with the one that it comes from.
CHECKED = 256
# The largest difference of a probability that rounding explains.
TOLERANCE = 1e-4

# What ONNX takes beside torch: the file's own library, torch's way to it, and what runs it.
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# The first dimension of the only input has any size.
ANY_BATCH = ({0: torch.export.Dim("batch")},)

# uint8 [n, 3, S, S] -> probabilities float32 [n, K].
Exported = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def export(
    args: ExportArguments, say: Callable[[str], None], complain: Callable[[str], None]
) -> int:
    """Write a model in another form, or push it to the hub; the exit code.

    1 is for an exported model that does not say what the model says; nothing is written then.
    Raises BadInput.
    """
    check_options(args)
    folder, run = find_model(args.model)
    # Whatever is wrong with the model is found before anything is written.
    classifier = read_classifier(folder, "cpu", run)
    if args.push:
        push(args, folder, run, say)
        return 0
    out = home(str(args.out))
    try:
        if args.format:
            return export_graph(args, classifier, run, out, say, complain)
        write_hub_folder(folder, run, out)
    except OSError as e:
        raise BadInput(f"--out {out}: {e.strerror or e}") from e
    say(f"written   {out}: config.json, model.safetensors, {CARD}")
    return 0


def check_options(args: ExportArguments) -> None:
    """Raise BadInput for options without effect, and for packages that are missing."""
    if bool(args.out) == bool(args.push):
        raise BadInput("export: give either --out DIR, or --push REPO of the Hugging Face hub")
    if args.out and args.out.encode(errors="replace").decode() != args.out:
        raise BadInput(f"--out {args.out}: is not UTF-8")
    if args.format and args.push:
        raise BadInput("export: --push sends timm's own format; --format goes with --out")
    if args.private and not args.push:
        raise BadInput("export: --private is for --push")
    if args.dataset and not args.format:
        raise BadInput("export: --dataset is what --format is checked on; leave it out")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if args.format == "onnx" and missing:
        raise BadInput(f"export --format onnx: needs more; pip install {' '.join(missing)}")


# ---- as a graph: ONNX or torch.export


class Served(torch.nn.Module):
    """A classifier as it is exported: uint8 [n, 3, S, S] -> probabilities float32 [n, K]."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.model = classifier.module
        # (pixel / 255 - mean) / std = pixel * scale - offset, each [3, 1, 1].
        mean, std = (torch.tensor(classifier.input[n]).view(3, 1, 1) for n in ("mean", "std"))
        self.scale = torch.nn.Buffer(1 / (255 * std))
        self.offset = torch.nn.Buffer(mean / std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities [n, K] of `images`."""
        logits = self.model(images.float() * self.scale - self.offset)
        return logits.float().softmax(1)


def export_graph(
    args: ExportArguments,
    classifier: Classifier,
    run: FinishedRun | None,
    out: Path,
    say: Callable[[str], None],
    complain: Callable[[str], None],
) -> int:
    """Write DIR/model.onnx or DIR/model.pt2 once it was compared with the model; the exit code.

    Raises OSError, and BadInput for a model that torch cannot export.
    """
    name, write = GRAPHS[str(args.format)]
    images, which = checking_images(args, classifier, run, say)
    _make_folder(out, [name])
    # Two images: torch takes a batch of one for a constant.
    served = Served(classifier).eval()
    example = torch.zeros(2, 3, classifier.size, classifier.size, dtype=torch.uint8)
    with tempfile.TemporaryDirectory(dir=out) as scratch, warnings.catch_warnings():
        # Of torch's own insides.
        warnings.simplefilter("ignore")
        file = Path(scratch) / name
        try:
            graph = torch.export.export(served, (example,), dynamic_shapes=ANY_BATCH)
            exported = write(graph, file, description(classifier))
        except OSError:
            raise
        # There is no telling how a model of timm's fails in there.
        except Exception as e:
            reason = f"{type(e).__name__}: {first_line(e)}"
            raise BadInput(f"--format {args.format}: torch cannot export it ({reason})") from e
        agrees, line = compare(classifier, exported, images)
        say(f"checked   on {len(images)} {which}:")
        say(f"          {line}")
        if not agrees:
            complain(f"the exported model differs by {TOLERANCE:g} or more: nothing is written")
            return FAILED
        os.replace(file, out / name)
    say(f"written   {out / name}: uint8 [batch, 3, {classifier.size}, {classifier.size}] in,")
    say(f"          probabilities float32 [batch, {len(classifier.classes)}] out")
    return 0


def description(classifier: Classifier) -> dict[str, str]:
    """What the exported file says of itself; values are text, lists are JSON."""
    side, made = classifier.size, classifier.input
    larger = int(side / made["crop_pct"])
    # By timm's names for how an image that is not square becomes square.
    ways = {"center": f"the shorter side to {larger}", "squash": f"to {larger}x{larger}"}
    mode = made["crop_mode"]
    whole = ways.get(mode, f"by timm's crop_mode {mode} to {larger}")
    return {
        "classes": json.dumps(classifier.classes),
        "image_size": str(side),
        "resizing": (
            f"RGB; {whole} pixels ({made['interpolation']}, antialiased), "
            f"then the centre of {side}x{side}"
        ),
        "input": f"uint8 [batch, 3, {side}, {side}], not normalised",
        "output": "probabilities, float32 [batch, classes]",
        "version": f"cifar_accel {cifar_accel.__version__}, torch {torch.__version__}",
    }


def _write_onnx(graph: Any, file: Path, described: dict[str, str]) -> Exported:
    """Write an ONNX file with its metadata; returns what runs it."""
    import onnxruntime

    program: Any = torch.onnx.export(
        graph,
        dynamo=True,
        dynamic_shapes=ANY_BATCH,
        input_names=["images"],
        output_names=["probabilities"],
        verbose=False,
    )
    program.model.metadata_props.update(described)
    program.save(file, external_data=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def _write_pt2(graph: Any, file: Path, described: dict[str, str]) -> Exported:
    """Write a torch.export file with its metadata; returns what runs it."""
    torch.export.save(graph, file, extra_files={"metadata.json": json.dumps(described)})
    module = torch.export.load(file).module()
    return lambda images: module(torch.from_numpy(images)).detach().numpy()


# By --format: the file's name, and what writes it.
GRAPHS = {"onnx": ("model.onnx", _write_onnx), "torch": ("model.pt2", _write_pt2)}


def checking_images(
    args: ExportArguments,
    classifier: Classifier,
    run: FinishedRun | None,
    say: Callable[[str], None],
) -> tuple[list[Image.Image], str]:
    """Images to compare models on, and which these are, in words."""
    pixels: NDArray[np.uint8] | None = None
    which = "random images (no data at hand; --dataset names some)"
    options = run.options if run else TrainingArguments()
    if args.dataset:
        side, most = classifier.size, MOST_STORED**2
        dataset = load_dataset(args.dataset, options.data_dir, side, say, most)
        pixels = (dataset.test if len(dataset.test) else dataset.train).images
    elif run:
        fingerprint = run.config["options"].get("data_fingerprint")
        for split in ("test", "train"):
            if pixels is None:
                pixels = decoded_images(options.data_dir, fingerprint, options.stored_size, split)
    if pixels is not None:
        which = f"images of {args.dataset or options.dataset}"
    else:
        side = classifier.size
        pixels = np.random.default_rng(0).integers(0, 256, (CHECKED, 3, side, side), np.uint8)
    # From all over the split, which may be in the order of its classes.
    places = np.linspace(0, len(pixels) - 1, min(CHECKED, len(pixels))).astype(int)
    return [Image.fromarray(pixels[place].transpose(1, 2, 0)) for place in places], which


def compare(
    classifier: Classifier, exported: Exported, images: list[Image.Image]
) -> tuple[bool, str]:
    """Whether an exported model says what the model says of images, and how near it is."""
    # timm's transform without its last step.
    resize = timm.data.create_transform(**classifier.input, normalize=False)
    ours, theirs = [], []
    for batch in batches(images, 32):
        ours.append(classifier.probabilities([classifier.prepare(image) for image in batch]))
        theirs.append(exported(np.stack([resize(image).numpy() for image in batch])))
    a, b = np.concatenate(ours), np.concatenate(theirs)
    difference = float(np.abs(a - b).max())
    equal = int((a.argmax(1) == b.argmax(1)).sum())
    line = f"largest difference of a probability {difference:.1e}, {equal} of {len(a)} top-1 equal"
    return difference < TOLERANCE, line


# ---- as the hub has it


def write_hub_folder(folder: Path, run: FinishedRun | None, out: Path) -> None:
    """Write config.json, model.safetensors and the model card to `out`, a new or empty place.

    Nothing in it is pickled, and each file is whole or absent. Raises OSError, and BadInput where
    one of them is there already.
    """
    _make_folder(out, ["config.json", "model.safetensors", CARD])
    classes = class_names(folder)
    config = for_transformers(read_json(folder / "config.json"))
    if run:
        # As in `read_classifier`.
        config["pretrained_cfg"]["crop_mode"] = CROP_MODE
    card = folder / CARD
    if card.is_file():
        # Somebody may have added to it.
        text = card.read_text(encoding="utf-8", errors="replace")
    elif run:
        text = model_card(config, classes, run.config, read_summary(run.folder))
    else:
        text = model_card(config, classes)
    write_json(out / "config.json", config)
    write_text(out / CARD, text)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        copied = shutil.copyfile(folder / "model.safetensors", Path(scratch, "model.safetensors"))
        os.replace(copied, out / "model.safetensors")


def _make_folder(out: Path, names: list[str]) -> None:
    """Make the folder `out`. Raises OSError, and BadInput where one of `names` is in it."""
    there = [name for name in names if (out / name).exists()]
    if there:
        raise BadInput(f"--out {out}: holds {there[0]} already; remove it, or give another folder")
    out.mkdir(parents=True, exist_ok=True)


def push(
    args: ExportArguments, folder: Path, run: FinishedRun | None, say: Callable[[str], None]
) -> None:
    """Upload what `write_hub_folder` writes to a repository of the hub. Raises BadInput."""
    # The hub's client is slow to import.
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    repository = str(args.push)
    try:
        validate_repo_id(repository)
    except HFValidationError as e:
        raise BadInput(f"--push {repository}: {first_line(e)}") from e
    if get_token() is None:
        raise BadInput(f"--push {repository}: no key of the hub; hf auth login, or set HF_TOKEN")
    require_network(f"--push {repository}", "export --out DIR writes the same folder here", "")
    with tempfile.TemporaryDirectory() as scratch:
        write_hub_folder(folder, run, Path(scratch))
        api = HfApi()
        try:
            # Unset: as the owner has it for new ones.
            made = api.create_repo(repository, private=args.private or None, exist_ok=True)
            is_public = not api.repo_info(made.repo_id).private
        # The hub's HTTP library, and with it its errors, changes from version to version.
        except Exception as e:
            raise BadInput(f"--push {repository}: {first_line(e)}") from e
        if args.private and is_public:
            raise BadInput(f"--push {repository}: is there already, and public, not --private")
        say(f"hub       uploading to {made}")
        message = f"Model by cifar_accel {cifar_accel.__version__}"
        try:
            api.upload_folder(repo_id=made.repo_id, folder_path=scratch, commit_message=message)
        except Exception as e:
            raise BadInput(f"--push {repository}: {first_line(e)}") from e
    say(f"pushed    {made}")
