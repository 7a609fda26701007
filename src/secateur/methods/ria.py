"""RIA: remove the weights that matter least within their own row and column, by relative importance and input norms.

From "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models" (Zhang et al., ICLR 2024,
openreview.net/forum?id=Tr0lPx9woF), relative importance and activations:

    S_ij = (|W_ij| / sum over k of |W_kj| + |W_ij| / sum over k of |W_ik|) * ||X_j||_2^a,  a = 0.5

||X_j||_2 is the norm of input j over all calibration tokens, as in Wanda (arXiv:2306.11695). A weight counts by its
share of its column and of its row, so that a column or row of small weights is not removed as a whole. The default of
the authors' code removes the floor(O * I * s) lowest weights of each matrix. `scope=row` removes the floor(I * s)
lowest of each row, as in Wanda; N:M removes all but N of every M consecutive inputs. Weights that stay are unchanged.
Blocks are calibrated on the outputs of the already pruned ones. Calibration of the authors' code: 128 windows of 2048
tokens of C4.

Not implemented: the paper's channel permutation, which reorders inputs before N:M.

Differences from the authors' code: exactly the requested number is removed (theirs removes one more from a matrix, and
all weights that tie with it). Of equal scores the lower index is removed first. The shares of a row or column that is
all zero are 0 (theirs are NaN). Matrices that are fused in the file are scored one by one.

Shape letters: O outputs, I inputs of a matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from secateur.calibrate.statistics import InputNorm, Statistics
from secateur.core.errors import UsageError
from secateur.core.numbers import at_least_float32
from secateur.models.view import BlockView
from secateur.plan.pattern import parse_pattern
from secateur.plan.plan import BlockPlan
from secateur.plan.selection import Scope, plan_masks_or_units

CALIBRATION = "c4"
STATISTICS = InputNorm
DEMO = [
    {"sparsities": [0.5, 0.6]},
    {"options": {"pattern": "2:4"}, "sparsities": [0.5]},
]


@dataclass(frozen=True)
class RIA:
    """Options.

    Attributes:
        pattern: `unstructured` or N:M.
        scope: the weights that are compared with each other, with pattern `unstructured`: those of a `matrix` (the
            authors' default) or of a `row`.
        power: a, the power of the norm of the input; with 0 the relative importance alone is the score.
    """

    pattern: str = "unstructured"
    scope: str = "matrix"
    power: float = 0.5

    def __post_init__(self) -> None:
        if parse_pattern(self.pattern).structured:
            raise UsageError(
                f"ria: pattern {self.pattern} removes whole units, but ria scores a weight by its share of its row and"
                " column, which cannot rank whole rows or columns (allowed: unstructured, or N:M such as 2:4; for"
                " units use magnitude or wanda)"
            )
        if self.scope not in ("row", "matrix"):
            raise UsageError(f"ria: unknown scope '{self.scope}' (allowed: row, matrix)")
        if not 0 <= self.power < math.inf:
            raise UsageError(
                f"ria: power {self.power:g} is outside [0, inf); it is the power of an input's norm, such as 0.5"
            )


def by_rows(options: RIA) -> bool:
    """Return True if weights are compared within each row."""
    return options.scope == "row"


def plan_block(block: BlockView, statistics: Statistics[InputNorm], options: RIA) -> BlockPlan:
    """Plan one block from its weights and the norms of its inputs."""

    def score_OI(name: str) -> torch.Tensor:
        norm_I = statistics[name].norm_I
        relative_OI = relative_importance(at_least_float32(block.matrix(name)))
        return relative_OI.mul_(norm_I.pow(options.power).to(relative_OI))

    scope: Scope = "row" if options.scope == "row" else "matrix"
    return plan_masks_or_units(block, score_OI, parse_pattern(options.pattern), scope)


def relative_importance(weight_OI: torch.Tensor) -> torch.Tensor:
    """Return each weight's share of its column plus its share of its row, [O, I]; a share of a zero sum is 0."""
    size_OI = weight_OI.abs()
    least = torch.finfo(size_OI.dtype).tiny  # in place of a sum of 0, so that the share is 0 / tiny
    of_column_I, of_row_O = (size_OI.sum(dim).clamp_min_(least) for dim in (0, 1))
    return (size_OI / of_column_I).add_(size_OI.div_(of_row_O[:, None]))
