"""Every promise of the documentation names a test that there is."""

import re
from pathlib import Path


def test_every_promise_names_its_test():
    """The README's table, line by line."""
    root = Path(__file__).parent
    section = (
        (root.parent / "README.md")
        .read_text()
        .partition("## What you can rely on")[2]
        .partition("\n## ")[0]
    )
    promised = re.findall(r"`(test_\w+)`", section)
    there = "".join(file.read_text() for file in root.rglob("test_*.py"))
    assert len(promised) > 25 and not [name for name in promised if f"def {name}(" not in there]
