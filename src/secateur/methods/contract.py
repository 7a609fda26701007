"""What the module of a method says: the whole contract between a method and the rest of secateur.

A method is one file, `methods/NAME.py`, or one folder, `methods/NAME/`, whose `__init__.py` says the same. It defines

1. its options: one frozen dataclass with flat fields and defaults, which refuses wrong values with UsageError;
2. how it plans: one of `plan_block`, `plan_place` and `plan_model` (or the first and the last, see `Says.plan_model`);
3. what it needs and what it can do: the constants and functions of `Says`. CALIBRATION must be there; the rest has
   defaults.

No method changes weights. It returns plans (`plan/plan.py`), and `cut/` alone cuts.
"""
# ruff: noqa: D102 (of a protocol the class says what its function does)

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
from secateur.plan.quantity import Quantity
from secateur.plan.run import Run

_SPELLING = 0.9  # how alike a name must be to one of the contract to be taken for a slip


class PlanBlock(Protocol):
    """Plan one block. The blocks before it are cut already, and `statistics` are of what they give.

    `block.matrix("q")` is a weight [O, I], also where q, k and v are fused. `block.rates` holds the sparsity of each
    matrix. `statistics["k"]` is the statistic of the input of k; None for a method without STATISTICS.
    """

    def __call__(self, block: BlockView, statistics: Any, options: Any, /) -> BlockPlan: ...


class PlanPlace(Protocol):
    """Choose the directions of one place of the residual stream, from its second moment in the network sliced so far.

    `before` is the place that the residual connection comes from, None at the first one.
    """

    def __call__(self, moment: Any, before: Place | None, sparsity: float, options: Any, seed: int, /) -> Place: ...


class PlanModel(Protocol):
    """Plan all blocks at once. `data` are token ids [S, T], or None; `run` is `plan.run.Run`."""

    def __call__(self, view: ModelView, data: Tensor | None, options: Any, run: Run, /) -> Sequence[BlockPlan]: ...


class NewMoment(Protocol):
    """Make the statistic that `plan_place` reads, of a residual stream of that width."""

    def __call__(self, hidden: int, device: torch.device, options: Any, /) -> Any: ...


class LastPlace(Protocol):
    """Give the place behind the last block from the one before it; None where it is chosen like the others."""

    def __call__(self, before: Place, options: Any, /) -> Place | None: ...


class Check(Protocol):
    """Refuse before the work what cannot be done, with UsageError or SecateurError.

    `sparsity` is None where the user gave none; 0 asks for nothing and passes. It is called where a sparsity counts the
    model as a whole, not the weights of each matrix.
    """

    def __call__(self, view: ModelView, sparsity: float | None, options: Any, /) -> None: ...


class SizesLeft(Protocol):
    """Give the sizes of all blocks at a sparsity. None where only the text tells them."""

    def __call__(self, view: ModelView, options: Any, sparsity: float, /) -> Sequence[BlockDims] | None: ...


class Notice(Protocol):
    """Give a line for the user before the work, or None."""

    def __call__(self, view: ModelView, sparsity: float, options: Any, /) -> str | None: ...


class NeverStock(Protocol):
    """Say why no result with these options is a stock model; None where some are."""

    def __call__(self, options: Any, /) -> str | None: ...


class ByRows(Protocol):
    """Say whether pattern `unstructured` takes a whole number of weights from each row, not from each matrix."""

    def __call__(self, options: Any, /) -> bool: ...


class Gradual(Protocol):
    """Say whether a lower sparsity is a stop on the way to a higher one, which may go on from `run.checkpoint`."""

    def __call__(self, options: Any, /) -> bool: ...


class Operations(Protocol):
    """Give about how many multiplications a plan of the whole model takes, over that many calibration tokens."""

    def __call__(self, view: ModelView, tokens: int, options: Any, sparsity: float, /) -> float: ...


@dataclass(frozen=True)
class Says:
    """What a method says. Each field is an attribute of its module, by the same name.

    Attributes:
        CALIBRATION: the text that its paper calibrates with, a SPEC; None: it needs no tokens.
        SAMPLES, SEQLEN: how many windows of how many tokens.
        STATISTICS: what to collect for each distinct input of a block, for `plan_block`.
        REMOVES: what a sparsity is a fraction of, from `plan/quantity.py`. Without it the weights of each matrix or,
            where its option `pattern` is rows or columns, the units. Where that pattern zeroes weights, always the
            weights. A method that has `plan_model` or `plan_place` alone must say it.
        GRADIENTS: whether it takes gradients of the loss (`calibrate/backward.py`): a dry run counts their memory.
        TRAINS: whether it goes over the text as often as its options say: a dry run knows no time (unless
            `operations` says) and no memory.
        SHARDS: whether the processes of torchrun share its work. Without it a run under torchrun is refused.
        DEMO: what `secateur demo` shows of it: a list of {"sparsities": [...], "options": {...}, "heal": True}.
        QUICK: the options that make a run short, whatever it is worth then.
        MAY_CHANGE: the options that may have another value where an interrupted run goes on.
        plan_block: see `PlanBlock`.
        plan_place: see `PlanPlace`; it needs `new_moment`, `last_place` and `sizes_left` beside it.
        plan_model: see `PlanModel`. Where `plan_block` is there too, the property `whole_model` of the options says
            which of them plans.
        new_moment, last_place: see `NewMoment`, `LastPlace`.
        check: see `Check`.
        sizes_left: see `SizesLeft`. Needed where REMOVES is WIDTH or HEADS.
        notice: see `Notice`.
        never_stock: see `NeverStock`.
        by_rows: see `ByRows`; without it weights are counted by matrix.
        gradual: see `Gradual`.
        operations: see `Operations`.
    """

    CALIBRATION: str | None
    SAMPLES: int = 128
    SEQLEN: int = 2048
    STATISTICS: NewStatistic | None = None
    REMOVES: Quantity | None = None
    GRADIENTS: bool = False
    TRAINS: bool = False
    SHARDS: bool = False
    DEMO: Sequence[Mapping[str, Any]] = ()
    QUICK: Mapping[str, Any] = field(default_factory=dict)
    MAY_CHANGE: tuple[str, ...] = ()
    plan_block: PlanBlock | None = None
    plan_place: PlanPlace | None = None
    plan_model: PlanModel | None = None
    new_moment: NewMoment | None = None
    last_place: LastPlace | None = None
    check: Check | None = None
    sizes_left: SizesLeft | None = None
    notice: Notice | None = None
    never_stock: NeverStock | None = None
    by_rows: ByRows | None = None
    gradual: Gradual | None = None
    operations: Operations | None = None


def read_contract(name: str, module: ModuleType) -> Says:
    """What a module says.

    Raises:
        UsageError: it lacks what a method must say, says it in another form, or misspells a name. The file and the
            attribute are named.
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
    return says


def _check_spelling(where: str, module: ModuleType, known: Mapping[str, Any]) -> None:
    for own in vars(module):
        if own.isupper() and own not in known and (meant := get_close_matches(own, known, 1, _SPELLING)):
            raise UsageError(f"{where}: {own} is no name of the contract; did you mean {meant[0]}?")


def _check_form(where: str, value: Any, hint: Any) -> None:
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for one in allowed:
        if getattr(one, "_is_protocol", False) or get_origin(one) is Callable:
            if callable(value):
                _check_arguments(where, value, one)
                return
        elif isinstance(value, get_origin(one) or one):
            return
    words = ", ".join("None" if one is type(None) else getattr(one, "__name__", str(one)) for one in allowed)
    raise UsageError(f"{where} is {value!r}; it must be: {words} (methods/contract.py)")


def _check_arguments(where: str, function: Callable[..., Any], protocol: Any) -> None:
    """A function takes the arguments of its protocol. A class (STATISTICS) is called once it is used."""
    if isinstance(function, type) or not getattr(protocol, "_is_protocol", False):
        return
    wanted = list(inspect.signature(protocol.__call__).parameters)[1:]
    try:
        inspect.signature(function).bind(*wanted)
    except TypeError:
        raise UsageError(
            f"{where} takes {inspect.signature(function)}; it is called with ({', '.join(wanted)})"
        ) from None


def _check_whole(where: str, says: Says) -> None:
    """What is said goes together."""
    if says.plan_block is None and says.plan_place is None and says.plan_model is None:
        raise UsageError(f"{where} lacks a plan: define plan_block, plan_place or plan_model (methods/contract.py)")
    if says.plan_block is None and says.REMOVES is None:
        raise UsageError(
            f"{where} lacks REMOVES: what a sparsity is a fraction of, such as PARAMETERS of plan/quantity.py"
        )
    for name in ("new_moment", "last_place", "sizes_left"):
        if says.plan_place is not None and getattr(says, name) is None:
            raise UsageError(f"{where} lacks {name}, which plan_place needs beside it (methods/contract.py)")
    if says.REMOVES is not None and says.REMOVES.needs_sizes and says.sizes_left is None:
        raise UsageError(
            f"{where} lacks sizes_left, which a sparsity of {says.REMOVES.name} needs (methods/contract.py)"
        )
