"""LLM Surgeon: rows and columns go that cost the loss least by its Kronecker-factored curvature, and what stays makes up for them.

From arXiv:2312.17244 (ICLR 2024), section 3. The Fisher information of each matrix is G (x) A (`calibrate/kronecker.py`), from gradients of the
language-model loss at the text's own next tokens (the empirical Fisher), damped by a hundredth of its mean diagonal. Units are what the runtime removes
for real: the features of the residual that attention and MLP of a block read and write, its feed-forward units, and its key-value heads with their query
heads. The cost of a unit is the sum of the costs of the rows and columns it has in its matrices, and one threshold serves all units of the model. What
stays of a matrix is changed to the exact minimiser of the quadratic under all its removals at once. All that is done in `shots`: in each a part of the
units goes, on a linear schedule, and the next one has gradients of the model as it then is. The sparsity is the fraction of the parameters of the whole
model to remove.

`update=false` leaves the weights that stay as they were: K-OBD, the paper's baseline. `curvature=diagonal` has the diagonals of the factors alone (an
L-OBD), `curvature=identity` is magnitude; neither has correlations, so neither changes what stays.

Differences from the authors' code: rows and columns are removed, not zeroed; factors are summed block by block, on the way back, and in a second pass
where weights are updated, so that those of one block are in memory at a time; Cholesky factors in place of eigenvectors; units compete by their cost a
parameter (`rank=cost`: by their cost); every space of a block keeps at least one unit; no LoRA between shots, and no unstructured or N:M pattern. Ties:
the unit of the earlier block goes first.

Shape letters: S windows, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from secateur.calibrate.kronecker import CURVATURES
from secateur.core.errors import SecateurError, UsageError
from secateur.core.progress import say
from secateur.models.view import ModelView
from secateur.plan.plan import BlockPlan
from secateur.plan.run import Run
from secateur.train.shots import SPACES, Shots, removed_parameters

CALIBRATION = "wikitext2"
TRAINS = True  # a dry run does not know for how long
DEMO: list[dict[str, object]] = []
SHOTS_A_WHOLE = 80  # the paper has 40 for one half


@dataclass(frozen=True)
class LLMSurgeon:
    """Options.

    Attributes:
        shots: in how many steps units go, with new gradients for each; 0 takes the paper's, 40 for a sparsity of one half and in proportion.
        update: whether the weights that stay make up for those that go; false is K-OBD.
        curvature: `kfac`, `diagonal` (of the same factors), or `identity` (magnitude).
        damping: of the factors, in units of their mean diagonal.
        rank: units compete by their cost a `parameter`, or by their `cost`.
    """

    shots: int = 0
    update: bool = True
    curvature: str = "kfac"
    damping: float = 0.01
    rank: str = "parameter"

    def __post_init__(self) -> None:
        for name, allowed in (("curvature", CURVATURES), ("rank", ("parameter", "cost"))):
            if getattr(self, name) not in allowed:
                raise UsageError(f"llm_surgeon: unknown {name} '{getattr(self, name)}' (allowed: {', '.join(allowed)})")
        if self.shots < 0:
            raise UsageError(f"llm_surgeon: shots is {self.shots}; it is a count, 1 or more (0: as many as the paper takes)")
        if not self.damping > 0:
            raise UsageError(f"llm_surgeon: damping is {self.damping:g}; it must be above 0, since the factors may be singular")


def check(view: ModelView, sparsity: float, options: LLMSurgeon) -> None:
    """Refuse before the work what cannot be done.

    Raises:
        UsageError: the sparsity would empty a block.
        SecateurError: the residual stream of the model is rotated or selected from already.
    """
    if view.dims(0).residual is not None:
        raise SecateurError(
            f"{view.name}: what its blocks read and write of the residual stream was pruned already; prune the original model, at a higher sparsity"
        )
    most = removed_parameters(view, [dict.fromkeys(SPACES, 1)] * view.blocks) / view.parameters()
    if sparsity > most:
        raise UsageError(
            f"llm_surgeon: --sparsity {sparsity:g} would empty a block: with one unit left of each space, at most {most:.4f} of the parameters go; "
            f"use --sparsity {int(most * 100) / 100:g} or less"
        )


def plan_model(view: ModelView, data: Tensor, options: LLMSurgeon, run: Run) -> tuple[BlockPlan, ...]:
    """Remove units shot by shot, by gradients on windows `data` [S, T].

    Raises:
        HopelessError: all gradients are zero.
        NotFiniteError: a loss or a gradient is NaN or infinite.
    """
    shots = options.shots or max(1, math.ceil(SHOTS_A_WHOLE * run.sparsity))
    work = Shots(view, run, curvature=options.curvature, damping=options.damping, update=options.update, rank=options.rank)
    for shot in range(work.done + 1, shots + 1):
        work.shot(data, run.sparsity * shot / shots)
        loss, removed = work.told[-1]["loss"], work.told[-1]["removed"]
        say(f"llm_surgeon: shot {shot} of {shots}: loss before {loss:.4f}, {removed:.4f} of the parameters removed")
        work.save()
    run.notes["shots"] = work.told
    return tuple(work.plan(index) for index in range(view.blocks))
