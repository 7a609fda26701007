"""The errors that users meet.

A message names the thing, the value met, the values allowed and the next step, on one line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class SecateurError(Exception):
    """The work could not be done: bad data, a broken model, no memory. Exit status 1."""

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"\s*\n\s*", " ", message))  # messages of libraries may have several lines


class UsageError(SecateurError, ValueError):
    """The request itself is wrong: unknown name, value out of range. Exit status 2."""


class HopelessError(SecateurError):
    """The data cannot give a result. Resuming the run would fail the same way, so its progress is not kept."""


class NotFiniteError(HopelessError):
    """Weights or activations hold NaN or infinity."""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UsageError:
    """The error for a name that is not one of `allowed`; it offers the most similar names."""
    allowed = sorted(allowed)
    plain = {known.lower(): known for known in reversed(allowed)}  # WANDA is near wanda
    near = [plain[match] for match in difflib.get_close_matches(name.lower(), plain, n=3)]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return UsageError(f"unknown {kind} '{name}'{hint} (known: {', '.join(allowed) or 'none'})")


def reason(error: Exception) -> str:
    """Return the first line of what an error says; its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
