"""Numbers as text, and powers that overflow a float."""

from __future__ import annotations

import math


def exp(value: float) -> float:
    """e to the power `value`; infinity if a float cannot hold it (above 709.78)."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def plural(number: int, noun: str) -> str:
    """A number with its noun: 1 run, 2 runs."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def perplexity_words(ppl: float | None) -> str:
    """A perplexity in few digits, two decimals below 1000; None stands for infinity, which a record cannot hold."""
    if ppl is None or math.isinf(ppl):
        return "infinite"
    return f"{ppl:,.2f}" if ppl < 1000 else f"{ppl:,.0f}" if ppl < 1e7 else f"{ppl:.2e}"
