"""Words of a command line -> options and where each comes from; every complaint is one line."""

import argparse
import ast
import contextlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from itertools import chain, pairwise
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from pydantic import ValidationError

from cifar_accel.console import fail
from cifar_accel.errors import BadInput, did_you_mean
from cifar_accel.files import adapter
from cifar_accel.options.options import BUILT_IN, TrainingArguments, flag
from cifar_accel.options.recipes import recipe_defaults
from cifar_accel.options.resolve import resolve

T = TypeVar("T")

# The options of a training by name, with their types without bounds.
TYPES: dict[str, Any] = get_type_hints(TrainingArguments)

# What flags of other trainers are here.
SYNONYMS = {
    "--lr": "--learning-rate",
    "--wd": "--weight-decay",
    "--bs": "--batch-size",
    "--opt": "--optimizer",
    "--sched": "--scheduler",
    "--data": "--dataset",
    "--output": "--save-dir",
    "--output-dir": "--save-dir",
    "--wandb": "--tracker wandb",
    "--freeze": "missing: every weight is trained",
}
for _flag in ("--mixed-precision", "--amp", "--fp16", "--bf16", "--precision"):
    SYNONYMS[_flag] = "the launcher's: --mixed_precision, or ACCELERATE_MIXED_PRECISION"


def parse_training(argv: Sequence[str]) -> tuple[TrainingArguments, dict[str, str]]:
    """Options of a training and, by field, where each value comes from.

    The origin of a value is "default", "recipe", "flag" or "derived". Raises BadInput for options
    that cannot be or contradict each other, and SystemExit for a usage error or after --help.
    """
    for word in argv:
        if word.encode(errors="replace").decode() != word:
            raise BadInput(f"{word!r}: is not UTF-8, in which a run is recorded")
    words = normal_words(argv)
    # The recipe's values are tyro's defaults, so that --help shows them and any flag replaces them.
    defaults = recipe_defaults(chosen_recipe(words))
    args = parse(TrainingArguments, words, "python -m cifar_accel", defaults)
    return resolve(args, given_fields(argv))


def parse(kind: type[T], argv: Sequence[str], prog: str, default: T | None = None) -> T:
    """The options `kind`, a dataclass, from words.

    Exits with 2 after one line for what tyro cannot read, and with 0 after --help. Raises BadInput
    for a value outside the bounds of its type.
    """
    given_default: dict[str, Any] = {} if default is None else {"default": default}
    boxed_complaint = io.StringIO()
    # tyro prints its complaint and exits.
    try:
        with contextlib.redirect_stderr(boxed_complaint):
            args = tyro.cli(kind, args=list(argv), prog=prog, **given_default)
    except SystemExit as end:
        # After --help, or the completion of a shell.
        if not end.code:
            raise
        complaint = out_of_the_box(boxed_complaint.getvalue())
        raise SystemExit(fail(f"{complaint} ({_remedy(complaint, argv, kind, prog)})")) from None
    check_bounds(args)
    return args


def normal_words(argv: Sequence[str]) -> list[str]:
    """The words as tyro reads them: --no-flag for --flag=False, 0 or None for none, names small."""
    words = list(chain.from_iterable(map(_without_brackets, argv)))
    return [_normal_word(previous, word) for previous, word in pairwise(["", *words])]


def _without_brackets(word: str) -> list[str]:
    """`--scale=[0.5, 1.0]`, as wandb's agents write a list -> `--scale`, `0.5`, `1.0`."""
    name, _, value = word.partition("=")
    values = None
    if _field_of(name) in TYPES and value.startswith("["):
        # Python's own form of a list. The errors are what it raises where there is none.
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            values = ast.literal_eval(value)
    return [name, *map(str, values)] if isinstance(values, list) else [word]


def _normal_word(previous: str, word: str) -> str:
    """One word as tyro reads it, which may be --name=value, or the value of the `previous` one."""
    name, equals, value = word.partition("=")
    if not word.startswith("--") or not equals:
        return _normal_value(previous, word)
    if TYPES.get(_field_of(name)) is not bool:
        return f"{name}={_normal_value(name, value)}"
    # Sweeps write --pretrained=False, tyro wants --no-pretrained.
    if value.lower() == "true":
        return name
    if value.lower() == "false":
        return "--no-" + name.removeprefix("--")
    raise BadInput(f"{name}={value}: must be true or false")


def _normal_value(name: str, value: str) -> str:
    """`value` as tyro reads it for the flag `name`: None or 0 for the `none` that turns it off."""
    field = _field_of(name)
    kind = TYPES.get(field)
    if _is_a_name(field, value):
        value = value.lower()
    if value.lower() != "none":
        return value
    if type(None) in get_args(kind):
        return "None"
    if kind in (int, float):
        return "0"
    # For a text it is one of the texts: --aa none.
    return value


def _is_a_name(field: str, value: str) -> bool:
    """Whether `value` is a name of ours or timm's, all in lower case, and no path or hub id."""
    if field == "dataset":
        return value.lower() in BUILT_IN and not os.path.exists(value)
    if field == "model":
        return re.fullmatch(r"[\w.]+", value) is not None and not os.path.exists(value)
    is_choice = get_origin(TYPES.get(field)) is Literal
    return is_choice or field in ("aa", "optimizer", "recipe", "scheduler")


def _field_of(word: str) -> str:
    """`--learning-rate` -> `learning_rate`; other words give what is no field."""
    if not word.startswith("--"):
        return ""
    return word.removeprefix("--").replace("-", "_")


def chosen_recipe(words: Sequence[str]) -> str:
    """The recipe that the words name; of several the last counts, as for any flag."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    usual = TrainingArguments.recipe
    parser.add_argument("--recipe", nargs="?", default=usual, const=usual)
    return str(parser.parse_known_args(words)[0].recipe)


def given_fields(argv: Sequence[str]) -> set[str]:
    """The fields of TrainingArguments that the words set."""
    names = [_field_of(word.partition("=")[0]) for word in argv]
    # A switch is turned off by --no-pretrained.
    return TYPES.keys() & {*names, *(name.removeprefix("no_") for name in names)}


def check_bounds(args: Any) -> None:
    """Raise BadInput for the first option of the dataclass `args` outside its type's bounds."""
    # pydantic takes an instance as checked, so the values are given to it by name.
    values = {field.name: getattr(args, field.name) for field in fields(args)}
    kind: Any = type(args)
    try:
        adapter(kind).validate_python(values)
    except ValidationError as error:
        # Errors come in the order of the fields; one line tells of one.
        first = error.errors()[0]
        name = str(first["loc"][0])
        value = first["input"]
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        # A number may have hundreds of digits.
        if len(shown) > 20:
            shown = shown[:20] + "..."
        # pydantic writes "Input should be greater than 0".
        bound = first["msg"].replace("Input should be", "must be")
        raise BadInput(f"{flag(name)} {shown}: {bound}") from None


def out_of_the_box(text: str) -> str:
    """The first paragraph of tyro's complaint as one line, without title and box."""
    # Colours, and bold as tyro marks it in some texts.
    text = re.sub(r"\x1b\[[0-9;]*m|\[/?bold\]", "", text)
    # The title is a line. Where stdout is not UTF-8, rules are drawn with hyphens.
    lines = [line.strip(" │─╰╯") for line in text.splitlines()[1:]]
    body = "\n".join(line if line.strip("-") else "" for line in lines)
    return body.strip().partition("\n\n")[0].replace("\n", " ")


def _remedy(complaint: str, argv: Sequence[str], kind: Any, prog: str) -> str:
    """What to do about a usage error, as the end of its line."""
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if name in SYNONYMS:
            return f"here {name} is {SYNONYMS[name]}"
    unknown = re.match(r"Unrecognized options: (--[\w-]+)", complaint)
    known = [flag(field.name) for field in fields(kind)]
    near = did_you_mean(unknown[1], known, cutoff=0.7) if unknown else ""
    return f"{prog} --help lists all options{near}"
