"""Spaces: the meaning of the rows and the columns of each matrix of a block. No other module defines it.

A space is a set of units. A unit is part of several matrices, and it stays or goes in all of them:

    groups                       key-value heads, each with the query heads that use it
    ffn                          feed-forward units
    attention_in, mlp_in         features of the residual stream that attention and MLP read
    attention_out, mlp_out       features of the residual stream that attention and MLP write
    q_in, k_in, v_in             in place of `attention_in`, if q, k and v each choose the features that they read

A matrix reads the units of its columns and writes the units of its rows. `BlockDims.unit_width` gives the
number of rows or columns of one unit in a matrix, from the sizes of the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ROWS: Mapping[str, str] = {
    "q": "groups",
    "k": "groups",
    "v": "groups",
    "o": "attention_out",
    "gate": "ffn",
    "up": "ffn",
    "down": "mlp_out",
}
"""Canonical matrix name -> the space that its rows write."""

COLUMNS: Mapping[str, str] = {
    "q": "attention_in",
    "k": "attention_in",
    "v": "attention_in",
    "o": "groups",
    "gate": "mlp_in",
    "up": "mlp_in",
    "down": "ffn",
}
"""Canonical matrix name -> the space that its columns read."""

OWN_COLUMNS: Mapping[str, str] = {"q": "q_in", "k": "k_in", "v": "v_in"}
SEPARATE_COLUMNS: Mapping[str, str] = {**COLUMNS, **OWN_COLUMNS}
"""The same as `COLUMNS`, if q, k and v each choose the features that they read."""

SPACES = tuple(dict.fromkeys([*ROWS.values(), *COLUMNS.values()]))
"""All spaces of a block, the written ones first."""

INNER = ("ffn", "groups")
"""The spaces inside a block: its own matrices write and read their units. The other spaces belong to the residual."""

QUERY_HEADS = ("q", "o")
"""The matrices in which a unit of `groups` is several query heads; in the others it is one key-value head."""


@dataclass(frozen=True)
class Members:
    """The matrices of an inner space: the rows of `writers` write its units, and the columns of `reader` read them."""

    writers: tuple[str, ...]
    reader: str


def _members(space: str) -> Members:
    (reader,) = (name for name, read in COLUMNS.items() if read == space)
    return Members(tuple(name for name, written in ROWS.items() if written == space), reader)


PARTS: Mapping[str, str] = {"attention": "groups", "mlp": "ffn"}
"""The two parts of a block, each with the space whose units it is made of."""

MEMBERS: Mapping[str, Members] = {space: _members(space) for space in INNER}
"""Inner space -> its matrices."""

RESIDUAL_READERS = tuple(name for name, space in COLUMNS.items() if space not in INNER)
RESIDUAL_WRITERS = tuple(name for name, space in ROWS.items() if space not in INNER)
