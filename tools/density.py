"""How dense the code is, by file: what the style asks for, measured.

    python -m tools.density [FILE OR FOLDER ...]     (unset: cifar_accel)

Code lines are those that hold more than a comment, a docstring or nothing. `test_house.py` keeps
the bounds over the whole package.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


@dataclass
class Density:
    """Counts over one file, or over several when added up."""

    lines: int = 0
    code: int = 0
    comments: int = 0
    handlers: int = 0  # `except` clauses
    nodes: int = 0  # of the syntax tree, docstrings left out
    wide: int = 0  # code lines of over 100 columns
    longest: int = 0  # lines of the longest function

    def __add__(self, other: "Density") -> "Density":
        sums = {name: getattr(self, name) + getattr(other, name) for name in vars(self)}
        sums["longest"] = max(self.longest, other.longest)
        return Density(**sums)

    def row(self, name: str) -> str:
        """One line of the table."""
        per = 100 / max(1, self.code)
        return (
            f"{name:<44}{self.lines:>6}{self.code:>6}{self.comments * per:>9.1f}"
            f"{self.handlers * per:>8.2f}{self.nodes / max(1, self.code):>7.1f}"
            f"{self.wide * per:>7.1f}{self.longest:>9}"
        )


HEAD = (
    f"{'':<44}{'lines':>6}{'code':>6}{'comments':>9}"
    f"{'except':>8}{'nodes':>7}{'wide%':>7}{'longest':>9}"
)


def measure(path: Path) -> Density:
    """Count one file."""
    text = path.read_text()
    tree = ast.parse(text)
    docstrings: set[int] = set()
    texts: set[ast.AST] = set()
    functions = []
    for node in ast.walk(tree):
        # A string that stands alone is a docstring, also below a field.
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            docstrings |= set(range(node.lineno, (node.end_lineno or 0) + 1))
            texts |= {node, node.value}
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions.append((node.end_lineno or 0) - node.lineno + 1)
    code: set[int] = set()
    comments = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        comments += token.type == tokenize.COMMENT
        if token.type not in SKIPPED and token.start[0] not in docstrings:
            code |= set(range(token.start[0], token.end[0] + 1))
    lines = text.splitlines()
    return Density(
        lines=len(lines),
        code=len(code),
        comments=comments,
        handlers=sum(isinstance(node, ast.ExceptHandler) for node in ast.walk(tree)),
        nodes=sum(
            1 for n in ast.walk(tree) if n not in texts and not isinstance(n, ast.expr_context)
        ),
        wide=sum(len(lines[number - 1]) > 100 for number in code),
        longest=max(functions, default=0),
    )


def total(paths: Iterable[Path]) -> Density:
    """Count several files together."""
    return sum(map(measure, paths), Density())


def main() -> None:
    """Print the table."""
    names = sys.argv[1:] or ["cifar_accel"]
    paths = [
        p for n in names for p in (sorted(Path(n).rglob("*.py")) if Path(n).is_dir() else [Path(n)])
    ]
    print(HEAD)
    for path in paths:
        print(measure(path).row(str(path)))
    print(total(paths).row("all"))


if __name__ == "__main__":
    main()
