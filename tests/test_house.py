"""The layout of the code: imports point down only."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "cifar_accel"

# The rooms from the ground up. A module may import from lower levels and from its own room (the same
# word), not across a level. Packages stand for all their modules but those named by themselves; what
# starts a program (`__main__`) stands above all.
LEVELS = [
    "errors console files network",
    "options",
    "data records optim.schedules",
    "models machine plan results",
    "launch",
    "optim",
    "evaluate",
    "use",
    "run",
    "outputs trial",
    "dry_run train",
    "cli",
]
WITHIN = {("console", "errors"), ("files", "errors"), ("network", "errors")}  # BadInput
# Imports against this order that are still to be cut.
EXCEPTIONS: set[tuple[str, str]] = set()


def place(module: str) -> tuple[int, str]:
    """Level and room of a module, by its longest name in LEVELS."""
    if module.endswith("__main__"):
        return len(LEVELS), "__main__"
    words = module.split(".")
    for length in range(len(words), 0, -1):
        room = ".".join(words[:length])
        for level, rooms in enumerate(LEVELS):
            if room in rooms.split():
                return level, room
    raise AssertionError(f"cifar_accel.{module} has no place in LEVELS")


def imports() -> list[tuple[str, str]]:
    """(module, what it imports) within the package, wherever in its text."""
    paths = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    names = {".".join(path.parts).removesuffix(".__init__"): path for path in paths}
    found = []
    for name, path in names.items():
        if name == "__init__":
            continue
        for node in ast.walk(ast.parse(paths[path].read_text())):
            if isinstance(node, ast.Import):
                assert not any(a.name.startswith("cifar_accel") for a in node.names), (
                    "from ... import ..."
                )
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cifar_accel"):
                source = node.module.removeprefix("cifar_accel").removeprefix(".")
                for alias in node.names:
                    whole = f"{source}.{alias.name}".removeprefix(".")
                    found.append((name, whole if whole in names else source))
    return found


def test_imports_point_down_only():
    up = set()
    for module, other in imports():
        level, room = place(module)
        other_level, other_room = place(other)
        down = other_level < level or other_room == room or (module, other) in WITHIN
        if not down:
            up.add((module, other))
    assert up == EXCEPTIONS


def test_within_a_room_there_is_no_circle():
    edges: dict[str, set[str]] = {}
    for module, other in imports():
        edges.setdefault(module, set()).add(other)

    def reaches(module: str, goal: str, seen: set[str]) -> bool:
        for other in edges.get(module, set()) - seen:
            seen.add(other)
            if other == goal or reaches(other, goal, seen):
                return True
        return False

    circles = {module for module in edges if reaches(module, module, set())}
    assert circles <= {name for pair in EXCEPTIONS for name in pair}


def test_rooms_that_never_load_torch():
    rooms = (
        "errors console files network options.parsing records.folder results.page launch.study plan"
    )
    there = [room for room in rooms.split() if (PACKAGE / f"{room.replace('.', '/')}.py").exists()]
    code = "import sys; " + "".join(f"import cifar_accel.{room}; " for room in there)
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
