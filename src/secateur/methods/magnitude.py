"""Magnitude pruning: the weights (or whole units) of the smallest absolute value go. It needs no calibration.

Scores are |W|, compared within each matrix (Han et al., arXiv:1506.02626; the baseline of arXiv:2306.11695, section 4). With the
patterns `rows` and `columns` whole feed-forward units, and key-value heads with the query heads that use them, are removed: a unit's
score is the Euclidean norm of the weights that compute it (`rows`) or that read it (`columns`). `scope=model` ranks the units of all blocks
together, so widths differ from block to block.

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
from secateur.plan.allocate import keep_units, plan_masks_or_units, removed_units, unit_scores
from secateur.plan.pattern import parse_pattern
from secateur.plan.plan import BlockPlan

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
        scope: what is compared: `matrix` (the default), `row`, or, for `rows` and `columns`, `block` or `model`.
    """

    pattern: str = "unstructured"
    scope: str = ""

    def __post_init__(self) -> None:
        allowed = ("block", "model") if parse_pattern(self.pattern).structured else ("matrix", "row")
        if not self.scope:
            object.__setattr__(self, "scope", allowed[0])
        if self.scope not in allowed:
            raise UsageError(
                f"magnitude: scope '{self.scope}' does not go with pattern {self.pattern} (allowed: {', '.join(allowed)})"
            )

    @property
    def whole_model(self) -> bool:
        """Whether all blocks are ranked together."""
        return self.scope == "model"


def by_rows(options: Magnitude) -> bool:
    """Whether weights are compared within each row."""
    return options.scope == "row"


def plan_block(block: BlockView, statistics: Any, options: Magnitude) -> BlockPlan:
    """The plan of one block; `statistics` is not used."""
    score = partial(_absolute, block)
    return plan_masks_or_units(
        block, score, parse_pattern(options.pattern), "row" if options.scope == "row" else "matrix"
    )


def plan_model(view: ModelView, data: Any, options: Magnitude, run: Any) -> tuple[BlockPlan, ...]:
    """Rank the units of all blocks together: one threshold a space; every block keeps at least one unit. `data` and `run` are not used."""
    pattern = parse_pattern(options.pattern)
    scored: list[tuple[int, dict[str, torch.Tensor], dict[str, float]]] = []
    for block in view.iterate():
        rates = {space: block.rates[m.reader] for space, m in MEMBERS.items() if m.reader in block.rates}
        scored.append((block.index, unit_scores(block, partial(_absolute, block), pattern), rates))
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
        kept = keep_units(torch.cat(protected), min(remove, sum(len(s) - 1 for s in protected)))
        start = 0
        for n, score_U in zip(members, protected, strict=True):
            here = kept[(kept >= start) & (kept < start + len(score_U))] - start
            keep[n][space] = here.to(torch.int32)
            start += len(score_U)
    return tuple(
        BlockPlan(index, keep=kept, of={space: len(score) for space, score in scores.items()})
        for (index, scores, _), kept in zip(scored, keep, strict=True)
    )


def _absolute(block: BlockView, name: str) -> torch.Tensor:
    return at_least_float32(block.matrix(name)).abs()
