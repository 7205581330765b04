"""What ends a command early: bad input, failures told in one line, and an agreed stop."""

import difflib
from collections.abc import Iterable


class BadInput(Exception):
    """The user's fault: an option, a file or an environment that cannot work (exit code 2).

    The message is one line for the user: what is wrong, where, and what to do.
    """


class DoesNotFit(BadInput):
    """A step does not fit into the device's memory, as a trial before the first shows."""


class TrainingError(RuntimeError):
    """Ends a training that had begun (exit code 1).

    The message is one line for the user; a traceback would add nothing.
    """


class Diverged(TrainingError):
    """The loss, the gradients or the weights are no longer finite."""


class OutOfMemory(TrainingError):
    """The device cannot hold what one step needs."""


class PeerLost(TrainingError):
    """Another process of this run is gone."""


class Stopped(Exception):
    """All ranks agreed to stop, between two steps or two batches of an evaluation."""


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, or its kind where it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """`; did you mean a, b?` for the names nearest to `name`; empty when none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"; did you mean {', '.join(near)}?" if near else ""
