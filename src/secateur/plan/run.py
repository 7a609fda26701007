"""What a method that plans the whole model at once is told, besides its options."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Run:
    """The run.

    Attributes:
        sparsity: the fraction of the parameters of the whole model to remove; 0 where matrices have rates of their own.
        seed: of every random choice.
        device, dtype: of the computation.
    """

    sparsity: float
    seed: int
    device: torch.device
    dtype: torch.dtype
