"""Wanda: within each output row, remove the weights of the lowest |W_ij| times the norm of input j.

From arXiv:2306.11695, equation 1 and algorithm 1: the score is S_ij = |W_ij| * ||X_j||_2. From each row the
floor(I * s) weights of the lowest scores are removed (with N:M, all but N of every M consecutive inputs). Weights that
stay are unchanged. Blocks are calibrated on the outputs of the already pruned ones. Calibration of the paper: 128
windows of 2048 tokens of C4.

Differences from the authors' code: q, k, v share one statistic, as do gate and up; the statistics pass of a block ends
at the last input that is needed; ties (the lower index is removed first) and N:M are selected without loops over
columns. With `rows` and `columns` the score of a unit is the Euclidean norm of its weights' scores.

Shape letters: O outputs, I inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from secateur.calibrate.statistics import InputNorm, Statistics
from secateur.core.errors import UsageError
from secateur.core.numbers import at_least_float32
from secateur.models.view import BlockView
from secateur.plan.pattern import parse_pattern
from secateur.plan.plan import BlockPlan
from secateur.plan.selection import plan_masks_or_units

CALIBRATION = "c4"
STATISTICS = InputNorm
DEMO = [
    {"sparsities": [0.5, 0.6, 0.7]},
    {"options": {"pattern": "2:4"}, "sparsities": [0.5]},
    {"options": {"scope": "matrix"}, "sparsities": [0.5]},
]


@dataclass(frozen=True)
class Wanda:
    """Options.

    Attributes:
        pattern: `unstructured`, N:M, `rows` or `columns`.
        scope: the weights that are compared with each other, with pattern `unstructured`: those of a `row` (the paper)
            or of a `matrix`. `matrix` is ahead on the bundled model: perplexity 12.54 against 13.04 at 50%
            (docs/lab-log.md).
    """

    pattern: str = "unstructured"
    scope: str = "row"

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)
        if self.scope not in ("row", "matrix"):
            raise UsageError(f"wanda: unknown scope '{self.scope}' (allowed: row, matrix)")


def by_rows(options: Wanda) -> bool:
    """Return True if weights are compared within each row."""
    return options.scope == "row"


def plan_block(block: BlockView, statistics: Statistics[InputNorm], options: Wanda) -> BlockPlan:
    """Plan one block from its weights and the norms of its inputs."""

    def score_OI(name: str) -> torch.Tensor:
        weight_OI, norm_I = at_least_float32(block.matrix(name)), statistics[name].norm_I
        return weight_OI.abs().mul_(norm_I.to(weight_OI))

    return plan_masks_or_units(
        block, score_OI, parse_pattern(options.pattern), "row" if options.scope == "row" else "matrix"
    )
