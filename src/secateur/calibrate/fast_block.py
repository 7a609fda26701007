"""The stock block with a few of its parts exchanged for faster ones, on a CPU in float32.

The forward stays that of transformers, so that any family and any version works. Exchanged are linear modules (weights packed once into
the layout that oneDNN multiplies fastest) and RMS norms (one pass over memory less). A norm is exchanged only where it gives what the
original gives on a probe; everything else stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_ONEDNN = torch.ops.mkldnn
_PACKS = torch.backends.mkldnn.is_available() and all(hasattr(_ONEDNN, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
_WORTH_PACKING = 16384  # tokens; packing takes as long as is won on some 5,000 to 10,000


@contextmanager
def faster(block: nn.Module, tokens: int, at_once: int) -> Iterator[None]:
    """Exchange parts of a loaded block for as long as this lasts; its linear modules have no weights of their own meanwhile.

    Args:
        block: the block with its weights.
        tokens: how many will pass through it.
        at_once: about how many it will be given at once.
    """
    exchanged: dict[str, nn.Module] = {}
    for path, part in list(block.named_modules()):
        if (new := _faster_part(part, tokens, at_once)) is not None:
            exchanged[path] = part
            block.set_submodule(path, new)
    try:
        yield
    finally:
        for path, part in exchanged.items():
            block.set_submodule(path, part)


def _faster_part(part: nn.Module, tokens: int, at_once: int) -> nn.Module | None:
    weight = getattr(part, "weight", None)
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    if type(part) is nn.Linear and _PACKS and tokens >= _WORTH_PACKING:
        packed = _PackedLinear(part, at_once)
        part.to("meta")  # the weights are not kept twice
        return packed
    epsilon = getattr(part, "variance_epsilon", None)
    if isinstance(epsilon, float):
        norm = _RMSNorm(weight, epsilon)
        probe = torch.linspace(-3, 3, 2 * len(weight)).view(2, -1)
        return norm if torch.allclose(norm(probe), part(probe), rtol=1e-5, atol=1e-6) else None
    return None


class _PackedLinear(nn.Module):
    def __init__(self, linear: nn.Linear, at_once: int) -> None:
        super().__init__()
        self.packed = _ONEDNN._reorder_linear_weight(linear.weight.detach(), at_once)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _ONEDNN._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


class _RMSNorm(nn.Module):
    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(self.epsilon).rsqrt_()
        out: Tensor = (x * scale).mul_(self.weight)
        return out
