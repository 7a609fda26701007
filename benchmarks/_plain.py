"""What the straightforward implementations share that prune weights: a whole model in memory, one window at a time, and
the comparison of results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _common import Shape
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel


class _Caught(Exception):
    pass


class _Catcher(nn.Module):
    """Stands for the first block: keeps what enters it."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs, self.count = inputs, 0
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.inputs[self.count] = hidden[0]
        self.count += 1
        self.arguments = arguments
        raise _Caught


def block_inputs(model: PreTrainedModel, windows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The inputs of the first block, [S, T, D], and the arguments that all blocks receive."""
    inputs = torch.zeros(*windows.shape, model.config.hidden_size)
    catcher, first = _Catcher(inputs), model.model.layers[0]
    model.model.layers[0] = catcher
    for window in windows:
        try:
            model(window[None])
        except _Caught:
            continue
    model.model.layers[0] = first
    return inputs, catcher.arguments


def weights(folder: Path) -> Any:
    """The weights of a small checkpoint, one file."""
    return safe_open(folder / "model.safetensors", framework="pt")


def differing(one: Path, other: Path, shape: Shape) -> float:
    """The fraction of the entries of the block matrices that are zero in one result alone."""
    count = 0
    with weights(one) as left, weights(other) as right:
        for block in range(shape.blocks):
            for path in shape.block_matrices:
                name = f"model.layers.{block}.{path}.weight"
                count += int(((left.get_tensor(name) == 0) != (right.get_tensor(name) == 0)).sum())
    return count / (shape.blocks * shape.block_parameters)
