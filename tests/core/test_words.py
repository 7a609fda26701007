"""Numbers in words: one form in the terminal, on the page and in cards."""

from __future__ import annotations

import pytest

from secateur.core.words import below_words, count_words, duration_words, size_words
from secateur.report import words


@pytest.mark.parametrize(
    ("value", "said"),
    [(7, "7"), (999, "999"), (1234, "1.23 k"), (999_700, "1.00 M"), (134_515_008, "135 M"), (6.74e9, "6.74 B")],
)
def test_counts_have_three_digits(value: float, said: str) -> None:
    assert count_words(value) == said
    assert words.count(value) == said.replace(" ", "\N{NO-BREAK SPACE}")


@pytest.mark.parametrize(("value", "said"), [(99, "99 bytes"), (6_296_448, "6.30 MB"), (269_060_552, "269 MB")])
def test_sizes_have_three_digits(value: float, said: str) -> None:
    assert size_words(value) == said
    assert words.size(value) == said.replace(" ", "\N{NO-BREAK SPACE}")


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.01, "under 0.1 s"), (4.21, "4.2 s"), (59.97, "1 min 00 s"), (185, "3 min 05 s"), (3599.7, "1 h 00 min")],
)
def test_durations_are_short(value: float, said: str) -> None:
    assert duration_words(value) == said
    assert words.duration(value) == said.replace(" ", "\N{NO-BREAK SPACE}")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "under 1 s"), (1.0, "under 2 s"), (89.5, "under 90 s"), (100, "under 2 min"), (1e4, "under 3 h")],
)
def test_a_time_stays_below_what_is_said(seconds: float, words: str) -> None:
    assert below_words(seconds) == words
