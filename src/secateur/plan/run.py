"""What a method that plans the whole model at once is told, besides its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Run:
    """The run.

    Attributes:
        sparsity: the fraction of the parameters of the whole model to remove; 0 where matrices have rates of their own.
        seed: of every random choice.
        device, dtype: of the computation.
        checkpoint: a file for what an interrupted run needs to go on, of a method that learns; None keeps none. The caller removes it. Of a method that is
            gradual it may be that of a run at a lower sparsity.
        notes: what the method tells of its work, JSON, the same whenever the run is repeated; the caller puts it into the plan and the record.
        spill: a file for activations; None keeps them in memory. The caller removes it.
    """

    sparsity: float
    seed: int
    device: torch.device
    dtype: torch.dtype
    checkpoint: Path | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    spill: Path | None = None
