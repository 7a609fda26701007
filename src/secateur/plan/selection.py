"""The selection of what stays, from scores: masks or kept units, for any pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from secateur.models.spaces import MEMBERS
from secateur.models.view import BlockView
from secateur.plan.counts import removed_units, removed_weights
from secateur.plan.pattern import Pattern, keep_highest, keep_highest_per_row, keep_n_of_m
from secateur.plan.plan import BlockPlan, Mask

Scope = Literal["row", "matrix"]
Score = Callable[[str], Tensor]
"""Canonical matrix name -> score_OI, at least 0, higher is more worth keeping.

It is called once for each matrix.
"""


def plan_masks_or_units(block: BlockView, score: Score, pattern: Pattern, scope: Scope) -> BlockPlan:
    """The plan of one block: masks for `unstructured` and N:M, kept units for `rows` and `columns`.

    Args:
        block: the block; `block.rates` holds the sparsity of each matrix.
        score: see `Score`.
        pattern: the pattern; `scope` is used by `unstructured` alone: compare within each output row, or within the
            whole matrix.
    """
    if not pattern.structured:
        masks = {name: Mask.pack(_mask(score(name), rate, pattern, scope)) for name, rate in block.rates.items()}
        return BlockPlan(block.index, masks)
    scores = unit_scores(block, score, pattern)
    keep, of = {}, {}
    for space, score_U in scores.items():
        rate = block.rates[MEMBERS[space].reader]
        keep[space] = keep_units(score_U, removed_units(rate, len(score_U)))
        of[space] = len(score_U)
    return BlockPlan(block.index, keep=keep, of=of)


def _mask(score_OI: Tensor, rate: float, pattern: Pattern, scope: Scope) -> Tensor:
    if pattern.kind == "n:m":
        return keep_n_of_m(score_OI, pattern.keep, pattern.group)
    if scope == "row":
        return keep_highest_per_row(score_OI, removed_weights(rate, score_OI.shape[1]))
    return keep_highest(score_OI, removed_weights(rate, score_OI.numel()))


def keep_units(score_U: Tensor, remove: int) -> Tensor:
    """The kept indices, ascending."""
    return keep_highest_per_row(score_U[None], remove)[0].nonzero().squeeze(1).to(torch.int32).cpu()


def unit_scores(block: BlockView, score: Score, pattern: Pattern) -> dict[str, Tensor]:
    """The score of each unit in the spaces that have a rate: the root of the sum of squares over the weights that
    compute the unit (`rows`) or that read it (`columns`). A key-value head is one unit with its query heads.
    """
    return {
        space: _unit_score(block, score, pattern, space) for space in MEMBERS if MEMBERS[space].reader in block.rates
    }


def _unit_score(block: BlockView, score: Score, pattern: Pattern, space: str) -> Tensor:
    units = block.dims.units()[space]
    members = MEMBERS[space].writers if pattern.kind == "rows" else (MEMBERS[space].reader,)
    total_U = torch.zeros(units, dtype=torch.float64)
    for name in members:
        if name in block.family.matrices:
            square_OI = score(name).square()
            along = square_OI.sum(1 if pattern.kind == "rows" else 0, dtype=torch.float64)
            total_U += along.view(units, -1).sum(1).cpu()
    return total_U.sqrt()
