"""metrics.jsonl: one JSON object a logged step."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cifar_accel.files import adapter


class Metrics:
    """Writer of metrics.jsonl: each row is handed to the system before the next step.

    A disk that cannot take a line costs one warning, never the run: the line is kept and tried
    again with the next. Writes nothing where it is not `enabled`, which it is on the main process.
    """

    def __init__(self, path: Path, say: Callable[[str], None], enabled: bool = True):
        self.path = path
        self.say = say
        self.enabled = enabled
        # Lines that the disk has not taken yet.
        self.pending: list[str] = []
        self.warned = False

    def truncate(self, step: int) -> None:
        """Drop the rows after `step`, and lines that are no rows.

        A run that goes on from `step` then logs each step once.
        """
        if not self.enabled or not self.path.exists():
            return
        # A start that was killed had logged steps after the checkpoint from which this one goes on.
        text = "".join(f"{line}\n" for line, row in _rows(self.path) if row["step"] <= step)
        # Bytes that are no UTF-8 must not stop a run: nothing of the trainer's is lost with them.
        if text == self.path.read_text(errors="replace"):
            return
        # Written aside, so that a kill leaves all old rows or all that stay.
        scratch = self.path.with_name(self.path.name + ".tmp")
        scratch.write_text(text)
        os.replace(scratch, self.path)

    def write(self, row: dict[str, Any]) -> None:
        """Append `row`, after what could not be written before."""
        if self.enabled:
            self.pending.append(json.dumps(row, allow_nan=False) + "\n")
            self.flush()

    def flush(self) -> None:
        """Write what is pending, where there is room."""
        if not self.pending:
            return
        end = self.path.stat().st_size if self.path.exists() else 0
        try:
            # Closing the file hands its last bytes to the system, and raises too.
            with open(self.path, "a") as file:
                file.writelines(self.pending)
            self.pending = []
        except OSError as error:
            # A disk that filled up in the middle has taken a part of a line: cut it off again.
            with suppress(OSError):
                os.truncate(self.path, end)
            # Said once: the same is true for every further row.
            if not self.warned:
                reason = f"cannot be written ({error.strerror}); training goes on, and tries again"
                self.say(f"warning: {self.path} {reason}")
            self.warned = True

    def close(self) -> None:
        """Try once more, and say how many lines are lost."""
        self.flush()
        if self.pending:
            self.say(f"warning: {self.path} lacks its last {len(self.pending)} lines: no room")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; what no training writes there is left out."""
    return [row for _, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line that is a row, and the row: numbers by name, with an integer step and an epoch."""
    numbers = adapter(dict[str, int | float])
    for line in path.read_text(errors="replace").splitlines():
        # The last line may have been cut short by a kill, and people do edit files.
        row = {}
        with suppress(ValueError):
            row = numbers.validate_json(line, strict=True)
        if isinstance(row.get("step"), int) and "epoch" in row:
            yield line, row
