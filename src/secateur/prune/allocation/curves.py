"""Turn losses measured at a few sparsities into one sparsity per matrix: remove the cheapest weights, under one budget.

The loss that a matrix adds grows roughly exponentially with its sparsity. So a parabola in the sparsity is fitted to
the logarithm of the measured losses. On the lower convex hull of each curve the greedy choice (next the smallest loss
per weight) is optimal for losses that add up.

Shape letters: L levels of sparsity, U matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LOWEST = 1e-4  # nats per token: an increase below this is noise, because few tokens are measured
HIGHEST = 0.95  # the limit of a sparsity: nothing is measured above 0.9, where curves turn steep


@dataclass(frozen=True)
class Curve:
    """The measured losses of one matrix.

    Attributes:
        block, name: the index of the block, and the canonical name of the matrix.
        outputs, inputs: the shape; a step of the allocation removes one weight from each row.
        increase_L: the loss above the dense model at each level, in nats per token.
    """

    block: int
    name: str
    outputs: int
    inputs: int
    increase_L: tuple[float, ...]


def fitted(levels: Sequence[float], increase: Sequence[float], at: Floats) -> Floats:
    """Return the fitted increase at sparsities `at`: exp of a parabola.

    Large increases decide the allocation, so they get more weight in the fit.
    """
    s_L, y_L = np.asarray(levels), np.maximum(np.asarray(increase), LOWEST)
    weight_L = np.sqrt(y_L / y_L.max())
    powers_L3 = np.stack([np.ones_like(s_L), s_L, s_L**2], 1)
    fit_3 = np.linalg.lstsq(powers_L3 * weight_L[:, None], np.log(y_L) * weight_L, rcond=None)[0]
    curve: Floats = np.exp(fit_3[0] + fit_3[1] * at + fit_3[2] * at**2)
    return curve


def hull_slopes(y: Floats) -> Floats:
    """Return the slopes of the lower convex hull of a curve on an even grid, one per step; they never decrease."""
    corners = [0]
    for x in range(1, len(y)):
        while len(corners) > 1:
            before, last = corners[-2:]
            if not (y[last] - y[before]) * (x - last) >= (y[x] - y[last]) * (last - before):
                break
            corners.pop()  # the last corner lies on or above the line from the one before it to x
        corners.append(x)
    slopes: Floats = np.diff(np.interp(np.arange(len(y)), corners, y[corners]))
    return slopes


def cheapest(levels: Sequence[float], curves: Sequence[Curve], budget: int) -> list[float]:
    """Return the sparsity of each matrix with the smallest sum of fitted increases.

    Together they remove at least `budget` weights, and less than one step more.

    Args:
        levels: the measured sparsities.
        curves: the losses measured there, one curve per matrix.
        budget: the number of weights to remove, over all matrices together.
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
    """Return steps / inputs, raised a little if rounding down would give back fewer than `steps` weights per row."""
    rate = steps / inputs
    exact = int(inputs * rate) == steps and int(outputs * inputs * rate) == outputs * steps
    return rate if exact else (steps + 1e-9) / inputs
