"""Published tables as data, for comparison with a user's runs: `published/NAME.json` holds those of one paper."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class PublishedTable:
    """A table of a paper.

    Attributes:
        source: the paper and the number of the table.
        title: the content of the table.
        protocol: how the numbers were measured, as far as the paper says.
        columns, rows: as printed; null if the paper gives no number.
        note: a caution for the reader; may be empty.
    """

    source: str
    title: str
    protocol: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str


def published(paper: str) -> Mapping[str, PublishedTable]:
    """The tables of a paper by their numbers; `paper` is the name of the method."""
    content = json.loads(files("secateur.report").joinpath(f"published/{paper}.json").read_text("utf-8"))
    return {
        number: PublishedTable(
            f"{content['source']}, table {number}",
            table["title"],
            table["protocol"],
            tuple(table["columns"]),
            tuple(tuple(row) for row in table["rows"]),
            table.get("note", ""),
        )
        for number, table in content["tables"].items()
    }
