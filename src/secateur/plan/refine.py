"""Better weights, and a better mask, for a matrix of which a mask is given: least squares, and swaps.

Both lower the error of one matrix on its calibration inputs, |(W_0 - W) X|^2 = tr((W_0 - W) H (W_0 - W)^T) with
H = X X^T (damped), where W_0 are the weights before pruning. The rows of W are independent of one another.

- `fit` solves for the weights that stay: (W_0 - W) H = 0 at every one of them. Each row has a system of its own, so
  all rows go by conjugate gradients together, one product with H a step, with the diagonal of H as preconditioner.
- `swap` changes the mask of each row by exchanges of a weight that stays for one that does not, as SparseSwaps
  (arXiv:2512.10922, section 3) does, with one difference: here weights are fitted, and the one that returns takes its
  best value, where theirs keeps every weight at its old value. With C = (W_0 - W) H, to let p go and q return adds

      2 W_p C_p + W_p^2 H_pp - (C_q + W_p H_pq)^2 / H_qq                                   (for each row)

  to the error. The best pair of each row is taken, as long as the error falls.

Shape letters: O outputs and I inputs of a matrix, R rows of a piece, K candidates, N groups, M inputs of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.numbers import diagonal_blocks

_STEPS = 10  # of conjugate gradients; from the weights of SparseGPT ten more gain two thousandths at most
_CANDIDATES = 32  # to go and to return, in each row; the pairs of the cheapest of both are compared
_INPUTS_A_SWAP = 64  # a row of so many inputs may swap one pair between two fits
_LEAST_GAIN = 1e-6  # as a share of the mean cost of a weight: a smaller gain is rounding error
_NUMBERS_AT_ONCE = 1 << 24  # of a piece of the rows, so that wide matrices need little memory


def refine(
    before_OI: Tensor, weight_OI: Tensor, keep_OI: Tensor, hessian_II: Tensor, fits: int, group: int = 0
) -> tuple[Tensor, Tensor]:
    """Fit the weights that stay, `fits` times, with swaps between two fits.

    Args:
        before_OI: W_0.
        weight_OI: the weights now, zero where the mask says so; what a fit begins with.
        keep_OI: the mask, True where a weight stays.
        hessian_II: H, positive definite.
        fits: the number of fits, at least 1.
        group: M where the mask is N:M, so that pairs are swapped within a group; 0 where it is not.

    Returns:
        The weights and the mask, which keeps as many weights in each row (and group) as before. No row has a larger
        error than at the start.
    """
    hessian_II = hessian_II.to(before_OI)
    inputs = len(hessian_II)
    rows = max(1, _NUMBERS_AT_ONCE // max(inputs * max(1, group), _CANDIDATES**2))
    weights, masks = [], []
    for before_RI, weight_RI, keep_RI in zip(
        before_OI.split(rows), weight_OI.split(rows), keep_OI.split(rows), strict=True
    ):
        weight_RI = fit(before_RI, weight_RI, keep_RI, hessian_II)
        for _ in range(fits - 1):
            weight_RI, keep_RI = swap(before_RI, weight_RI, keep_RI, hessian_II, group)
            weight_RI = fit(before_RI, weight_RI, keep_RI, hessian_II)
        weights.append(weight_RI)
        masks.append(keep_RI)
    return torch.cat(weights), torch.cat(masks)


def fit(before_RI: Tensor, weight_RI: Tensor, keep_RI: Tensor, hessian_II: Tensor, steps: int = _STEPS) -> Tensor:
    """Return the weights that stay, by least squares; the arguments are those of `refine`.

    The default of `steps` is enough from the weights of SparseGPT; an ill-conditioned H and weights that make up for
    nothing yet need more.
    """
    diagonal_I = hessian_II.diagonal()
    lost_RI = before_RI - weight_RI
    residual_RI = lost_RI @ hessian_II
    error_R = lost_RI.mul_(residual_RI).sum(1, dtype=torch.float64)
    residual_RI.mul_(keep_RI)
    found_RI, direction_RI = weight_RI.clone(), residual_RI / diagonal_I
    energy_R = (residual_RI * direction_RI).sum(1, keepdim=True)
    tiny = torch.finfo(energy_R.dtype).tiny
    for _ in range(steps):
        curved_RI = (direction_RI @ hessian_II).mul_(keep_RI)
        step_R = energy_R / (direction_RI * curved_RI).sum(1, keepdim=True).clamp_min_(tiny)
        found_RI.addcmul_(step_R, direction_RI)
        residual_RI.addcmul_(step_R, curved_RI, value=-1)
        scaled_RI = residual_RI / diagonal_I
        next_R = (residual_RI * scaled_RI).sum(1, keepdim=True)
        direction_RI.mul_(next_R / energy_R.clamp_min_(tiny)).add_(scaled_RI)
        energy_R = next_R
    lost_RI = before_RI - found_RI
    better_R = (lost_RI @ hessian_II).mul_(lost_RI).sum(1, dtype=torch.float64) < error_R
    return torch.where(better_R[:, None], found_RI, weight_RI)


def swap(
    before_RI: Tensor,
    weight_RI: Tensor,
    keep_RI: Tensor,
    hessian_II: Tensor,
    group: int = 0,
    *,
    candidates: int = _CANDIDATES,
    most: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weights and the mask after swaps; see `refine`.

    Args:
        before_RI, weight_RI, keep_RI, hessian_II, group: as for `refine`.
        candidates: without groups, how many weights of a row may go and how many may return at each swap: those that
            are cheapest alone. With all inputs as candidates the best pair of the row is taken.
        most: the most swaps of a row; None takes one for each 64 inputs.
    """
    inputs = weight_RI.shape[1]
    candidates, most = min(candidates, inputs), max(1, inputs // _INPUTS_A_SWAP) if most is None else most
    weight_RI, keep_RI, diagonal_I = weight_RI.clone(), keep_RI.clone(), hessian_II.diagonal()
    rows_R = torch.arange(len(weight_RI), device=weight_RI.device)
    owed_RI = (before_RI - weight_RI) @ hessian_II  # C
    for _ in range(most):
        now_RI, stays_RI = weight_RI[rows_R], keep_RI[rows_R]
        cost_RI = (2 * now_RI * owed_RI).addcmul_(now_RI.square(), diagonal_I)
        go_RI = cost_RI.masked_fill(~stays_RI, torch.inf)
        back_RI = (owed_RI.square() / -diagonal_I).masked_fill_(stays_RI, torch.inf)
        best = _best_in_groups if group else _best_of_row
        change_R, go_R, back_R = best(now_RI, owed_RI, go_RI, back_RI, hessian_II, group or candidates)
        better_R = change_R < -_LEAST_GAIN * cost_RI.abs().mean(1)
        rows_R, owed_RI, go_R, back_R = rows_R[better_R], owed_RI[better_R], go_R[better_R], back_R[better_R]
        if not len(rows_R):
            break
        owed_RI += weight_RI[rows_R, go_R, None] * hessian_II[go_R]
        new_R = owed_RI.gather(1, back_R[:, None])[:, 0] / diagonal_I[back_R]
        owed_RI -= new_R[:, None] * hessian_II[back_R]
        weight_RI[rows_R, go_R], keep_RI[rows_R, go_R] = 0, False
        weight_RI[rows_R, back_R], keep_RI[rows_R, back_R] = new_R, True
    return weight_RI, keep_RI


def _best_of_row(
    now_RI: Tensor, owed_RI: Tensor, go_RI: Tensor, back_RI: Tensor, hessian_II: Tensor, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the change of the error by the best pair of each row, and the inputs of the pair: to go, to return."""
    go_RK, goes_RK = go_RI.topk(candidates, largest=False)
    back_RK, backs_RK = back_RI.topk(candidates, largest=False)
    diagonal_RK = hessian_II.diagonal()[backs_RK]
    both_RKK = hessian_II[goes_RK[:, :, None], backs_RK[:, None, :]]
    owed_RKK = both_RKK.mul_(now_RI.gather(1, goes_RK)[:, :, None]).add_(owed_RI.gather(1, backs_RK)[:, None, :])
    change_RKK = owed_RKK.square_().div_(diagonal_RK[:, None, :]).neg_().add_(go_RK[:, :, None])
    change_RKK.masked_fill_(back_RK.isinf()[:, None, :], torch.inf)
    change_R, at_R = change_RKK.flatten(1).min(1)
    go_R, back_R = at_R[:, None] // candidates, at_R[:, None] % candidates
    return change_R, goes_RK.gather(1, go_R)[:, 0], backs_RK.gather(1, back_R)[:, 0]


def _best_in_groups(
    now_RI: Tensor, owed_RI: Tensor, go_RI: Tensor, back_RI: Tensor, hessian_II: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as `_best_of_row`, for pairs within a group."""
    now_RNM, owed_RNM, go_RNM, back_RNM = (x.unflatten(1, (-1, group)) for x in (now_RI, owed_RI, go_RI, back_RI))
    both_NMM = diagonal_blocks(hessian_II, group)
    diagonal_NM = hessian_II.diagonal().unflatten(0, (-1, group))
    owed_RNMM = (now_RNM[..., :, None] * both_NMM).add_(owed_RNM[..., None, :])
    change_RNMM = owed_RNMM.square_().div_(diagonal_NM[:, None, :]).neg_().add_(go_RNM[..., :, None])
    change_RNMM.masked_fill_(back_RNM.isinf()[..., None, :], torch.inf)
    change_R, at_R = change_RNMM.flatten(1).min(1)
    first_R, pair_R = at_R // group**2 * group, at_R % group**2
    return change_R, first_R + pair_R // group, first_R + pair_R % group
