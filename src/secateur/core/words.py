"""Numbers as text, and powers that overflow a float."""

from __future__ import annotations

import math


def exp(value: float) -> float:
    """e to the power `value`; infinity if a float cannot hold it (above 709.78)."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def perplexity_words(ppl: float | None) -> str:
    """A perplexity in few digits, two decimals below 1000; None stands for infinity, which a record cannot hold."""
    if ppl is None or math.isinf(ppl):
        return "infinite"
    return f"{ppl:,.2f}" if ppl < 1000 else f"{ppl:,.0f}" if ppl < 1e7 else f"{ppl:.2e}"


def seconds_words(seconds: float) -> str:
    """A time in the unit that people plan by."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def bytes_words(number: float) -> str:
    """A size in the unit that leaves few digits."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 100 * size else f"{number / size:,.0f} {unit}"
    return f"{number:,.0f} bytes"
