"""LLM-Pruner: scores against autograd on the whole model and against brute force, and which units are kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur import api
from secateur.methods import llm_pruner
from secateur.methods.llm_pruner import LLMPruner, channel_scores, group_scores
from secateur.models.runtime import SELECT_FIRST
from secateur.models.spaces import MEMBERS
from secateur.models.view import ModelView
from secateur.plan.pattern import parse_pattern
from secateur.plan.plan import BlockPlan
from secateur.plan.quantity import UNITS, Subject
from secateur.plan.run import Run
from secateur.plan.structures import SELECTIONS
from secateur.text.windows import IGNORE
from tests.layouts import layout_of
from tests.tiny import FAMILY_TYPES, MODEL_TYPES, able, tiny_model

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
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        }
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
                g = torch.stack(
                    [
                        torch.cat([w.flatten() for w in _parts(s, index, name, members.reader, unit, units)])
                        for s in sources
                    ]
                )
                first, second = -weights * g.mean(0), weights**2 * (g**2).mean(0) / 2
                change = {"first": first, "second": second, "mixed": first + second}[options.order]
                parts.append(float(change.sum().abs() if options.granularity == "vector" else change.abs().sum()))
            scores[space].append(float(REDUCE[options.reduce](parts)))
    return scores


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_scores_are_those_of_the_formulas(model_type: str, windows: Tensor) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    for order, granularity, reduce in (
        ("first", "parameter", "sum"),
        ("mixed", "vector", "max"),
        ("second", "parameter", "product"),
    ):
        options = LLMPruner(order=order, granularity=granularity, reduce=reduce)
        found = group_scores(api.view_model(model), windows[:3], options, FLOAT64)
        for space, expected in _naive(model, windows[:3], 1, options).items():
            torch.testing.assert_close(
                found[1][space], torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-9
            )


@pytest.mark.parametrize("reduce", ["mean", "last"])
def test_the_other_ways_to_reduce(reduce: str, windows: Tensor) -> None:
    model = tiny_model("opt", dtype=torch.float64)
    options = LLMPruner(granularity="vector", reduce=reduce)
    found = group_scores(api.view_model(model), windows[:3], options, FLOAT64)[2]
    for space, expected in _naive(model, windows[:3], 2, options).items():
        torch.testing.assert_close(found[space], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-15)


def _by_hand(model: Any, model_type: str, index: int, space: str, unit: int) -> dict[str, list[Tensor]]:
    """Matrix -> what it holds of a feed-forward unit, of a key-value head with its query heads, or of a residual
    feature: views of the stock parameters.
    """
    layout = layout_of(model_type)
    blocks, matrices = layout.blocks, layout.matrices
    head, query = slice(8 * unit, 8 * unit + 8), slice(16 * unit, 16 * unit + 16)
    if matrices["q"][1] == matrices["k"][1]:  # as many key-value heads as query heads
        query = head
    one = slice(unit, unit + 1)
    rows, columns = {
        "ffn": ({"gate": one, "up": one}, {"down": one}),
        "groups": ({"q": query, "k": head, "v": head}, {"o": query}),
        "channel": ({"o": one, "down": one}, dict.fromkeys(("q", "k", "v", "gate", "up"), one)),
    }[space]
    found = {}
    for name, (path, at) in matrices.items():
        module = model.get_submodule(f"{blocks}.{index}.{path}")
        if name in rows:
            found[name] = [
                t[at][rows[name]]
                for t in (module.weight.data, None if module.bias is None else module.bias.data)
                if t is not None
            ]
        elif name in columns:
            found[name] = [module.weight.data[at, columns[name]]]
    return found


def _smooth_model(model_type: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Float64 throughout (RMS norms of transformers are in float32), and with no kinks."""

    def rms_norm(norm: Any, x_BTD: Tensor) -> Tensor:
        gain_D, epsilon = norm.weight + layout.gain_offset, vars(norm).get("variance_epsilon") or norm.eps
        return gain_D * x_BTD / (x_BTD.square().mean(-1, keepdim=True) + epsilon).sqrt()

    layout = layout_of(model_type)
    model = tiny_model(model_type, dtype=torch.float64, **layout.smooth).requires_grad_(False)
    for kind in {type(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm")}:
        monkeypatch.setattr(kind, "forward", rms_norm)
    return model


@contextmanager
def _scaled(parts: list[Tensor], by: float) -> Iterator[None]:
    kept = [part.clone() for part in parts]
    for part in parts:
        part *= by
    yield
    for part, before in zip(parts, kept, strict=True):
        part.copy_(before)


def _slope(model: Any, windows: Tensor, parts: list[Tensor], step: float = 1e-3) -> float:
    """d loss / dt at t = 0 of all these parts times 1 - t: central differences, with an error of step^4."""

    def rise(t: float) -> float:
        found = []
        for way in (t, -t):
            with _scaled(parts, 1 - way):
                found.append(float(_losses(model, windows).mean()))
        return (found[0] - found[1]) / (2 * t)

    return (4 * rise(step) - rise(2 * step)) / 3


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_a_group_taken_by_hand_from_the_stock_model_changes_the_loss_as_its_terms_say(
    model_type: str, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All members of a group, and each alone, on their way to zero; and at zero the loss is that of the model without
    the group.
    """
    model = _smooth_model(model_type, monkeypatch)
    options = LLMPruner(granularity="vector", keep_first=1, keep_last=0)
    view = api.view_model(model)
    for block, sums in llm_pruner._gradients(view, windows, options, FLOAT64, options.pruned_blocks(view.blocks)):
        for space, unit in (("ffn", 0), ("ffn", 30), ("groups", 0), ("groups", 1)):
            parts = _by_hand(model, model_type, block.index, space, unit)
            terms = {
                name: float(change_U[unit])
                for name, change_U in llm_pruner.unit_changes(block, sums, options, space).items()
            }
            assert terms == pytest.approx(
                {name: _slope(model, windows, part) for name, part in parts.items()}, rel=1e-6, abs=1e-9
            )
            whole = [tensor for part in parts.values() for tensor in part]
            assert sum(terms.values()) == pytest.approx(_slope(model, windows, whole), rel=1e-6, abs=1e-9)
            units = block.dims.ffn if space == "ffn" else block.dims.groups
            kept = torch.tensor([u for u in range(units) if u != unit], dtype=torch.int32)
            plans = [
                BlockPlan(n, keep={space: kept}, of={space: units}) if n == block.index else BlockPlan(n)
                for n in range(3)
            ]
            without = float(_losses(api.cut(model, api.Plan({}, tuple(plans))), windows).detach().mean())
            with _scaled(whole, 0):
                assert without == pytest.approx(float(_losses(model, windows).mean()), rel=1e-12)


@pytest.mark.parametrize("model_type", able("llm_pruner", FAMILY_TYPES, mode="channel"))
def test_a_channel_taken_by_hand_from_the_stock_model_changes_the_loss_as_its_terms_say(
    model_type: str, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its part of every matrix of all blocks on the way to zero; gains of norms, which read it too, have no term."""
    model = _smooth_model(model_type, monkeypatch)
    options, names = LLMPruner(mode="channel", granularity="vector"), list(layout_of(model_type).matrices)
    change_MD = llm_pruner.channel_changes(api.view_model(model), windows, options, FLOAT64)
    assert len(change_MD) == 3 * len(names)
    for channel in (0, 21):
        members = [
            t
            for index in range(3)
            for part in _by_hand(model, model_type, index, "channel", channel).values()
            for t in part
        ]
        assert float(sum(change_MD)[channel]) == pytest.approx(_slope(model, windows, members), rel=1e-6, abs=1e-9)
        kept = torch.tensor([d for d in range(32) if d != channel], dtype=torch.int32)
        spaces = [space for space in SELECTIONS if space != "ffn"]
        cut = [
            BlockPlan(n, keep=dict.fromkeys(spaces, kept), of=dict.fromkeys(spaces, 32), select=SELECT_FIRST)
            for n in range(3)
        ]
        without = float(_losses(api.cut(model, api.Plan({}, tuple(cut))), windows).detach().mean())
        by_hand = deepcopy(model)
        for index in range(3):
            for part in _by_hand(by_hand, model_type, index, "channel", channel).values():
                for tensor in part:
                    tensor.zero_()
            for module in by_hand.get_submodule(f"{layout_of(model_type).blocks}.{index}").modules():
                if "Norm" in type(module).__name__:
                    module.forward = partial(_norm_of_kept, deepcopy(module), kept.long())  # type: ignore[method-assign]
        assert without == pytest.approx(float(_losses(by_hand, windows).mean()), rel=1e-12)


def _norm_of_kept(norm: Any, kept: Tensor, x_BTD: Tensor) -> Tensor:
    """A norm over the features that are kept; the other has no reader."""
    x_BTW = x_BTD[..., kept]
    centred = x_BTW - x_BTW.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else x_BTW
    epsilon = norm.eps if isinstance(norm, torch.nn.LayerNorm) else norm.variance_epsilon
    y_BTW = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt() * norm.weight[kept]
    if getattr(norm, "bias", None) is not None:
        y_BTW = y_BTW + norm.bias[kept]
    return torch.zeros_like(x_BTD).index_copy(-1, kept, y_BTW)


def test_the_loss_of_a_task_is_on_the_answers(windows: Tensor) -> None:
    """The change is that of their mean loss, whatever share of the tokens they are."""
    model = tiny_model("opt", dtype=torch.float64)
    labels = windows.where(torch.arange(20) % 5 > 2, IGNORE)
    options = LLMPruner(mode="channel", order="mixed", granularity="vector")
    found_D = sum(llm_pruner.channel_changes(api.view_model(model), windows, options, replace(FLOAT64, labels=labels)))
    first_D = second_D = torch.zeros(32, dtype=torch.float64)
    for window_T, label_T in zip(windows, labels, strict=True):
        model.zero_grad()
        logits_TV = model(input_ids=window_T[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits_TV, label_T[1:], ignore_index=IGNORE).backward()
        for name, p in model.named_parameters():
            writes, reads = (
                re.search(r"layers.*(out_proj|fc2)", name),
                re.search(r"layers.*([qkv]_proj|fc1).weight", name),
            )
            if p.grad is not None and (writes or reads):
                change_DX = (p.detach() * p.grad if writes else (p.detach() * p.grad).t()).reshape(32, -1)
                first_D, second_D = (
                    first_D - change_DX.sum(1) / len(windows),
                    second_D + change_DX.square().sum(1) / (2 * len(windows)),
                )
    torch.testing.assert_close(found_D, first_D + second_D, rtol=1e-6, atol=1e-12)


def test_query_heads_count_for_the_key_value_head_they_use(windows: Tensor) -> None:
    """With 4 query heads on 2 key-value heads, heads 2 and 3 belong to group 1; folding h onto h modulo 2 would blame
    group 0 for head 2.
    """
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
def test_the_sparsity_is_that_of_the_whole_model(
    options: dict[str, str], saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    request = api.Request(str(saved("qwen2")), "llm_pruner", params_removed=0.3, calibration=ids_file, options=options)
    record = api.prune(request, tmp_path / "out")
    assert 0.3 <= record["sparsity_measured"] == record["pruning_ratio"] < 0.33
    assert api.inspect(str(tmp_path / "out"))["parameters"] == record["params_after"]
    spilled = api.prune(replace(request, spill=True), tmp_path / "spilled")
    assert spilled["buffer_bytes"] == 4 * 6 * 20 * 32 * 4  # what enters each of three blocks, and leaves the last
    assert api.read_plan(tmp_path / "spilled").blocks == api.read_plan(tmp_path / "out").blocks
    assert not list((tmp_path / "spilled").glob("scratch*"))


@pytest.mark.parametrize("model_type", able("llm_pruner", FAMILY_TYPES, mode="channel"))
def test_channels_are_one_choice_for_all_blocks(model_type: str, windows: Tensor) -> None:
    """Scores are those of the formulas, the least important channels go from every block, and as many parameters as
    asked.
    """
    model = tiny_model(model_type, dtype=torch.float64)
    view = api.view_model(model)
    score_D = channel_scores(view, windows, LLMPruner(mode="channel"), FLOAT64)
    _losses(model, windows).mean().backward()
    expected_D = torch.zeros(32, dtype=torch.float64)
    gradients = api.ModelSource(
        {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    )
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
    assert (prepared.samples, prepared.seqlen, prepared.calibration) == (
        10,
        64,
        "c4",
    )  # 128 tokens, but for the model's maximum
    dry = api.estimate(prepared)
    assert dry["calibration_tokens"] == 640
    assert dry["memory_bytes"] > 4 * 640 * 4 * 32  # what enters each block, and what leaves the last
    assert LLMPruner().pruned_blocks(32) == range(4, 30)
    assert LLMPruner().pruned_blocks(12) == range(1, 12)
    assert LLMPruner().pruned_blocks(5) == range(5)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 0.9}, r"--sparsity 0.9 would empty a block: .* use --sparsity 0\.\d+ or less"),
    (
        {"sparsity": 0.9, "options": {"ranking": "global"}},
        r"--sparsity 0.9 would empty a block: .* use --sparsity 0\.\d+ or less",
    ),
    (
        {"sparsity": 0.5, "options": {"keep_first": "2", "keep_last": "1"}},
        r"keep_first and keep_last leave none of 3 blocks to prune",
    ),
    ({"sparsity": 0.5, "options": {"keep_first": "x"}}, r"keep_first is x; it is a number of blocks"),
    ({"sparsity": 0.5, "options": {"order": "third"}}, r"unknown order 'third' \(allowed: first, second, mixed\)"),
    (
        {"sparsity": 0.9, "options": {"mode": "channel"}},
        r"--sparsity 0.9 would empty the blocks: .* use --sparsity 0\.\d+ or less",
    ),
    ({"sparsity": 0.5, "options": {"mode": "channel", "keep_last": "0"}}, r"keep_last does not go with mode=channel"),
    ({"sparsity": 0.5, "modules": "mlp"}, r"--modules does not go with llm_pruner"),
    (
        {"sparsity": 0.2, "options": {"mode": "channel"}, "stock_only": True},
        r"--stock-only: llm_pruner: its blocks read",
    ),
]


@pytest.mark.parametrize(("asked", "words"), BAD)
def test_bad_input_is_refused_in_one_line(
    asked: dict[str, Any], words: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    with pytest.raises(api.UsageError, match=words) as caught:
        api.prune(api.Request(str(saved("llama")), "llm_pruner", calibration=ids_file, **asked), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_gradients_that_say_nothing_are_refused(windows: Tensor, saved: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama")
    np.save(tmp_path / "one.npy", windows[:1].numpy())
    request = api.Request(
        str(saved("llama")),
        "llm_pruner",
        sparsity=0.3,
        calibration=str(tmp_path / "one.npy"),
        options={"order": "second"},
    )
    with pytest.raises(api.SecateurError, match="order=second needs 2 windows or more"):
        api.prune(request, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    model.lm_head.weight.data.zero_()
    with pytest.raises(api.SecateurError, match="all gradients are zero"):
        api.plan(model, "llm_pruner", windows, sparsity=0.3)


def test_stock_only_takes_widths_that_agree_and_refuses_others(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    dense = saved("llama")
    view = api.prepare(api.Request(str(dense), "magnitude", sparsity=0.5)).job.view
    half = UNITS.parameters(Subject(view, "magnitude", parse_pattern("rows")), 0.5)  # of each space of each block
    assert half is not None
    request = api.Request(
        str(dense), "llm_pruner", sparsity=1 - half / view.parameters() - 1e-9, calibration=ids_file, stock_only=True
    )
    assert api.prune(request, tmp_path / "out")["stock"] is True
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "LlamaForCausalLM"
    with pytest.raises(api.SecateurError, match="--stock-only: the widths differ from block to block"):
        api.prune(replace(request, options={"keep_first": 1, "keep_last": 0}), tmp_path / "no")
    assert not list(tmp_path.glob("*no*"))
