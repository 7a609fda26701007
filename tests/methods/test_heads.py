"""Heads: importances against masks put into the whole model, and what is kept of them, with shared key-value heads and
without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur import api
from secateur.evaluate.cloze import cloze_items
from secateur.methods import heads
from secateur.methods.heads import Heads, head_importance
from secateur.plan.run import Run
from secateur.text.windows import IGNORE
from tests.tiny import MODEL_TYPES, some_ids, tiny_model

FLOAT64 = Run(0.0, 0, torch.device("cpu"), torch.float64)


def _naive(model: Any, windows: Tensor, labels: Tensor | None = None) -> Tensor:
    """dL/d mask of every query head, for every window: [S, L, H]."""
    view = api.view_model(model)
    heads, found = view.dims(0).heads, []
    mask_LH = torch.ones(view.blocks, heads, dtype=torch.float64, requires_grad=True)

    def scale(index: int) -> Any:
        return lambda _, inputs: ((inputs[0].unflatten(-1, (heads, -1)) * mask_LH[index][:, None]).flatten(-2),)

    hooks = [
        model.get_submodule(view.block_prefix(index) + view.family.matrices["o"]).register_forward_pre_hook(
            scale(index)
        )
        for index in range(view.blocks)
    ]
    for window_T, label_T in zip(windows, windows if labels is None else labels, strict=True):
        logits_TV = model(input_ids=window_T[None]).logits[0, :-1]
        found.append(
            torch.autograd.grad(
                torch.nn.functional.cross_entropy(logits_TV, label_T[1:], ignore_index=IGNORE), mask_LH
            )[0]
        )
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_importances_are_those_of_masks_in_the_whole_model(model_type: str, windows: Tensor) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    view = api.view_model(model)
    groups = view.dims(0).groups
    gradient_SLH = _naive(model, windows)
    of_heads = head_importance(view, windows, Heads("heads", normalise=False), FLOAT64)
    of_groups = head_importance(view, windows, Heads("groups", normalise=True), FLOAT64)
    for index in range(view.blocks):
        expected_H = gradient_SLH[:, index].abs().mean(0)
        torch.testing.assert_close(of_heads[index], expected_H.view(groups, -1), rtol=1e-3, atol=1e-8)
        expected_G = gradient_SLH[:, index].unflatten(1, (groups, -1)).sum(2).abs().mean(0)
        torch.testing.assert_close(of_groups[index][0], expected_G / expected_G.norm(), rtol=1e-3, atol=1e-8)


def test_the_loss_of_a_task_is_on_the_answers(windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("opt", dtype=torch.float64)
    labels = windows.where(torch.arange(20) % 5 > 2, IGNORE)
    found = head_importance(api.view_model(model), windows, Heads(normalise=False), replace(FLOAT64, labels=labels))
    expected_LH = _naive(model, windows, labels).abs().mean(0)
    torch.testing.assert_close(torch.cat(found), expected_LH, rtol=1e-3, atol=1e-8)
    asked: list[Run] = []

    def listen(view: Any, windows: Tensor, options: Heads, run: Run) -> list[Tensor]:
        asked.append(run)
        return head_importance(view, windows, options, run)

    monkeypatch.setattr(heads, "head_importance", listen)
    for spec in ("task:cloze", "builtin"):
        record = api.prune(
            api.Request("bundled", "heads", sparsity=0.3, calibration=spec, samples=8, seqlen=64), tmp_path / spec[:4]
        )
        assert record["calibration"]["spec"] == spec
    assert asked[1].labels is None
    assert asked[0].labels is not None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "task")
    answers = "".join(item.choices[item.answer] for item in cloze_items(300, seed=1, part="train"))
    for label_T in asked[0].labels:
        (places,) = (label_T != IGNORE).nonzero(as_tuple=True)
        runs = torch.tensor_split(label_T[places], (places.diff() > 1).nonzero().flatten() + 1)
        assert all(tokenizer.decode(run).strip() in answers for run in runs)


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_query_heads_go_evenly_from_every_group(
    model_type: str, saved: Callable[..., Path], ids_file: str, windows: Tensor, tmp_path: Path
) -> None:
    """4 query heads on 2 key-value heads: 2 of 4 go, one of each group, and the others keep their key-value head."""
    request = api.Request(
        str(saved(model_type)), "heads", sparsity=0.34, calibration=ids_file, options={"unit": "heads"}
    )
    record = api.prune(request, tmp_path / "out")
    assert record["sparsity_measured"] == pytest.approx(4 / 12)
    dims = api.inspect(str(tmp_path / "out"))["blocks"]
    assert sorted((block["heads"], block["groups"]) for block in dims) == [(2, 2), (2, 2), (4, 2)]
    masked = tiny_model(model_type)
    plan = api.plan(masked, "heads", windows, sparsity=0.34, unit="heads")
    for block, block_plan in zip(api.view_model(masked).iterate(), plan.blocks, strict=True):
        kept = block_plan.keep.get("heads", torch.arange(4)).tolist()
        assert len({head // 2 for head in kept}) == 2
        for head in set(range(4)) - set(kept):
            block.matrix("o")[:, head * 8 : head * 8 + 8] = 0
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    torch.testing.assert_close(narrow(some_ids()).logits, masked(some_ids()).logits, rtol=1e-4, atol=1e-5)
    ids = some_ids(1, 8)
    cached, not_cached = (
        narrow.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=c)
        for c in (True, False)
    )
    assert torch.equal(cached, not_cached)


def test_opt_with_a_head_count_left_behind_would_be_seen(windows: Tensor) -> None:
    """Heads fold into time when `num_heads` is not lowered with the weights: no error, other logits."""
    model = tiny_model("opt", dtype=torch.float64)
    plan = api.plan(model, "heads", windows, sparsity=0.5)
    narrow = api.cut(model, plan)
    view = api.view_model(model)
    for block, block_plan in zip(view.iterate(), plan.blocks, strict=True):
        for head in set(range(4)) - set(block_plan.keep["groups"].tolist()):
            block.matrix("o")[:, head * 8 : head * 8 + 8] = 0
    right = narrow(some_ids()).logits
    torch.testing.assert_close(right, model(some_ids()).logits, rtol=1e-6, atol=1e-8)
    for layer in narrow.model.decoder.layers:
        assert layer.self_attn.num_heads == layer.self_attn.q_proj.out_features // 8 < 4
        layer.self_attn.num_heads = 4
    try:
        wrong = narrow(some_ids()).logits
    except RuntimeError:
        return  # a version that notices
    assert not torch.allclose(wrong, right, atol=1e-3)


def test_the_requested_parameters_are_removed(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    for unit in ("groups", "heads"):
        request = api.Request(
            str(saved("llama")), "heads", params_removed=0.08, calibration=ids_file, options={"unit": unit}
        )
        prepared = api.prepare(request)
        record = api.prune(request, tmp_path / unit)
        assert record["pruning_ratio"] == pytest.approx(0.08, abs=0.03), "half a step"
        assert record["sparsity_measured"] == pytest.approx(prepared.sparsity)
        assert api.estimate(prepared)["params_after"] == record["params_after"]


BAD: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"sparsity": 0.6},
        r"--sparsity 0.6 would empty a block: each block keeps one of its groups, so at most 0.5000 of the heads can",
    ),
    (
        "llama",
        {"sparsity": 0.1},
        r"--sparsity 0.1 of 12 heads is less than one step, which removes 2; the least is 0.1667",
    ),
    ("opt", {"sparsity": 0.5, "options": {"unit": "heads"}}, r"here each has its own, so use unit=groups"),
    ("llama", {"sparsity": 0.5, "options": {"unit": "layer"}}, r"unknown unit 'layer' \(allowed: groups, heads\)"),
    ("llama", {"params_removed": 0.9}, r"removing heads can remove at most 0\.\d+ of this model"),
]


@pytest.mark.parametrize(("model_type", "asked", "words"), BAD)
def test_bad_input_is_refused_in_one_line(
    model_type: str, asked: dict[str, Any], words: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    with pytest.raises(api.UsageError, match=words) as caught:
        api.prune(api.Request(str(saved(model_type)), "heads", calibration=ids_file, **asked), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_heads_that_do_not_divide_and_plans_that_do_not_merge(windows: Tensor) -> None:
    model = tiny_model("llama")
    plan = api.plan(model, "heads", windows, sparsity=0.34, unit="heads")
    with pytest.raises(api.SecateurError, match="both plans choose among the query heads"):
        plan.merge(plan)
    both = plan.merge(api.plan(model, "heads", windows, sparsity=0.34))
    narrow = api.cut(model, both)
    assert torch.isfinite(narrow(some_ids()).logits).all()
    model.config.num_attention_heads = 5
    with pytest.raises(api.SecateurError, match="5 query heads and 2 key-value heads, which do not divide"):
        api.view_model(model)


def test_gradients_that_are_all_zero_are_refused(windows: Tensor) -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data.zero_()
    with pytest.raises(api.SecateurError, match="heads: all gradients are zero"):
        api.plan(model, "heads", windows, sparsity=0.5)


def test_stock_only_takes_heads_of_equal_number_and_refuses_others(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = api.Request(str(saved("llama")), "heads", sparsity=0.5, calibration=ids_file, stock_only=True)

    def importance(of_groups: list[list[float]]) -> None:
        scores = [torch.tensor([row], dtype=torch.float64) for row in of_groups]
        monkeypatch.setattr(heads, "head_importance", lambda *_: scores)

    importance([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])  # of each block one of two key-value heads goes
    assert api.prune(request, tmp_path / "out")["stock"] is True
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "LlamaForCausalLM"
    importance([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(api.SecateurError, match="--stock-only: the widths differ from block to block"):
        api.prune(replace(request, sparsity=0.34), tmp_path / "no")
    assert not list(tmp_path.glob("*no*"))
    api.prune(replace(request, sparsity=0.34, stock_only=False), tmp_path / "runtime")
    with pytest.raises(api.UsageError, match=r"--stock-only: '.*runtime' is finished, and it is not a stock model"):
        api.prune(replace(request, sparsity=0.34), tmp_path / "runtime", resume=True)
