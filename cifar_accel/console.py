"""What a command tells: lines of the main process, one line for what went wrong, exit codes."""

import contextlib
import io
import os
import signal
import sys
import time
from typing import Any

from cifar_accel.errors import BadInput

# Exit codes of every command: 0 is done, and 143 what a shell reports for a process that SIGTERM
# ended: a training that was stopped, after a checkpoint.
FAILED = 1
BAD_INPUT = 2
STOPPED = 143

# How long another process than the main one waits before it complains, in seconds.
WAIT_FOR_MAIN_PROCESS = 5.0


def is_main_process() -> bool:
    """Whether this process is the launcher's rank 0, or the only one. Torch need not be loaded."""
    return os.environ.get("RANK", "0") == "0"


class _Output(io.FileIO):
    """A file for which a reader that has gone away, as in `| head`, is no error."""

    reader_is_gone = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            self.reader_is_gone = True
        return len(data)


def reader_is_gone() -> bool:
    """Whether nobody reads stdout any longer, so that more output is for nobody."""
    return getattr(getattr(sys.stdout, "buffer", None), "reader_is_gone", False)


def open_stdout() -> None:
    """Let stdout take any character, line by line, and go on when nobody reads it any longer."""
    system = sys.__stdout__
    # None is a stdout that was closed; another than the system's is somebody else's.
    if system and sys.stdout is system:
        # Without a buffer, in which lines that a full disk refused would wait to fail once more.
        raw = _Output(system.fileno(), "w", closefd=False)
        sys.stdout = io.TextIOWrapper(raw, system.encoding, "backslashreplace", line_buffering=True)


def printable(text: str) -> str:
    """`text` in one line, with `\\x1b` and the like for what is no visible character."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def say(line: str) -> None:
    """Print a line on the main process, above the progress bar if there is one."""
    if not is_main_process():
        return
    line = "\n".join(map(printable, line.split("\n")))
    # A full disk behind stdout, or a reader that is gone, costs the line and not the run.
    with contextlib.suppress(OSError):
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(line)
        else:
            print(line, flush=True)


def print_result(text: str) -> None:
    """Print what a command was asked for. Raises BadInput where stdout does not take it."""
    try:
        print(text, flush=True)
    except OSError as e:
        raise BadInput(f"stdout: {e.strerror or e}") from e


def complain(line: str) -> None:
    """Print a line on the main process's stderr, from a command that goes on."""
    if is_main_process():
        print(f"cifar_accel: {printable(' '.join(line.split()))}", file=sys.stderr, flush=True)


def fail(message: str, code: int = BAD_INPUT) -> int:
    """Print one line on stderr and return the exit code `code`.

    Other processes than the main one wait a moment first. When the main process has the same
    complaint, its launcher ends them meanwhile, and it is told once.
    """
    head = "cifar_accel:"
    if not is_main_process():
        head += f" [rank {os.environ['RANK']}]"
        # The launcher's SIGTERM ends the wait.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(WAIT_FOR_MAIN_PROCESS)
    one_line = printable(" ".join(message.split()))
    print(f"{head} {one_line}", file=sys.stderr, flush=True)
    return code


def in_time(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 1:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
