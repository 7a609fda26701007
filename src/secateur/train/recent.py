"""The loss of the last few steps, for the progress line of a training."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

KEPT = 10


class RecentLoss:
    """The losses of the last steps. They stay on the device until somebody asks: a step does not wait for the host."""

    def __init__(self, kept: int = KEPT) -> None:
        self._losses: deque[Tensor] = deque(maxlen=kept)

    def add(self, loss: Tensor) -> None:
        """Add the loss of a step, a scalar; the oldest one goes."""
        self._losses.append(loss.detach())

    def words(self) -> str:
        """The mean loss, and of how many steps; empty before the first."""
        if not self._losses:
            return ""
        last = len(self._losses)
        steps = f"{last} steps" if last > 1 else "step"
        return f"loss {float(torch.stack(list(self._losses)).mean()):.3f} (last {steps})"
