"""The removed share of each block, read from the plan in the folder of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from secateur.core.errors import SecateurError
from secateur.models.family import CANONICAL
from secateur.plan.plan import read_plan_json
from secateur.report.rows import Row

_ORDER = (*CANONICAL, "groups", "heads", "ffn")
_UNIFORM = 0.01  # of a part: with N:M and whole rows the removed fraction varies a little from block to block


@dataclass(frozen=True)
class Layers:
    """The plan of one run.

    Attributes:
        row: the run.
        parts: the masked matrices, and the spaces (`groups`, `ffn`) that lost whole units; `block` alone where the plan
            drops blocks and changes nothing else.
        removed: part -> the removed fraction in each block; None if the plan does not change that part of the block.
            All of a dropped block is removed.
        kept: space -> (kept, of) in each block, for plans that remove units and mask nothing; else empty.
        dropped: the numbers of the blocks that are dropped whole.
    """

    row: Row
    parts: tuple[str, ...]
    removed: Mapping[str, tuple[float | None, ...]]
    kept: Mapping[str, tuple[tuple[int, int], ...]]
    dropped: tuple[int, ...] = ()

    @property
    def blocks(self) -> int:
        """The number of blocks of the model."""
        return len(self.removed[self.parts[0]])

    @property
    def spread(self) -> float:
        """The largest difference of the removed fraction of a part between blocks."""
        ranges = ([value or 0.0 for value in values] for values in self.removed.values())
        return max(max(values) - min(values) for values in ranges)

    @property
    def uniform(self) -> bool:
        """Whether every block loses the same."""
        return self.spread < _UNIFORM

    def sentence(self) -> str:
        """The plan of a uniform run in words."""
        means = [(part, f"{sum(v or 0.0 for v in self.removed[part]) / self.blocks:.1%}") for part in self.parts]
        shares = [
            f"{share} of {', '.join(part for part, _ in same)}"
            for share, same in groupby(means, key=lambda item: item[1])
        ]
        return f"the same in all {self.blocks} blocks: " + "; ".join(shares)


def read_layers(rows: Sequence[Row]) -> list[Layers]:
    """Read the plans of the rows whose folder still has one.

    The most unequal of each method come first, then the others, each the most unequal first.
    """
    plans = [layers for row in rows if not row.dense and (layers := _read(row)) is not None]
    first: dict[str, Layers] = {}
    for layers in (ordered := sorted(plans, key=lambda layers: -layers.spread)):
        first.setdefault(str(layers.row.get("method")), layers)
    firsts = list(first.values())
    return [*firsts, *(layers for layers in ordered if layers not in firsts)]


def _read(row: Row) -> Layers | None:
    try:
        plan = read_plan_json(Path(str(row.get("out") or "")))
        return _layers(row, plan) if plan is not None and _same_run(row, plan) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SecateurError):
        return None  # a damaged plan loses its picture; the report goes on


def _same_run(row: Row, plan: Mapping[str, Any]) -> bool:
    """Whether the folder still holds the result of the row; it may have been pruned again since."""
    return all(
        plan.get(name) == row.get(name)
        for name in ("method", "sparsity_measured", "pattern")
        if row.get(name) is not None and name in plan
    )


def _layers(row: Row, plan: Mapping[str, Any]) -> Layers | None:
    blocks = plan.get("blocks") or []
    removed: dict[str, list[float | None]] = {}
    kept: dict[str, list[tuple[int, int]]] = {}
    for index, block in enumerate(blocks):
        shares = {
            name: mask["removed"] / (mask["shape"][0] * mask["shape"][1])
            for name, mask in block.get("masks", {}).items()
        }
        shares |= {space: 1 - units["kept"] / units["of"] for space, units in block.get("keep", {}).items()}
        for name, share in shares.items():
            removed.setdefault(name, [None] * len(blocks))[index] = share
        for space, units in block.get("keep", {}).items():
            kept.setdefault(space, []).append((units["kept"], units["of"]))
    dropped = tuple(index for index, block in enumerate(blocks) if block.get("dropped"))
    if dropped and not removed:
        removed["block"] = [0.0] * len(blocks)
    for values, index in ((values, index) for values in removed.values() for index in dropped):
        values[index] = 1.0
    parts = tuple(sorted(removed, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)))
    complete = all(name in kept and len(kept[name]) == len(blocks) for name in parts)
    widths = {name: tuple(several) for name, several in kept.items()} if complete else {}
    shares_of = {name: tuple(removed[name]) for name in parts}
    return Layers(row, parts, shares_of, widths, dropped) if parts else None
