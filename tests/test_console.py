"""What a command tells, and who reads it: nobody any longer, or a terminal that obeys escapes."""

import os
import shlex
import subprocess
import sys

import pytest
from conftest import BIN, summary

from cifar_accel.console import fail, printable, say


@pytest.fixture
def unread():
    """A file descriptor to write to that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


# What only prints, by its words.
PRINTING = {
    "commands": [BIN / "cifar-accel", "--help"],
    "a command": [BIN / "cifar-accel", "report", "--help"],
    "options": [sys.executable, "-m", "cifar_accel", "--help"],
}


@pytest.mark.parametrize("words", PRINTING.values(), ids=PRINTING)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_is_gone_is_no_error(unread, words, unbuffered):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(words, stdout=unread, stderr=subprocess.PIPE, env=environment)
    assert done.returncode == 0
    assert not done.stderr


def test_a_full_disk_behind_help_is_told():
    """It is no reader that has seen enough."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(PRINTING["commands"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode != 0
    assert b"No space left" in done.stderr


def shell(command: str) -> subprocess.CompletedProcess:
    """What the shell gives for `command`, with a stdout that is buffered."""
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    words = ["bash", "-c", f"set -o pipefail; {command}"]
    return subprocess.run(words, capture_output=True, env=environment)


@pytest.mark.parametrize("stdout", ["| true", "> /dev/full", ">&-"])
def test_a_line_is_never_missed(stdout):
    """With or without a bar's library; the exit code stays 0."""
    code = "from cifar_accel.console import *; open_stdout(); say('1'); import tqdm; say('2')"
    done = shell(f"{shlex.join([sys.executable, '-c', code])} {stdout}")
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_training_goes_on_without_its_reader(trainer, tmp_path):
    command = trainer.command("--run-name", "a", "--tracker", "none", "--max-steps", "2")
    done = shell(f"{shlex.join(command)} | head -n 1")
    assert (done.returncode, done.stderr) == (0, b"")
    assert summary(tmp_path / "ck" / "a")["status"] == "finished"


def test_a_character_that_stdout_does_not_have_is_written_out():
    code = "from cifar_accel.console import open_stdout, say; open_stdout(); say('caf\\u00e9')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.stdout == b"caf\\xe9\n"


def test_control_characters_are_told_and_not_done(capsys):
    hostile = "a\x1b[31mb\x07\x9b\r\u202e\udcff"
    shown = r"a\x1b[31mb\x07\x9b\r\u202e\udcff"
    assert printable(hostile + "\n") == shown + r"\n"
    assert printable("Zürich – 東京 'x' \\n") == "Zürich – 東京 'x' \\n"
    say(f"\n{hostile}")
    fail(f"{hostile}\nx")
    # A carriage return is white space, of which `fail` makes one space.
    one_line = shown.replace(r"\r", " ")
    assert capsys.readouterr() == (f"\n{shown}\n", f"cifar_accel: {one_line} x\n")
