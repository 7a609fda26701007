"""Precision of numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32; a float64 tensor stays as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
