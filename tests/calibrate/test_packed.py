"""A block with packed linear modules against the stock one, for every model type."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur import api
from secateur.calibrate import packed as packed_module
from secateur.calibrate.packed import packed
from secateur.calibrate.stream import Stream
from tests.tiny import MODEL_TYPES, tiny_model

MANY = packed_module._WORTH_PACKING


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_packed_block_computes_what_the_stock_one_does(
    model_type: str, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = api.view_model(tiny_model(model_type))
    fast, stock = (Stream(view, windows, device=torch.device("cpu"), dtype=torch.float32) for _ in range(2))
    for block in view.iterate():
        stock.advance(block)
        with monkeypatch.context() as patch:
            patch.setattr(packed_module, "_WORTH_PACKING", 1)
            fast.advance(block)
        torch.testing.assert_close(fast.hidden_STD, stock.hidden_STD, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not packed_module._AVAILABLE, reason="this torch has no oneDNN packing")
def test_linear_modules_are_put_back_without_their_weights() -> None:
    block = tiny_model("llama").get_decoder().layers[0]
    before = dict(block.named_modules())
    linears = [part for part in before.values() if type(part) is nn.Linear]
    with packed(block, MANY, 64):
        assert not any(type(part) is nn.Linear for part in block.modules())
    assert all(part is before[path] for path, part in block.named_modules())
    assert all(part.weight.is_meta for part in linears)


@pytest.mark.parametrize(
    ("part", "tokens"), [(nn.Linear(8, 8), MANY - 1), (nn.Linear(8, 8).bfloat16(), MANY), (nn.LayerNorm(8), MANY)]
)
def test_too_few_tokens_another_dtype_and_other_modules_change_nothing(part: nn.Module, tokens: int) -> None:
    block = nn.Sequential(part)
    with packed(block, tokens, 64):
        assert block[0] is part
