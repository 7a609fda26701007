"""Kronecker-factored curvature of the loss, and the cost of removing rows and columns of a matrix
(arXiv:2312.17244, section 3).

The Fisher information of a matrix W is approximated by G (x) A, with A = E[x x^T] of its inputs and G = E[g g^T] of the
gradient of the loss with respect to its outputs, token by token. To second order a change D of the weights costs

    tr(G D A D^T) / 2

Of all changes that make rows R and columns C zero, the cheapest one leaves, with K the rows and J the columns that
stay,

    W'_KJ = G_KK^-1 G_K: W A_:J A_JJ^-1

(the minimiser over all of W'_KJ: G_KK W'_KJ A_JJ = (G W A)_KJ). For one row r alone it costs (W A W^T)_rr / (2
[G^-1]_rr), for columns C together tr(W_:C^T G W_:C [A^-1]_CC^-1) / 2, for one weight W_oi^2 / (2 [G^-1]_oo [A^-1]_ii).

If single weights are removed, there is no closed form: the minimiser W' is zero at those weights and has (G (W - W')
A)_oi = 0 everywhere else, one linear system over all weights that stay. `Curvature.masked` solves it by conjugate
gradients. Everything here is in float64.

Shape letters: O outputs, I inputs of a matrix, N tokens, U units of C columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from secateur.calibrate.backward import Backward
from secateur.calibrate.statistics import damped
from secateur.core.numbers import at_least_float32, diagonal_blocks
from secateur.models.family import Family
from secateur.models.view import BlockView

_COLUMNS = 512
CURVATURES = ("kfac", "diagonal", "identity")


@dataclass(frozen=True)
class Curvature:
    """G and A of one matrix, damped, float64."""

    g_OO: Tensor
    a_II: Tensor

    def part(self, rows_O: Tensor, columns_I: Tensor) -> Curvature:
        """The curvature of the rows and columns that are left, marked True in the masks."""
        return Curvature(
            *(
                m if bool(stays.all()) else m[stays][:, stays]
                for m, stays in ((self.g_OO, rows_O), (self.a_II, columns_I))
            )
        )

    def row_costs(self, weight_OI: Tensor) -> Tensor:
        """The cost of making each row zero, [O]."""
        return ((weight_OI @ self.a_II) * weight_OI).sum(1) / (2 * _inverse_diagonal(self.g_OO))

    def column_costs(self, weight_OI: Tensor, together: int = 1) -> Tensor:
        """The cost of making each column zero, or each set of `together` neighbouring columns, [I / together]."""
        if together == 1:
            return ((self.g_OO @ weight_OI) * weight_OI).sum(0) / (2 * _inverse_diagonal(self.a_II))
        count = weight_OI.shape[1] // together
        weight_UOC = weight_OI.view(-1, count, together).transpose(0, 1)
        inverse_UCC = diagonal_blocks(_inverse(self.a_II), together)
        felt_UCC: Tensor = torch.linalg.inv(inverse_UCC) * (weight_UOC.transpose(1, 2) @ (self.g_OO @ weight_UOC))
        return felt_UCC.sum((1, 2)) / 2

    def weight_costs(self, weight_OI: Tensor) -> Tensor:
        """The cost of making each weight zero, [O, I]."""
        return weight_OI.square() / (2 * _inverse_diagonal(self.g_OO)[:, None] * _inverse_diagonal(self.a_II))

    def masked(self, weight_OI: Tensor, keep_OI: Tensor, tolerance: float = 1e-5, most: int = 1000) -> Tensor:
        """The matrix [O, I] with the removed weights at zero and the others updated to compensate best, by conjugate
        gradients.

        The preconditioner is the inverse of all of G (x) A. So few removals take few iterations, and the norm r of the
        residual bounds the possible gain: with P the weights that stay and H = G (x) A, (H^-1)_PP is at least
        (H_PP)^-1, so the cost is within r^2 / 2 of the lowest. An iteration has two products with G and A and two with
        their inverses, 4 O I (O + I) multiplications and additions.

        Args:
            weight_OI: the weights before.
            keep_OI: True where a weight stays.
            tolerance: the allowed distance of the cost from the lowest cost, as a share of it.
            most: the largest number of iterations; each lowers the cost, so the last result is the best.
        """
        g_inverse_OO, a_inverse_II = _inverse(self.g_OO), _inverse(self.a_II)
        made_OI = weight_OI * keep_OI
        residual_OI = self.g_OO @ (weight_OI - made_OI) @ self.a_II
        cost = float((residual_OI * (weight_OI - made_OI)).sum()) / 2
        residual_OI *= keep_OI
        direction_OI, before = torch.zeros_like(made_OI), 1.0
        for _ in range(most):
            better_OI = (g_inverse_OO @ residual_OI @ a_inverse_II) * keep_OI
            now = float((residual_OI * better_OI).sum())
            if now / 2 <= tolerance * (cost - now / 2):
                break
            direction_OI.mul_(now / before).add_(better_OI)
            moved_OI = (self.g_OO @ direction_OI @ self.a_II) * keep_OI
            step = now / float((direction_OI * moved_OI).sum())
            made_OI.add_(direction_OI, alpha=step)
            residual_OI.sub_(moved_OI, alpha=step)
            cost -= step * now / 2
            before = now
        return made_OI

    def without(self, weight_OI: Tensor, rows_O: Tensor, columns_I: Tensor) -> Tensor:
        """The matrix [O, I] with the removed rows and columns at zero and the others updated to compensate best.

        The masks are True for the rows and columns that stay.
        """
        made_OI = torch.zeros_like(weight_OI)
        left_KI = weight_OI[rows_O] + _fold(self.g_OO, rows_O) @ weight_OI[~rows_O]
        kept_KJ = left_KI[:, columns_I] + left_KI[:, ~columns_I] @ _fold(self.a_II, columns_I).t()
        made_OI[rows_O.nonzero(), columns_I.nonzero().t()] = kept_KJ
        return made_OI


def _inverse_diagonal(matrix: Tensor) -> Tensor:
    """The diagonal of the inverse of a positive definite matrix.

    It inverts the triangular Cholesky factor, some columns at a time, and skips the zeros above the diagonal. LAPACK's
    potri takes many times as long.
    """
    lower, parts = torch.linalg.cholesky(matrix), []
    for start in range(0, len(matrix), _COLUMNS):
        rest = lower[start:, start:]
        unit = torch.eye(len(rest), min(_COLUMNS, len(rest)), dtype=matrix.dtype)
        parts.append(torch.linalg.solve_triangular(rest, unit, upper=False).square_().sum(0))
    return torch.cat(parts)


def _inverse(matrix: Tensor) -> Tensor:
    root: Tensor = torch.linalg.solve_triangular(
        torch.linalg.cholesky(matrix), torch.eye(len(matrix), dtype=matrix.dtype), upper=False
    )
    return root.t() @ root


def _fold(matrix: Tensor, keep: Tensor) -> Tensor:
    """M_KK^-1 M_KR, with K kept and R removed: the shares of the removed rows that are added to the kept ones."""
    return torch.cholesky_solve(matrix[keep][:, ~keep], torch.linalg.cholesky(matrix[keep][:, keep]))


@dataclass(frozen=True)
class Factors:
    """The sums of x x^T and g g^T over the tokens of a block's matrices, float32 or better. Matrices with the same
    input share one A.

    Attributes:
        family: the family of the model.
        kind: one of `CURVATURES`: the Kronecker factors, their diagonals alone, or identities (then a cost is half the
            square of a weight).
        damping: the amount added to each diagonal, in units of its mean.
        tokens: the number of tokens.
        sums: `a.NAME` and `g.NAME` -> a sum, for the matrix NAME.
        apart: whether attention and MLP read different tensors, see `Family.input_of`.
    """

    family: Family
    kind: str
    damping: float
    tokens: int
    sums: Mapping[str, Tensor]
    apart: bool = False

    @classmethod
    def measured(cls, block: BlockView, backward: Backward, kind: str, damping: float) -> Factors:
        """Run a backward pass through its current block, `block`, and return the sums."""
        sums: dict[str, Tensor] = {}
        tokens = {name: 0 for name in block.names if 0 not in block.dims.shape(name)}  # not of a part that is gone

        def listen(name: str, x_BTI: Tensor, g_BTO: Tensor) -> None:
            tokens[name] += x_BTI.shape[0] * x_BTI.shape[1]
            _add(sums, f"g.{name}", g_BTO.flatten(0, -2))
            if block.family.input_of(name, apart=block.dims.apart) == name:
                _add(sums, f"a.{name}", x_BTI.flatten(0, -2))

        backward.retreat(block, {name: partial(listen, name) for name in tokens})
        (total,) = set(tokens.values())
        return cls(block.family, kind, damping, total, sums, block.dims.apart)

    @property
    def size(self) -> int:
        """The bytes of the sums."""
        return sum(t.numel() * t.element_size() for t in self.sums.values())

    def __getitem__(self, name: str) -> Curvature:
        return Curvature(
            self._damped(self.sums[f"g.{name}"]),
            self._damped(self.sums[f"a.{self.family.input_of(name, apart=self.apart)}"]),
        )

    def any(self) -> bool:
        """True if any gradient was not zero."""
        return any(bool(total.any()) for name, total in self.sums.items() if name.startswith("g."))

    def _damped(self, total: Tensor) -> Tensor:
        mean = total.double().cpu() / self.tokens
        if self.kind == "identity":
            return torch.eye(len(mean), dtype=torch.float64)
        if self.kind == "diagonal":
            mean = mean.diagonal().diag()
        return damped(mean, self.damping)


def _add(sums: dict[str, Tensor], name: str, x_NI: Tensor) -> None:
    x_NI = at_least_float32(x_NI)
    product_II = x_NI.t() @ x_NI
    sums[name] = sums[name].add_(product_II) if name in sums else product_II
