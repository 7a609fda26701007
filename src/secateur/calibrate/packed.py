"""Linear modules whose weights are packed once into the layout that oneDNN multiplies fastest (CPU, float32).

Everything else in the block stays that of transformers, so that any family and any version works.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_WORTH_PACKING = 16384  # tokens; packing costs as much time as it saves on 5,000 to 10,000 tokens
_ONEDNN = torch.ops.mkldnn  # torch's own compiler packs with this; a torch version without it packs nothing
_AVAILABLE = torch.backends.mkldnn.is_available() and all(
    hasattr(_ONEDNN, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
)


_as_if = 0  # tokens of the run that this one rehearses


@contextmanager
def packed_as_if(tokens: int) -> Iterator[None]:
    """Pack inside the `with` statement as a run over this many tokens would, though fewer pass: for a rehearsal."""
    global _as_if
    before, _as_if = _as_if, tokens
    try:
        yield
    finally:
        _as_if = before


@contextmanager
def packed(block: nn.Module, tokens: int, at_once: int) -> Iterator[None]:
    """Replace the linear modules of a loaded block by packed ones inside the `with`. The unpacked weights are freed.

    Args:
        block: the block with its weights.
        tokens: the number of tokens that will pass through it; with too few, nothing is packed.
        at_once: about the number of tokens of one batch.
    """
    originals: dict[str, nn.Linear] = {}
    if _AVAILABLE and max(tokens, _as_if) >= _WORTH_PACKING:
        for path, part in list(block.named_modules()):
            weight = part.weight if type(part) is nn.Linear else None
            if weight is not None and weight.numel() and (weight.device.type, weight.dtype) == ("cpu", torch.float32):
                block.set_submodule(path, _PackedLinear(part, at_once))
                originals[path] = part.to("meta")  # the weights are not in memory twice
    try:
        yield
    finally:
        for path, part in originals.items():
            block.set_submodule(path, part)


class _PackedLinear(nn.Module):
    def __init__(self, linear: nn.Linear, at_once: int) -> None:
        super().__init__()
        self.packed_weight = _ONEDNN._reorder_linear_weight(linear.weight.detach(), at_once)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _ONEDNN._linear_pointwise(x, self.packed_weight, self.bias, "none", [], "")
        return out
