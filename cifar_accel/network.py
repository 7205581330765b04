"""Whether a hub can be reached, asked before a download that would retry for a minute."""

import urllib.error
import urllib.request
from contextlib import suppress

from cifar_accel.errors import BadInput

# How long the hub may take to answer, in seconds.
PATIENCE = 10.0


def require_network(what: str, remedy: str, why: str = "not on this machine, and ") -> None:
    """Raise BadInput within about 10 s when the Hugging Face hub cannot be reached.

    The message begins with `what` needs it and `why`, and ends with the `remedy`.
    """
    # The hub's client is slow to import, and most runs download nothing.
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise BadInput(f"{what}: {why}HF_HUB_OFFLINE forbids to ask the hub; {remedy}")
    question = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        # An answer with an error code is an answer: the download itself will say what is wrong.
        with suppress(urllib.error.HTTPError):
            urllib.request.urlopen(question, timeout=PATIENCE).close()
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise BadInput(
            f"{what}: {why}{constants.ENDPOINT} cannot be reached ({reason}); {remedy}"
        ) from error
