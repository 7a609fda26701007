"""SparseGPT: remove the weights whose removal costs least, and change the others to make up for it, column by column.

From arXiv:2301.00774, sections 3.2 to 3.4 and algorithm 1. Let H = sum of x x^T over the calibration tokens, plus
`damping` times its mean diagonal. Columns are settled from left to right. To remove a weight w of column j costs
w^2 / [(H_F)^-1]_jj, where F are the columns from j on. The columns after j then take over what they can (optimal brain
surgeon). The weights to remove are chosen for `blocksize` columns at a time; with N:M for each group of M. The choice
reads weights that already make up for the columns before. Calibration of the paper: 128 windows of 2048 tokens of C4.

This file computes the same weights from one Cholesky factor of H, without an inverse. Let H = R R^T with R upper
triangular, and U = R^-1, so that H^-1 = U^T U, the factor of algorithm 1. W_0 are the weights before and W those after.
E are the errors of algorithm 1, one column each; the error of a weight that stays is zero. Then W_0 - W = E U, that
is, E = (W_0 - W) R. For a weight that stays, the zero error gives its new value from the columns before it alone:

    W_j = W_0j + s_j,  s_j = sum over i < j of (W_0 - W)_i R_ij / R_jj

The cost of a weight is (w R_jj)^2. For the columns b of one decision, the weights that make up for the columns before b
alone are W_0b + s_b (R_bb / diag)^-1, with s_b from those columns. Matrices with the same input (q, k, v; gate, up) are
settled together.

Differences from the authors' code:
- Each decision removes exactly the requested number (theirs removes one more), so a whole matrix loses floor(O I s).
- Weights of inputs that are always zero are removed first; those that may stay keep their values (theirs become zero).
- Matrices that are fused in the file are pruned one by one.
- If a Hessian is not positive definite, the damping is multiplied by ten, with a warning, until it is.
- The mean diagonal that scales the damping leaves out inputs that are always zero.
- `refine` then fits the weights that stay by least squares, and swaps weights of a row (`plan/refine.py`).
- `order=activation` settles the inputs with the most energy first, as GPTQ (arXiv:2210.17323) may; with N:M each group
  of M inputs stays together.

Shape letters: O outputs and I inputs of a matrix, M inputs of a group, B columns of a decision, F columns of a step
inside a decision. O here counts the outputs of all matrices that share one input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.calibrate.statistics import SecondMoment, Statistics
from secateur.core.errors import HopelessError, UsageError
from secateur.core.numbers import at_least_float32
from secateur.core.progress import say
from secateur.models.view import BlockView
from secateur.plan.counts import removed_weights
from secateur.plan.pattern import Pattern, keep_highest, keep_n_of_m, parse_pattern
from secateur.plan.plan import BlockPlan, Mask
from secateur.plan.refine import refine

CALIBRATION = "c4"
STATISTICS = SecondMoment
ADVICE = (
    "--set refine=2 is well ahead of the default, the paper's: on SmolLM2-135M at 50%, perplexity 36.44 against 40.74"
    " (dense 21.83; docs/real-models.md)"
)
DEMO = [
    {"sparsities": [0.5, 0.7]},
    {"options": {"pattern": "2:4"}, "sparsities": [0.5]},
]
_FEW = 16  # columns settled one by one before the rest of their decision is updated
_LEAST_PIVOT = 1e-10  # as a share of the diagonal entry: a smaller pivot is rounding error
_NOTHING = 1e-6  # of the mean diagonal: what a weight of an input that is always zero costs in a refinement
_LEAST_DAMPING, _MOST_DAMPING = 1e-4, 1e4


@dataclass(frozen=True)
class SparseGPT:
    """Options.

    Attributes:
        pattern: `unstructured` or N:M.
        damping: the number added to the diagonal of the Hessian, as a share of the mean diagonal.
        blocksize: the number of columns decided together with pattern `unstructured`, and the number of columns settled
            before all later columns are updated.
        order: the order of the columns: `natural`, or `activation` (inputs with the most energy first).
        refine: afterwards fit the weights that stay by least squares this many times, with swaps of weights between two
            fits; 0 is the paper's.
    """

    pattern: str = "unstructured"
    damping: float = 0.01
    blocksize: int = 128
    order: str = "natural"
    refine: int = 0

    def __post_init__(self) -> None:
        if parse_pattern(self.pattern).structured:
            raise UsageError(
                f"sparsegpt: pattern {self.pattern} removes whole units, but sparsegpt removes single weights"
                " (allowed: unstructured, or N:M such as 2:4; for units use magnitude or wanda)"
            )
        if not 0 <= self.damping < math.inf:
            raise UsageError(
                f"sparsegpt: damping {self.damping:g} is outside [0, inf); it is a share of the mean diagonal,"
                " such as 0.01"
            )
        if self.blocksize < 1:
            raise UsageError(f"sparsegpt: blocksize is {self.blocksize}; it is a number of columns, at least 1")
        if self.order not in ("natural", "activation"):
            raise UsageError(f"sparsegpt: unknown order '{self.order}' (allowed: natural, activation)")
        if self.refine < 0:
            raise UsageError(f"sparsegpt: refine is {self.refine}; it is a number of fits, such as 2; 0 turns it off")


def plan_block(block: BlockView, statistics: Statistics[SecondMoment], options: SparseGPT) -> BlockPlan:
    """Return masks and new weights of one block, from the second moments of its inputs.

    Raises:
        HopelessError: no damping makes a Hessian positive definite, or the dtype cannot hold the new weights.
    """
    masks: dict[str, Mask] = {}
    updates: dict[str, Tensor] = {}
    pruned = [
        name for name, rate in block.rates.items() if rate > 0
    ]  # a matrix of which nothing is to go stays as it is
    for moment in dict.fromkeys(statistics[name] for name in pruned):
        names = [name for name in pruned if statistics[name] is moment]
        hessian_II = moment.sum_II
        where = f"block {block.index}: the Hessian of the input of {', '.join(names)}"
        for name, keep_OI, new_OI in _prune(block, names, hessian_II, parse_pattern(options.pattern), options, where):
            masks[name], updates[name] = Mask.pack(keep_OI), new_OI
    return BlockPlan(
        block.index, {name: masks[name] for name in pruned}, updates={name: updates[name] for name in pruned}
    )


def _prune(
    block: BlockView, names: Sequence[str], hessian_II: Tensor, pattern: Pattern, options: SparseGPT, where: str
) -> list[tuple[str, Tensor, Tensor]]:
    """Return name, mask [O, I] and new weight [O, I] of every matrix whose inputs have this Hessian."""
    order_I = _order(hessian_II, pattern) if options.order == "activation" else None
    natural_II, hessian_II = hessian_II, hessian_II if order_I is None else hessian_II[order_I][:, order_I]
    dead_I = hessian_II.diagonal() == 0
    matrices = [at_least_float32(block.matrix(name)).to(hessian_II.device) for name in names]
    weight_IO = torch.cat([(w if order_I is None else w[:, order_I]).t() for w in matrices], dim=1)
    factor_II, diagonal_I, damping = _factor(hessian_II, options.damping, where)
    parts = [len(w) for w in matrices]
    settle = _Columns(
        weight_IO,
        factor_II.to(weight_IO),
        diagonal_I.to(weight_IO).masked_fill_(dead_I, 0),
        parts,
        [block.rates[name] for name in names],
    )
    keeps_OI = (
        settle.by_group(pattern, options.blocksize) if pattern.kind == "n:m" else settle.by_block(options.blocksize)
    )
    del settle, factor_II, diagonal_I
    # settling left W_0 - W in weight_IO: bring it and the mask back to the natural order of inputs
    back_I = slice(None) if order_I is None else order_I.argsort()
    dead_I = dead_I[back_I]
    damped_II = None
    if options.refine:
        damped_II = _damp_(natural_II.clone(), damping).to(weight_IO)
        damped_II.diagonal().masked_fill_(dead_I, _NOTHING * float(damped_II.diagonal().mean()))
    results = []
    for name, old_OI, keep_OI, lost_IO in zip(
        names, matrices, keeps_OI.split(parts), weight_IO.split(parts, dim=1), strict=True
    ):
        keep_OI, new_OI = keep_OI[:, back_I], old_OI - lost_IO.t()[:, back_I]
        if damped_II is not None:
            aim_OI = torch.where(dead_I, new_OI, old_OI)  # what becomes of a dead input is no error
            new_OI, keep_OI = refine(aim_OI, new_OI, keep_OI, damped_II, options.refine, pattern.group)
        new_OI = new_OI.to(block.matrix(name))
        if not torch.isfinite(new_OI).all():
            raise HopelessError(
                f"{where}: the new weights of {name} are not finite in {new_OI.dtype}; more damping may help:"
                " --set damping=0.1"
            )
        results.append((name, keep_OI, new_OI))
    return results


def _order(hessian_II: Tensor, pattern: Pattern) -> Tensor:
    """Return the indices of the inputs [I], most energy first; the inputs of an N:M group stay together."""
    size = pattern.group or 1
    energy_G = hessian_II.diagonal().view(-1, size).sum(1)
    groups_G = energy_G.argsort(descending=True, stable=True)
    return (groups_G[:, None] * size + torch.arange(size, device=groups_G.device)).flatten()


def _damp_(hessian_II: Tensor, damping: float) -> Tensor:
    """Add `damping` times the mean diagonal of the inputs that are not always zero; give the others that mean too."""
    diagonal_I = hessian_II.diagonal()
    alive_I = diagonal_I > 0
    mean = float(diagonal_I[alive_I].mean()) if alive_I.any() else 1.0
    diagonal_I.add_(damping * mean).add_(mean * ~alive_I)
    return hessian_II


def _factor(hessian_II: Tensor, damping: float, where: str) -> tuple[Tensor, Tensor, float]:
    """Factor H = R R^T, in float64.

    Returns:
        R [I, I] with every column divided by its diagonal entry (upper triangular, ones on the diagonal), the diagonal
        of R [I], and the damping that was enough.

    Raises:
        HopelessError: H is not positive definite with any damping up to the largest one.
    """
    if not (hessian_II.diagonal() > 0).any():
        say(
            f"{where} is zero: these inputs are zero on all of the calibration text, so it cannot tell which weights"
            " matter"
        )
        identity_II = torch.eye(len(hessian_II), dtype=hessian_II.dtype, device=hessian_II.device)
        return identity_II, identity_II.diagonal().clone(), damping
    while damping <= _MOST_DAMPING:
        # reverse the inputs, take the lower factor, reverse it back: that is R
        damped_II = _damp_(hessian_II.clone(), damping).flip(0, 1)
        lower_II, info = torch.linalg.cholesky_ex(damped_II)
        pivot_I = lower_II.diagonal().square() / damped_II.diagonal()
        if not info and bool((pivot_I > _LEAST_PIVOT).all()):
            factor_II = lower_II.flip(0, 1)
            root_I = factor_II.diagonal().clone()
            return factor_II.div_(root_I), root_I, damping
        more = max(10 * damping, _LEAST_DAMPING)
        say(
            f"{where} is not positive definite with damping {damping:g}: trying {more:g}; more calibration tokens"
            " may help"
        )
        damping = more
    raise HopelessError(
        f"{where} is not positive definite with any damping up to {_MOST_DAMPING:g}; the checkpoint is damaged, or its"
        " dtype is too narrow: try --dtype float32"
    )


class _Columns:
    """The columns of matrices with one input, settled from left to right.

    A settled column holds W_0 - W; the others hold W_0. A column of W is stored as a row, so that it is contiguous.

    Args:
        weight_IO: W_0 of all matrices with this input, side by side; it is overwritten.
        factor_II: the factor, see `_factor`.
        diagonal_I: the diagonal, see `_factor`; 0 for an input that is always zero, so that its weights cost nothing.
        parts: the number of outputs of each matrix.
        rates: the sparsity of each matrix.
    """

    def __init__(
        self, weight_IO: Tensor, factor_II: Tensor, diagonal_I: Tensor, parts: list[int], rates: list[float]
    ) -> None:
        self.weight_IO, self.factor_II, self.diagonal_I = weight_IO, factor_II, diagonal_I
        self.parts, self.rates = parts, rates

    def by_block(self, blocksize: int) -> Tensor:
        """Settle all columns, choosing weights for a block of columns at a time. Return the mask [O, I]."""
        inputs, masks = len(self.weight_IO), []
        for start in range(0, inputs, blocksize):
            end = min(start + blocksize, inputs)
            owed_BO = self._owed(0, start, start, end)
            score_OB = self._score(start, end, owed_BO)
            masks.append(
                torch.cat(
                    [
                        self._lowest(s, rate, start, end)
                        for s, rate in zip(score_OB.split(self.parts), self.rates, strict=True)
                    ]
                )
            )
            keep_BO = masks[-1].t().to(self.weight_IO.dtype, memory_format=torch.contiguous_format)
            for few in range(start, end, _FEW):
                last = min(few + _FEW, end)
                owed_FO = owed_BO[few - start : last - start]
                if few > start:
                    owed_FO += self._owed(start, few, few, last)
                self._settle(few, last, owed_FO, keep_BO[few - start : last - start])
        return torch.cat(masks, dim=1)

    def by_group(self, pattern: Pattern, blocksize: int) -> Tensor:
        """Settle all columns, choosing weights for each N:M group. Return the mask [O, I]."""
        inputs, size, masks = len(self.weight_IO), pattern.group, []
        block, few = (size * max(1, columns // size) for columns in (blocksize, _FEW))
        for start in range(0, inputs, block):
            end = min(start + block, inputs)
            owed_BO = self._owed(0, start, start, end)
            for first in range(start, end, few):
                last = min(first + few, end)
                owed_FO = owed_BO[first - start : last - start]
                if first > start:
                    owed_FO += self._owed(start, first, first, last)
                for group in range(first, last, size):
                    owed_MO = owed_FO[group - first : group - first + size]
                    if group > first:
                        owed_MO += self._owed(first, group, group, group + size)
                    masks.append(keep_n_of_m(self._score(group, group + size, owed_MO), pattern.keep, size))
                    self._settle(
                        group,
                        group + size,
                        owed_MO,
                        masks[-1].t().to(self.weight_IO.dtype, memory_format=torch.contiguous_format),
                    )
        return torch.cat(masks, dim=1)

    def _owed(self, start: int, end: int, first: int, last: int) -> Tensor:
        """Return what the settled columns start..end add to s of the columns first..last."""
        return self.factor_II[start:end, first:last].t() @ self.weight_IO[start:end]

    def _score(self, start: int, end: int, owed_BO: Tensor) -> Tensor:
        """Return the square root of each weight's cost [O, B], once the weights make up for the columns before."""
        now_BO = torch.linalg.solve_triangular(
            self.factor_II[start:end, start:end].t(), owed_BO, upper=False, unitriangular=True
        )
        score_BO: Tensor = now_BO.add_(self.weight_IO[start:end]).mul_(self.diagonal_I[start:end, None]).abs_()
        return score_BO.t().contiguous()

    def _lowest(self, score_OB: Tensor, rate: float, start: int, end: int) -> Tensor:
        """Return the mask of some columns of one matrix, so that the whole matrix loses floor(O I rate) weights."""
        before, after = (removed_weights(rate, len(score_OB) * columns) for columns in (start, end))
        return keep_highest(score_OB, after - before)

    def _settle(self, start: int, end: int, owed_BO: Tensor, keep_BO: Tensor) -> None:
        """Settle some columns one by one; `owed_BO` is what all columns before them add to their s."""
        settled_OB = self.weight_IO[start:end].t()
        factor_BB = self.factor_II[start:end, start:end].t().contiguous()
        columns: Any = zip(
            self.weight_IO[start:end].unbind(), owed_BO.unbind(), keep_BO.unbind(), factor_BB.unbind(), strict=True
        )
        for done, (weight_O, owed_O, keep_O, factor_B) in enumerate(columns):
            now_O = weight_O + owed_O
            if done:
                now_O.addmv_(settled_OB[:, :done], factor_B[:done])
            weight_O.addcmul_(now_O, keep_O, value=-1)
