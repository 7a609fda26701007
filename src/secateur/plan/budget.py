"""`--params-removed`: the sparsity whose pruning ratio is the one wanted. Known from shapes alone, before any work."""

from __future__ import annotations

from secateur.core.errors import UsageError
from secateur.models.view import ModelView
from secateur.plan.allocate import MEMBERS, removed_units
from secateur.plan.pattern import Pattern
from secateur.plan.rates import Rates, resolve_rates

_EDGE = 1e-9  # k / n times n may fall just short of k in floating point


def find_sparsity(view: ModelView, pattern: Pattern, modules: str | None, wanted: float) -> float:
    """The smallest sparsity whose pruning ratio, over all parameters, is at least `wanted`.

    Raises:
        UsageError: the pattern zeroes weights instead of removing them, or cannot remove so much.
    """
    if not 0 <= wanted < 1:
        raise UsageError(f"--params-removed {wanted:g} is outside [0, 1)")
    if not pattern.structured:
        raise UsageError(f"--params-removed: pattern {pattern} zeroes weights and removes no parameters; use --sparsity, or --pattern rows or columns")
    before = view.parameters()

    def ratio(sparsity: float) -> float:
        return 1 - parameters_left(view, resolve_rates(view, sparsity, modules, pattern)) / before

    sizes = {size for index in range(view.blocks) for size in (view.dims(index).ffn, view.dims(index).groups)}
    steps = [0.0, *(step + _EDGE for step in sorted({k / n for n in sizes for k in range(1, n)}))]
    if (most := ratio(steps[-1])) < wanted:
        raise UsageError(f"--params-removed {wanted:g}: pattern {pattern} can remove at most {most:.3f} of this model")
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ratio(steps[middle]) >= wanted else (middle + 1, high)
    return steps[low]


def parameters_left(view: ModelView, rates: Rates) -> int:
    """All parameters after whole units are removed at these rates."""
    left = view.parameters()
    for index, rate in enumerate(rates):
        dims = view.dims(index)
        for space, units in (("ffn", dims.ffn), ("groups", dims.groups)):
            reader = MEMBERS[space].reader
            left -= removed_units(rate.get(reader, 0.0), units) * _unit_parameters(view, index, space) // units
    return left


def _unit_parameters(view: ModelView, index: int, space: str) -> int:
    """Weights and biases of all units of a space together."""
    shapes, prefix, stored = view.matrix_shapes(index), view.block_prefix(index), set(view.source.names())
    members = MEMBERS[space]
    total = shapes[members.reader][0] * shapes[members.reader][1]
    for name in members.writers:
        if name in shapes:
            rows, columns = shapes[name]
            total += rows * columns + (rows if f"{prefix}{view.family.matrices[name]}.bias" in stored else 0)
    return total
