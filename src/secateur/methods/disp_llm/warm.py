"""The first logits of the gates, from a few windows. This is not in the paper, where all gates begin equally open.

Closing gate n alone costs about (dL/dg_n)^2 / 2 times a constant (the empirical Fisher information; arXiv:1906.10771
has it for units), and saves dT/dg_n parameters. Gates are ranked by their cost for each parameter saved. The gates that
the budget allows begin likely open, the others likely shut, and those near the limit undecided. So learning starts near
the budget, and spends its steps on the uncertain gates.

Shape letters: S windows, T tokens, N gates of all structures together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.progress import track
from secateur.methods.disp_llm.choose import choose
from secateur.methods.disp_llm.masked import MaskedModel, keep_gates

WARM = "disp_llm: windows of the first logits"  # the description of its progress
SURE = 3.0  # the logit at the ends of the ranking, the paper's c


def importance(masked: MaskedModel, windows: Tensor) -> Tensor:
    """The mean square of dL/dg over the windows [S, T] with all gates open, divided by the parameters that a gate
    saves, float32 [N].
    """
    structures = masked.structures
    gate_N = torch.ones(sum(structures.widths), device=masked.device, requires_grad=True)
    square_N = torch.zeros_like(gate_N)
    for window_T in track(windows, WARM, len(windows)):
        (slope_N,) = torch.autograd.grad(masked.loss(window_T[None].to(masked.device), gate_N), gate_N)
        square_N += slope_N.square()
    (saved_N,) = torch.autograd.grad(structures.counter(masked.device)(gate_N), gate_N)
    return (square_N / len(windows) / saved_N).detach()


def begin(score_N: Tensor, masked: MaskedModel, target: float) -> Tensor:
    """The first logits [N]: by rank, from `SURE` (the most important gate) through 0 (the last gate within the budget)
    to minus `SURE`.
    """
    structures = masked.structures
    kept_N = keep_gates(structures, choose(score_N.log(), structures, target=target, multiple=1, half=False))
    open_N = max(1, int(kept_N.sum()))
    rank_N = torch.empty(len(score_N), device=score_N.device)
    order_N = torch.sort(score_N, descending=True, stable=True).indices
    rank_N[order_N] = torch.arange(len(score_N), device=score_N.device, dtype=torch.float32)
    return torch.where(
        rank_N < open_N, SURE * (open_N - rank_N) / open_N, SURE * (open_N - rank_N) / max(1, len(score_N) - open_N)
    )
