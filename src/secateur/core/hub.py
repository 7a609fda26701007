"""Check once whether the hub answers.

If it does not, its libraries retry for half a minute. In offline mode they fail at once, or use their cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

ANSWER_WITHIN = 5.0  # seconds; without a network the check fails at once


@contextmanager
def hub() -> Iterator[bool]:
    """Yield whether the hub answers; if not, its libraries are in offline mode while the context lasts."""
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
    except Exception:  # any error of the client: no name, no route, a timeout, or offline by the environment
        return False
    return True
