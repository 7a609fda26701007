"""A block with exchanged parts against the stock one, for every model type; what is not recognised stays."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur import api
from secateur.calibrate import fast_block
from secateur.calibrate import stream as stream_module
from secateur.calibrate.fast_block import faster
from secateur.calibrate.stream import Stream
from tests.tiny import MODEL_TYPES, tiny_model

MANY = fast_block._WORTH_PACKING


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_exchanged_parts_compute_what_the_stock_block_does(model_type: str, windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_block, "_WORTH_PACKING", 1)
    view = api.view_model(tiny_model(model_type))
    fast, stock = (Stream(view, windows, device=torch.device("cpu"), dtype=torch.float32) for _ in range(2))
    for block in view.iterate():
        fast.advance(block)
        with monkeypatch.context() as patch:
            patch.setattr(stream_module, "faster", lambda *_: nullcontext())
            stock.advance(block)
        torch.testing.assert_close(fast.hidden_STD, stock.hidden_STD, rtol=1e-5, atol=1e-5)


def test_parts_are_put_back() -> None:
    block = tiny_model("llama").get_decoder().layers[0]
    before = dict(block.named_modules())
    with faster(block, MANY, 64):
        assert not any(type(part) is nn.Linear for part in block.modules())
        assert not any("LlamaRMSNorm" in type(part).__name__ for part in block.modules())
    assert all(part is before[path] for path, part in block.named_modules())


class _OtherRMSNorm(nn.Module):
    """As Gemma's: the weight is what is added to one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)


@pytest.mark.parametrize("part", [_OtherRMSNorm(), nn.Linear(8, 8).bfloat16(), nn.GELU(), nn.LayerNorm(8)])
@torch.no_grad()
def test_what_is_not_the_same_stays(part: Any) -> None:
    block = nn.Sequential(part)
    with faster(block, MANY, 64):
        assert block[0] is part
