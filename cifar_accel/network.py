"""Whether a hub can be reached, asked before a download that would retry for a minute."""

import urllib.error
import urllib.request

from cifar_accel.errors import BadInput

# How long the hub may take to answer, in seconds.
PATIENCE = 10.0


def require_network(what: str, remedy: str) -> None:
    """Raise BadInput within about 10 s when the Hugging Face hub cannot be reached.

    Args:
        what: what needs it, the head of the message.
        remedy: what to do instead, the end of the message.
    """
    # The hub's client is slow to import, and most runs download nothing.
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise BadInput(
            f"{what}: not on this machine, and HF_HUB_OFFLINE forbids to download it; {remedy}"
        )
    question = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(question, timeout=PATIENCE).close()
    except OSError as error:
        # An answer with an error code is an answer: the download itself will say what is wrong.
        if isinstance(error, urllib.error.HTTPError):
            return
        reason = getattr(error, "reason", error)
        raise BadInput(
            f"{what}: not on this machine, and {constants.ENDPOINT} cannot be reached ({reason}); "
            f"{remedy}"
        ) from error
