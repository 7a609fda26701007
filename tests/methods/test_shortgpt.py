"""ShortGPT against a naive float64 reference, and what a shorter model must keep right: caches, windows, widths,
configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from secateur import api
from tests.tiny import BLOCKS, FAMILY_TYPES, some_ids, tiny_model

_FEW = {"steps": 2, "unmet": "cut"}
WINDOWED = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


def _reference(model: Any, windows: torch.Tensor) -> list[float]:
    """1 - mean cosine of what enters and what leaves each block, token by token."""
    seen: list[list[float]] = [[] for _ in range(BLOCKS)]

    def hook(index: int) -> Any:
        def listen(_: Any, inputs: Any, output: torch.Tensor) -> None:
            for x, y in zip(inputs[0].flatten(0, 1).double(), output.flatten(0, 1).double(), strict=True):
                seen[index].append(float(x @ y / (x @ x).sqrt() / (y @ y).sqrt()))

        return listen

    view = api.view_model(model)
    for index in range(BLOCKS):
        model.get_submodule(f"{view.family.blocks}.{index}").register_forward_hook(hook(index))
    with torch.no_grad():
        model(windows)
    return [1 - sum(values) / len(values) for values in seen]


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_influence_is_that_of_the_definition_and_the_lowest_go(model_type: str, windows: torch.Tensor) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    plan = api.plan(model, "shortgpt", windows, sparsity=1 / 3)
    expected = _reference(tiny_model(model_type, dtype=torch.float64), windows)
    assert [block.influence for block in plan.blocks] == pytest.approx(expected, rel=1e-9)
    assert [block.dropped for block in plan.blocks] == [value == min(expected) for value in expected]
    ends = api.plan(model, "shortgpt", windows, sparsity=1 / 3, first=1, last=1)
    assert [block.dropped for block in ends.blocks] == [False, True, False]


@pytest.mark.parametrize(
    ("model_type", "how"),
    [*((t, {}) for t in FAMILY_TYPES), ("qwen2", WINDOWED), ("qwen3", WINDOWED), ("mistral", {"sliding_window": 5})],
)
def test_a_shorter_model_is_the_stock_one_without_those_blocks(
    model_type: str, how: dict[str, Any], saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    """The first block goes, so that every number behind it changes; it loads as a stock model, with a cache and
    without.
    """
    dense = saved(model_type, **how)
    record = api.prune(
        api.Request(str(dense), "shortgpt", sparsity=0.3, calibration=ids_file, stock_only=True, options={"last": 2}),
        tmp_path / "out",
    )
    assert record["sparsity_measured"] == pytest.approx(1 / 3)
    model, shorter = (AutoModelForCausalLM.from_pretrained(path) for path in (dense, tmp_path / "out"))
    assert type(model) is type(shorter)
    blocks = model.get_submodule(api.view_model(model).family.blocks)
    del blocks[0]
    for index, block in enumerate(blocks):
        block.self_attn.layer_idx = index
    model.config.num_hidden_layers = 2
    if getattr(model.config, "layer_types", None):
        assert shorter.config.layer_types == model.config.layer_types[1:]
        model.config.layer_types = model.config.layer_types[1:]
    ids = some_ids(2, 20)
    torch.testing.assert_close(shorter(ids).logits, model(ids).logits)
    mask = torch.ones_like(ids)
    with_cache, without = (
        shorter.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=c)
        for c in (True, False)
    )
    assert torch.equal(with_cache, without)
    assert record["params_after"] == sum(p.numel() for p in shorter.parameters())
    shorter.save_pretrained(tmp_path / "again")


def test_blocks_of_unequal_widths_keep_their_own(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    request = api.Request(str(saved("opt")), "magnitude", pattern="rows", options={"scope": "model"}, sparsity=0.4)
    api.prune(request, tmp_path / "narrow")
    api.prune(
        api.Request(str(tmp_path / "narrow"), "shortgpt", sparsity=0.3, calibration=ids_file, options={"last": 2}),
        tmp_path / "short",
    )
    narrow, short = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("narrow", "short"))
    assert short.config.pruned_widths == narrow.config.pruned_widths[1:]
    del narrow.model.decoder.layers[0]
    torch.testing.assert_close(short(some_ids()).logits, narrow(some_ids(), use_cache=False).logits)


@pytest.mark.parametrize("model_type", [t for t in FAMILY_TYPES if t != "gemma3_text"])
def test_fit_brings_what_is_left_nearer_to_the_dense_model(model_type: str, windows: torch.Tensor) -> None:
    model, far = tiny_model(model_type, dtype=torch.float64), {}
    with torch.no_grad():
        dense = model(windows).logits
        for fit in (True, False):
            plan = api.plan(model, "shortgpt", windows, sparsity=2 / 3, first=1, fit=fit)
            assert [block.dropped for block in plan.blocks] == [False, True, True]
            far[fit] = float((api.cut(model, plan)(windows).logits - dense).square().mean())
    assert far[True] < far[False]


def test_only_the_block_before_a_dropped_one_is_fitted(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    request = api.Request(str(saved("llama")), "shortgpt", sparsity=1 / 3, calibration=ids_file, options={"fit": True})
    record = api.prune(request, tmp_path / "out")
    plan = api.read_plan(tmp_path / "out")
    gone = [block.dropped for block in plan.blocks].index(True)
    assert [block.index for block in plan.blocks if block.updated] == ([gone - 1] if gone else [])
    assert record["updated"] == bool(gone)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(api.SecateurError, match=r"fit: a norm .post_attention_layernorm. stands between"):
        api.prepare(replace(request, model=str(saved("gemma3_text"))))
    with pytest.raises(api.UsageError, match="damping is 0; it must be above 0"):
        api.prepare(replace(request, options={"fit": True, "damping": 0.0}))
    api.prune(
        api.Request(request.model, "disp_llm", sparsity=0.3, calibration=ids_file, options=_FEW), tmp_path / "selects"
    )
    with pytest.raises(api.SecateurError, match="fit: its blocks write parts of the residual stream"):
        api.prepare(replace(request, model=str(tmp_path / "selects")))


def test_a_fit_is_the_same_when_resumed_and_with_the_stream_on_disk(
    saved: Callable[..., Path],
    ids_file: str,
    tmp_path: Path,
    interrupted_at: Callable[..., AbstractContextManager[None]],
) -> None:
    folder = str(saved("llama", num_hidden_layers=4, dtype=torch.bfloat16))
    request = api.Request(
        folder, "shortgpt", sparsity=0.25, calibration=ids_file, options={"fit": True, "first": 1, "last": 1}
    )
    api.prune(request, tmp_path / "whole")
    with interrupted_at("block-00001", "plan-00002"):
        api.prune(request, tmp_path / "resumed")
    api.prune(request, tmp_path / "resumed", resume=True)
    api.prune(replace(request, spill=True), tmp_path / "spilled")
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == whole
    assert (tmp_path / "spilled" / "model.safetensors").read_bytes() == whole
    assert {t.dtype for t in load_file(tmp_path / "whole" / "model.safetensors").values()} == {torch.bfloat16}


def test_params_removed_and_what_is_refused(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    dense = str(saved("llama"))
    request = api.Request(dense, "shortgpt", params_removed=0.4, calibration=ids_file)
    record = api.prune(request, tmp_path / "nearest")
    assert record["sparsity_measured"] == pytest.approx(1 / 3), "0.283 is nearer to 0.4 than 0.566 is"
    record = api.prune(replace(request, at_least=True), tmp_path / "out")
    assert record["pruning_ratio"] >= 0.4
    assert record["sparsity_measured"] == pytest.approx(2 / 3)
    for wrong, words in (
        ({"sparsity": 0.9}, "of 3 blocks would leave nothing; use less than 0.8333"),
        ({"sparsity": 0.1}, "of 3 blocks is less than half a block; the least is 0.1667"),
        ({"params_removed": 0.95}, "dropping blocks can remove at most"),
        (
            {"sparsity": 0.6, "options": {"first": 2}},
            "removes 2 of 3 blocks, but first=2 and last=0 allow 1; use a smaller",
        ),
        ({"sparsity": 0.6, "modules": "mlp"}, "--modules does not go with shortgpt"),
    ):
        with pytest.raises(api.UsageError, match=words):
            api.prepare(api.Request(dense, "shortgpt", **wrong))
    api.prune(api.Request(dense, "slicegpt", sparsity=0.25, calibration=ids_file), tmp_path / "sliced")
    with pytest.raises(api.SecateurError, match="its residual stream is rotated"):
        api.prepare(api.Request(str(tmp_path / "sliced"), "shortgpt", sparsity=0.3))
