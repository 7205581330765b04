"""Words of a command line -> options with their origin, by tyro; its complaints become one line."""

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import tyro

from cifar_accel.console import fail
from cifar_accel.errors import BadInput
from cifar_accel.options.options import TrainingArguments
from cifar_accel.options.recipes import recipe_defaults
from cifar_accel.options.resolve import resolve


def parse(kind: Any, argv: Sequence[str], prog: str, default: Any = None) -> Any:
    """tyro, with its boxed complaint folded into one line. Exits with 2, or 0 after --help."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                kind,
                args=list(argv),
                prog=prog,
                **({} if default is None else {"default": default}),
            )
    except SystemExit as e:
        if e.code:
            text = re.sub(r"\x1b\[[0-9;]*m|\[/?bold\]", "", captured.getvalue())
            lines = [
                line.strip(" │\t") for line in text.splitlines() if not re.match(r"\s*[╭╰]", line)
            ]
            lines = [line for line in lines if line and not set(line) <= {"─"}]
            cut = next(
                (
                    i
                    for i, line in enumerate(lines)
                    if line.startswith(("Argument helptext", "For full helptext"))
                ),
                None,
            )
            raise SystemExit(fail(f"{' '.join(lines[:cut])} ({_hint(argv, prog)})")) from None
        raise


# What other trainers call an option of ours.
SYNONYMS = {
    "--lr": "--learning-rate",
    "--wd": "--weight-decay",
    "--bs": "--batch-size",
    "--opt": "--optimizer",
    "--sched": "--scheduler",
    "--data": "--dataset",
    "--output": "--save-dir",
}


PRECISION = ("--mixed-precision", "--amp", "--fp16", "--bf16", "--precision")


def _hint(argv: Sequence[str], prog: str) -> str:
    """What to do about options that do not exist here."""
    for name in (word.partition("=")[0].replace("_", "-") for word in argv):
        if name in SYNONYMS:
            return f"here {name} is {SYNONYMS[name]}"
        if name in PRECISION:
            return "precision is the launcher's: accelerate launch --mixed_precision, or ACCELERATE_MIXED_PRECISION"
    return f"{prog} --help lists all options"


def _off(kind: Any) -> str | None:
    """How an option of type `kind` is turned off, which timm's users and ours write as none."""
    return "None" if "None" in str(kind) else "0" if kind in (int, float) else None


def parse_training(argv: Sequence[str]) -> tuple[TrainingArguments, dict[str, str]]:
    """Options of a training and where each value comes from. Raises BadInput, or SystemExit for a usage error."""
    types = {f.name: f.type for f in fields(TrainingArguments)}
    words: list[str] = []
    given: set[str] = set()
    for word in argv:
        name, equals, value = word.partition("=")
        field = name.removeprefix("--").replace("-", "_")
        if name.startswith("--"):
            given.add(field.removeprefix("no_") if field not in types else field)
            if types.get(field) is bool and equals:  # sweeps write --pretrained=False
                if value.lower() not in ("true", "false"):
                    raise BadInput(f"{name}={value}: must be true or false")
                word = name if value.lower() == "true" else f"--no-{name.removeprefix('--')}"
            elif value.lower() == "none" and (off := _off(types.get(field))):
                word = f"{name}={off}"
        elif (
            word == "none"
            and words
            and (off := _off(types.get(words[-1].removeprefix("--").replace("-", "_"))))
        ):
            word = off
        words.append(word)
    recipes = re.findall(
        r"^--recipe[=\n](.+)$", "\n".join(words), re.MULTILINE
    )  # the last one counts, as for any flag
    defaults = recipe_defaults(recipes[-1] if recipes else TrainingArguments.recipe)
    return resolve(
        parse(TrainingArguments, words, "python -m cifar_accel", defaults), given & types.keys()
    )
