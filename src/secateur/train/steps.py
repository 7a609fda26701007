"""The windows of each step of training, and whether what was trained is still finite."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def all_finite(network: torch.nn.Module) -> bool:
    """Whether all parameters are; the host waits once."""
    return bool(torch.stack([torch.isfinite(parameter).all() for parameter in network.parameters()]).all())


def rows_of_step(step: int, windows: int, batch: int, seed: int) -> Tensor:
    """The windows of a step, int64 [batch]: every window once an epoch, in an order that follows from the step and the seed alone."""
    positions = range(step * batch, (step + 1) * batch)
    return torch.stack([_order(position // windows, windows, seed)[position % windows] for position in positions])


@lru_cache(maxsize=2)
def _order(epoch: int, windows: int, seed: int) -> Tensor:
    return torch.randperm(windows, generator=torch.Generator().manual_seed((seed << 20) + epoch))
