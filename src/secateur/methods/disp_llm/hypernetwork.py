"""The networks that give the logits of the gates: the hypernetwork of DISP-LLM (arXiv:2410.11988, appendix A.3, table
5), and two simpler ones.

    z [structures, 32], random and fixed -> Bi-GRU(32, 64) -> LayerNorm -> GELU -> one Linear(128, width) a structure

The GRU steps once a structure. `linear` leaves the GRU out: the linear layers act on a fixed random input of their own
width (its table 4, "w/o Bi-GRU"). `none` learns one logit a gate ("w/o HN"). z is a buffer: in the authors' code
wrapping it for several processes made it a parameter.

Shape letters: S structures, I input width, H the width the linear layers read, N gates of all structures together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

HYPERNETWORKS = ("gru", "linear", "none")
_INPUT, _HIDDEN = 32, 64


class Hypernetwork(nn.Module):
    """A network that gives the logits of all gates.

    Args:
        widths: the number of gates of each structure.
        kind: one of `HYPERNETWORKS`.
        seed: the seed of the fixed input and of the initial weights.
        begin_N: added to all logits; None adds nothing.
        scaled: learn a scale beside each gate too, see `scales`.
    """

    input_SI: Tensor
    begin_N: Tensor | None

    def __init__(
        self,
        widths: Sequence[int],
        kind: str = "gru",
        *,
        seed: int = 0,
        begin_N: Tensor | None = None,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("begin_N", begin_N)
        self.stretch_N = nn.Parameter(torch.zeros(sum(widths))) if scaled else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if kind == "none":
                self.logit_N = nn.Parameter(torch.zeros(sum(widths)))
                return
            self.register_buffer("input_SI", torch.randn(len(widths), _INPUT if kind == "gru" else 2 * _HIDDEN))
            if kind == "gru":
                self.gru = nn.GRU(_INPUT, _HIDDEN, bidirectional=True)
                self.norm = nn.LayerNorm(2 * _HIDDEN)
            self.linears = nn.ModuleList(nn.Linear(2 * _HIDDEN, width) for width in widths)

    def forward(self) -> Tensor:
        """The logits [N], structure after structure."""
        logit_N = self.logit_N if self.kind == "none" else self._generated()
        return logit_N if self.begin_N is None else logit_N + self.begin_N

    def scales(self) -> Tensor | None:
        """The scale [N] beside each gate, 1 at first; weight decay pulls it to 1. None if no scales are learned."""
        return None if self.stretch_N is None else 1 + self.stretch_N

    def _generated(self) -> Tensor:
        hidden_SH = gelu(self.norm(self.gru(self.input_SI)[0])) if self.kind == "gru" else self.input_SI
        return torch.cat([linear(hidden_H) for linear, hidden_H in zip(self.linears, hidden_SH, strict=True)])
