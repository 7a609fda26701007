"""The spaces of a block, against a table written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from secateur.models import spaces
from secateur.models.family import CANONICAL
from secateur.models.runtime import NORM_FIRST
from secateur.models.view import BlockDims, Residual

DIMS = BlockDims(hidden=10, heads=6, groups=2, head_width=4, ffn=7)


def test_spaces_follow_from_the_tables_of_rows_and_columns() -> None:
    assert tuple(spaces.ROWS) == tuple(spaces.COLUMNS) == CANONICAL
    assert spaces.MEMBERS["ffn"] == spaces.Members(("gate", "up"), "down")
    assert spaces.MEMBERS["groups"] == spaces.Members(("q", "k", "v"), "o")
    assert spaces.RESIDUAL_READERS == ("q", "k", "v", "gate", "up")
    assert spaces.RESIDUAL_WRITERS == ("o", "down")


def test_the_order_of_spaces_which_decides_among_units_that_cost_the_same() -> None:
    assert spaces.SPACES == ("groups", "attention_out", "ffn", "mlp_out", "attention_in", "mlp_in")
    assert tuple(spaces.MEMBERS) == ("ffn", "groups")


@pytest.mark.parametrize(
    ("residual", "shapes"),
    [
        (
            None,
            {"q": (24, 10), "k": (8, 10), "v": (8, 10), "o": (10, 24), "gate": (7, 10), "up": (7, 10), "down": (10, 7)},
        ),
        (
            Residual((1, 2), (3, 5), (NORM_FIRST, NORM_FIRST)),
            {"q": (24, 1), "k": (8, 1), "v": (8, 1), "o": (2, 24), "gate": (7, 3), "up": (7, 3), "down": (5, 7)},
        ),
        (
            Residual((10, 2), (3, 5), (NORM_FIRST, NORM_FIRST), (6, 8, 9)),
            {"q": (24, 6), "k": (8, 8), "v": (8, 9), "o": (2, 24), "gate": (7, 3), "up": (7, 3), "down": (5, 7)},
        ),
    ],
    ids=["whole", "parts", "parts of q, k and v apart"],
)
def test_shapes_follow_from_the_spaces(residual: Residual | None, shapes: dict[str, tuple[int, int]]) -> None:
    dims = replace(DIMS, residual=residual)
    assert {name: dims.shape(name) for name in CANONICAL} == shapes


def test_the_rows_and_columns_of_a_unit() -> None:
    assert {name: DIMS.unit_width(name, spaces.ROWS[name]) for name in CANONICAL} == {
        "q": 12, "k": 4, "v": 4, "o": 1, "gate": 1, "up": 1, "down": 1,
    }  # fmt: skip
    assert {name: DIMS.unit_width(name, spaces.COLUMNS[name]) for name in CANONICAL} == {
        "q": 1, "k": 1, "v": 1, "o": 12, "gate": 1, "up": 1, "down": 1,
    }  # fmt: skip
