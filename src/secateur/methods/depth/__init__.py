"""Depth: remove attention or MLP of whole blocks, one after the other, each time what the loss misses least.

From SLEB (arXiv:2402.09025, algorithm 1), which removes whole blocks: leave out each in turn, measure the loss of the
calibration text, remove for good the one without which it is lowest, and begin again. 2SSP (arXiv:2501.17771, its
second stage) does the same with attention alone. `part=blocks` and `part=attention` are these two. The default,
`submodules`, chooses among attention and MLP of every block. They differ in size, so what counts is the rise of the
loss for each parameter that goes. A block that loses both is dropped.

Difference from the papers: a removal rarely changes which others are cheap. So after the first round only the
`candidates` are measured again that were cheapest when they were last measured; `candidates=0` measures all of them.

The sparsity is the fraction of the parameters of the whole model to remove, to the nearest part. The bias that an
attention or MLP adds at its end stays, as after the removal of all its units, until the whole block goes. With
`part=blocks` the result is a stock model.

Shape letters: S windows, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from secateur.core.errors import SecateurError, UsageError
from secateur.core.progress import say
from secateur.methods.depth.parts import PARTS, Parts
from secateur.methods.depth.trials import Trials
from secateur.models.family import HEADS, check_can
from secateur.models.parameters import block_parameters
from secateur.models.view import ModelView
from secateur.plan.plan import BlockPlan
from secateur.plan.quantity import PARAMETERS
from secateur.plan.run import Run

CALIBRATION = "wikitext2"
SAMPLES, SEQLEN = 16, 512
REMOVES = PARAMETERS
WITHOUT_PARTS = True
DEMO = [{"sparsities": [0.2]}]


@dataclass(frozen=True)
class Depth:
    """Options.

    Attributes:
        part: what is removed: `submodules` (attention or MLP of a block), `attention`, or `blocks`.
        candidates: how many of the cheapest are measured again before each removal; 0 for all.
    """

    part: str = "submodules"
    candidates: int = 8

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise UsageError(f"depth: unknown part '{self.part}' (allowed: {', '.join(PARTS)})")
        if self.candidates < 0:
            raise UsageError(f"depth: candidates is {self.candidates}; it is a count, or 0 for all")


def check(view: ModelView, sparsity: float, options: Depth) -> None:
    """Refuse impossible requests before the work begins.

    Raises:
        UsageError: the sparsity is less than half of the smallest part, or more than can go.
        SecateurError: the residual stream of the model is rotated or selected from; or heads of this family cannot be
            removed.
    """
    residual = view.dims(0).residual
    if residual is not None and (options.part != "blocks" or not residual.selected):
        raise SecateurError(
            f"{view.name}: its blocks read and write a rotated or selected residual stream, so nothing can be left out;"
            " remove parts of the original model"
        )
    if options.part != "blocks":
        check_can(view.family, HEADS, view.name)
    whole, blocks = view.parameters(), [block_parameters(view, index) for index in range(view.blocks)]
    parts = Parts(view, options.part)
    sizes = [parts.parameters(candidate) for candidate in parts.candidates()]
    most = (sum(sizes) if options.part == "attention" else sum(blocks) - max(blocks)) / whole
    if sparsity > most:
        raise UsageError(
            f"depth: --sparsity {sparsity:g} is more than can go: with part={options.part} at most {most:.4f} of the"
            f" parameters; use --sparsity {math.floor(most * 1e4) / 1e4:g} or less"
        )
    if sparsity * whole < (least := min(sizes)) / 2:
        raise UsageError(
            f"depth: --sparsity {sparsity:g} is less than half of the smallest part of {options.part}; the least is"
            f" {math.ceil(least / whole / 2 * 1e4) / 1e4:g}"
        )


def never_stock(options: Depth) -> str | None:
    """Say why the result is not a stock model; None where whole blocks go."""
    return None if options.part == "blocks" else "it leaves blocks without attention or MLP (part=blocks does not)"


def rehearsal(options: Depth, sparsity: float) -> tuple[Depth, dict[str, int]]:
    """Refuse: what a removal takes grows with the number of blocks, and so does the number of removals."""
    raise SecateurError("its trials grow with the square of the depth, so two blocks do not tell how long it takes")


def gradual(options: Depth) -> bool:
    """Return True: a run passes through the lower sparsities."""
    return True


def plan_model(view: ModelView, data: Tensor, options: Depth, run: Run) -> tuple[BlockPlan, ...]:
    """Remove parts until the sparsity is reached, by the loss of windows `data` [S, T].

    Raises:
        NotFiniteError: the loss of the model is NaN or infinite.
    """
    parts, wanted = Parts(view, options.part), run.sparsity * view.parameters()
    parts.load(run)
    if parts.removed < wanted:
        trials = Trials(parts, data, run)
        parts.losses = parts.losses or [trials.loss()]
        while parts.removed < wanted:
            parts.remove(trials.without(parts.promising(options.candidates)))
            parts.save(run)
            say(f"depth: {parts.told()}")
    if parts.back_to(wanted):
        say(f"depth: the last one stays: without its removal the result is nearer to {run.sparsity:.2%}")
    run.notes["removed"] = [str(candidate) for candidate in parts.order]
    return tuple(parts.plan(index) for index in range(view.blocks))
