"""Least squares for the weights that stay, against a solve for every row, and swaps, against trying all pairs."""

from __future__ import annotations

import itertools

import pytest
import torch

from secateur.plan.refine import fit, refine, swap

ROWS, INPUTS = 5, 12


def problem(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the second moment of inputs that go together, as those of a model do."""
    draw = torch.Generator().manual_seed(seed)
    x_NI = torch.randn(40, INPUTS, generator=draw, dtype=torch.float64)
    x_NI = x_NI @ torch.randn(INPUTS, INPUTS, generator=draw, dtype=torch.float64)
    weight_OI = torch.randn(ROWS, INPUTS, generator=draw, dtype=torch.float64)
    return weight_OI.to(dtype), (x_NI.t() @ x_NI).to(dtype)


def half(weight_OI: torch.Tensor, group: int) -> torch.Tensor:
    """The larger half of every row, or of every group."""
    score = weight_OI.abs().unflatten(1, (-1, group or weight_OI.shape[1]))
    keep = torch.zeros_like(score, dtype=torch.bool)
    return keep.scatter_(2, score.topk(score.shape[2] // 2).indices, True).flatten(1)


def error(before: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return torch.einsum("oi,ij,oj->o", before - weight, hessian, before - weight)


def solved(before: torch.Tensor, keep: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Row by row, the weights that stay with the least error."""
    new = torch.zeros_like(before)
    for row, stays in enumerate(keep):
        new[row, stays] = torch.linalg.solve(hessian[stays][:, stays], (hessian[stays] @ before[row]))
    return new


@pytest.mark.parametrize("group", [0, 4])
def test_a_fit_is_the_least_squares_solution(group: int) -> None:
    before, hessian = problem(0)
    keep = half(before, group)
    found = fit(before, before * keep, keep, hessian, steps=60)
    torch.testing.assert_close(found, solved(before, keep, hessian), rtol=1e-8, atol=1e-8)


def swapped(
    before: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor, hessian: torch.Tensor, group: int, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row the best of all pairs, each tried: p becomes 0, and q takes the value with the least error."""
    weight, keep = weight.clone(), keep.clone()
    for row in range(len(weight)):
        for _ in range(most):
            least, best = error(before[row : row + 1], weight[row : row + 1], hessian).item() * (1 - 1e-9), None
            for p, q in itertools.product(keep[row].nonzero().flatten(), (~keep[row]).nonzero().flatten()):
                if group and p // group != q // group:
                    continue
                tried = weight[row : row + 1].clone()
                tried[0, p] = tried[0, q] = 0
                tried[0, q] = ((before[row] - tried[0]) @ hessian[q]) / hessian[q, q]
                if (now := error(before[row : row + 1], tried, hessian).item()) < least:
                    least, best = now, (p, q, tried[0])
            if best is None:
                break
            p, q, weight[row] = best
            keep[row, p], keep[row, q] = False, True
    return weight, keep


@pytest.mark.parametrize("most", [1, 3, 50])
@pytest.mark.parametrize("group", [0, 4])
def test_swaps_are_the_best_of_all_pairs(group: int, most: int) -> None:
    before, hessian = problem(1)
    keep = ~half(before, group)  # a poor mask, so that there is much to swap
    start = solved(before, keep, hessian)
    weight, mask = swap(before, start, keep, hessian, group, candidates=INPUTS, most=most)
    expected, expected_mask = swapped(before, start, keep, hessian, group, most)
    assert (mask == expected_mask).all()
    assert (mask != keep).any()
    torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fits", [1, 2, 4])
@pytest.mark.parametrize("group", [0, 4])
def test_no_row_gets_worse_and_each_keeps_as_many_weights(group: int, fits: int) -> None:
    before, hessian = problem(2, torch.float32)
    keep = half(before, group)
    weight, mask = refine(before, before * keep, keep, hessian, fits, group)
    assert not weight[~mask].any()
    size = (-1, group or INPUTS)
    assert (mask.unflatten(1, size).sum(2) == keep.unflatten(1, size).sum(2)).all()
    was, now = error(before, before * keep, hessian), error(before, weight, hessian)
    assert (now < was).all()
    if fits > 1:
        once, _ = refine(before, before * keep, keep, hessian, 1, group)
        assert now.sum() < error(before, once, hessian).sum()


def test_rows_without_a_pair_and_weights_that_are_right_already_stay() -> None:
    before, hessian = problem(3)
    keep = half(before, 0)
    keep[0], keep[1] = True, False
    start = before * keep
    weight, mask = refine(before, start, keep, hessian, 3)
    assert (mask[:2] == keep[:2]).all()
    assert weight[0].equal(before[0])
    assert weight[1].equal(start[1])


def test_what_was_written_is_not_changed() -> None:
    before, hessian = problem(4)
    keep = half(before, 0)
    given = [before, before * keep, keep, hessian]
    copies = [x.clone() for x in given]
    refine(*given, 3)  # type: ignore[arg-type]
    assert all(x.equal(copy) for x, copy in zip(given, copies, strict=True))
