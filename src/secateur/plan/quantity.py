"""The quantity that a sparsity is a fraction of: weights, units, width, parameters, heads, blocks, or time.

Each `Quantity` knows the four things that depend on it: the sparsity for a requested pruning ratio
(`--params-removed`), the number of parameters left, the sizes of the blocks left, and the fraction removed in the end.
All but the last follow from shapes alone, before any work.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch

from secateur.core.errors import SecateurError, UsageError
from secateur.models.canonical import canonical_view
from secateur.models.parameters import count_parameters, mean_block
from secateur.models.view import BlockDims, ModelView
from secateur.plan.counts import removed_blocks, units_left
from secateur.plan.pattern import Pattern
from secateur.plan.rates import Rates, check_sparsity, resolve_rates

_LEAST_ADVICE = 0.01  # no smaller sparsity is worth advising
_MOST_OF_PART = 0.8  # of the weights in the blocks go in a rehearsal, at most
_EDGE = 1e-9  # k / n times n may fall just short of k in floating point


@dataclass(frozen=True)
class Subject:
    """A model and the settings of its pruning that sizes depend on.

    Attributes:
        view: the model before pruning.
        method: the name of the method, for messages.
        pattern: the pattern of the removal from matrices.
        modules: the sparsity of each matrix, as on the command line; None for the same sparsity everywhere.
        options: the options that were given, as NAME=VALUE, for messages.
        ranked: True if the units of all blocks are ranked together, so that blocks lose different numbers of units.
        sizes_left: sparsity -> the sizes of all blocks; None if they depend on the calibration text.
        tied: whether a tied head stays tied where the residual stream is rotated.
    """

    view: ModelView
    method: str
    pattern: Pattern
    modules: str | None = None
    options: str = ""
    ranked: bool = False
    sizes_left: Callable[[float], Sequence[BlockDims] | None] = lambda _: None
    tied: bool = False

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
        return canonical_view(self.view, torch.float32, tied=self.tied)


@dataclass(frozen=True)
class BeforeAndAfter:
    """The counts before and after pruning, from the written result; times are those that the method expects.

    Attributes:
        targeted, removed: the number of targeted weights (or directions of the residual), and how many were removed.
        parameters, heads, blocks: (before, after), of the whole model.
        seconds: (before, after), where a sparsity is a fraction of time.
    """

    targeted: int
    removed: int
    parameters: tuple[int, int]
    heads: tuple[int, int]
    blocks: tuple[int, int]
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Quantity:
    """A quantity that a sparsity is a fraction of.

    Attributes:
        name: the value of `sparsity_of` in plans and records.
        words: the same for people: a sparsity is "0.5 of {words}".
        shared: the reason why matrices have no sparsity of their own (`--modules`); None if they can have one.
        needs_sizes: True if the method must provide `sizes_left`.
        required: what `--sparsity` is, for the message that it is missing; None if an option may stand in for it, so
            that the method checks for itself.
        sparsity_for: the sparsity whose pruning ratio is nearest to the requested one, or the first that reaches it
            (`at_least`); see `nearest`.
        parameters: the number of all parameters after the cut; None if it depends on the calibration text or on times.
        sizes: the sizes of the blocks after the cut; None if they depend on the choice of what to remove.
        share_gone: the fraction removed.
        zeroes: True if weights are set to zero and no parameter is removed.
    """

    name: str
    words: str
    sparsity_for: Callable[[Subject, float, bool], float]
    parameters: Callable[[Subject, float | None], int | None]
    sizes: Callable[[Subject, float | None], Sequence[BlockDims] | None]
    share_gone: Callable[[BeforeAndAfter], float]
    shared: str | None = None
    needs_sizes: bool = False
    required: str | None = None
    zeroes: bool = False

    @property
    def result(self) -> str:
        """What becomes of the model: `zeros` where weights are set to zero and the size stays, otherwise `smaller`."""
        return "zeros" if self.zeroes else "smaller"

    def check(self, method: str, sparsity: float | None, modules: str | None) -> float | None:
        """Check the sparsity of a quantity that the whole model shares, and return it.

        Raises:
            UsageError: the sparsity is missing or outside [0, 1), or `modules` is given.
        """
        if modules is not None:
            raise UsageError(f"--modules does not go with {method}: {self.shared}; use --sparsity")
        if sparsity is None and self.required is not None:
            raise UsageError(f"{method} needs --sparsity S, {self.required}")
        return sparsity if sparsity is None else check_sparsity(sparsity)


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


def _zeroes_only(subject: Subject, wanted: float, at_least: bool) -> float:
    raise UsageError(
        f"--params-removed: pattern {subject.pattern} zeroes weights and removes no parameters; use --sparsity, or "
        "a method with --pattern rows or columns"
    )


def _sparsity_of_units(subject: Subject, wanted: float, at_least: bool) -> float:
    before = subject.view.parameters()

    def ratio(sparsity: float) -> float:
        return 1 - _parameters_of_units(subject, sparsity) / before

    if subject.ranked:
        raise UsageError(
            "--params-removed needs scope=block: with scope=model the ratio depends on the scores; use --sparsity"
        )
    sizes = {size for dims in subject.dense for size in (dims.ffn, dims.groups)}
    steps = [0.0, *(step + _EDGE for step in sorted({k / n for n in sizes for k in range(1, n)}))]
    start = max(0, bisect_left(steps, wanted, key=ratio) - 1)  # the ratio rises with every step
    return nearest(steps[start:], ratio, wanted, at_least=at_least, what=f"pattern {subject.pattern}")


def _units_left(subject: Subject, sparsity: float | None) -> Sequence[BlockDims]:
    """The sizes of the blocks if each loses its own share; ranking all units together removes as many."""
    return [units_left(dims, rate) for dims, rate in zip(subject.dense, subject.rates(sparsity), strict=True)]


def _parameters_of_units(subject: Subject, sparsity: float | None) -> int:
    return count_parameters(subject.view, _units_left(subject, sparsity))


def _sparsity_of_width(subject: Subject, wanted: float, at_least: bool) -> float:
    if subject.sizes_left(0.0) is None:
        raise UsageError(
            f"--params-removed {wanted:g} does not go with these options of {subject.method} "
            f"({subject.options}): the text decides the widths; leave out one of the two"
        )
    if wanted == 0:
        return 0.0
    hidden, before = int(subject.view.config.hidden_size), subject.view.parameters()

    def widths() -> Iterator[float]:
        yield 0.0
        narrowest = hidden
        for width in range(hidden - 1, 0, -1):
            with suppress(UsageError):  # nothing left after rounding
                if (rounded := _method_sizes(subject, 1 - width / hidden)[0].enters) < narrowest:
                    narrowest = rounded
                    yield 1 - rounded / hidden

    def ratio(step: float) -> float:
        return 1 - count_parameters(subject.canonical, _method_sizes(subject, step)) / before if step else 0.0

    return nearest(widths(), ratio, wanted, at_least=at_least, what="narrowing the residual stream")


def _method_sizes(subject: Subject, sparsity: float) -> Sequence[BlockDims]:
    """The sizes that the method gives for a sparsity. For heads they are those of the first heads gone; every choice of
    heads removes the same number of parameters.
    """
    sizes = subject.sizes_left(sparsity)
    assert sizes is not None, "the sizes follow from shapes"
    return sizes


def _parameters_of_width(subject: Subject, sparsity: float | None) -> int | None:
    if sparsity == 0:
        return subject.view.parameters()
    sizes = None if sparsity is None else subject.sizes_left(sparsity)
    return None if sizes is None else count_parameters(subject.canonical, sizes)


def _sparsity_of_heads(subject: Subject, wanted: float, at_least: bool) -> float:
    before, heads = subject.view.parameters(), sum(dims.heads for dims in subject.dense)

    def ratio(step: float) -> float:
        return 1 - _parameters_of_heads(subject, step) / before

    steps = (gone / heads for gone in range(heads))
    return nearest(steps, ratio, wanted, at_least=at_least, what="removing heads")


def _parameters_of_heads(subject: Subject, sparsity: float | None) -> int:
    if not sparsity:
        return subject.view.parameters()
    return count_parameters(subject.view, _method_sizes(subject, sparsity))


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


def _sparsity_of_time(subject: Subject, wanted: float, at_least: bool) -> float:
    raise UsageError(
        f"--params-removed {wanted:g} does not go with these options of {subject.method} ({subject.options}): the"
        " sparsity is then a fraction of the time; use --sparsity, in prune or sweep"
    )


def _of_time(counts: BeforeAndAfter) -> float:
    return 0.0 if counts.seconds is None else _gone(counts.seconds)


def _of_targeted(counts: BeforeAndAfter) -> float:
    return counts.removed / counts.targeted if counts.targeted else 0.0


def _gone(before_and_after: tuple[float, float]) -> float:
    before, after = before_and_after
    return 1 - after / before


WEIGHTS = Quantity(
    "weights",
    "the weights of the targeted matrices",
    sparsity_for=_zeroes_only,
    parameters=lambda subject, _: subject.view.parameters(),
    sizes=lambda subject, _: subject.dense,
    share_gone=_of_targeted,
    zeroes=True,
)
UNITS = Quantity(
    "units",
    "the weights of the targeted matrices, in whole units",
    sparsity_for=_sparsity_of_units,
    parameters=_parameters_of_units,
    sizes=lambda subject, sparsity: None if subject.ranked else _units_left(subject, sparsity),
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
    shared="it chooses among all parameters of the model",
    required="the fraction of the parameters of the whole model to remove",
)
HEADS = Quantity(
    "heads",
    "the attention heads",
    sparsity_for=_sparsity_of_heads,
    parameters=_parameters_of_heads,
    sizes=lambda *_: None,
    share_gone=lambda counts: _gone(counts.heads),
    shared="it chooses among all attention heads of the model",
    required="the fraction of the attention heads to remove, or --params-removed R",
    needs_sizes=True,
)
BLOCKS = Quantity(
    "blocks",
    "the blocks",
    sparsity_for=_sparsity_of_blocks,
    parameters=_parameters_of_blocks,
    sizes=_sizes_of_blocks,
    share_gone=lambda counts: _gone(counts.blocks),
    shared="it chooses among all blocks of the model",
    required="the fraction of the blocks to remove, or --params-removed R",
)


def _measured_time(name: str, words: str) -> Quantity:
    return Quantity(
        name,
        words,
        sparsity_for=_sparsity_of_time,
        parameters=lambda *_: None,
        sizes=lambda *_: None,
        share_gone=_of_time,
        shared="it is about the time of the whole model",
        required=f"the fraction of {words} to remove",
    )


PREFILL_TOKENS = 128
PREFILL = _measured_time("prefill", f"the time of a prefill of {PREFILL_TOKENS} tokens")
DECODE = _measured_time("decode", "the time of one decoded token")
QUANTITIES = {
    quantity.name: quantity for quantity in (WEIGHTS, UNITS, WIDTH, PARAMETERS, HEADS, BLOCKS, PREFILL, DECODE)
}


def check_droppable(view: ModelView) -> None:
    """Refuse a model of which no block can be left out.

    Raises:
        SecateurError: its residual stream is rotated, so that a block fits only its neighbours.
    """
    if (residual := view.dims(0).residual) is not None and not residual.selected:
        raise SecateurError(
            f"{view.name}: its residual stream is rotated, and each block reads one basis and writes the next, so"
            " no block can be left out; drop blocks of the original model"
        )


def check_removable(method: str, sparsity: float, most: float, left: str, what: str = "the parameters") -> None:
    """Refuse a share of all parameters, or of something else, that would empty a block.

    Args:
        method: its name.
        sparsity: the share that is to go.
        most: the largest share that can go.
        left: what stays, for the message: `with one unit left of each kind,`.
        what: what the share is of.

    Raises:
        UsageError: the share is too large.
    """
    if not sparsity <= most:
        advice = (
            f"use --sparsity {int(most * 100) / 100:g} or less" if most >= _LEAST_ADVICE else "prune something else"
        )
        raise UsageError(
            f"{method}: --sparsity {sparsity:g} would empty a block: {left} at most {most:.4f} of {what} can "
            f"be removed; {advice}"
        )


def sparsity_of_part(quantity: Quantity, whole: ModelView, part: ModelView, sparsity: float) -> float:
    """Return the sparsity of a model with some of the blocks of another one that takes as much from each block.

    Args:
        quantity: what the sparsity is a fraction of.
        whole, part: the model, and the same with fewer blocks.
        sparsity: the sparsity of the whole model.
    """
    if quantity is BLOCKS:
        return min(part.blocks - 1, max(1, round(sparsity * part.blocks))) / part.blocks
    if quantity is PARAMETERS:
        share = part.matrix_parameters() / whole.matrix_parameters()
        gone = min(sparsity * whole.parameters() * share, _MOST_OF_PART * part.matrix_parameters())
        return gone / part.parameters()
    return sparsity


def words_of(name: str | None) -> str:
    """The words for a `sparsity_of` of a record; records of older versions have none."""
    return QUANTITIES[name].words if name in QUANTITIES else "what the method removes from"
