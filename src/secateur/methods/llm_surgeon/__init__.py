"""LLM Surgeon: remove the rows and columns, or weights, that cost the loss least by its curvature, and update the rest.

From arXiv:2312.17244 (ICLR 2024), section 3. The Fisher information of each matrix is G (x) A (`kronecker.py`), from
gradients of the language-model loss at the text's own next tokens (the empirical Fisher), damped by a hundredth of its
mean diagonal. The weights that stay in a matrix are set to the exact minimiser of the quadratic under all its removals
at once. The work is done in `shots`: each shot removes a part, on a linear schedule, and the next shot computes the
gradients of the changed model. A lower sparsity is a stop on the way to a higher one, so `sweep` and `compare` take
several in one run; a stop between two steps of the schedule is one more shot.

With the pattern `rows` units go, those that the runtime removes for real: the features of the residual that attention
and MLP of a block read and write, its feed-forward units, and its key-value heads with their query heads. The cost of a
feature is the sum over its rows and columns in all matrices. For a feed-forward unit or a head, cost and update are
those of its columns in the matrix that reads it, all columns of a head together; the rows that compute it then go
at no cost. One threshold serves all units of the model. The sparsity is the fraction of the parameters of the
whole model to remove.

With `unstructured` and N:M weights become zero, and the sparsity is of the matrices, as for other methods. One
threshold serves all matrices that take part (those of one sparsity, where `--modules` gives several); with N:M the
cheapest go that their groups of M can still spare. The minimiser is then found by conjugate gradients
(`Curvature.masked`), to 1e-5 of its cost: 5 to 110 iterations for matrices of the bundled model. In float64 on a CPU
that is for small models: a matrix of 4096 x 4096 takes 5.5e11 operations an iteration. Rows and columns have a closed
form.

`update=false` leaves the weights that stay as they were: K-OBD, the paper's baseline. `curvature=diagonal` has the
diagonals of the factors alone (an L-OBD), `curvature=identity` is magnitude; neither has correlations, so neither
changes what stays.

Differences from the authors' code: rows and columns are removed, not zeroed, so a unit goes from the matrices that give
it and from the one that reads it at once, where theirs go one by one; factors are summed block by block, on the way
back, and those of one block are in memory at a time: for the updates they are kept on disk, or summed again where half
of its free space does not hold them; Cholesky
factors in place of eigenvectors; units compete by their cost a parameter (`rank=cost`: by their cost); every space of a
block keeps at least one unit; no LoRA between shots. Ties: the unit or weight of the earlier block goes first.

Shape letters: S windows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from secateur.calibrate.statistics import check_damping
from secateur.core.errors import SecateurError, UsageError
from secateur.core.progress import track
from secateur.methods.llm_surgeon.kronecker import CURVATURES
from secateur.methods.llm_surgeon.shots import Shots
from secateur.methods.llm_surgeon.units import UnitShots, removed_parameters
from secateur.methods.llm_surgeon.weights import WeightShots
from secateur.models.family import HEADS, SELECT, check_can
from secateur.models.spaces import SPACES
from secateur.models.view import ModelView
from secateur.plan.pattern import parse_pattern
from secateur.plan.plan import BlockPlan
from secateur.plan.quantity import PARAMETERS, check_removable
from secateur.plan.run import Run

QUICK = {"shots": 1}
CALIBRATION = "wikitext2"
REMOVES = PARAMETERS
GRADIENTS = True
TRAINS = True
DEMO: list[dict[str, object]] = []
STEP = 1 / 80  # the paper has 40 shots for one half
_SHOTS = "llm_surgeon: shots"
_EDGE = 1e-9  # k / 80 times 80 may not be quite k


@dataclass(frozen=True)
class LLMSurgeon:
    """Options.

    Attributes:
        shots: the number of steps of the removal, each with new gradients; 0 takes as many as `step` says. 8 are much
            quicker than the paper's and no worse on the bundled model: perplexity 17.73 against 18.39 at 50%
            (docs/lab-log.md).
        step: where `shots` is 0, the sparsity that each shot adds; a sweep passes through the lower sparsities on its
            way to the highest. 0.0125 is the paper's: 40 shots for a sparsity of 0.5.
        update: update the weights that stay, to compensate for those that are removed; false is K-OBD.
        curvature: `kfac`, `diagonal` (the diagonals of the same factors), or `identity` (magnitude).
        damping: the damping of the factors, in units of their mean diagonal.
        rank: with pattern `rows`, compare units by their cost for each `parameter`, or by their whole `cost`.
        pattern: `rows` (remove rows and columns of all matrices), or `unstructured` or N:M (zero weights).
    """

    shots: int = 0
    step: float = STEP
    update: bool = True
    curvature: str = "kfac"
    damping: float = 0.01
    rank: str = "parameter"
    pattern: str = "rows"

    def __post_init__(self) -> None:
        for name, allowed in (("curvature", CURVATURES), ("rank", ("parameter", "cost"))):
            if getattr(self, name) not in allowed:
                raise UsageError(f"llm_surgeon: unknown {name} '{getattr(self, name)}' (allowed: {', '.join(allowed)})")
        if self.pattern == "columns":
            raise UsageError(
                "llm_surgeon: pattern 'columns' is not allowed, since pattern rows removes columns too (allowed: rows, "
                "unstructured, or N:M such as 2:4)"
            )
        if self.shots < 0:
            raise UsageError(
                f"llm_surgeon: shots is {self.shots}; it is a count, at least 1, or 0 for the number in the paper"
            )
        if not 0 < self.step <= 1:
            raise UsageError(f"llm_surgeon: step is {self.step:g}; it is the sparsity of a shot, above 0 and at most 1")
        check_damping("llm_surgeon", self.damping, "the factors may be singular")


def check(view: ModelView, sparsity: float, options: LLMSurgeon) -> None:
    """Check before the work starts that this model can be pruned at this sparsity.

    Raises:
        UsageError: the sparsity would empty a block.
        SecateurError: the residual stream of the model was already pruned, or this family does not allow it; or its
            heads cannot be removed.
    """
    check_can(view.family, SELECT, view.name)
    check_can(view.family, HEADS, view.name)
    if view.dims(0).residual is not None:
        raise SecateurError(
            f"{view.name}: the residual stream of this model was pruned already; prune the original model, at a higher "
            "sparsity"
        )
    most = removed_parameters(view, [dict.fromkeys(SPACES, 1)] * view.blocks) / view.parameters()
    check_removable("llm_surgeon", sparsity, most, "with one unit left of each kind,")


def never_stock(options: LLMSurgeon) -> str | None:
    """The reason why the result is not a stock model; None for patterns that zero weights."""
    return "it gives every block its own widths" if parse_pattern(options.pattern).structured else None


def plan_model(view: ModelView, data: Tensor, options: LLMSurgeon, run: Run) -> tuple[BlockPlan, ...]:
    """Remove units or weights shot by shot, by gradients on windows `data` [S, T].

    Raises:
        HopelessError: all gradients are zero.
        NotFiniteError: a loss or a gradient is NaN or infinite.
    """
    pattern = parse_pattern(options.pattern)
    work: Shots
    if pattern.structured:
        work = UnitShots(
            view, run, curvature=options.curvature, damping=options.damping, update=options.update, rank=options.rank
        )
    else:
        work = WeightShots(
            view, run, curvature=options.curvature, damping=options.damping, update=options.update, pattern=pattern
        )
    sparsity = run.sparsity or max(rate for rates in view.rates for rate in rates.values())
    work.load(lambda done: left(sparsity, options.shots, options.step, done) is not None)
    remaining = left(sparsity, options.shots, options.step, work.done) or ()
    for share in track(remaining, _SHOTS, status=work.status):
        work.shot(data, share)
        work.save()
    run.notes["shots"] = work.told
    return tuple(work.plan(index) for index in range(view.blocks))


def rehearsal(view: ModelView, options: LLMSurgeon, sparsity: float) -> tuple[LLMSurgeon, dict[str, int]]:
    """Two shots, and the number of all shots.

    Raises:
        SecateurError: zeroed weights are updated by conjugate gradients.
    """
    if options.update and options.curvature == "kfac" and not parse_pattern(options.pattern).structured:
        raise SecateurError(
            f"with pattern {options.pattern} llm_surgeon adjusts the weights of each matrix in 5 to 110 iterations, "
            "and only the run itself shows how many"
        )
    shots = len(left(sparsity, options.shots, options.step) or ())
    return replace(options, shots=min(2, max(1, shots))), {_SHOTS: shots}


def gradual(options: LLMSurgeon) -> bool:
    """True with steps of `step`, where a lower sparsity is a stop on the way to a higher one."""
    return not options.shots


def left(sparsity: float, shots: int, step: float, done: Sequence[float] = ()) -> list[float] | None:
    """The sparsity after each shot that still has to be done.

    Args:
        sparsity: the sparsity after the last shot.
        shots: the number of all shots; 0 is a schedule in steps of `step`, where a higher sparsity begins with the
            same steps.
        step: the sparsity that a shot adds.
        done: the sparsities after the shots that are done, if a run continues; in steps of `step` the last one may lie
            between two of them.

    Returns:
        The sparsities, or None if `done` does not belong to this schedule.
    """
    if shots:
        every = [sparsity * shot / shots for shot in range(1, shots + 1)]
        return every[len(done) :] if list(done) == every[: len(done)] else None
    reached = done[-1] if done else 0.0
    if reached > sparsity:
        return None
    a_whole = 1 / step  # so that 3 steps of 0.0125 are 0.0375 exactly
    steps = [shot / a_whole for shot in range(1, math.ceil(a_whole * sparsity - _EDGE))]
    return [*(step for step in steps if step > reached + _EDGE), *([sparsity] if sparsity > reached else [])]
