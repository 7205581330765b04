"""The layout of the code: imports point down only, and the code stays easy to read."""

import ast
import subprocess
import sys
from pathlib import Path

from tools import density

PACKAGE = Path(__file__).parents[1] / "cifar_accel"

# The rooms from the ground up: a module may import from lower levels and from its own room, not
# from its neighbours on a level. A folder stands for all its modules but those named by themselves.
LEVELS = [
    "errors",
    "console files network yaml_files",
    "options",
    "data records optim.schedules",
    "models machine plan results budget",
    "launch",
    "optim",
    "evaluate",
    "use",
    "run",
    "outputs step",
    "trial",
    "timing",
    "dry_run train",
    "cli",
]
# What starts a program stands above all.
TOP = (len(LEVELS), "__main__")


def place(module: str) -> tuple[int, str]:
    """Level and room of a module, by the longest of its names that is in LEVELS."""
    words = module.split(".")
    if words[-1] == "__main__":
        return TOP
    for length in range(len(words), 0, -1):
        room = ".".join(words[:length])
        for level, rooms in enumerate(LEVELS):
            if room in rooms.split():
                return level, room
    raise AssertionError(f"cifar_accel.{module} has no place in LEVELS")


def imports() -> list[tuple[str, str]]:
    """(module, what it imports) within the package, wherever in its text."""
    paths = {}
    for path in PACKAGE.rglob("*.py"):
        words = path.relative_to(PACKAGE).with_suffix("").parts
        paths[".".join(words).removesuffix(".__init__")] = path
    found = []
    for module, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            package, _, source = node.module.partition(".")
            if package != "cifar_accel":
                continue
            # `from cifar_accel.data import pixels` imports a module, other names are a module's.
            for alias in node.names:
                whole = f"{source}.{alias.name}".removeprefix(".")
                found.append((module, whole if whole in paths else source))
    return found


def test_imports_point_down_only():
    wrong = []
    for module, other in imports():
        level, room = place(module)
        other_level, other_room = place(other)
        if other_level >= level and other_room != room:
            wrong.append((module, other))
    assert len(imports()) > 200 and not wrong


def test_modules_of_a_room_import_each_other_in_no_circle():
    below: dict[str, set[str]] = {}
    for module, other in imports():
        below.setdefault(module, set()).add(other)

    def reachable(module: str) -> set[str]:
        seen: set[str] = set()
        todo = [module]
        while todo:
            new = below.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    assert not [module for module in below if module in reachable(module)]


def test_what_must_answer_at_once_does_not_load_torch():
    modules = "console options.parsing records.folder plan launch.study"
    modules += " results.report results.compare cli"
    code = "import sys; "
    for module in modules.split():
        code += f"import cifar_accel.{module}; "
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_code_is_not_dense():
    """The bounds of CONTRIBUTING.md, over the whole package."""
    whole = density.total(PACKAGE.rglob("*.py"))
    assert whole.handlers <= 0.012 * whole.code, "except clauses"
    assert whole.comments >= 0.10 * whole.code
    assert whole.wide <= 0.03 * whole.code, "code lines of over 100 columns"
    assert whole.longest <= 60, "lines of a function"
