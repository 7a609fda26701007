"""The windows of each training step, and a check that parameters are finite."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def all_finite(network: torch.nn.Module) -> bool:
    """Return True if all parameters are finite. The host waits for the device only once."""
    return bool(torch.stack([torch.isfinite(parameter).all() for parameter in network.parameters()]).all())


def rows_of_step(step: int, windows: int, batch: int, seed: int) -> Tensor:
    """Return the indices of the windows of a step, int64 [batch].

    Every window comes once per epoch. The order follows from the step and the seed alone.
    """
    positions = range(step * batch, (step + 1) * batch)
    return torch.stack([_order(position // windows, windows, seed)[position % windows] for position in positions])


@lru_cache(maxsize=2)
def _order(epoch: int, windows: int, seed: int) -> Tensor:
    return torch.randperm(windows, generator=torch.Generator().manual_seed((seed << 20) + epoch))
