"""From learned logits to what is kept: deterministic, never empty, within the budget.

The authors' code draws a fresh, unseeded sample. Here a gate is kept where its logit is high: by default the threshold
is moved until the parameters are those asked for (after a converged run it barely moves), or it stays where a gate is
open as often as not.

Shape letter: N gates of all structures together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.plan.structures import Structures


def choose(logit_N: Tensor, structures: Structures, *, target: float, multiple: int, half: bool) -> list[Tensor]:
    """The kept indices of each structure, ascending, int32.

    Args:
        logit_N: of a gate being open, bias included.
        structures: where gates are.
        target: the parameters to keep at most.
        multiple: widths are multiples of this (the best of a structure's gates make up the number), or all of a
            structure.
        half: keep what is open as often as not, whatever the budget.
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
    """How many to keep of each structure: the gates with the highest logits of all, as many as the target allows."""
    owner_N = torch.cat([torch.full((len(part),), number) for number, part in enumerate(logits)])
    ranked_N = owner_N[torch.sort(torch.cat(logits), descending=True, stable=True).indices]
    low, high = 0, len(ranked_N)

    def counts(first: int) -> list[int]:
        found: list[int] = torch.bincount(ranked_N[:first], minlength=len(logits)).tolist()
        return found

    while low < high:
        middle = (low + high + 1) // 2
        kept = [
            float(_rounded(count, width, multiple))
            for count, width in zip(counts(middle), structures.widths, strict=True)
        ]
        low, high = (middle, high) if float(structures.parameters(kept)) <= target else (low, middle - 1)
    return counts(low)


def _rounded(count: int, width: int, multiple: int) -> int:
    """At least one multiple, at most everything."""
    return min(width, max(1, -(-count // multiple)) * multiple)
