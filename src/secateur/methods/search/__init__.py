"""Search: give every block the widths that cost the model least, for exactly the parameters or the time that should go.

One pass of gradients makes a library: for each block the order in which its feed-forward units and its key-value heads
would go, and what the removal of each number of them costs (`removal.py`: optimal brain surgery with a
Kronecker-factored Fisher information, on the columns that read the units). A search over the library finds the cheapest
mix for a budget (`budget.py`), and a forward pass then sets the columns that stay to the least-squares best for
what the pruned blocks before give. The library serves any number of budgets: `sweep` and `compare` make it once.

No paper describes this method; these have its parts: a library of blocks at several widths and a search over their mix
(Tyr-the-Pruner, arXiv:2503.09657; EvoPress, arXiv:2410.14649), the removal of columns with an update of the rest
(OSSCAR, arXiv:2403.12983), the factors (LLM Surgeon, arXiv:2312.17244). The first two score a mix by running it; here
costs add up, so the best mix follows at once. Evolution by measured divergence from there, 120 steps, found nothing
that held on other text, and neither did more than one pass of gradients (docs/lab-log.md).

The sparsity is the fraction of the parameters of the whole model to remove; with `budget=prefill` or `budget=decode`,
of the time that the model takes on this machine (`latency.py`). Every block keeps at least one unit of each kind. The
loss is that of the text's own next tokens (the empirical Fisher), or of the answers with the text of a task.

Shape letters: S windows, T tokens, O outputs, I inputs of a matrix, U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from secateur.calibrate.backward import Backward, check_reacts
from secateur.calibrate.statistics import SecondMoment, check_damping, damped
from secateur.calibrate.stream import Stream
from secateur.core.errors import HopelessError, UsageError
from secateur.core.memory import give_back
from secateur.core.progress import say
from secateur.cut.block import cut_block
from secateur.methods.search.budget import curve, spend, spend_alike
from secateur.methods.search.latency import measure_times
from secateur.methods.search.removal import Removal, removal, without
from secateur.models.family import HEADS, check_can
from secateur.models.parameters import unit_parameters
from secateur.models.spaces import MEMBERS
from secateur.models.view import BlockView, ModelView
from secateur.plan.plan import BlockPlan, LaterPlans
from secateur.plan.quantity import DECODE, PARAMETERS, PREFILL, PREFILL_TOKENS, Quantity, check_removable
from secateur.plan.run import Run

_ROUNDING = 1e-12  # a share of the model that is a whole number of parameters stays that number
CALIBRATION = "wikitext2"
REMOVES = PARAMETERS
GRADIENTS = True
DEMO = [{"sparsities": [0.2]}]

_BUDGETS: Mapping[str, Quantity] = {quantity.name: quantity for quantity in (PARAMETERS, PREFILL, DECODE)}

Lost = Mapping[str, int]
"""The units that a block loses, by space."""

Gone = Sequence[Mapping[str, Tensor]]
"""What the removal of 0, 1, ... U - 1 units takes off the budget, float64 [U], for each block by space."""


@dataclass(frozen=True)
class Search:
    """Options.

    Attributes:
        update: set the columns that stay to make up for those that go.
        uniform: give all blocks the same widths; the result is then a stock model.
        budget: what the sparsity is a fraction of: `parameters`, or the time of a `prefill` of 128 tokens or of the
            `decode` of one token, which is measured on this machine first. `multiple=32` goes well with a time.
        multiple: keep a multiple of so many feed-forward units in each block that loses any, as fast kernels and
            quantised files want (32 or 256).
        damping: added to the diagonals of both moments, in units of their mean.
        rounds: in how many rounds all units of a block would go; after each, costs are those of what is left.
    """

    update: bool = True
    uniform: bool = False
    budget: str = "parameters"
    multiple: int = 1
    damping: float = 0.01
    rounds: int = 64

    def __post_init__(self) -> None:
        if self.budget not in _BUDGETS:
            raise UsageError(f"search: unknown budget '{self.budget}' (allowed: {', '.join(_BUDGETS)})")
        for name in ("multiple", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"search: {name} is {getattr(self, name)}; it is a count of at least 1")
        check_damping("search", self.damping, "moments may be singular")


def check(view: ModelView, sparsity: float, options: Search) -> None:
    """Refuse impossible requests before the work begins.

    Raises:
        UsageError: the sparsity would empty a block; or `uniform` is asked of blocks that differ.
        SecateurError: heads of this family cannot be removed.
    """
    check_can(view.family, HEADS, view.name)
    if options.uniform and any(view.dims(index) != view.dims(0) for index in range(view.blocks)):
        raise UsageError(f"search: uniform: the blocks of {view.name} have different widths already; leave out uniform")
    if quantity_of(options) is PARAMETERS:
        _check_reachable(view, sparsity, _parameters_gone(view), view.parameters(), options)
    positions = getattr(view.config, "max_position_embeddings", None)
    if quantity_of(options) is PREFILL and positions is not None and positions < PREFILL_TOKENS:
        raise UsageError(
            f"search: budget=prefill times {PREFILL_TOKENS} tokens, and {view.name} knows {positions} positions; use"
            " budget=decode or parameters"
        )


def quantity_of(options: Search) -> Quantity:
    """Return what the sparsity is a fraction of."""
    return _BUDGETS[options.budget]


def _check_reachable(view: ModelView, sparsity: float, gone: Gone, whole: float, options: Search) -> None:
    """Refuse a sparsity that would empty a block; `whole` is what the budget counts of the whole model."""
    most = sum(_most(of, options, _spaces(view, options)) for of in gone) / whole
    heads = "a key-value head" if "groups" in _spaces(view, options) else "its heads"
    units = "a feed-forward unit" if options.multiple == 1 else f"{options.multiple} feed-forward units"
    what = quantity_of(options).words
    check_removable("search", sparsity, most, f"each keeps {heads} and {units}, so", what=what)


def rehearsal(view: ModelView, options: Search, sparsity: float) -> tuple[Search, dict[str, int]]:
    """The same work for parameters: two blocks may have less to lose of a time that the head shares."""
    return replace(options, budget="parameters"), {}


def never_stock(options: Search) -> str | None:
    """Say why the result is not a stock model; None with `uniform`."""
    return None if options.uniform else "it gives every block its own widths (--set uniform=true does not)"


def gradual(options: Search) -> bool:
    """Return True: the library of one run serves the next."""
    return True


def plan_model(view: ModelView, data: Tensor, options: Search, run: Run) -> Sequence[BlockPlan]:
    """Make the library on windows `data` [S, T], search it for the budget, and fit what stays.

    Raises:
        HopelessError: all gradients are zero; or so much of the time cannot go.
        NotFiniteError: a loss or a gradient is NaN or infinite.
    """
    measured = run.once(lambda: {**_times(view, options, run), **_library(view, data, options, run)})
    library = [
        {space: Removal(measured[f"{index}.{space}.order"], measured[f"{index}.{space}.cost"]) for space in MEMBERS}
        for index in range(view.blocks)
    ]
    if quantity_of(options) is not PARAMETERS:
        _check_time(view, measured, options, run)
    gone, whole = _budget(view, measured, options)
    lost = search(view, library, gone, run.sparsity * whole * (1 - _ROUNDING), options)
    _note_time(lost, gone, whole, options, run)
    expected = sum(
        float(library[index][space].cost_U[count]) for index, of in enumerate(lost) for space, count in of.items()
    )
    run.notes["expected_loss"] = round(expected, 4)
    say(f"search: to second order, the loss of a token rises by {expected:.4f} nats")
    keep = [_kept(library[index], of) for index, of in enumerate(lost)]
    outlines = [
        BlockPlan(index, keep=of, of={space: view.dims(index).units()[space] for space in of})
        for index, of in enumerate(keep)
    ]
    return LaterPlans(outlines, _Fit(view, data, outlines, options, run)) if options.update else outlines


def _library(view: ModelView, windows: Tensor, options: Search, run: Run) -> dict[str, Tensor]:
    """Return the removals of all blocks, as `INDEX.SPACE.order` and `INDEX.SPACE.cost`."""
    backward = Backward(view, windows, device=run.device, dtype=run.dtype, labels=run.labels, spill=run.spill)
    found: dict[str, Tensor] = {}
    felt: list[Tensor] = []
    for block in backward.blocks():
        for space, (a, g) in _moments(block, backward).items():
            felt.append(g.sum_II.diagonal().clone())  # where it is zero, nothing that the matrix gives is felt
            one = removal(
                block.matrix(MEMBERS[space].reader),
                damped(a.sum_II / a.tokens, options.damping),
                damped(g.sum_II / backward.targets, options.damping),
                block.dims.units()[space],
                options.rounds,
            )
            found |= {f"{block.index}.{space}.order": one.order_U, f"{block.index}.{space}.cost": one.cost_U}
        give_back()
    check_reacts("search", felt)
    return found


def _moments(block: BlockView, backward: Backward) -> dict[str, tuple[SecondMoment, SecondMoment]]:
    """Run a backward pass through its current block, `block`.

    Returns:
        Space -> the second moments of the inputs of the matrix that reads it, and of the gradients of its outputs.
    """

    def listen(space: str, x_BTI: Tensor, g_BTO: Tensor) -> None:
        for moment, values in zip(moments[space], (x_BTI, g_BTO), strict=True):
            moment.update(values.flatten(0, 1))

    moments, device = {}, backward.gradient_STD.device
    for space, members in MEMBERS.items():
        outputs, inputs = block.matrix(members.reader).shape
        moments[space] = SecondMoment(inputs, device), SecondMoment(outputs, device)
    backward.retreat(block, {MEMBERS[space].reader: partial(listen, space) for space in moments})
    return moments


def _times(view: ModelView, options: Search, run: Run) -> dict[str, Tensor]:
    """Return what `measure_times` gives, where the budget is a time."""
    tokens = {PREFILL: PREFILL_TOKENS, DECODE: 1}.get(quantity_of(options))
    if tokens is None:
        return {}
    times = measure_times(view, tokens, run.device, run.dtype)
    _check_time(view, times, options, run)  # before the pass of gradients
    return times


def _check_time(view: ModelView, times: Mapping[str, Tensor], options: Search, run: Run) -> None:
    """Refuse a share of the time that would empty a block: what the blocks save is known only now."""
    try:
        _check_reachable(view, run.sparsity, *_budget(view, times, options), options)
    except UsageError as error:
        raise HopelessError(str(error)) from None


def _budget(view: ModelView, measured: Mapping[str, Tensor], options: Search) -> tuple[Gone, float]:
    """Return what the removal of units takes off the budget, and what the budget counts of the whole model."""
    if quantity_of(options) is PARAMETERS:
        return _parameters_gone(view), view.parameters()
    gone = [{space: measured[f"{index}.{space}.saved"] for space in MEMBERS} for index in range(view.blocks)]
    return gone, float(measured["whole"])


def _note_time(lost: Sequence[Lost], gone: Gone, whole: float, options: Search, run: Run) -> None:
    """Note the time before and after, in seconds, where the budget is a time."""
    if quantity_of(options) is PARAMETERS:
        return
    saved = sum(float(gone[index][space][count]) for index, of in enumerate(lost) for space, count in of.items())
    run.notes["seconds_expected"] = [whole, whole - saved]
    say(f"search: {quantity_of(options).words} should fall from {1e3 * whole:.3g} to {1e3 * (whole - saved):.3g} ms")


def _parameters_gone(view: ModelView) -> Gone:
    return [
        {space: torch.arange(units[space]).double() * unit_parameters(view, index, space) for space in MEMBERS}
        for index, units in ((index, view.dims(index).units()) for index in range(view.blocks))
    ]


def search(
    view: ModelView, library: list[dict[str, Removal]], gone: Gone, budget: float, options: Search
) -> Sequence[Lost]:
    """Return the units that each block loses, for the least cost at which `budget` goes."""
    spaces = _spaces(view, options)
    if options.uniform:
        alike = []
        for space in MEMBERS:
            cost_U = torch.stack([of[space].cost_U for of in library]).sum(0)
            gone_U = torch.stack([of[space] for of in gone]).sum(0)
            units = len(cost_U) if space in spaces else 1
            alike.append(curve(cost_U[:units], gone_U[:units], _multiple(space, options)))
        counts = dict(zip(MEMBERS, spend_alike(alike, budget), strict=True))
        return [counts] * view.blocks
    places = [(index, space) for index in range(view.blocks) for space in MEMBERS]
    curves = [
        curve(library[index][space].cost_U, gone[index][space], _multiple(space, options)) for index, space in places
    ]
    lost: list[dict[str, int]] = [{} for _ in library]
    for (index, space), count in zip(places, spend(curves, budget), strict=True):
        lost[index][space] = count
    return lost


def _multiple(space: str, options: Search) -> int:
    return options.multiple if space == "ffn" else 1


def _kept(removals: Mapping[str, Removal], lost: Lost) -> dict[str, Tensor]:
    """Return the units that stay, by space, int32 ascending; spaces that lose nothing are left out."""
    return {
        space: removals[space].order_U[count:].sort().values.to(torch.int32) for space, count in lost.items() if count
    }


class _Fit:
    """The fit of the columns that stay, on the stream of the pruned model.

    The blocks before one are fitted and run first; asked for in order, each is fitted once.
    """

    def __init__(self, view: ModelView, windows: Tensor, outlines: Sequence[BlockPlan], options: Search, run: Run):
        self._view, self._windows, self._outlines, self._options, self._run = view, windows, outlines, options, run
        self._stream: Stream | None = None
        self._next = 0

    def __call__(self, index: int) -> BlockPlan:
        """Return the plan of a block with its new weights."""
        if self._stream is None or index < self._next:
            self._stream, self._next = None, 0  # before a new one is made
            run = self._run
            self._stream = Stream(self._view, self._windows, device=run.device, dtype=run.dtype, spill=run.spill)
        while True:
            block, plan = self._view.block(self._next), self._outlines[self._next]
            if plan.keep:
                plan = replace(plan, updates=_updates(block, self._stream, plan.keep, self._options))
            if self._next < self._view.blocks - 1:
                self._stream.advance(cut_block(block, plan))
            self._next += 1
            del block
            give_back()
            if self._next > index:
                return plan
            del plan


def _updates(block: BlockView, stream: Stream, keep: Mapping[str, Tensor], options: Search) -> dict[str, Tensor]:
    """Return the matrices that read units which go, with new weights in the columns that stay."""
    moments = {}
    for space in keep:
        name = MEMBERS[space].reader
        moments[name] = SecondMoment(block.matrix(name).shape[1], stream.device)
    stream.observe(block, {block.family.matrices[name]: moment.update for name, moment in moments.items()})
    made = {}
    for space, keep_K in keep.items():
        name = MEMBERS[space].reader
        weight_OI, units = block.matrix(name), block.dims.units()[space]
        stays_U = torch.zeros(units, dtype=torch.bool).index_fill_(0, keep_K.long(), True)
        stays_I = stays_U.repeat_interleave(weight_OI.shape[1] // units)
        a_II = damped(moments[name].sum_II / moments[name].tokens, options.damping)
        made[name] = without(weight_OI, a_II, stays_I).to(block.dtype or weight_OI.dtype)
    return made


def _most(gone: Mapping[str, Tensor], options: Search, spaces: Sequence[str]) -> float:
    """Return the most that a block can take off the budget."""
    left = {space: min(len(gone[space]), _multiple(space, options)) for space in spaces}
    return sum(float(gone[space][-count]) for space, count in left.items())


def _spaces(view: ModelView, options: Search) -> tuple[str, ...]:
    """Return the spaces that may lose units: not the heads where the stock model could not have fewer of them."""
    return tuple(space for space in MEMBERS if space == "ffn" or not options.uniform or view.family.stock_heads)
