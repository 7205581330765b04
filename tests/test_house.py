"""The layout of the code: imports point down only."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "cifar_accel"
# Imports against the order, to be cut one by one.
EXCEPTIONS = {
    ("cifar_accel.instruments", "cifar_accel.prepare"),
    ("cifar_accel.prepare", "cifar_accel.instruments"),
    ("cifar_accel.launch", "cifar_accel.cli"),
    ("cifar_accel.study", "cifar_accel.cli"),
    ("cifar_accel.cli", "cifar_accel.study"),
    ("cifar_accel.study", "cifar_accel.launch"),
    ("cifar_accel.cli", "cifar_accel.dry_run"),
    ("cifar_accel.dry_run", "cifar_accel.launch"),
}


def imports() -> dict[str, set[str]]:
    """For each module of the package the modules of the package that it imports, wherever in its text."""
    names = {
        p: ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for p in PACKAGE.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for path, name in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cifar_accel"):
                whole = {f"{node.module}.{alias.name}" for alias in node.names} & set(names.values())
                found[name] |= whole or {node.module}
    return found


def test_imports_make_no_circle():
    found = imports()
    below: dict[str, set[str]] = {}

    def reach(name: str) -> set[str]:
        if name not in below:
            below[name] = set()
            for other in found.get(name, ()):
                if (name, other) not in EXCEPTIONS:
                    below[name] |= {other} | reach(other)
        return below[name]

    assert not [name for name in found if name in reach(name)]
