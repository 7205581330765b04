"""metrics.jsonl: one JSON object a logged step."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Metrics:
    """metrics.jsonl: one JSON object a line, each line on the disk's side of the process before the next step.

    A disk that cannot take a line costs one warning, never the run: the line is kept and tried again with the next.
    """

    def __init__(self, path: Path, say: Callable[[str], None], enabled: bool = True):
        self.enabled = enabled  # on the main process
        self.path, self.say, self.pending, self.warned = path, say, "", False

    def truncate(self, step: int) -> None:
        """Drop what follows `step` (and a line cut short by a kill), so that a continued run logs each step once."""
        if self.enabled and self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            if text != self.path.read_text(errors="replace"):
                scratch = self.path.with_name(self.path.name + ".tmp")
                scratch.write_text(text)
                os.replace(scratch, self.path)

    def write(self, row: dict[str, Any]) -> None:
        """Append `row`, and what could not be written before."""
        if self.enabled:
            self.pending += json.dumps(row) + "\n"
            self.flush()

    def close(self) -> None:
        """Try once more, and say how many lines are lost."""
        if not self.flush():
            self.say(
                f"warning: {self.path} lacks its last {self.pending.count(chr(10))} lines: no room"
            )

    def flush(self) -> bool:
        """Whether all lines are in the file now."""
        if not self.pending:
            return True
        try:
            with open(self.path, "ab", buffering=0) as f:
                end = f.tell()
                data = self.pending.encode()
                try:
                    written = f.write(data)
                except OSError:
                    f.truncate(end)
                    raise
                if written < len(data):  # the disk became full in the middle
                    f.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.pending = ""
            return True
        except OSError as e:
            if not self.warned:
                self.say(
                    f"warning: {self.path} cannot be written ({e.strerror}); training goes on, and tries again"
                )
            self.warned = True
            return False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line without its end, and what no training writes there, is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        numbers = isinstance(row, dict) and all(
            isinstance(value, int | float) for value in row.values()
        )
        if numbers and isinstance(row.get("step"), int) and "epoch" in row:
            rows.append(row)
    return rows
