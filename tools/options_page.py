"""docs/options.md, made from the options themselves.

    python -m tools.options_page

A test keeps the page what this makes. The sections are those of `TrainingArguments`: a comment
right above a field heads one, and the comment's further lines are its prose.
"""

import ast
import inspect
import textwrap
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cifar_accel.options.options import VOLATILE, TrainingArguments, flag
from cifar_accel.options.recipes import RECIPES, recipe_defaults
from cifar_accel.options.resolve import NEEDS

# The page that is made.
PAGE = Path(__file__).parent.parent / "docs" / "options.md"

# What the page says before the tables.
HEAD = """\
# Options of a training

Made from `cifar_accel/options/options.py` by `python -m tools.options_page`: change it there.

These options are the same for `python -m cifar_accel`, `accelerate launch -m cifar_accel`,
`torchrun -m cifar_accel`, `./launch.sh` and `cifar-accel train`; a study file writes them without
the dashes. The defaults below are those of `--recipe {recipe}`, which is the default recipe.
`python -m cifar_accel --recipe plain --help` shows those of another.

**Precision and the number of processes are no options here.** They are the launcher's:
`accelerate config`, `accelerate launch --mixed_precision bf16 --num_processes 4`,
`torchrun --nproc_per_node 4`, or `ACCELERATE_MIXED_PRECISION=bf16` in the environment. The batch
size is that of all processes together.

**`none` turns an option off.** It means unset for an option that can be unset, and 0 for a number;
`--aa`, `--save-every` and `--tracker` have it among their values. What 0 means, where it is not
plain, stands beside the option. A switch `--x` is turned off by `--no-x` or `--x=False`.

**Names may be in upper case.** `--optimizer SGD` is `sgd`; so with models, schedules, recipes,
choices and data sets that come with the program, not with folders and hub ids.

**An option that would have no effect is refused**, and so are two that contradict each other: one
line, exit code 2. `--dry-run` prints every value and where it comes from.
"""


@dataclass
class Section:
    """A group of options, in the order of the dataclass."""

    title: str
    prose: str
    # Meaning by field.
    options: dict[str, str] = field(default_factory=dict)


def sections_of(kind: type) -> list[Section]:
    """The sections of the dataclass `kind`, read from its source."""
    # The tree has the fields and the texts below them; comments are only in the lines.
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    sections: list[Section] = []
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign):
            continue
        assert isinstance(statement.target, ast.Name)
        # Without a comment the field belongs to the section of the one before it.
        comment = comment_above(lines, statement.lineno)
        if comment:
            title, *prose = comment
            sections.append(Section(title, " ".join(prose)))
        # The text below a field says what it means.
        assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        sections[-1].options[statement.target.id] = str(following.value.value)
    return sections


def comment_above(lines: list[str], number: int) -> list[str]:
    """The lines of the comment right above line `number`, which counts from 1."""
    comment: list[str] = []
    for line in reversed(lines[: number - 1]):
        if not line.strip().startswith("#"):
            break
        comment.insert(0, line.strip().removeprefix("#").strip())
    return comment


def as_words(value: Any) -> str:
    """A value as it is written behind its flag."""
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return " ".join(as_words(part) for part in value)
    # 4 / 3 is shown as 1.333.
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def default_cell(value: Any) -> str:
    """A default as a cell of the table."""
    if value is None or value == ():
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{as_words(value)}`"


def option_cell(name: str, hint: Any) -> str:
    """An option, with its choices where there are a few, as a cell of the table."""
    if get_origin(hint) is Literal:
        return f"`{flag(name)}` {{{', '.join(get_args(hint))}}}"
    return f"`{flag(name)}`"


def setting(name: str, value: Any) -> str:
    """An option and its value as words of a command line."""
    if isinstance(value, bool):
        return f"`{flag(name)}`" if value else f"`--no-{flag(name)[2:]}`"
    return f"`{flag(name)} {as_words(value)}`"


def option_tables() -> list[str]:
    """Lines of the page: a table for each section."""
    # Types without their bounds.
    hints = get_type_hints(TrainingArguments)
    defaults = recipe_defaults(TrainingArguments.recipe)
    lines: list[str] = []
    for section in sections_of(TrainingArguments):
        lines += ["", f"## {section.title}", ""]
        if section.prose:
            lines += [section.prose, ""]
        lines += ["| option | default | meaning |", "|---|---|---|"]
        for name, meaning in section.options.items():
            option = option_cell(name, hints[name])
            default = default_cell(getattr(defaults, name))
            # What Markdown would take for a cell's end or for emphasis.
            text = meaning.replace("|", "\\|").replace("*", "\\*")
            lines.append(f"| {option} | {default} | {text} |")
    return lines


def recipe_list() -> list[str]:
    """Lines of the page: what each recipe sets."""
    lines = ["", "## What the recipes set", ""]
    lines += ["`finetune` derives more from the model and the images: [data](data.md#recipes).", ""]
    for recipe, changes in RECIPES.items():
        settings = ", ".join(setting(name, value) for name, value in changes.items())
        lines.append(f"- `{recipe}`: {settings}")
    return lines


def needs_table() -> list[str]:
    """Lines of the page: options that have no effect by themselves."""
    lines = ["", "## Options that need another", ""]
    lines += ["| option | has no effect without |", "|---|---|"]
    for name, need in NEEDS.items():
        lines.append(f"| `{flag(name)}` | {need.words} |")
    return lines


def volatile_list() -> list[str]:
    """Lines of the page: options that a continuation may change."""
    names = [option.name for option in fields(TrainingArguments) if option.name in VOLATILE]
    return [
        "",
        "## Options that may change when a run goes on",
        "",
        "They say where or how a run goes, not what it computes. With another value of any other",
        "option it is another run, which is refused in the folder of the first.",
        "",
        ", ".join(f"`{flag(name)}`" for name in names),
    ]


def page() -> str:
    """The whole page."""
    head = HEAD.format(recipe=TrainingArguments.recipe).rstrip()
    lines = [head, *option_tables(), *recipe_list(), *needs_table(), *volatile_list()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
