"""The settings that a method gets, beside its options, if it plans the whole model at once."""

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
    """The settings of one run.

    Attributes:
        sparsity: the fraction of the parameters of the whole model to remove; 0 if matrices have their own rates.
        seed: of every random choice.
        device, dtype: the device and dtype of the computation.
        state_file: the file from which an interrupted run continues; None saves nothing. The caller removes it. For a
            gradual method it may come from a run at a lower sparsity.
        notes: the method's own entries for the plan and the record, as JSON values; a repeated run gives the same.
        spill: a file for activations; None keeps them in memory. The caller removes it.
        at_least: remove at least the sparsity, not what is nearest to it; for methods whose steps are large.
        labels: the token to predict at each place of the windows of a task [S, T], -100 in the questions; None to
            predict all tokens.
    """

    sparsity: float
    seed: int
    device: torch.device
    dtype: torch.dtype
    state_file: Path | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    spill: Path | None = None
    labels: Tensor | None = None
    at_least: bool = False

    def once(self, measure: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The result of `measure`, on a CPU. It is saved in `state_file`, and a continued run reads it from there. Only
        for methods that save nothing else there.

        Raises:
            SecateurError: the disk is full or not writable.
        """
        if self.state_file is None:
            return measure()
        if not self.state_file.is_file():
            tensors = measure()
            if rank() > 0:
                return tensors
            with disk(self.state_file.parent):
                save_whole(self.state_file, tensors)
        return load_file(self.state_file)
