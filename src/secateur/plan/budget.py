"""`--params-removed`: the sparsity whose pruning ratio is nearest to the one wanted. Known from shapes alone, before any work."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from secateur.core.errors import UsageError
from secateur.models.canonical import canonical_view
from secateur.models.parameters import block_cost, block_parameters, count_parameters
from secateur.models.view import BlockDims, ModelView, Residual
from secateur.plan.allocate import units_left
from secateur.plan.pattern import Pattern
from secateur.plan.rates import Rates, resolve_rates

_EDGE = 1e-9  # k / n times n may fall just short of k in floating point


def nearest(steps: Iterable[float], ratio: Callable[[float], float], wanted: float, *, at_least: bool, what: str) -> float:
    """The step whose pruning ratio is nearest to the one wanted; of two as near, the one that removes less, but not nothing.

    Args:
        steps: sparsities, ascending from 0; what they remove rises with them, or nearly so. No more of them are looked at than it takes.
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


def find_sparsity(view: ModelView, pattern: Pattern, modules: str | None, wanted: float, *, at_least: bool = False) -> float:
    """The sparsity of whole units whose pruning ratio is nearest to the one wanted; see `nearest`.

    Raises:
        UsageError: the pattern zeroes weights instead of removing them, or cannot remove so much.
    """
    if not pattern.structured:
        raise UsageError(f"--params-removed: pattern {pattern} zeroes weights and removes no parameters; use --sparsity, or --pattern rows or columns")
    before = view.parameters()

    def ratio(sparsity: float) -> float:
        return 1 - parameters_left(view, resolve_rates(view, sparsity, modules, pattern)) / before

    sizes = {size for index in range(view.blocks) for size in (view.dims(index).ffn, view.dims(index).groups)}
    steps = [0.0, *(step + _EDGE for step in sorted({k / n for n in sizes for k in range(1, n)}))]
    start = max(0, bisect_left(steps, wanted, key=ratio) - 1)  # the ratio rises with every step
    return nearest(steps[start:], ratio, wanted, at_least=at_least, what=f"pattern {pattern}")


def find_dropped(view: ModelView, wanted: float, *, at_least: bool = False) -> float:
    """The fraction of whole blocks whose pruning ratio is nearest to the one wanted, as if all blocks were as large as their mean; see `nearest`."""
    share = mean_block(view) / view.parameters()
    steps = (number / view.blocks for number in range(view.blocks))
    return nearest(steps, lambda step: step * view.blocks * share + _EDGE, wanted, at_least=at_least, what="dropping blocks")


def mean_block(view: ModelView) -> float:
    """The parameters of a block, in the mean."""
    return sum(block_parameters(view, index) for index in range(view.blocks)) / view.blocks


def parameters_left(view: ModelView, rates: Rates) -> int:
    """All parameters after whole units are removed at these rates."""
    return count_parameters(view, [units_left(view.dims(index), rate) for index, rate in enumerate(rates)])


def find_heads(view: ModelView, wanted: float, dims_left: Callable[[float], Sequence[BlockDims]], *, at_least: bool = False) -> float:
    """The sparsity of heads whose pruning ratio is nearest to the one wanted; see `nearest`.

    Args:
        view: a model whose blocks have heads of one size.
        wanted, at_least: as for `nearest`.
        dims_left: sparsity -> the sizes of blocks that have lost as many heads, wherever these are.
    """
    before, heads = view.parameters(), sum(view.dims(index).heads for index in range(view.blocks))
    steps = (gone / heads for gone in range(heads))
    return nearest(steps, lambda step: 1 - dims_parameters(view, dims_left(step)) / before, wanted, at_least=at_least, what="removing heads")


def dims_parameters(view: ModelView, after: Sequence[BlockDims]) -> int:
    """All parameters of a model whose blocks are narrowed to these heads and feed-forward units."""
    return count_parameters(view, after)


def find_sliced(view: ModelView, wanted: float, residuals: Callable[[float], Sequence[Residual]], *, at_least: bool = False) -> float:
    """The sparsity of the residual width whose pruning ratio, with what slicing adds, is nearest to the one wanted; see `nearest`.

    Args:
        view: the model.
        wanted, at_least: as for `nearest`.
        residuals: sparsity -> the widths of all blocks; raises UsageError where nothing would be left.
    """
    if wanted == 0:
        return 0.0
    hidden, before = int(view.config.hidden_size), view.parameters()
    canonical = canonical_view(view, torch.float32)

    def widths() -> Iterator[float]:
        yield 0.0
        seen = hidden
        for width in range(hidden - 1, 0, -1):
            with suppress(UsageError):  # nothing left after rounding
                if (rounded := residuals(1 - width / hidden)[0].attention[0]) < seen:
                    seen = rounded
                    yield 1 - rounded / hidden

    def ratio(step: float) -> float:
        return 1 - sliced_parameters(canonical, residuals(step)) / before if step else 0.0

    return nearest(widths(), ratio, wanted, at_least=at_least, what="narrowing the residual stream")


def sliced_parameters(view: ModelView, residuals: Sequence[Residual]) -> int:
    """All parameters of a canonical model whose residual stream is narrowed so."""
    after = [replace(view.dims(index), residual=residual) for index, residual in enumerate(residuals)]
    return count_parameters(view, after)


def unit_parameters(view: ModelView, index: int, space: str) -> int:
    """Weights and biases of one unit: a feed-forward unit, or a key-value head with its query heads."""
    return block_cost(view, index).unit_parameters(space, view.dims(index).units())
