"""Unusual configurations.

The stream equals the whole model, and the narrowed, reloaded model equals the one in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur import api
from tests.tiny import some_ids

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 16,
}
CORNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral, sliding window": ("mistral", {"sliding_window": 5}),
    "qwen2, sliding window in the upper blocks": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3, sliding window": ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "phi3, sliding window": ("phi3", {"sliding_window": 5}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 12}),
    "llama, one key-value head": ("llama", {"num_key_value_heads": 1}),
    "llama, as many key-value heads as heads": ("llama", {"num_key_value_heads": 4}),
    "opt, no biases": ("opt", {"enable_bias": False}),
    "opt, norms without weights": ("opt", {"layer_norm_elementwise_affine": False}),
    "phi, tied": ("phi", {"tied": True}),
    "llama, float16": ("llama", {"dtype": torch.float16}),
}


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("pattern", ["unstructured", "rows"])
def test_streaming_equals_the_whole_model(
    corner: str, pattern: str, saved: Callable[..., Path], ids_file: str, windows: torch.Tensor, tmp_path: Path
) -> None:
    model_type, how = CORNERS[corner]
    dense = saved(model_type, **how)
    api.prune(api.Request(str(dense), "wanda", sparsity=0.5, pattern=pattern, calibration=ids_file), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    in_memory = api.cut(model, api.plan(model, "wanda", windows, sparsity=0.5, pattern=pattern, dtype=torch.float32))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(reloaded(some_ids(2, 20)).logits, in_memory(some_ids(2, 20)).logits)
    assert not torch.equal(reloaded(some_ids(2, 20)).logits, model(some_ids(2, 20)).logits)
    ids = some_ids(1, 24)
    mask = torch.ones_like(ids)
    with_cache, without = (
        reloaded.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=c)
        for c in (True, False)
    )
    assert torch.equal(with_cache, without) or "longrope" in corner, "longrope changes its factors when the text grows"
