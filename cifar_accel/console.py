"""What a command tells: lines of the main process, one line for what went wrong, exit codes."""

import contextlib
import os
import signal
import sys
import time

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


def say(line: str) -> None:
    """Print a line on the main process, above the progress bar if there is one."""
    if not is_main_process():
        return
    # A full disk behind stdout, or a reader that is gone, costs the line and not the run.
    with contextlib.suppress(OSError):
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(line)
            sys.stdout.flush()
        else:
            print(line, flush=True)


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
    one_line = " ".join(message.split())
    print(f"{head} {one_line}", file=sys.stderr, flush=True)
    return code
