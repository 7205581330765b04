"""What a trained model takes images for, as a table, JSON or CSV."""

import csv
import io
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from cifar_accel.console import FAILED, print_result, printable, reader_is_gone
from cifar_accel.data.folders import IMAGE_ENDINGS, is_image, visible_files
from cifar_accel.errors import BadInput
from cifar_accel.files import home
from cifar_accel.options.options import PredictArguments
from cifar_accel.use.classifier import Prediction, batches, load

# A file and what its image is taken for, best first.
Row = tuple[str, list[Prediction]]


def predict(args: PredictArguments, complain: Callable[[str], None]) -> int:
    """Print what the model takes each image for, in the order of the images; the exit code.

    What is no whole image is named with `complain`, and the rest go on; the exit code is 1 then.
    Raises BadInput for a model that cannot be used.
    """
    classifier = load(args.model, args.device)
    # Pillow refuses what is far larger, and warns of the rest.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)

    def prepared(file: Path | BadInput) -> torch.Tensor | BadInput:
        """The image in a file, or what is wrong with it."""
        if isinstance(file, BadInput):
            return file
        try:
            return classifier.prepare(file)
        except BadInput as damage:
            return damage

    bad = 0
    rows: list[Row] = []
    write = _write_csv if args.csv else _write_table
    if args.csv:
        print_result("file,rank,label,probability")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in batches(_files(args.images), args.batch_size):
            # Pillow decodes and resizes without Python's lock.
            images = list(pool.map(prepared, batch))
            for damage in images:
                if isinstance(damage, BadInput):
                    bad += 1
                    complain(str(damage))
            pairs = zip(batch, images, strict=True)
            whole = [(str(file), i) for file, i in pairs if isinstance(i, torch.Tensor)]
            if whole:
                found = classifier.predict_prepared([image for _, image in whole], args.top_k)
                rows += zip((file for file, _ in whole), found, strict=True)
            # JSON is one list; the others are written as they come.
            if not args.json:
                write(rows)
                rows = []
            if reader_is_gone():
                break
    if args.json:
        _write_json(rows)
    return FAILED if bad else 0


def _files(words: tuple[str, ...]) -> Iterator[Path | BadInput]:
    """The image files that the words name: files, folders, and - for one a line on stdin.

    In place of what names none comes what is wrong with it.
    """
    for word in words:
        if word == "-":
            # As bytes: a name need not be UTF-8.
            lines = (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
            yield from (Path(os.fsdecode(line)) for line in lines if line)
            continue
        try:
            yield from _files_of(word)
        except BadInput as damage:
            yield damage


def _files_of(word: str) -> list[Path]:
    """The image files that one word names. Raises BadInput where there are none."""
    path = home(word)
    if not word:
        raise BadInput("an empty word names no image")
    if not os.path.isdir(path):
        return [path]
    try:
        inside = list(filter(is_image, visible_files(path, path.rglob("*"), Counter())))
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror} ({e.filename})") from e
    if not inside:
        raise BadInput(f"{path}: this folder holds no image ({', '.join(IMAGE_ENDINGS)})")
    return inside


# ---- how it is written


def _write_table(rows: list[Row]) -> None:
    """A line a class, the file beside the first one of its image; columns are aligned."""
    files = [printable(file) for file, _ in rows]
    file_width = max(map(len, files), default=0)
    label_width = max((len(p.label) for _, found in rows for p in found), default=0)
    lines = []
    for file, (_, found) in zip(files, rows, strict=True):
        for label, probability in found:
            name = printable(label)
            lines.append(f"{file:<{file_width}}  {name:<{label_width}}  {probability:7.2%}")
            file = ""
    if lines:
        print_result("\n".join(lines))


def _write_csv(rows: list[Row]) -> None:
    """`file,rank,label,probability`: a line a class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for file, found in rows:
        for rank, (label, probability) in enumerate(found, 1):
            writer.writerow([file, rank, label, f"{probability:.6f}"])
    if rows:
        print_result(text.getvalue().removesuffix("\n"))


def _write_json(rows: list[Row]) -> None:
    """`[{"file", "predictions": [{"label", "probability"}]}]`."""
    listed = [
        {"file": file, "predictions": [p._asdict() for p in predictions]}
        for file, predictions in rows
    ]
    print_result(json.dumps(listed, indent=1))
