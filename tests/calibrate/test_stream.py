"""The stream of blocks against the whole model: the residual after each block, and the statistics of each input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur import api
from secateur.calibrate import stream as stream_module
from secateur.calibrate.statistics import InputNorm
from secateur.calibrate.stream import Stream
from secateur.models.load import open_checkpoint
from tests.tiny import MODEL_TYPES, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_residual_stream_equals_the_whole_model(
    model_type: str, spill: bool, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "TOKENS_A_BATCH", 80)  # 4 windows and a remainder of 2
    model = tiny_model(model_type)
    view = api.view_model(model)
    stream = Stream(view, windows, device=CPU, dtype=torch.float32, spill=tmp_path / "spill.bin" if spill else None)
    hidden = model(windows, output_hidden_states=True).hidden_states
    assert torch.allclose(stream.hidden_STD, hidden[0], atol=1e-6)
    for block in view.iterate():
        stream.advance(block)
        if block.index + 1 < view.blocks:  # the last entry of hidden_states is behind the final norm
            torch.testing.assert_close(stream.hidden_STD, hidden[block.index + 1].detach(), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "spill.bin").exists() is spill


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_embeddings_are_those_of_a_model_loaded_in_the_dtype_of_the_stream(
    model_type: str,
    windows: torch.Tensor,
    saved: Callable[..., Path],
) -> None:
    """Whatever the dtype of the files: the scale of an embedding is a constant of a model's dtype."""
    folder = saved(model_type, dtype=torch.bfloat16)
    stream = Stream(open_checkpoint(str(folder)).view(), windows, device=CPU, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(stream.hidden_STD, model(windows, output_hidden_states=True).hidden_states[0])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_listeners_hear_every_token_once_and_nothing_moves(
    model_type: str, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "TOKENS_A_BATCH", 80)
    view = api.view_model(tiny_model(model_type))
    stream = Stream(view, windows, device=CPU, dtype=torch.float32)
    before = stream.hidden_STD.clone()
    block = view.block(0)
    paths = {view.family.matrices[view.family.input_of(name)] for name in block.names}
    heard = dict.fromkeys(paths, 0)

    def listener(path: str) -> stream_module.Listener:
        def listen(x: torch.Tensor) -> None:
            heard[path] += len(x)

        return listen

    stream.observe(block, {path: listener(path) for path in paths})
    assert set(heard.values()) == {windows.numel()}
    assert torch.equal(stream.hidden_STD, before)


def test_only_one_block_has_weights(windows: torch.Tensor) -> None:
    view = api.view_model(tiny_model("llama"))
    stream = Stream(view, windows, device=CPU, dtype=torch.float32)
    for block in view.iterate():
        stream.advance(block)
        assert all(p.is_meta for p in stream._blocks.parameters())


def test_norms_do_not_depend_on_how_tokens_are_cut_into_batches() -> None:
    x = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0))
    whole, parts = InputNorm(7, CPU), InputNorm(7, CPU)
    whole.update(x)
    for part in x.split(33):
        parts.update(part)
    expected = x.double().square().sum(0).sqrt()
    for norm in (whole, parts):
        assert norm.tokens == 1000
        torch.testing.assert_close(norm.norm_I, expected, rtol=1e-6, atol=0)
    assert whole.finite()
    whole.update(torch.full((1, 7), torch.nan))
    assert not whole.finite()


def test_bfloat16_activations_are_summed_in_float32() -> None:
    norm = InputNorm(1, CPU)
    norm.update(torch.ones(100_000, 1, dtype=torch.bfloat16))
    assert norm.norm_I.item() == pytest.approx(100_000**0.5, rel=1e-6)
