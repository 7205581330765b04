"""What the documents promise is there: a test for each promise, and a target for each link."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_every_promise_names_its_test():
    """The tables of docs/guarantees.md, line by line."""
    page = (ROOT / "docs" / "guarantees.md").read_text()
    promises = re.findall(r"^\|(?! promise|---)(.*)\|(.*)\|$", page, re.MULTILINE)
    tests = [re.findall(r"`(test_\w+)`", names) for _, names in promises]
    assert all(tests), "a promise without a test"

    named = {name for names in tests for name in names}
    assert len(named) > 25
    there = "".join(file.read_text() for file in ROOT.glob("tests/**/test_*.py"))
    # Once: else it could go, and the page would not notice.
    assert [name for name in named if there.count(f"def {name}(") != 1] == []
    # None is in the long form alone; one of wandb has a case that is.
    long = re.findall(r"^@LONG\n(?:@.*\n)*def (test_\w+)\(", there, re.MULTILINE)
    assert not named & set(long)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_is_there(page):
    """Paths of code, tests, configs and studies, where a page names them in backticks."""
    known = "cifar_accel|tests|tools|benchmarks|examples|studies|accelerate_configs|docs"
    rooms = "options|data|models|optim|machine|records|results|use|launch"
    named = re.findall(rf"`((?:{known})/[\w./-]+\.\w+)`", page.read_text())
    within = re.findall(rf"`((?:{rooms})/\w+\.py)`", page.read_text())
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [name for name in within if not (ROOT / "cifar_accel" / name).exists()]
    assert missing == []
