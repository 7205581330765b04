"""Whether a hub can be reached, asked before a download that would retry for a minute."""

from cifar_accel.errors import BadInput


def require_network(what: str, remedy: str) -> None:
    """Raise BadInput within about 10 s when the Hugging Face hub cannot be reached.

    Args:
        what: what needs it, the head of the message.
        remedy: what to do instead, the end of the message.
    """
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise BadInput(
            f"{what}: not on this machine, and HF_HUB_OFFLINE forbids to download it; {remedy}"
        )
    try:
        urllib.request.urlopen(
            urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10
        ).close()
    except urllib.error.HTTPError:
        pass  # an answer, if not a welcome: the download itself will say what is wrong
    except OSError as e:
        reason = getattr(e, "reason", e)
        raise BadInput(
            f"{what}: not on this machine, and {constants.ENDPOINT} cannot be reached ({reason}); {remedy}"
        ) from e
