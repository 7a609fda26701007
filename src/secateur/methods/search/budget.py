"""How many units each block loses, so that what goes reaches the budget at the least cost.

The budget is in parameters, or in seconds (`latency.py`); here it is in whatever the curves count.

The costs of blocks add up (to second order, and as if blocks did not interact). The cheapest mix then has one price
for all: every block and space removes the number k that is lowest in

    cost(k) - price * gone(k)

and the price is the lowest that reaches the budget: no mix that removes as much costs less (Everett's
theorem on Lagrange multipliers, Operations Research 11, 1963). What the last step of the price took too much is then
given back, the units that cost most for what they save first. Where a curve is not convex that step may be large. So
the mix just below the budget is filled up too, by the cheapest next units, and the cheaper of the two is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_HALVINGS = 200


@dataclass(frozen=True)
class Curve:
    """What a space of a block can lose.

    Attributes:
        cost_K: the costs of the choices, float64, the first 0 for nothing.
        removed_K: the units that each choice removes, ascending from 0.
        gone_K: what each choice takes off the budget, float64, strictly ascending from 0.
    """

    cost_K: Tensor
    removed_K: Tensor
    gone_K: Tensor

    def step(self, k: int) -> float:
        """Return what choice k takes off the budget beyond choice k - 1."""
        return float(self.gone_K[k] - self.gone_K[k - 1])

    def cheapest(self, price: float) -> int:
        """Return the choice that is lowest in cost minus price times what it takes; of equal ones the smallest."""
        return int((self.cost_K - price * self.gone_K).argmin())


def curve(cost_U: Tensor, gone_U: Tensor, multiple: int = 1) -> Curve:
    """Return the choices of a space that keeps a multiple of `multiple` units, or all."""
    units = len(cost_U)
    removed_K = torch.tensor([k for k in range(units) if k == 0 or (units - k) % multiple == 0])
    return Curve(cost_U[removed_K], removed_K, gone_U[removed_K])


def spend(curves: Sequence[Curve], budget: float) -> list[int]:
    """Return the units that each curve removes.

    Args:
        curves: the choices.
        budget: what has to go; the result takes as much or more, by less than one choice where the curves are convex.
    """

    def removed(choices: Sequence[int]) -> float:
        return sum(float(c.gone_K[k]) for c, k in zip(curves, choices, strict=True))

    def at(price: float) -> list[int]:
        return [c.cheapest(price) for c in curves]

    low, high = 0.0, 1.0
    while removed(at(high)) < budget:
        low, high = high, high * 4
        if high > 1e300:  # the caller checks that the budget can be met
            return [len(c.removed_K) - 1 for c in curves]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if removed(at(middle)) >= budget else (middle, high)

    def trimmed(choices: list[int]) -> list[int]:
        surplus = removed(choices) - budget
        while (back := _dearest(curves, choices, surplus)) is not None:
            choices[back] -= 1
            surplus -= curves[back].step(choices[back] + 1)
        return choices

    def filled(choices: list[int]) -> list[int]:
        while removed(choices) < budget:
            choices[_cheapest_step(curves, choices)] += 1
        return choices

    # where the price jumps over a dent of a curve, going on from below may be cheaper than coming back from above
    mixes = [trimmed(at(high)), trimmed(filled(at(low)))]
    choices = min(mixes, key=lambda mix: sum(float(c.cost_K[k]) for c, k in zip(curves, mix, strict=True)))
    return [int(c.removed_K[k]) for c, k in zip(curves, choices, strict=True)]


def _cheapest_step(curves: Sequence[Curve], choices: Sequence[int]) -> int:
    """Return the curve whose next step costs least for what it takes."""
    prices = [
        float(c.cost_K[k + 1] - c.cost_K[k]) / c.step(k + 1) if k + 1 < len(c.removed_K) else float("inf")
        for c, k in zip(curves, choices, strict=True)
    ]
    return min(range(len(prices)), key=lambda number: prices[number])


def _dearest(curves: Sequence[Curve], choices: Sequence[int], surplus: float) -> int | None:
    """Return the curve whose last step costs most for what it took, of those that the surplus pays for, or None."""
    best, dearest = -1.0, None
    for number, (c, k) in enumerate(zip(curves, choices, strict=True)):
        if k == 0:
            continue
        price = float(c.cost_K[k] - c.cost_K[k - 1]) / c.step(k)
        if c.step(k) <= surplus and price > best:
            best, dearest = price, number
    return dearest


def spend_alike(curves: Sequence[Curve], budget: float) -> list[int]:
    """Return the units that two spaces remove from every block, at the least cost that meets the budget.

    Args:
        curves: the choices of the two spaces, with what they cost and take in all blocks together.
        budget: what has to go.
    """
    first, second = curves
    best, found = float("inf"), [len(c.removed_K) - 1 for c in curves]
    for k in range(len(first.removed_K)):
        enough = (second.gone_K >= budget - float(first.gone_K[k])).nonzero()
        if len(enough) and (cost := float(first.cost_K[k] + second.cost_K[enough[0, 0]])) < best:
            best, found = cost, [k, int(enough[0, 0])]
    return [int(c.removed_K[k]) for c, k in zip(curves, found, strict=True)]
