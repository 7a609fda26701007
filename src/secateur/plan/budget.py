"""Counts of parameters from shapes alone, and the step whose pruning ratio is nearest to the requested one."""

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
    """The step whose pruning ratio is nearest to the requested one. Of two equally near steps it takes the one that
    removes less, but never one that removes nothing.

    Args:
        steps: sparsities, ascending from 0; a higher one removes more, or nearly always. They are read only as far as
            needed.
        ratio: step -> its pruning ratio, over all parameters.
        wanted: the requested ratio.
        at_least: take the first step that reaches the requested ratio, even if another one below is nearer.
        what: the name of the pruning, for the message.

    Raises:
        UsageError: the ratio is outside its range, or no step reaches it.
    """
    if not 0 <= wanted < 1:
        raise UsageError(f"--params-removed {wanted:g} is outside [0, 1)")
    below, most = (0.0, 0.0), 0.0
    for step in steps:
        if (removed := ratio(step)) >= wanted:
            nothing = below[0] == 0 < wanted
            return step if at_least or nothing or removed - wanted < wanted - below[1] else below[0]
        below, most = max(below, (step, removed), key=lambda pair: pair[1]), max(most, removed)
    raise UsageError(f"--params-removed {wanted:g}: {what} can remove at most {most:.3f} of this model")


def mean_block(view: ModelView) -> float:
    """The mean number of parameters of a block."""
    return sum(block_parameters(view, index) for index in range(view.blocks)) / view.blocks


def parameters_left(view: ModelView, rates: Rates) -> int:
    """The number of all parameters after whole units are removed at these rates."""
    return count_parameters(view, [units_left(view.dims(index), rate) for index, rate in enumerate(rates)])


def dims_parameters(view: ModelView, after: Sequence[BlockDims]) -> int:
    """The number of all parameters of a model whose blocks have these heads and feed-forward units."""
    return count_parameters(view, after)


def sliced_parameters(view: ModelView, residuals: Sequence[Residual]) -> int:
    """The number of all parameters of a canonical model whose residual stream has these widths."""
    after = [replace(view.dims(index), residual=residual) for index, residual in enumerate(residuals)]
    return count_parameters(view, after)


def unit_parameters(view: ModelView, index: int, space: str) -> int:
    """The number of weights and biases of one unit: a feed-forward unit, or a key-value head with its query heads."""
    return block_cost(view, index).unit_parameters(space, view.dims(index).units())
