"""Heads: remove the attention heads whose masks change the loss least.

From Michel et al., arXiv:1905.10650, equation 2. The output of head h is multiplied by a mask xi_h, which is 1. The
importance of the head is the mean over texts x of |dL(x) / d xi_h|, where L is the loss and a text is one window. It is
divided by the Euclidean norm of the importances of its block. The least important heads of the whole model are removed;
every block keeps one. The sparsity is the fraction of query heads. Any text serves. For a model that serves one task,
use the text of the task (`--calibration task:NAME`): its loss counts the right answers alone.

Where several query heads share a key-value head, `unit=groups` removes a key-value head with all its query heads, under
one mask. `unit=heads` removes query heads, the same number from every group of a block, so that the rest is grouped as
before: the least important heads of all groups are removed together. This does not make the key-value cache smaller.

The masks are not put into the model. Their gradients follow from the input of the output projection and from the
gradient of its output (`calibrate/backward.py`). Ties: of the earlier block, the head with the lower index is removed
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from secateur.calibrate.backward import Backward, check_reacts, mask_gradient
from secateur.core.errors import UsageError
from secateur.models.family import HEADS as LOSE_HEADS
from secateur.models.family import check_can
from secateur.models.spaces import MEMBERS
from secateur.models.view import BlockDims, ModelView
from secateur.plan.plan import BlockPlan
from secateur.plan.quantity import HEADS
from secateur.plan.run import Run

CALIBRATION = "wikitext2"
REMOVES = HEADS
GRADIENTS = True  # a dry run counts their memory
DEMO: list[dict[str, object]] = []
_READER = MEMBERS["groups"].reader  # this matrix reads the outputs of the heads


@dataclass(frozen=True)
class Heads:
    """Options.

    Attributes:
        unit: what is removed: `groups` (key-value heads with their query heads), or `heads` (query heads, the same
            number from every group).
        normalise: whether each importance is divided by the norm of the importances of its block. `false` is ahead of
            the paper's `true`: perplexity 14.54 against 17.20 at a third of the bundled model's heads
            (docs/lab-log.md).
    """

    unit: str = "groups"
    normalise: bool = True

    def __post_init__(self) -> None:
        if self.unit not in ("groups", "heads"):
            raise UsageError(f"heads: unknown unit '{self.unit}' (allowed: groups, heads)")

    def step(self, dims: BlockDims) -> int:
        """Return the number of query heads that one step removes from a block."""
        return dims.queries if self.unit == "groups" else dims.groups


def check(view: ModelView, sparsity: float, options: Heads) -> None:
    """Refuse impossible requests before the work begins.

    Raises:
        UsageError: the sparsity is less than one unit, or it would empty a block; or `unit=heads` where
            each query head has its own key-value head.
        SecateurError: heads of this family cannot be removed.
    """
    check_can(view.family, LOSE_HEADS, view.name)
    dims = [view.dims(index) for index in range(view.blocks)]
    heads = sum(d.heads for d in dims)
    if options.unit == "heads" and all(d.queries == 1 for d in dims):
        raise UsageError(
            "heads: unit=heads removes query heads that share a key-value head; here each has its own, so use"
            " unit=groups"
        )
    most = sum(d.heads - options.step(d) for d in dims) / heads
    if sparsity > most:
        raise UsageError(
            f"heads: --sparsity {sparsity:g} would empty a block: each block keeps one of its {options.unit}, so at"
            f" most {most:.4f} of the heads can be removed; use {int(most * 1e4) / 1e4:g} or less"
        )
    least = min(options.step(d) for d in dims)
    if int(sparsity * heads + 1e-9) < least:
        raise UsageError(
            f"heads: --sparsity {sparsity:g} of {heads} heads is less than one step, which removes {least}; the least"
            f" is {least / heads + 5e-5:.4f}"
        )


def gradual(options: Heads) -> bool:
    """Return True: the scores of one run serve the next."""
    return True


def plan_model(view: ModelView, data: Tensor, options: Heads, run: Run) -> tuple[BlockPlan, ...]:
    """Measure the importance of the heads on windows `data` [S, T], and remove the least important.

    Raises:
        HopelessError: all gradients are zero.
        NotFiniteError: a loss or a gradient is NaN or infinite.
    """
    measured = run.once(
        lambda: {str(index): score_GQ for index, score_GQ in enumerate(head_importance(view, data, options, run))}
    )
    orders = [_order(measured[str(index)]) for index in range(view.blocks)]
    steps_taken = _steps_taken(view, options, [score for score, _ in orders], run.sparsity)
    plans = []
    for index, (number, (_, order)) in enumerate(zip(steps_taken, orders, strict=True)):
        units = view.dims(index).groups if options.unit == "groups" else view.dims(index).heads
        keep_U = torch.ones(units, dtype=torch.bool).index_fill_(0, order[:number].flatten(), False)
        plans.append(
            BlockPlan(
                index,
                keep={options.unit: keep_U.nonzero().squeeze(1).to(torch.int32)} if number else {},
                of={options.unit: units} if number else {},
            )
        )
    return tuple(plans)


def head_importance(view: ModelView, windows: Tensor, options: Heads, run: Run) -> list[Tensor]:
    """Return the importance of the heads of each block, in float64.

    The unit is nats a token; with `normalise` the importances of a block are divided by their norm.

    Returns:
        For each block a tensor [1, G] with `unit=groups`, and [G, Q] with `unit=heads` (Q query heads of a group).
    """
    backward = Backward(view, windows, device=run.device, dtype=run.dtype, labels=run.labels, spill=run.spill)
    scores: list[Tensor] = [torch.empty(0)] * view.blocks
    for block in backward.blocks():
        dims, weight_OI = block.dims, block.matrix(_READER).to(run.device)
        across = dims.unit_width(_READER, "groups") if options.unit == "groups" else dims.head_width
        total_U = torch.zeros(dims.heads * dims.head_width // across, dtype=torch.float64, device=run.device)

        def listen(total_U: Tensor, across: int, weight_OI: Tensor, x_BTI: Tensor, g_BTO: Tensor) -> None:
            of_window_BI = mask_gradient(x_BTI, g_BTO, weight_OI)
            total_U += of_window_BI.unflatten(1, (-1, across)).sum(2, dtype=torch.float64).abs().sum(0)

        backward.retreat(block, {_READER: partial(listen, total_U, across, weight_OI)})
        score_U = total_U.cpu() / backward.targets
        if options.normalise and score_U.any():
            score_U = score_U / score_U.norm()
        scores[block.index] = score_U[None] if options.unit == "groups" else score_U.view(dims.groups, dims.queries)
    check_reacts("heads", scores)
    return scores


def sizes_left(view: ModelView, options: Heads, sparsity: float) -> Sequence[BlockDims]:
    """Return the sizes of the blocks, as if the heads of the first blocks were the least important."""
    dims = [view.dims(index) for index in range(view.blocks)]
    steps_taken = _steps_taken(view, options, [torch.zeros(d.heads // options.step(d)) for d in dims], sparsity)
    if options.unit == "groups":
        return [d.with_units(d.groups - number, d.ffn) for d, number in zip(dims, steps_taken, strict=True)]
    return [replace(d, heads=d.heads - number * d.groups) for d, number in zip(dims, steps_taken, strict=True)]


def _order(score_GQ: Tensor) -> tuple[Tensor, Tensor]:
    """Order the removals of a block, the least important first.

    Returns:
        The score of each step [steps], and the indices of the units it removes [steps, units], one from each row.
    """
    rows, columns = score_GQ.shape
    value_GQ, order_GQ = score_GQ.sort(dim=1, stable=True)
    return value_GQ.sum(0), (order_GQ + torch.arange(rows)[:, None] * columns).t()


def _steps_taken(view: ModelView, options: Heads, scores: Sequence[Tensor], sparsity: float) -> list[int]:
    """Return how many steps each block takes, as many in all as the sparsity allows.

    The steps of the lowest scores in all blocks are taken first. The last step of a block is never taken, since it
    would empty the block.
    """
    steps = [options.step(view.dims(index)) for index in range(view.blocks)]
    allowed = sparsity * sum(view.dims(index).heads for index in range(view.blocks)) + 1e-9
    ranked = sorted(
        (float(value), index, number) for index, score in enumerate(scores) for number, value in enumerate(score[:-1])
    )
    taken = [0] * view.blocks
    for _, index, _ in ranked:
        allowed -= steps[index]
        if allowed < 0:
            break
        taken[index] += 1
    return taken
