"""The contract between a method and the rest of secateur: what the module of a method defines.

A method is one file, `methods/NAME.py`, or one folder, `methods/NAME/`, whose `__init__.py` defines the same names:

1. its options: one frozen dataclass with flat fields and defaults, which refuses wrong values with UsageError;
2. its plan: one of `plan_block`, `plan_place` and `plan_model` (or the first and the last, see `Says.plan_model`);
3. what it needs and what it can do: the constants and functions of `Says`. CALIBRATION is required; the rest has
   defaults.

No method changes the model. It returns plans (`plan/plan.py`), which may hold new weights; `cut/` applies them.
"""
# ruff: noqa: D102 (the docstring of a protocol's class describes its function)

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from types import ModuleType, UnionType
from typing import Any, Protocol, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from secateur.calibrate.statistics import NewStatistic
from secateur.core.errors import UsageError
from secateur.models.view import BlockDims, BlockView, ModelView
from secateur.plan.plan import BlockPlan, Place
from secateur.plan.quantity import UNITS, WEIGHTS, Quantity
from secateur.plan.run import Run

_SPELLING = 0.85  # a name at least this similar to a name of the contract is taken for a misspelling


class PlanBlock(Protocol):
    """Plan one block. The blocks before it are cut already, and `statistics` come from their outputs.

    `block.matrix("q")` is a weight [O, I], also where q, k and v are fused. `block.rates` holds the sparsity of each
    matrix. `statistics["k"]` is the statistic of the input of k; `statistics` is None for a method without STATISTICS.
    """

    def __call__(self, block: BlockView, statistics: Any, options: Any, /) -> BlockPlan: ...


class PlanPlace(Protocol):
    """Choose the directions of one place of the residual stream, from `moment` in the already sliced network.

    `before` is the place that the residual connection comes from; None at the first place. `moment` comes from
    `new_moment`.
    """

    def __call__(self, moment: Any, before: Place | None, sparsity: float, options: Any, seed: int, /) -> Place: ...


class PlanModel(Protocol):
    """Plan all blocks at once. `data` are token ids [S, T], or None; `run` is `plan.run.Run`.

    The driver asks for the plans in order, and keeps none: `plan.LaterPlans` makes each when it is asked for.
    """

    def __call__(self, view: ModelView, data: Tensor | None, options: Any, run: Run, /) -> Sequence[BlockPlan]: ...


class NewMoment(Protocol):
    """Make the statistic that `plan_place` reads, for a residual stream of width `hidden`."""

    def __call__(self, hidden: int, device: torch.device, options: Any, /) -> Any: ...


class LastPlace(Protocol):
    """Return the place after the last block, from the place before it; None where it is chosen like the others."""

    def __call__(self, before: Place, options: Any, /) -> Place | None: ...


class JoinEnds(Protocol):
    """Join to the second moment of the embeddings that of what a tied head reads, so that one basis serves both.

    `leaving` is a second moment of the normed residual after the last block, times the gain of the last norm.
    """

    def __call__(self, entering: Any, leaving: Any, options: Any, /) -> None: ...


class KeepsTied(Protocol):
    """Return whether the head of a model is the embedding, and stays it when the residual stream is rotated."""

    def __call__(self, view: ModelView, options: Any, /) -> bool: ...


class Check(Protocol):
    """Refuse impossible requests before the work begins, with UsageError or SecateurError.

    The driver calls it where a sparsity counts the model as a whole, not the weights of each matrix. `sparsity` is
    above 0. Only where an option may stand in for it (`Quantity.required` is None) is it also called with 0 or None.
    """

    def __call__(self, view: ModelView, sparsity: float | None, options: Any, /) -> None: ...


class SizesLeft(Protocol):
    """Return the sizes of all blocks at a sparsity; None where they depend on the calibration text."""

    def __call__(self, view: ModelView, options: Any, sparsity: float, /) -> Sequence[BlockDims] | None: ...


class Notice(Protocol):
    """Return a line that is printed before the work begins, or None."""

    def __call__(self, view: ModelView, sparsity: float, options: Any, /) -> str | None: ...


class FewTokens(Protocol):
    """Say why so few calibration tokens make a poor result, and what to give instead; None where they are enough."""

    def __call__(self, view: ModelView, tokens: int, options: Any, /) -> str | None: ...


class NeverStock(Protocol):
    """Say why no result with these options is a stock model; None where a result can be one."""

    def __call__(self, options: Any, /) -> str | None: ...


class ByRows(Protocol):
    """Return True if pattern `unstructured` removes the same number of weights from each row, not from each matrix."""

    def __call__(self, options: Any, /) -> bool: ...


class Gradual(Protocol):
    """Return True if a run may go on from the `run.state_file` of a run at a lower sparsity.

    Either it passes through the lower sparsity, or what was measured (`run.once`) serves both.
    """

    def __call__(self, options: Any, /) -> bool: ...


class Streams(Protocol):
    """Return how many residual streams of the text the method has at a time with these options."""

    def __call__(self, options: Any, /) -> int: ...


class QuantityOf(Protocol):
    """Return the quantity that a sparsity is a fraction of with these options."""

    def __call__(self, options: Any, /) -> Quantity: ...


class Rehearsal(Protocol):
    """Return options of a short run that fits a model of two blocks, and how often the whole run does what repeats.

    `view` is the model of the whole run. The counts are by the description of a `progress.track`: {"NAME: steps": 1000}
    says that the whole run has 1000 items there, where the short one has fewer. A dry run times the short run, and
    multiplies. What is not counted grows with the blocks where the description of its track says "blocks", and else
    only with the tokens. It raises SecateurError with the reason where nothing short tells how long the whole takes;
    the dry run then has no time.
    """

    def __call__(self, view: ModelView, options: Any, sparsity: float, /) -> tuple[Any, Mapping[str, int]]: ...


@dataclass(frozen=True)
class Says:
    """The definitions of a method. Each field is an attribute of its module, with the same name.

    Attributes:
        CALIBRATION: the text that its paper calibrates with, a SPEC; None if it needs no tokens.
        SAMPLES, SEQLEN: the number of windows, and the number of tokens of each.
        STATISTICS: the statistic to collect for each distinct input of a block, for `plan_block`.
        REMOVES: the quantity that a sparsity is a fraction of, from `plan/quantity.py`. The default is the weights of
            each matrix, or the units where the option `pattern` is rows or columns. A pattern that zeroes weights
            always counts weights. A method with only `plan_model` or `plan_place` must define it.
        quantity_of: see `QuantityOf`; for a method whose options choose between quantities. REMOVES is that of the
            defaults.
        GRADIENTS: whether it takes gradients of the loss (`calibrate/backward.py`): a dry run counts their memory.
        TRAINS: whether it trains on the text, as many passes as its options say; it then needs `rehearsal`, and a dry
            run measures its memory, which no shapes tell.
        SHARDS: whether the processes of torchrun share its work. Otherwise a run under torchrun is refused.
        STREAMS: how many residual streams of the text it has at a time, or a function of the options that returns it
            (`Streams`), for a dry run; with `--spill` all but one are on disk.
        ADVICE: a setting that is better than the default of the paper, with its numbers; `methods NAME` prints it.
        DEMO: the runs of `secateur demo`: a list of {"sparsities": [...], "options": {...}, "heal": True}.
        QUICK: options that make a run short, without regard to its quality.
        WITHOUT_PARTS: whether it takes a model with blocks that have no attention or no MLP (a result of `depth`).
            Methods that prune matrix by matrix take it: the matrices of such a part are empty and have no rate.
        MAY_CHANGE: the options that may have another value when an interrupted run is resumed.
        plan_block: see `PlanBlock`.
        plan_place: see `PlanPlace`; it also needs `new_moment`, `last_place` and `sizes_left`.
        plan_model: see `PlanModel`. If `plan_block` is defined too, the property `whole_model` of the options chooses
            between them.
        new_moment, last_place: see `NewMoment`, `LastPlace`.
        keeps_tied, join_ends: see `KeepsTied`, `JoinEnds`; the second is needed beside the first.
        check: see `Check`.
        sizes_left: see `SizesLeft`. Needed where REMOVES is WIDTH or HEADS.
        notice: see `Notice`.
        few_tokens: see `FewTokens`. It warns before the work begins, also in a dry run.
        never_stock: see `NeverStock`.
        by_rows: see `ByRows`; without it weights are counted in each matrix.
        gradual: see `Gradual`.
        rehearsal: see `Rehearsal`. Needed where TRAINS, and where options name blocks by their number.
    """

    CALIBRATION: str | None
    SAMPLES: int = 128
    SEQLEN: int = 2048
    STATISTICS: NewStatistic | None = None
    REMOVES: Quantity | None = None
    quantity_of: QuantityOf | None = None
    GRADIENTS: bool = False
    TRAINS: bool = False
    SHARDS: bool = False
    STREAMS: int | Streams = 1
    ADVICE: str | None = None
    DEMO: Sequence[Mapping[str, Any]] = ()
    QUICK: Mapping[str, Any] = field(default_factory=dict)
    WITHOUT_PARTS: bool = False
    MAY_CHANGE: tuple[str, ...] = ()
    plan_block: PlanBlock | None = None
    plan_place: PlanPlace | None = None
    plan_model: PlanModel | None = None
    new_moment: NewMoment | None = None
    last_place: LastPlace | None = None
    keeps_tied: KeepsTied | None = None
    join_ends: JoinEnds | None = None
    check: Check | None = None
    sizes_left: SizesLeft | None = None
    notice: Notice | None = None
    few_tokens: FewTokens | None = None
    never_stock: NeverStock | None = None
    by_rows: ByRows | None = None
    gradual: Gradual | None = None
    rehearsal: Rehearsal | None = None


def read_contract(name: str, module: ModuleType, options: type[Any]) -> Says:
    """Read the definitions of a method from its module, and check them.

    Args:
        name: the name of the method.
        module: its module.
        options: the dataclass of its options.

    Raises:
        UsageError: a required name is missing, has the wrong type or arguments, or is misspelled. The message names the
            file and the attribute.
    """
    where = f"method '{name}' ({module.__file__})"
    known = {f.name: f for f in fields(Says)}
    _check_spelling(where, module, known)
    hints, values = get_type_hints(Says), {}
    for attribute, declared in known.items():
        if hasattr(module, attribute):
            values[attribute] = getattr(module, attribute)
            _check_form(f"{where}: {attribute}", values[attribute], hints[attribute])
        elif declared.default is MISSING and declared.default_factory is MISSING:
            raise UsageError(
                f"{where} lacks {attribute}: the text that it calibrates with, or None (docs/add-a-method.md)"
            )
    says = Says(**values)
    _check_whole(where, says)
    _check_options(where, says, options)
    return says


def _check_spelling(where: str, module: ModuleType, known: Mapping[str, Any]) -> None:
    """Refuse a constant or a public function whose name is almost a name of the contract."""
    for own, value in vars(module).items():
        public = own.isupper() or (inspect.isfunction(value) and value.__module__ == module.__name__ and own[0] != "_")
        if public and own not in known and (meant := get_close_matches(own, known, 1, _SPELLING)):
            raise UsageError(f"{where}: {own} is no name of the contract; did you mean {meant[0]}?")


def _check_form(where: str, value: Any, hint: Any) -> None:
    """Refuse a value whose type, or whose arguments, are not those of the contract."""
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in allowed:
        if getattr(kind, "_is_protocol", False) or get_origin(kind) is Callable:
            if callable(value):
                _check_arguments(where, value, kind)
                return
        elif isinstance(value, get_origin(kind) or kind) and (kind is bool or not isinstance(value, bool)):
            return
    words = ", ".join("None" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in allowed)
    raise UsageError(f"{where} is {value!r}; it must be: {words} (methods/contract.py)")


def _check_arguments(where: str, function: Callable[..., Any], protocol: Any) -> None:
    """Check that a function takes the arguments of its protocol. A class (STATISTICS) is not checked here."""
    if isinstance(function, type) or not getattr(protocol, "_is_protocol", False):
        return
    expected = list(inspect.signature(protocol.__call__).parameters)[1:]
    try:
        inspect.signature(function).bind(*expected)
    except TypeError:
        raise UsageError(
            f"{where} takes {inspect.signature(function)}; it is called with ({', '.join(expected)})"
        ) from None


def _check_whole(where: str, says: Says) -> None:
    """Check that the definitions are complete: some need others."""
    if says.plan_block is None and says.plan_place is None and says.plan_model is None:
        raise UsageError(f"{where} lacks a plan: define plan_block, plan_place or plan_model (methods/contract.py)")
    if says.plan_block is None and says.REMOVES is None:
        raise UsageError(
            f"{where} lacks REMOVES: what a sparsity is a fraction of, such as PARAMETERS of plan/quantity.py"
        )
    if says.plan_model is None and says.plan_place is None and says.REMOVES not in (None, WEIGHTS, UNITS):
        raise UsageError(
            f"{where}: a sparsity of {says.REMOVES.name} is for the model as a whole, which plan_block does not plan: "
            "define plan_model"
        )
    if says.TRAINS and says.rehearsal is None:
        raise UsageError(
            f"{where} lacks rehearsal: how a short run relates to the whole one, since it TRAINS (methods/contract.py)"
        )
    if says.SHARDS and says.plan_model is None:
        raise UsageError(f"{where}: SHARDS is for the work of plan_model, which is missing")
    for name in ("new_moment", "last_place", "sizes_left"):
        if says.plan_place is not None and getattr(says, name) is None:
            raise UsageError(f"{where} lacks {name}, which plan_place needs beside it (methods/contract.py)")
    if says.keeps_tied is not None and says.join_ends is None:
        raise UsageError(f"{where} lacks join_ends, which keeps_tied needs beside it (methods/contract.py)")
    if says.REMOVES is not None and says.REMOVES.needs_sizes and says.sizes_left is None:
        raise UsageError(
            f"{where} lacks sizes_left, which a sparsity of {says.REMOVES.name} needs (methods/contract.py)"
        )


def _check_options(where: str, says: Says, options: type[Any]) -> None:
    """Check that the options have what the definitions speak of."""
    names = [option.name for option in fields(options)]
    for option in fields(options):
        if option.default is MISSING and option.default_factory is MISSING:
            raise UsageError(f"{where}: its option {option.name} has no default; write {option.name}: TYPE = VALUE")
    if unknown := [name for name in says.MAY_CHANGE if name not in names]:
        raise UsageError(f"{where}: MAY_CHANGE names {', '.join(unknown)}, but the options are {', '.join(names)}")
    if says.plan_block is not None and says.plan_model is not None and not hasattr(options, "whole_model"):
        raise UsageError(
            f"{where} has plan_block and plan_model: its options need a property whole_model, which chooses"
        )
