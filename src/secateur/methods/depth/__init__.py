"""Depth: remove attention or MLP of whole blocks, one after the other: each time the one whose removal costs least.

Leave out each candidate in turn, measure the loss of the calibration text, remove for good what raises it least, and
begin again. BlockPruner (arXiv:2406.10594) does so with attention and MLP of every block, SLEB (arXiv:2402.09025,
algorithm 1) with whole blocks (`part=blocks`), and 2SSP (arXiv:2501.17771, its second stage) with attention alone
(`part=attention`).

Differences from the papers: attention and MLP differ in size, so what counts is the rise of the loss for each parameter
that goes. After the first round only the `candidates` are measured again that were cheapest when they were last
measured, as if a removal rarely made another one cheap; `candidates=0` measures all of them, as the papers do. The text
is shorter by default: the trials of a deep model take as many passes as it has parts.

The sparsity is the fraction of the parameters of the whole model to remove, to the nearest part; at least one goes. A
block that loses attention and MLP is dropped. Otherwise the bias that the part adds at its end stays, as after the
removal of all its units, and so do the norms beside it. With `part=blocks` the result is a stock model.

Shape letters: S windows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from secateur.calibrate.making_up import MakingUp, check_makes_up
from secateur.calibrate.statistics import check_damping
from secateur.core.errors import SecateurError, UsageError
from secateur.core.progress import say, track
from secateur.cut.block import cut_block
from secateur.methods.depth.parts import MAY_GO, Parts
from secateur.methods.depth.trials import AT_ONCE, Trials
from secateur.models.view import ModelView
from secateur.plan.plan import BlockPlan, LaterPlans
from secateur.plan.quantity import PARAMETERS, check_droppable
from secateur.plan.run import Run

CALIBRATION = "wikitext2"
SAMPLES, SEQLEN = 16, 512
REMOVES = PARAMETERS
WITHOUT_PARTS = True
STREAMS = 1 + AT_ONCE
_REMOVALS = "depth: removals"  # the description of its progress
DEMO = [{"sparsities": [0.2]}]


@dataclass(frozen=True)
class Depth:
    """Options.

    Attributes:
        part: what is removed: `submodules` (attention or MLP of a block), `attention`, or `blocks`.
        candidates: how many of the cheapest are measured again before each removal; 0 for all.
        fit: at the end, set the last matrix of each block that lost a part, or of the block before dropped ones, to
            make up for it by least squares (`calibrate/making_up.py`). Nothing does where the model begins with them.
        damping: with `fit`, added to the diagonal of the second moment, in units of its mean.
    """

    part: str = "submodules"
    candidates: int = 8
    fit: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.part not in MAY_GO:
            raise UsageError(f"depth: unknown part '{self.part}' (allowed: {', '.join(MAY_GO)})")
        if self.candidates < 0:
            raise UsageError(f"depth: candidates is {self.candidates}; it is a count, or 0 for all")
        check_damping("depth", self.damping, "a moment may be singular")


def check(view: ModelView, sparsity: float, options: Depth) -> None:
    """Refuse impossible requests before the work begins.

    Raises:
        UsageError: the sparsity is less than half of the smallest part, or more than can go.
        SecateurError: the residual stream of the model is rotated, or blocks read parts of it; or `fit` is asked of a
            family with a norm between the MLP and the residual stream.
    """
    check_droppable(view)
    if options.fit:
        check_makes_up(view, "depth")
    if view.dims(0).residual is not None and options.part != "blocks":
        raise SecateurError(
            f"{view.name}: its blocks read and write parts of the residual stream, and depth takes no attention or MLP"
            " from them; use --set part=blocks, or the original model"
        )
    parts, whole = Parts(view, options.part), view.parameters()
    most, least = parts.most() / whole, min(map(parts.parameters, parts.candidates()), default=0) / whole
    if sparsity > most:
        raise UsageError(
            f"depth: --sparsity {sparsity:g} is more than can go: with part={options.part} at most {most:.4f} of the"
            f" parameters; use --sparsity {math.floor(most * 1e4) / 1e4:g} or less"
        )
    if sparsity < least / 2:
        raise UsageError(
            f"depth: --sparsity {sparsity:g} is less than half of the smallest part that can go; the least is"
            f" {math.ceil(least / 2 * 1e4) / 1e4:g}"
        )


def never_stock(options: Depth) -> str | None:
    """Say why the result is not a stock model; None where whole blocks go."""
    return None if options.part == "blocks" else "it leaves blocks without attention or MLP (part=blocks does not)"


def rehearsal(view: ModelView, options: Depth, sparsity: float) -> tuple[Depth, dict[str, int]]:
    """Return the options, and the removals of two blocks that have as many trials as the whole run."""
    parts = Parts(view, options.part)
    first, removals = len(parts.candidates()), parts.removals_to(sparsity * view.parameters())
    trials = first + (removals - 1) * min(first, options.candidates or first)
    return options, {_REMOVALS: math.ceil(trials / (2 * len(MAY_GO[options.part])))}


def gradual(options: Depth) -> bool:
    """Return True: a run passes through the lower sparsities."""
    return True


def plan_model(view: ModelView, data: Tensor, options: Depth, run: Run) -> Sequence[BlockPlan]:
    """Remove parts until the sparsity is reached, by the loss of windows `data` [S, T].

    Raises:
        NotFiniteError: the loss of the model is NaN or infinite.
    """
    parts, wanted = Parts(view, options.part), run.sparsity * view.parameters()
    parts.load(run)
    if parts.removed < wanted:
        trials = Trials(parts, data, run)
        parts.losses = parts.losses or [trials.loss()]
        for _ in track(_removals(parts, trials, wanted, options), _REMOVALS, parts.removals_to(wanted)):
            parts.save(run)
            say(f"depth: {parts.told()}")
    found = len(parts.order)
    parts.stop_at(wanted, at_least=run.at_least)
    if parts.order and len(parts.order) < found:
        say(f"depth: it stops at: {parts.told()}, the nearest to {run.sparsity:.2%}")
    run.notes["removed_parts"] = [str(candidate) for candidate in parts.order]
    outlines = [parts.plan(index) for index in range(view.blocks)]
    if not options.fit:
        return outlines
    return LaterPlans(outlines, MakingUp(view, data, outlines, cut_block, options.damping, "depth", run))


def _removals(parts: Parts, trials: Trials, wanted: float, options: Depth) -> Iterator[None]:
    """Remove one part after the other, until `wanted` parameters are gone."""
    while parts.removed < wanted and (candidates := parts.promising(options.candidates)):
        parts.remove(trials.without(candidates))
        yield
