"""Numbers as text, and powers that overflow a float."""

from __future__ import annotations

import math
from collections.abc import Mapping


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


def count_words(value: float) -> str:
    """A number of parameters or weights, to three digits."""
    return _three_digits(value, {"B": 1e9, "M": 1e6, "k": 1e3}) or f"{value:,.0f}"


def size_words(value: float) -> str:
    """A number of bytes with its unit, to three digits."""
    return _three_digits(value, {"GB": 1e9, "MB": 1e6, "kB": 1e3}) or f"{value:,.0f} bytes"


def duration_words(seconds: float) -> str:
    """A number of seconds as a duration."""
    if seconds < 59.95:
        return "under 0.1 s" if seconds < 0.05 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def rough_duration_words(seconds: float) -> str:
    """A time that is estimated, in the unit that people plan by."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def below_words(seconds: float) -> str:
    """A time that some work stays below, in whole seconds, minutes or hours."""
    unit, name = (1, "s") if seconds < 90 else (60, "min") if seconds < 90 * 60 else (3600, "h")
    return f"under {math.floor(seconds / unit) + 1} {name}"


def _three_digits(value: float, units: Mapping[str, float]) -> str | None:
    """The value in the largest unit that it reaches, to three digits; None below the smallest."""
    for name, unit in units.items():
        if (scaled := value / unit) >= 0.9995:
            return f"{scaled:,.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f} {name}"
    return None
