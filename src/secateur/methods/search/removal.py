"""In which order the units of a block go, and what that costs: optimal brain surgery on the columns of one matrix.

A unit (a feed-forward unit, or a key-value head with its query heads) is read by columns of one matrix W. To second
order, a change D of that matrix raises the loss by

    tr(G D A D^T) / 2,    A = E[x x^T] of the inputs, G = E[g g^T] of the gradients of the outputs

(the Kronecker-factored Fisher information, arXiv:2312.17244, section 3). If columns R go, the cheapest change of the
columns J that stay, and its cost, do not depend on one another's outputs:

    W'_J = W_J + W_R A_RJ A_JJ^-1        cost = tr(W_R^T G W_R ([A^-1]_RR)^-1) / 2

Units go in rounds: in each, those go that cost least alone; W and A^-1 then become those of the columns that are left
(block elimination), so that units that stand in for one another do not all go. One order serves every number of units:
its first k are the removal of k.

Shape letters: O outputs, I inputs of the matrix, U units, C columns of a unit, R columns that go, J columns that stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.numbers import diagonal_blocks


@dataclass(frozen=True)
class Removal:
    """The order in which the units of a space go, and the cost of the first k of them.

    Attributes:
        order_U: the units, the first to go first, int64.
        cost_U: what the removal of 0, 1, ... U - 1 units adds to the loss of a token, nats, float64; it never falls.
    """

    order_U: Tensor
    cost_U: Tensor


def removal(weight_OI: Tensor, a_II: Tensor, g_OO: Tensor, units: int, rounds: int) -> Removal:
    """Return the order and the costs for the units that a matrix reads.

    Args:
        weight_OI: the matrix; unit u is read by its columns u C to (u + 1) C - 1, with C = I / units.
        a_II, g_OO: the second moments, damped, float64.
        units: U.
        rounds: how many rounds remove all units.
    """
    width = weight_OI.shape[1] // units
    felt_OI = torch.linalg.cholesky(g_OO).t() @ weight_OI.double().cpu()
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(a_II))
    left_U = torch.arange(units)
    order, costs, spent = [], [torch.zeros(1, dtype=torch.float64)], 0.0
    while len(left_U):
        alone_U = _alone(felt_OI, inverse_II, width)
        count = min(len(left_U), math.ceil(units / rounds))
        go_U = alone_U.sort(stable=True).indices[:count]
        goes = torch.zeros(len(left_U), dtype=torch.bool).index_fill_(0, go_U, True)
        columns = goes.repeat_interleave(width)
        lower_RR = torch.linalg.cholesky(inverse_II[columns][:, columns])
        change_RO = torch.linalg.solve_triangular(lower_RR, felt_OI[:, columns].t(), upper=False)
        together = float(change_RO.square().sum()) / 2
        # the units of a round share its cost in proportion to what each costs alone
        share_U = alone_U[go_U].cumsum(0)
        whole = float(share_U[-1])
        costs.append(spent + together * (share_U / whole if whole > 0 else torch.ones_like(share_U)))
        order.append(left_U[go_U])
        spent += together
        inverse_RJ = torch.linalg.solve_triangular(lower_RR, inverse_II[columns][:, ~columns], upper=False)
        felt_OI = felt_OI[:, ~columns] - change_RO.t() @ inverse_RJ
        inverse_II = inverse_II[~columns][:, ~columns] - inverse_RJ.t() @ inverse_RJ
        left_U = left_U[~goes]
    return Removal(torch.cat(order), torch.cat(costs)[:units])


def _alone(felt_OI: Tensor, inverse_II: Tensor, width: int) -> Tensor:
    """Return the cost of each unit by itself, float64 [U]; felt_OI^T felt_OI is W^T G W."""
    if width == 1:
        return felt_OI.square().sum(0) / inverse_II.diagonal() / 2
    units = len(inverse_II) // width
    inverse_UCC = diagonal_blocks(inverse_II, width)
    felt_UCO = felt_OI.t().reshape(units, width, -1)
    root_UCO: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(inverse_UCC), felt_UCO, upper=False)
    return root_UCO.square().sum((1, 2)) / 2


def without(weight_OI: Tensor, a_II: Tensor, stays_I: Tensor) -> Tensor:
    """Return the matrix [O, I] whose columns that stay make up best for those that go, which are zero.

    Args:
        weight_OI: the matrix.
        a_II: the second moment of its inputs, damped, float64.
        stays_I: True for the columns that stay.
    """
    weight_OI = weight_OI.double().cpu()
    lower_JJ = torch.linalg.cholesky(a_II[stays_I][:, stays_I])
    share_JR = torch.cholesky_solve(a_II[stays_I][:, ~stays_I], lower_JJ)
    made_OI = torch.zeros_like(weight_OI)
    made_OI[:, stays_I] = weight_OI[:, stays_I] + weight_OI[:, ~stays_I] @ share_JR.t()
    return made_OI
