"""Words of a command line -> options and where each comes from; every complaint is one line."""

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any, TypeVar, get_args, get_type_hints

import tyro
from pydantic import ValidationError

from cifar_accel.console import fail
from cifar_accel.errors import BadInput
from cifar_accel.files import adapter
from cifar_accel.options.options import TrainingArguments, flag
from cifar_accel.options.recipes import recipe_defaults
from cifar_accel.options.resolve import resolve

T = TypeVar("T")

# The options of a training by name, with their types without bounds.
TYPES: dict[str, Any] = get_type_hints(TrainingArguments)

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

# Flags of other trainers for what is the launcher's here.
PRECISION = ("--mixed-precision", "--amp", "--fp16", "--bf16", "--precision")


def parse_training(argv: Sequence[str]) -> tuple[TrainingArguments, dict[str, str]]:
    """Options of a training and, by field, where each value comes from.

    The origin of a value is "default", "recipe", "flag" or "derived". Raises BadInput for options
    that cannot be or contradict each other, and SystemExit for a usage error or after --help.
    """
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
    given_default: dict[str, Any] = {}
    if default is not None:
        given_default["default"] = default
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
        raise SystemExit(fail(f"{complaint} ({_remedy(argv, prog)})")) from None
    check_bounds(args)
    return args


def normal_words(argv: Sequence[str]) -> list[str]:
    """The words as tyro reads them: --no-flag for --flag=False, and a number or None for none."""
    words = []
    previous = ""
    for word in argv:
        if word.startswith("--") and "=" in word:
            words.append(_normal_assignment(word))
        else:
            words.append(_normal_value(previous, word))
        previous = word
    return words


def _normal_assignment(word: str) -> str:
    """The word --name=value as tyro reads it."""
    name, _, value = word.partition("=")
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
    if value.lower() != "none":
        return value
    kind = TYPES.get(_field_of(name))
    if type(None) in get_args(kind):
        return "None"
    if kind in (int, float):
        return "0"
    # For a text it is one of the texts: --aa none.
    return value


def _field_of(word: str) -> str:
    """`--learning-rate` -> `learning_rate`; other words give what is no field."""
    if not word.startswith("--"):
        return ""
    return word.removeprefix("--").replace("-", "_")


def chosen_recipe(words: Sequence[str]) -> str:
    """The recipe that the words name; of several the last counts, as for any flag."""
    recipe = TrainingArguments.recipe
    for word, following in pairwise([*words, ""]):
        if word.startswith("--recipe="):
            recipe = word.removeprefix("--recipe=")
        elif word == "--recipe" and following:
            recipe = following
    return recipe


def given_fields(argv: Sequence[str]) -> set[str]:
    """The fields of TrainingArguments that the words set."""
    given = set()
    for word in argv:
        field = _field_of(word.partition("=")[0])
        # A switch is turned off by --no-pretrained.
        if field not in TYPES:
            field = field.removeprefix("no_")
        if field in TYPES:
            given.add(field)
    return given


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
    """tyro's complaint as one line, without the box around it and the help below it."""
    # Colours, and bold as tyro marks it in some texts.
    text = re.sub(r"\x1b\[[0-9;]*m|\[/?bold\]", "", text)
    lines = []
    for line in text.splitlines():
        is_end_of_the_box = line.startswith(("╭", "╰"))
        line = line.strip(" │─")
        # What follows is for a screen, not for a line.
        if line.startswith(("Argument helptext", "For full helptext")):
            break
        # Where stdout is not UTF-8, rules are drawn with hyphens.
        is_rule = not line.strip("-")
        if not is_end_of_the_box and not is_rule:
            lines.append(line)
    return " ".join(lines)


def _remedy(argv: Sequence[str], prog: str) -> str:
    """What to do about a usage error, as the end of its line."""
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if name in SYNONYMS:
            return f"here {name} is {SYNONYMS[name]}"
        if name in PRECISION:
            return (
                "precision is the launcher's: accelerate launch --mixed_precision, "
                "or ACCELERATE_MIXED_PRECISION"
            )
    return f"{prog} --help lists all options"
