"""The choice of the gates to keep from their learned logits: deterministic, never empty, within the budget.

The authors' code draws a fresh, unseeded sample. Here the gates with a high logit are kept. By default the threshold
moves until the parameters fit the budget (after a converged run it hardly moves). With `half` the threshold is 0: a
gate is kept if it is open more than half of the time.

Shape letter: N gates of all structures together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.plan.structures import Structures


def choose(logit_N: Tensor, structures: Structures, *, target: float, multiple: int, half: bool) -> list[Tensor]:
    """The kept indices of each structure, ascending, int32.

    Args:
        logit_N: the logit of each gate being open, bias included.
        structures: the gates of the model.
        target: the number of parameters to keep at most.
        multiple: make every width a multiple of this, by keeping more of a structure's best gates, or keep the whole
            structure.
        half: keep the gates with a logit above 0, whatever the budget.
    """
    logits = [part.detach().double().cpu() for part in structures.split(logit_N)]
    orders = [torch.sort(part, descending=True, stable=True).indices for part in logits]
    if half:
        counts = [int((part > 0).sum()) for part in logits]
    else:
        counts = _within(logits, orders, structures, target, multiple)
    widths = [_rounded(count, width, multiple) for count, width in zip(counts, structures.widths, strict=True)]
    return [order[:width].sort().values.to(torch.int32) for order, width in zip(orders, widths, strict=True)]


def smallest(structures: Structures, multiple: int) -> float:
    """The fewest parameters that any choice keeps."""
    return float(structures.parameters([float(_rounded(0, width, multiple)) for width in structures.widths]))


def _within(
    logits: list[Tensor], orders: list[Tensor], structures: Structures, target: float, multiple: int
) -> list[int]:
    """The number of gates to keep in each structure: those with the highest logits, as many as the target allows."""
    owner_N = torch.cat([torch.full((len(part),), number) for number, part in enumerate(logits)])
    ranked_N = owner_N[torch.sort(torch.cat(logits), descending=True, stable=True).indices]
    low, high = 0, len(ranked_N)

    def counts(first: int) -> list[int]:
        by_structure: list[int] = torch.bincount(ranked_N[:first], minlength=len(logits)).tolist()
        return by_structure

    while low < high:
        middle = (low + high + 1) // 2
        widths = [
            float(_rounded(count, width, multiple))
            for count, width in zip(counts(middle), structures.widths, strict=True)
        ]
        low, high = (middle, high) if float(structures.parameters(widths)) <= target else (low, middle - 1)
    return counts(low)


def _rounded(count: int, width: int, multiple: int) -> int:
    """Round `count` up to a multiple: at least one multiple, at most `width`."""
    return min(width, max(1, -(-count // multiple)) * multiple)
