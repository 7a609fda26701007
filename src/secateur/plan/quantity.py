"""The quantity that a sparsity is a fraction of: weights, units, the residual width, parameters, heads, or blocks.

Each `Quantity` knows the four things that depend on it: the sparsity for a requested pruning ratio
(`--params-removed`), the number of parameters left, the sizes of the blocks left, and the fraction removed in the end.
All but the last follow from shapes alone, before any work.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch

from secateur.core.errors import UsageError
from secateur.models.canonical import canonical_view
from secateur.models.view import BlockDims, ModelView, Residual
from secateur.plan.allocate import removed_blocks, units_left
from secateur.plan.budget import dims_parameters, mean_block, nearest, parameters_left, sliced_parameters
from secateur.plan.pattern import Pattern
from secateur.plan.rates import Rates, check_sparsity, resolve_rates

_EDGE = 1e-9  # k / n times n may fall just short of k in floating point


@dataclass(frozen=True)
class Subject:
    """A model and the settings of its pruning that sizes depend on.

    Attributes:
        view: the model before pruning.
        method: the name of the method, for messages.
        pattern: the pattern of the removal from matrices.
        modules: the sparsity of each matrix, as on the command line; None for the same sparsity everywhere.
        ranked: True if the units of all blocks are ranked together, so that blocks lose different numbers of units.
        sizes_left: sparsity -> the sizes of all blocks; None if they depend on the calibration text.
    """

    view: ModelView
    method: str
    pattern: Pattern
    modules: str | None = None
    ranked: bool = False
    sizes_left: Callable[[float], Sequence[BlockDims] | None] = lambda _: None

    def rates(self, sparsity: float | None) -> Rates:
        """The sparsity of each matrix."""
        return resolve_rates(self.view, sparsity, self.modules, self.pattern)

    @cached_property
    def dense(self) -> list[BlockDims]:
        """The sizes of all blocks before pruning."""
        return [self.view.dims(index) for index in range(self.view.blocks)]

    @cached_property
    def canonical(self) -> ModelView:
        """The model with a residual stream that may be narrowed."""
        return canonical_view(self.view, torch.float32)


@dataclass(frozen=True)
class Counts:
    """The counts before and after pruning, from the written result.

    Attributes:
        targeted, removed: the number of targeted weights (or directions of the residual), and how many were removed.
        parameters, heads, blocks: (before, after), of the whole model.
    """

    targeted: int
    removed: int
    parameters: tuple[int, int]
    heads: tuple[int, int]
    blocks: tuple[int, int]


@dataclass(frozen=True)
class Quantity:
    """A quantity that a sparsity is a fraction of.

    Attributes:
        name: the value of `sparsity_of` in plans and records.
        words: the same for people: a sparsity is "0.5 of {words}".
        shared: the reason why matrices have no sparsity of their own (`--modules`); None if they can have one.
        needs_sizes: True if the method must provide `sizes_left`.
        sparsity_for: the sparsity whose pruning ratio is nearest to the requested one, or the first that reaches it
            (`at_least`); see `budget.nearest`.
        parameters: the number of all parameters after the cut; None if it depends on the calibration text.
        sizes: the sizes of the blocks after the cut; None if they depend on the choice of what to remove.
        share_gone: the fraction removed.
    """

    name: str
    words: str
    sparsity_for: Callable[[Subject, float, bool], float]
    parameters: Callable[[Subject, float | None], int | None]
    sizes: Callable[[Subject, float | None], Sequence[BlockDims] | None]
    share_gone: Callable[[Counts], float]
    shared: str | None = None
    needs_sizes: bool = False

    def check(self, method: str, sparsity: float | None, modules: str | None) -> float | None:
        """Check the sparsity and return it.

        Raises:
            UsageError: the sparsity is outside [0, 1), or `modules` is given for a quantity of the whole model.
        """
        if modules is not None and self.shared is not None:
            raise UsageError(f"--modules does not go with {method}: {self.shared}; use --sparsity")
        return sparsity if sparsity is None else check_sparsity(sparsity)


def _zeroes_only(subject: Subject, wanted: float, at_least: bool) -> float:
    raise UsageError(
        f"--params-removed: pattern {subject.pattern} zeroes weights and removes no parameters; use --sparsity, or "
        "--pattern rows or columns"
    )


def _sparsity_of_units(subject: Subject, wanted: float, at_least: bool) -> float:
    before = subject.view.parameters()

    def ratio(sparsity: float) -> float:
        return 1 - parameters_left(subject.view, subject.rates(sparsity)) / before

    if subject.ranked:
        raise UsageError(
            "--params-removed needs scope=block: with scope=model the ratio depends on the scores; use --sparsity"
        )
    sizes = {size for dims in subject.dense for size in (dims.ffn, dims.groups)}
    steps = [0.0, *(step + _EDGE for step in sorted({k / n for n in sizes for k in range(1, n)}))]
    start = max(0, bisect_left(steps, wanted, key=ratio) - 1)  # the ratio rises with every step
    return nearest(steps[start:], ratio, wanted, at_least=at_least, what=f"pattern {subject.pattern}")


def _sizes_of_units(subject: Subject, sparsity: float | None) -> Sequence[BlockDims] | None:
    if subject.ranked:
        return None
    return [units_left(dims, rate) for dims, rate in zip(subject.dense, subject.rates(sparsity), strict=True)]


def _sparsity_of_width(subject: Subject, wanted: float, at_least: bool) -> float:
    if wanted == 0:
        return 0.0
    if subject.sizes_left(0.0) is None:
        raise UsageError(
            f"--params-removed does not go with these options of {subject.method}: the text decides the widths; use "
            "either --params-removed or these options"
        )
    hidden, before = int(subject.view.config.hidden_size), subject.view.parameters()

    def widths() -> Iterator[float]:
        yield 0.0
        narrowest = hidden
        for width in range(hidden - 1, 0, -1):
            with suppress(UsageError):  # nothing left after rounding
                if (rounded := _residuals(subject, 1 - width / hidden)[0].attention[0]) < narrowest:
                    narrowest = rounded
                    yield 1 - rounded / hidden

    def ratio(step: float) -> float:
        return 1 - sliced_parameters(subject.canonical, _residuals(subject, step)) / before if step else 0.0

    return nearest(widths(), ratio, wanted, at_least=at_least, what="narrowing the residual stream")


def _residuals(subject: Subject, sparsity: float) -> list[Residual]:
    """The widths of the residual stream in all blocks."""
    sizes = subject.sizes_left(sparsity)
    assert sizes is not None, "the widths follow from shapes"
    residuals = [dims.residual for dims in sizes if dims.residual is not None]
    assert len(residuals) == len(sizes), "a narrowed residual stream has a width in every block"
    return residuals


def _parameters_of_width(subject: Subject, sparsity: float | None) -> int | None:
    if sparsity == 0:
        return subject.view.parameters()
    if sparsity is None or subject.sizes_left(sparsity) is None:
        return None
    return sliced_parameters(subject.canonical, _residuals(subject, sparsity))


def _sparsity_of_heads(subject: Subject, wanted: float, at_least: bool) -> float:
    before, heads = subject.view.parameters(), sum(dims.heads for dims in subject.dense)

    def ratio(step: float) -> float:
        return 1 - dims_parameters(subject.view, _heads_left(subject, step)) / before

    steps = (gone / heads for gone in range(heads))
    return nearest(steps, ratio, wanted, at_least=at_least, what="removing heads")


def _heads_left(subject: Subject, sparsity: float) -> Sequence[BlockDims]:
    """The sizes of the blocks if the first heads go; every choice of heads removes the same number of parameters."""
    sizes = subject.sizes_left(sparsity)
    assert sizes is not None, "the number of heads follows from shapes"
    return sizes


def _sparsity_of_blocks(subject: Subject, wanted: float, at_least: bool) -> float:
    view = subject.view
    share = mean_block(view) / view.parameters()  # as if all blocks were as large as their mean
    steps = (number / view.blocks for number in range(view.blocks))

    def ratio(step: float) -> float:
        return step * view.blocks * share + _EDGE

    return nearest(steps, ratio, wanted, at_least=at_least, what="dropping blocks")


def _parameters_of_blocks(subject: Subject, sparsity: float | None) -> int:
    gone = removed_blocks(sparsity or 0.0, subject.view.blocks)
    return round(subject.view.parameters() - gone * mean_block(subject.view))


def _sizes_of_blocks(subject: Subject, sparsity: float | None) -> Sequence[BlockDims] | None:
    return subject.dense if all(dims == subject.dense[0] for dims in subject.dense) else None


def _of_targeted(counts: Counts) -> float:
    return counts.removed / counts.targeted if counts.targeted else 0.0


def _gone(before_and_after: tuple[int, int]) -> float:
    before, after = before_and_after
    return 1 - after / before


_ALL_PARAMETERS = "it chooses among all parameters of the model"

WEIGHTS = Quantity(
    "weights",
    "the weights of the targeted matrices",
    sparsity_for=_zeroes_only,
    parameters=lambda subject, _: subject.view.parameters(),
    sizes=lambda subject, _: subject.dense,
    share_gone=_of_targeted,
)
UNITS = Quantity(
    "units",
    "the weights of the targeted matrices",
    sparsity_for=_sparsity_of_units,
    parameters=lambda subject, sparsity: parameters_left(subject.view, subject.rates(sparsity)),
    sizes=_sizes_of_units,
    share_gone=_of_targeted,
)
WIDTH = Quantity(
    "width",
    "the residual width",
    sparsity_for=_sparsity_of_width,
    parameters=_parameters_of_width,
    sizes=lambda subject, sparsity: subject.dense if sparsity == 0 else subject.sizes_left(sparsity or 0.0),
    share_gone=_of_targeted,
    shared="it narrows the residual stream, which all matrices share",
    needs_sizes=True,
)
PARAMETERS = Quantity(
    "parameters",
    "all parameters",
    sparsity_for=lambda _, wanted, __: wanted,
    parameters=lambda subject, sparsity: round((1 - (sparsity or 0.0)) * subject.view.parameters()),
    sizes=lambda *_: None,
    share_gone=lambda counts: _gone(counts.parameters),
    shared=_ALL_PARAMETERS,
)
HEADS = Quantity(
    "heads",
    "the attention heads",
    sparsity_for=_sparsity_of_heads,
    parameters=lambda subject, s: (
        dims_parameters(subject.view, _heads_left(subject, s)) if s else subject.view.parameters()
    ),
    sizes=lambda *_: None,
    share_gone=lambda counts: _gone(counts.heads),
    shared=_ALL_PARAMETERS,
    needs_sizes=True,
)
BLOCKS = Quantity(
    "blocks",
    "the blocks",
    sparsity_for=_sparsity_of_blocks,
    parameters=_parameters_of_blocks,
    sizes=_sizes_of_blocks,
    share_gone=lambda counts: _gone(counts.blocks),
    shared=_ALL_PARAMETERS,
)
QUANTITIES = {quantity.name: quantity for quantity in (WEIGHTS, UNITS, WIDTH, PARAMETERS, HEADS, BLOCKS)}


def words_of(name: str | None) -> str:
    """The words for a `sparsity_of` of a record; records of older versions have none."""
    return QUANTITIES[name].words if name in QUANTITIES else "what the method removes from"
