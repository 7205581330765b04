"""What is printed: lines of the main process, and one line on stderr for what went wrong."""

import contextlib
import os
import signal
import sys
import time


def speak_somewhere() -> None:
    """Give a process that was started without stdout or stderr (`>&-`) one that leads nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it stays open


def say(line: str) -> None:
    """Print a line on the main process, above the progress bar if there is one."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # a full disk behind stdout costs the line, not the run
            if "tqdm" in sys.modules:
                sys.modules["tqdm"].tqdm.write(line)
                sys.stdout.flush()
            else:
                print(line, flush=True)


def fail(message: str, code: int = 2) -> int:
    """Print one line on stderr and return the exit code.

    Other ranks wait a moment first: when the main process has the same complaint, its launcher ends them meanwhile.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print(
        f"cifar_accel: {'' if rank == '0' else f'[rank {rank}] '}{' '.join(message.split())}",
        file=sys.stderr,
        flush=True,
    )
    return code
