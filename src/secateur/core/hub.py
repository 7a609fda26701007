"""Whether the hub answers. Its libraries try again for half a minute where it does not, and fail at once, or take what they have kept, where they are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

ANSWER_WITHIN = 5.0  # seconds; without a network it takes none of them


@contextmanager
def hub() -> Iterator[bool]:
    """While this lasts, the libraries of the hub are offline if it does not answer; gives whether it does."""
    import datasets.config
    from huggingface_hub import constants

    answers = _answers()
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not answers:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield answers
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_WITHIN)
    except Exception:  # whatever its client raises: no name, no route, no time, or offline by the environment
        return False
    return True
