"""LLM-Pruner: scores against autograd on the whole model, against brute force, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur import api
from secateur.methods.llm_pruner import LLMPruner, channel_scores, group_scores
from secateur.models.view import ModelView
from secateur.plan.allocate import MEMBERS
from secateur.plan.run import Run
from tests.tiny import MODEL_TYPES, tiny_model

CPU = torch.device("cpu")
FLOAT64 = Run(0.0, 0, CPU, torch.float64)
REDUCE = {
    "sum": sum,
    "mean": lambda parts: sum(parts) / len(parts),
    "max": max,
    "product": lambda parts: torch.tensor(parts, dtype=torch.float64).prod() ** (1 / len(parts)),
    "last": lambda p: p[-1],
}


def _losses(model: Any, windows: Tensor) -> Tensor:
    """The mean loss of each window, float64."""
    logits_BTV = model(input_ids=windows).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), windows[:, 1:], reduction="none").mean(1)


def _parts(view: ModelView, index: int, name: str, reader: str, unit: int, units: int) -> list[Tensor]:
    """The weights of a unit in one matrix, and its biases: views of the tensors."""
    block = view.block(index)
    weight_OI, bias_O = block.matrix(name), block.bias(name)
    each = weight_OI.shape[name == reader] // units
    mine = slice(unit * each, (unit + 1) * each)
    if name == reader:
        return [weight_OI[:, mine]]
    return [weight_OI[mine]] + ([] if bias_O is None else [bias_O[mine]])


def _naive(model: Any, windows: Tensor, index: int, options: LLMPruner) -> dict[str, list[float]]:
    """Every gradient of every window, then the formulas."""
    view, sources = api.view_model(model), []
    for loss in _losses(model, windows):
        model.zero_grad()
        loss.backward(retain_graph=True)
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        sources.append(replace(view, source=api.ModelSource(gradients)))
    dims, scores = view.dims(index), {}
    for space, members in MEMBERS.items():
        units = dims.ffn if space == "ffn" else dims.groups
        names = [name for name in (*members.writers, members.reader) if name in view.family.matrices]
        scores[space] = []
        for unit in range(units):
            parts = []
            for name in names:
                weights = torch.cat([w.flatten() for w in _parts(view, index, name, members.reader, unit, units)])
                g = torch.stack([torch.cat([w.flatten() for w in _parts(s, index, name, members.reader, unit, units)]) for s in sources])
                first, second = -weights * g.mean(0), weights**2 * (g**2).mean(0) / 2
                change = {"first": first, "second": second, "mixed": first + second}[options.order]
                parts.append(float(change.sum().abs() if options.granularity == "vector" else change.abs().sum()))
            scores[space].append(float(REDUCE[options.reduce](parts)))
    return scores


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_scores_are_those_of_the_formulas(model_type: str, windows: Tensor) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    for order, granularity, reduce in (("first", "parameter", "sum"), ("mixed", "vector", "max"), ("second", "parameter", "product")):
        options = LLMPruner(order=order, granularity=granularity, reduce=reduce)
        found = group_scores(api.view_model(model), windows[:3], options, FLOAT64)
        for space, expected in _naive(model, windows[:3], 1, options).items():
            torch.testing.assert_close(found[1][space], torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("reduce", ["mean", "last"])
def test_the_other_ways_to_reduce(reduce: str, windows: Tensor) -> None:
    model = tiny_model("opt", dtype=torch.float64)
    options = LLMPruner(granularity="vector", reduce=reduce)
    found = group_scores(api.view_model(model), windows[:3], options, FLOAT64)[2]
    for space, expected in _naive(model, windows[:3], 2, options).items():
        torch.testing.assert_close(found[space], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("model_type", ["llama", "opt", "phi", "phi3"])
def test_a_step_towards_zero_changes_the_loss_as_the_first_order_says(model_type: str, windows: Tensor) -> None:
    """The weights of a unit in one matrix, times 1 - e: the change over e tends to the estimate as e goes to 0, and its error goes with e."""
    model = tiny_model(model_type, dtype=torch.float64).requires_grad_(False)
    view = api.view_model(model)
    dense = _losses(model, windows).mean()
    for space, units in (("groups", view.dims(1).groups), ("ffn", view.dims(1).ffn)):
        members = MEMBERS[space]
        names = [name for name in (*members.writers, members.reader) if name in view.family.matrices]
        changes: dict[float, list[float]] = {0.1: [], 0.01: []}
        for name in names:
            for step, found in changes.items():
                parts = _parts(view, 1, name, members.reader, units - 1, units)
                kept = [part.clone() for part in parts]
                for part in parts:
                    part *= 1 - step
                found.append(float((_losses(model, windows).mean() - dense) / step))
                for part, before in zip(parts, kept, strict=True):
                    part.copy_(before)
        estimate = group_scores(view, windows, LLMPruner(granularity="vector"), FLOAT64)[1][space][units - 1]
        errors = [abs(sum(map(abs, found)) - estimate) for found in changes.values()]
        assert errors[1] < 0.02 * estimate
        assert errors[1] < max(0.3 * errors[0], 1e-3 * estimate)  # a ReLU has kinks


def test_query_heads_count_for_the_key_value_head_they_use(windows: Tensor) -> None:
    """With 4 query heads on 2 key-value heads, heads 2 and 3 belong to group 1; folding h onto h modulo 2 would blame group 0 for head 2."""
    model = tiny_model("llama", dtype=torch.float64)
    options = LLMPruner(granularity="vector", reduce="last")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[:, 16:] = 0  # what heads 2 and 3 write
    score_G = group_scores(api.view_model(model), windows, options, FLOAT64)[1]["groups"]
    assert score_G[0] > 0
    assert score_G[1] == 0


def test_the_lowest_units_go(windows: Tensor) -> None:
    model = tiny_model("llama")
    options = LLMPruner(keep_first=1)
    scores = group_scores(api.view_model(model), windows, options, Run(0.3, 0, CPU, torch.float32))
    local = api.plan(model, "llm_pruner", windows, sparsity=0.3, keep_first=1).blocks
    assert not local[0].keep
    for index in (1, 2):
        for space, score_U in scores[index].items():
            kept = local[index].keep[space].long()
            gone = torch.tensor([u for u in range(len(score_U)) if u not in kept], dtype=torch.long)
            assert abs(len(kept) - len(local[3 - index].keep[space])) <= 1
            assert not len(gone) or score_U[gone].max() <= score_U[kept].min()
    ranked = api.plan(model, "llm_pruner", windows, sparsity=0.3, keep_first=1, ranking="global").blocks
    assert [len(kept) for kept in ranked[1].keep.values()] != [len(kept) for kept in ranked[2].keep.values()]
    assert not ranked[0].keep


@pytest.mark.parametrize("options", [{"ranking": "local"}, {"ranking": "global"}, {"mode": "channel"}])
def test_the_sparsity_is_that_of_the_whole_model(options: dict[str, str], saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    request = api.Request(str(saved("qwen2")), "llm_pruner", params_removed=0.3, calibration=ids_file, options=options)
    record = api.prune(request, tmp_path / "out")
    assert 0.3 <= record["sparsity_measured"] == record["pruning_ratio"] < 0.33
    assert api.inspect(str(tmp_path / "out"))["parameters"] == record["params_after"]
    spilled = api.prune(replace(request, spill=True), tmp_path / "spilled")
    assert spilled["buffer_bytes"] == 4 * 6 * 20 * 32 * 4  # what enters each of three blocks, and leaves the last
    assert api.read_plan(tmp_path / "spilled").blocks == api.read_plan(tmp_path / "out").blocks
    assert not list((tmp_path / "spilled").glob("scratch*"))


@pytest.mark.parametrize("model_type", ["llama", "opt", "phi", "phi3"])
def test_channels_are_one_choice_for_all_blocks(model_type: str, windows: Tensor) -> None:
    """Scores are those of the formulas, the least important channels go from every block, and as many parameters as asked."""
    model = tiny_model(model_type, dtype=torch.float64)
    view = api.view_model(model)
    score_D = channel_scores(view, windows, LLMPruner(mode="channel"), FLOAT64)
    _losses(model, windows).mean().backward()
    expected_D = torch.zeros(32, dtype=torch.float64)
    gradients = api.ModelSource({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()})
    for block, gradient in zip(view.iterate(), replace(view, source=gradients).iterate(), strict=True):
        for name in block.names:
            expected_D += (block.matrix(name) * gradient.matrix(name)).abs().sum(1 if name in ("o", "down") else 0)
            if name in ("o", "down") and block.bias(name) is not None:
                expected_D += (block.bias(name) * gradient.bias(name)).abs()
    torch.testing.assert_close(score_D, expected_D, rtol=1e-3, atol=1e-9)
    plan = api.plan(model, "llm_pruner", windows, sparsity=0.3, mode="channel")
    kept = plan.blocks[0].keep["mlp_in"].long()
    assert all(torch.equal(indices.long(), kept) for block in plan.blocks for indices in block.keep.values())
    assert set(kept.tolist()) == set(score_D.topk(len(kept)).indices.tolist())
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, api.cut(model, plan)))
    assert 0.3 <= 1 - after / before < 0.34


def test_the_papers_calibration_is_the_default_and_its_ends_scale(saved: Callable[..., Path]) -> None:
    prepared = api.prepare(api.Request(str(saved("llama")), "llm_pruner", sparsity=0.2))
    assert (prepared.samples, prepared.seqlen, prepared.calibration) == (10, 64, "c4")  # 128 tokens, but for the model's maximum
    dry = api.estimate(prepared)
    assert dry["calibration_tokens"] == 640
    assert dry["memory_bytes"] > 4 * 640 * 4 * 32  # what enters each block, and what leaves the last
    assert LLMPruner().pruned_blocks(32) == range(4, 30)
    assert LLMPruner().pruned_blocks(12) == range(1, 12)
    assert LLMPruner().pruned_blocks(5) == range(5)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 0.9}, r"--sparsity 0.9 would empty a block: .* use --sparsity 0\.\d+ or less"),
    ({"sparsity": 0.9, "options": {"ranking": "global"}}, r"--sparsity 0.9 would empty a block: .* use --sparsity 0\.\d+ or less"),
    ({"sparsity": 0.5, "options": {"keep_first": "2", "keep_last": "1"}}, r"keep_first and keep_last leave none of 3 blocks to prune"),
    ({"sparsity": 0.5, "options": {"keep_first": "x"}}, r"keep_first is x; it is a number of blocks"),
    ({"sparsity": 0.5, "options": {"order": "third"}}, r"unknown order 'third' \(allowed: first, second, mixed\)"),
    ({"sparsity": 0.9, "options": {"mode": "channel"}}, r"--sparsity 0.9 would empty the blocks: .* use --sparsity 0\.\d+ or less"),
    ({"sparsity": 0.5, "options": {"mode": "channel", "keep_last": "0"}}, r"keep_last does not go with mode=channel"),
    ({"sparsity": 0.5, "modules": "mlp"}, r"--modules does not go with llm_pruner"),
    ({"sparsity": 0.5, "stock_only": True}, r"--stock-only: llm_pruner"),
]


@pytest.mark.parametrize(("asked", "words"), BAD)
def test_bad_input_is_refused_in_one_line(asked: dict[str, Any], words: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    with pytest.raises(api.UsageError, match=words) as caught:
        api.prune(api.Request(str(saved("llama")), "llm_pruner", calibration=ids_file, **asked), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_gradients_that_say_nothing_are_refused(windows: Tensor, saved: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama")
    np.save(tmp_path / "one.npy", windows[:1].numpy())
    request = api.Request(str(saved("llama")), "llm_pruner", sparsity=0.3, calibration=str(tmp_path / "one.npy"), options={"order": "second"})
    with pytest.raises(api.SecateurError, match="order=second needs 2 windows or more"):
        api.prune(request, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    model.lm_head.weight.data.zero_()
    with pytest.raises(api.SecateurError, match="all gradients are zero"):
        api.plan(model, "llm_pruner", windows, sparsity=0.3)
