"""Numbers in words, and numbers that a float cannot hold."""

from __future__ import annotations

import math


def exp(value: float) -> float:
    """e to a power; infinity above 709.78, where a float ends."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def perplexity_words(ppl: float | None) -> str:
    """A perplexity in few digits: two decimals as long as they mean something. None is one that a record could not hold."""
    if ppl is None or math.isinf(ppl):
        return "infinite"
    return f"{ppl:,.2f}" if ppl < 1000 else f"{ppl:,.0f}" if ppl < 1e7 else f"{ppl:.2e}"
