"""Counts of parameters from shapes alone, and the step whose pruning ratio is nearest to the wanted one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from secateur.core.errors import UsageError
from secateur.models.parameters import block_cost, block_parameters, count_parameters
from secateur.models.view import BlockDims, ModelView, Residual
from secateur.plan.allocate import units_left
from secateur.plan.rates import Rates


def nearest(
    steps: Iterable[float], ratio: Callable[[float], float], wanted: float, *, at_least: bool, what: str
) -> float:
    """The step whose pruning ratio is nearest to the one wanted; of two as near, the one that removes less, but not
    nothing.

    Args:
        steps: sparsities, ascending from 0; what they remove rises with them, or nearly so. No more of them are looked
            at than it takes.
        ratio: the pruning ratio, over all parameters, of one of them.
        wanted: the ratio that was asked for.
        at_least: take the first step that removes as much, however much more that is.
        what: what removes, for the message.

    Raises:
        UsageError: the ratio is outside its range, or no step removes so much.
    """
    if not 0 <= wanted < 1:
        raise UsageError(f"--params-removed {wanted:g} is outside [0, 1)")
    below, most = (0.0, 0.0), 0.0
    for step in steps:
        if (removed := ratio(step)) >= wanted:
            nothing = below[0] == 0 < wanted
            return step if at_least or nothing or removed - wanted < wanted - below[1] else below[0]
        below, most = max(below, (step, removed), key=lambda found: found[1]), max(most, removed)
    raise UsageError(f"--params-removed {wanted:g}: {what} can remove at most {most:.3f} of this model")


def mean_block(view: ModelView) -> float:
    """The parameters of a block, in the mean."""
    return sum(block_parameters(view, index) for index in range(view.blocks)) / view.blocks


def parameters_left(view: ModelView, rates: Rates) -> int:
    """All parameters after whole units are removed at these rates."""
    return count_parameters(view, [units_left(view.dims(index), rate) for index, rate in enumerate(rates)])


def dims_parameters(view: ModelView, after: Sequence[BlockDims]) -> int:
    """All parameters of a model whose blocks are narrowed to these heads and feed-forward units."""
    return count_parameters(view, after)


def sliced_parameters(view: ModelView, residuals: Sequence[Residual]) -> int:
    """All parameters of a canonical model whose residual stream is narrowed so."""
    after = [replace(view.dims(index), residual=residual) for index, residual in enumerate(residuals)]
    return count_parameters(view, after)


def unit_parameters(view: ModelView, index: int, space: str) -> int:
    """Weights and biases of one unit: a feed-forward unit, or a key-value head with its query heads."""
    return block_cost(view, index).unit_parameters(space, view.dims(index).units())
