"""Magnitude pruning: remove the weights, or whole units, of the smallest absolute value. It needs no calibration.

Scores are |W|, compared within each matrix (Han et al., arXiv:1506.02626; the baseline of arXiv:2306.11695, section 4).
The patterns `rows` and `columns` remove whole feed-forward units, and key-value heads with the query heads that use
them. The score of a unit is the Euclidean norm of the weights that compute it (`rows`) or that read it (`columns`).
`scope=model` ranks the units of all blocks together, so widths differ from block to block.

Ties: the entry with the lower index is removed first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from secateur.core.errors import UsageError
from secateur.core.numbers import at_least_float32
from secateur.models.spaces import MEMBERS
from secateur.models.view import BlockView, ModelView
from secateur.plan.counts import removed_units
from secateur.plan.pattern import parse_pattern
from secateur.plan.plan import BlockPlan
from secateur.plan.selection import keep_units, plan_masks_or_units, unit_scores

CALIBRATION = None
DEMO = [
    {"sparsities": [0.5, 0.7]},
    {"options": {"pattern": "2:4"}, "sparsities": [0.5]},
    {"options": {"scope": "row"}, "sparsities": [0.5]},
    {"options": {"pattern": "rows", "scope": "model"}, "sparsities": [0.25]},
]


@dataclass(frozen=True)
class Magnitude:
    """Options.

    Attributes:
        pattern: `unstructured`, N:M, `rows` or `columns`.
        scope: the weights or units that are compared with each other: those of a `matrix` (the default) or `row`; with
            `rows` and `columns` those of a `block` (the default) or of the whole `model`.
    """

    pattern: str = "unstructured"
    scope: str = ""

    def __post_init__(self) -> None:
        allowed = ("block", "model") if parse_pattern(self.pattern).structured else ("matrix", "row")
        if not self.scope:
            object.__setattr__(self, "scope", allowed[0])
        if self.scope not in allowed:
            raise UsageError(
                f"magnitude: scope '{self.scope}' does not go with pattern {self.pattern}"
                f" (allowed: {', '.join(allowed)})"
            )

    @property
    def whole_model(self) -> bool:
        """True if the units of all blocks are ranked together."""
        return self.scope == "model"


def by_rows(options: Magnitude) -> bool:
    """Return True if weights are compared within each row."""
    return options.scope == "row"


def plan_block(block: BlockView, statistics: Any, options: Magnitude) -> BlockPlan:
    """Plan one block from its weights; `statistics` is not used."""
    score = partial(_absolute, block)
    return plan_masks_or_units(
        block, score, parse_pattern(options.pattern), "row" if options.scope == "row" else "matrix"
    )


def plan_model(view: ModelView, data: Any, options: Magnitude, run: Any) -> tuple[BlockPlan, ...]:
    """Rank the units of all blocks together, with one threshold for each space of units.

    Every block keeps at least one unit of each space. `data` and `run` are not used.
    """
    pattern = parse_pattern(options.pattern)
    scored: list[tuple[int, dict[str, torch.Tensor], dict[str, float]]] = []
    for block in view.iterate():
        rates = {space: block.rates[m.reader] for space, m in MEMBERS.items() if m.reader in block.rates}
        scored.append((block.index, unit_scores(block, partial(_absolute, block), pattern), rates))
    # one ranking for each space: rank the units of all its blocks, then split the kept indices by block
    keep: list[dict[str, torch.Tensor]] = [{} for _ in scored]
    for space in MEMBERS:
        members = [n for n, (_, scores, _) in enumerate(scored) if space in scores]
        if not members:
            continue
        remove = sum(removed_units(scored[n][2][space], len(scored[n][1][space])) for n in members)
        protected = []
        for n in members:
            score_U = scored[n][1][space].clone()
            score_U[score_U.argmax()] = torch.inf  # the best unit of a block always stays
            protected.append(score_U)
        kept_N = keep_units(torch.cat(protected), min(remove, sum(len(s) - 1 for s in protected)))
        start = 0
        for n, score_U in zip(members, protected, strict=True):
            kept_U = kept_N[(kept_N >= start) & (kept_N < start + len(score_U))] - start
            keep[n][space] = kept_U.to(torch.int32)
            start += len(score_U)
    return tuple(
        BlockPlan(index, keep=kept, of={space: len(score) for space, score in scores.items()})
        for (index, scores, _), kept in zip(scored, keep, strict=True)
    )


def _absolute(block: BlockView, name: str) -> torch.Tensor:
    """Return |W| of a matrix, [O, I]."""
    return at_least_float32(block.matrix(name)).abs()
