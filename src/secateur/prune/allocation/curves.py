"""From losses measured at a few sparsities to one sparsity a matrix: the cheapest weights first, under one budget.

The loss that a matrix adds as it is pruned grows roughly exponentially, so the logarithm of what was measured is fitted with a parabola in the
sparsity. The lower convex hull of the curve then makes the greedy choice (the smallest loss per weight next) the best one there is for losses that add up.

Shape letters: L levels of sparsity, U matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LOWEST = 1e-4  # nats a token: below it, an increase measured on so few tokens says nothing
HIGHEST = 0.95  # nothing is measured beyond 0.9, where curves turn steep


@dataclass(frozen=True)
class Curve:
    """One matrix of one block.

    Attributes:
        block, name: which.
        outputs, inputs: its shape; a step of the allocation removes one weight of each row.
        increase_L: loss above the dense model's at the levels, nats a token.
    """

    block: int
    name: str
    outputs: int
    inputs: int
    increase_L: tuple[float, ...]


def fitted(levels: Sequence[float], increase: Sequence[float], at: Floats) -> Floats:
    """The increase at other sparsities: exp of a parabola, weighted so that large increases, which decide the allocation, are met best."""
    s_L, y_L = np.asarray(levels), np.maximum(np.asarray(increase), LOWEST)
    weight_L = np.sqrt(y_L / y_L.max())
    powers_L3 = np.stack([np.ones_like(s_L), s_L, s_L**2], 1)
    found_3 = np.linalg.lstsq(powers_L3 * weight_L[:, None], np.log(y_L) * weight_L, rcond=None)[0]
    curve: Floats = np.exp(found_3[0] + found_3[1] * at + found_3[2] * at**2)
    return curve


def hull_slopes(y: Floats) -> Floats:
    """The slopes, a step each, of the lower convex hull of a curve on an even grid; they never fall."""
    kept = [0]
    for x in range(1, len(y)):
        while len(kept) > 1 and (y[kept[-1]] - y[kept[-2]]) * (x - kept[-1]) >= (y[x] - y[kept[-1]]) * (
            kept[-1] - kept[-2]
        ):
            kept.pop()
        kept.append(x)
    slopes: Floats = np.diff(np.interp(np.arange(len(y)), kept, y[kept]))
    return slopes


def cheapest(levels: Sequence[float], curves: Sequence[Curve], budget: int) -> list[float]:
    """The sparsity of each matrix that removes at least `budget` weights, and no whole step more, at the least sum of fitted increases.

    Args:
        levels: the sparsities that were measured.
        curves: what was measured there.
        budget: weights to remove, of all matrices together.
    """
    overall = budget / sum(c.outputs * c.inputs for c in curves)
    cost, weights, owner = [], [], []
    for number, curve in enumerate(curves):
        steps = max(int(HIGHEST * curve.inputs), math.ceil(overall * curve.inputs))
        slopes = hull_slopes(fitted(levels, curve.increase_L, np.arange(steps + 1) / curve.inputs)) / curve.outputs
        cost.append(slopes)
        weights.append(np.full(steps, curve.outputs))
        owner.append(np.full(steps, number))
    order = np.argsort(np.concatenate(cost), kind="stable")
    removed = np.cumsum(np.concatenate(weights)[order])
    taken = order[: int(np.searchsorted(removed, budget)) + 1] if budget else order[:0]
    steps_U = np.bincount(np.concatenate(owner)[taken], minlength=len(curves))
    return [_rate(int(steps), curve.outputs, curve.inputs) for steps, curve in zip(steps_U, curves, strict=True)]


def _rate(steps: int, outputs: int, inputs: int) -> float:
    """steps / inputs, such that the floor of it, of a row's weights or the whole matrix's, is `steps` of each row again in floating point."""
    rate = steps / inputs
    exact = int(inputs * rate) == steps and int(outputs * inputs * rate) == outputs * steps
    return rate if exact else (steps + 1e-9) / inputs
