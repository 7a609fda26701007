"""Blocks small enough to cut by hand: 2 features, 4 query heads of width 2 on 2 key-value heads, 3 feed-forward units.

Every entry says where it is: 1000 x the number of its matrix + 10 x its row + its column. Biases have 0.5 more than
the first column of their row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.models.family import Family, all_families
from secateur.models.view import BlockDims, BlockView

F64 = torch.float64
DIMS = BlockDims(hidden=2, heads=4, groups=2, head_width=2, ffn=3)
NUMBER = {"q": 1, "k": 2, "v": 3, "o": 4, "gate": 5, "up": 6, "down": 7}
SHAPES = {"q": (8, 2), "k": (4, 2), "v": (4, 2), "o": (2, 8), "gate": (3, 2), "up": (3, 2), "down": (2, 3)}


def weight(name: str) -> Tensor:
    rows, columns = SHAPES[name]
    return 1000 * NUMBER[name] + 10 * torch.arange(rows, dtype=F64)[:, None] + torch.arange(columns, dtype=F64)


def bias(name: str) -> Tensor:
    return weight(name)[:, 0] + 0.5


def block(family_name: str, *, biases: bool = True) -> BlockView:
    """A block of LLaMA, OPT, Phi or Phi-3 with the weights above; matrices that are fused lie one above the other."""
    family = all_families()[family_name]
    tensors: dict[str, Tensor] = {}
    for number, path in enumerate(family.norms):
        tensors[f"{path}.weight"] = torch.tensor([1.0, 2.0], dtype=F64) + 10 * number
        if family.norm.centred:
            tensors[f"{path}.bias"] = torch.tensor([3.0, 4.0], dtype=F64) + 10 * number
    for path in dict.fromkeys(family.matrices.values()):
        names = [name for name in family.matrices if family.matrices[name] == path]
        tensors[f"{path}.weight"] = torch.cat([weight(name) for name in names])
        if biases:
            tensors[f"{path}.bias"] = torch.cat([bias(name) for name in names])
    return BlockView(family, DIMS, 0, tensors, dtype=F64)


def family(name: str) -> Family:
    return all_families()[name]


def equals(tensor: Tensor, expected: list[float] | list[list[float]]) -> bool:
    return torch.equal(tensor, torch.tensor(expected, dtype=F64))
