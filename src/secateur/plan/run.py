"""What a method that plans the whole model at once is told, besides its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from secateur.core.distributed import rank
from secateur.models.save import disk, save_whole


@dataclass(frozen=True)
class Run:
    """The run.

    Attributes:
        sparsity: the fraction of the parameters of the whole model to remove; 0 where matrices have rates of their own.
        seed: of every random choice.
        device, dtype: of the computation.
        checkpoint: a file for what an interrupted run needs to go on; None keeps none. The caller removes it. Of a
            method that is gradual it may be that of a run at a lower sparsity.
        notes: what the method tells of its work, JSON, the same whenever the run is repeated; the caller puts it into
            the plan and the record.
        spill: a file for activations; None keeps them in memory. The caller removes it.
        labels: what is to be predicted at each place of the windows of a task [S, T], -100 in the questions; None: all.
    """

    sparsity: float
    seed: int
    device: torch.device
    dtype: torch.dtype
    checkpoint: Path | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    spill: Path | None = None
    labels: Tensor | None = None

    def once(self, measure: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `measure` gives, on a CPU: kept in `checkpoint`, from where a run that goes on takes it. For a method
        that keeps nothing else there.

        Raises:
            SecateurError: the disk is full, or may not be written.
        """
        if self.checkpoint is None:
            return measure()
        if not self.checkpoint.is_file():
            found = measure()
            if rank() > 0:
                return found
            with disk(self.checkpoint.parent):
                save_whole(self.checkpoint, found)
        return load_file(self.checkpoint)
