"""Linear modules with their weights packed once into the layout that oneDNN multiplies fastest, on a CPU in float32.

The rest of the block, and its forward, stay those of transformers, so that any family and any version works.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_WORTH_PACKING = 16384  # tokens; packing takes as long as is won on some 5,000 to 10,000
_ONEDNN = torch.ops.mkldnn  # what torch's own compiler packs with; where a version lacks it, nothing is packed
_AVAILABLE = torch.backends.mkldnn.is_available() and all(
    hasattr(_ONEDNN, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
)


@contextmanager
def packed(block: nn.Module, tokens: int, at_once: int) -> Iterator[None]:
    """Exchange the linear modules of a loaded block for packed ones for as long as this lasts; their own weights are let go.

    Args:
        block: the block with its weights.
        tokens: how many will pass through it; nothing is exchanged where they are too few.
        at_once: about how many it will be given at once.
    """
    exchanged: dict[str, nn.Linear] = {}
    if _AVAILABLE and tokens >= _WORTH_PACKING:
        for path, part in list(block.named_modules()):
            if type(part) is nn.Linear and part.weight.device.type == "cpu" and part.weight.dtype == torch.float32:
                block.set_submodule(path, _PackedLinear(part, at_once))
                exchanged[path] = part.to("meta")  # the weights are not kept twice
    try:
        yield
    finally:
        for path, part in exchanged.items():
            block.set_submodule(path, part)


class _PackedLinear(nn.Module):
    def __init__(self, linear: nn.Linear, at_once: int) -> None:
        super().__init__()
        self.packed_weight = _ONEDNN._reorder_linear_weight(linear.weight.detach(), at_once)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _ONEDNN._linear_pointwise(x, self.packed_weight, self.bias, "none", [], "")
        return out
