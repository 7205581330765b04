"""What ends a command: bad input, failures that are told in one line, and an agreed stop."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean a, b?` for the names nearest to `name`, or an empty string when none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


class BadInput(Exception):
    """The user's fault: an option, a file or an environment that cannot work. Its message is one line for the user."""


class TrainingError(RuntimeError):
    """Ends a training that began; its message is for the user, and a traceback would add nothing."""


class Diverged(TrainingError):
    """The loss, the gradients or the weights are no longer finite."""


class OutOfMemory(TrainingError):
    """The device cannot hold what one step needs."""


class PeerLost(TrainingError):
    """Another process of this run is gone."""


class Stopped(Exception):
    """All ranks agreed, between two batches of an evaluation, to stop."""
