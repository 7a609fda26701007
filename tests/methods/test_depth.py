"""Depth against a naive float64 search, and what a model without some of its parts must keep right: caches, padding,
saving, further pruning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur import api
from secateur.calibrate.ending import Ending
from secateur.methods.depth import parts as depth_parts
from secateur.plan.plan import BlockPlan, Plan
from tests.folders import contents
from tests.tiny import BLOCKS, FAMILY_TYPES, able, some_ids, tiny_model

WRITER = {"attention": "o", "mlp": "down"}
ABLE = able("depth", FAMILY_TYPES)
Gone = set[tuple[str, int]]


@contextmanager
def _without(model: Any, gone: Gone) -> Iterator[None]:
    """Run the dense model as if parts were gone: what they read is zero, so only a bias is left; a block without both
    gives back what it gets.
    """
    view, hooks = api.view_model(model), []
    for index in range(BLOCKS):
        block = model.get_submodule(f"{view.family.blocks}.{index}")
        missing = {part for part, where in gone if where == index}
        if missing in ({"block"}, {"attention", "mlp"}):
            hooks.append(block.register_forward_hook(lambda _, inputs, __: inputs[0]))
            continue
        for part in missing:
            module = block.get_submodule(view.family.matrices[WRITER[part]])
            hooks.append(module.register_forward_pre_hook(lambda _, inputs: torch.zeros_like(inputs[0])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _loss(model: Any, windows: Tensor, gone: Gone) -> float:
    with _without(model, gone), torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def _size(model: Any, gone: Gone) -> int:
    """The parameters that a removal takes: matrices, and biases except that of the writer, which stays."""
    view, total = api.view_model(model), 0
    for index in range(BLOCKS):
        block = model.get_submodule(f"{view.family.blocks}.{index}")
        missing = {part for part, where in gone if where == index}
        if missing in ({"block"}, {"attention", "mlp"}):
            total += sum(p.numel() for p in block.parameters())
            continue
        for part in missing:
            for path in {
                view.family.matrices[n] for n in view.family.matrices if (n in "qkvo") == (part == "attention")
            }:
                module = block.get_submodule(path)
                writes = path == view.family.matrices[WRITER[part]]
                total += module.weight.numel() + (0 if writes or module.bias is None else module.bias.numel())
    return total


def _reference(model: Any, windows: Tensor, kinds: tuple[str, ...], sparsity: float) -> Gone:
    """Each time the removal of the least rise for each parameter, all of them tried."""
    gone: Gone = set()
    wanted = sparsity * sum(p.numel() for p in model.parameters())
    while True:
        free = [(part, index) for index in range(BLOCKS) for part in kinds if (part, index) not in gone]
        before, size = _loss(model, windows, gone), _size(model, gone)
        prices = {
            one: (_loss(model, windows, gone | {one}) - before) / (_size(model, gone | {one}) - size) for one in free
        }
        longer = gone | {min(prices, key=prices.__getitem__)}
        if (more := _size(model, longer)) >= wanted:
            return gone if gone and wanted - size < more - wanted else longer
        gone = longer


@pytest.mark.parametrize("part", list(depth_parts.MAY_GO))
@pytest.mark.parametrize("model_type", ABLE)
def test_what_goes_is_what_a_naive_search_removes(model_type: str, part: str, windows: Tensor) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    for sparsity in (0.16, 0.3):
        plan = api.plan(model, "depth", windows, sparsity=sparsity, part=part, candidates=0)
        found: Gone = set()
        for block in plan.blocks:
            found |= {
                (name, block.index) for name, space in (("attention", "groups"), ("mlp", "ffn")) if space in block.keep
            }
            found |= {("block", block.index)} if block.dropped else set()
        expected = _reference(model, windows, depth_parts.MAY_GO[part], sparsity)
        for index in range(BLOCKS):
            if {("attention", index), ("mlp", index)} <= expected:
                expected = expected - {("attention", index), ("mlp", index)} | {("block", index)}
        assert found == expected
        out = api.cut(model, plan)
        with _without(model, expected), torch.no_grad():
            torch.testing.assert_close(out(some_ids()).logits, model(some_ids()).logits)
        assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in out.parameters()) == _size(
            model, expected
        )


def test_few_candidates_are_those_that_were_cheapest() -> None:
    view = api.view_model(tiny_model("llama"))
    parts = depth_parts.Parts(view, "attention")
    first, second, third = parts.promising(1)
    parts.losses = [3.0]
    parts.remove({first: 3.1, second: 3.3, third: 3.2})
    assert parts.order == [first]
    assert parts.promising(1) == [third]
    assert parts.promising(0) == [second, third]


def test_with_few_candidates_the_cheapest_of_before_are_measured_again(windows: Tensor) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    gone: Gone = set()
    every = [(part, index) for index in range(BLOCKS) for part in ("attention", "mlp")]
    rises = {one: _loss(model, windows, {one}) - _loss(model, windows, gone) for one in every}
    for removal in range(4):

        def price(one: tuple[str, int], gone: Gone = gone) -> float:
            return rises[one] / (_size(model, gone | {one}) - _size(model, gone))

        free = sorted((one for one in every if one not in gone), key=price)
        for one in free[:2] if removal else free:
            rises[one] = _loss(model, windows, gone | {one}) - _loss(model, windows, gone)
        gone = gone | {min(free[:2] if removal else free, key=price)}
        share = _size(model, gone) / sum(p.numel() for p in model.parameters())
        plan = api.plan(model, "depth", windows, sparsity=share, candidates=2)
        kept = sum(p.numel() for p in api.cut(model, plan).parameters())
        assert kept == sum(p.numel() for p in model.parameters()) - _size(model, gone)
        with _without(model, gone), torch.no_grad():
            torch.testing.assert_close(api.cut(model, plan)(some_ids()).logits, model(some_ids()).logits)


@pytest.mark.parametrize("seed", range(3, 6))
def test_one_part_goes_at_least_and_at_least_as_much_where_it_is_asked(seed: int, windows: Tensor) -> None:
    model = tiny_model("llama", seed=seed)
    whole = sum(p.numel() for p in model.parameters())

    def removed(**asked: Any) -> float:
        return (
            1 - sum(p.numel() for p in api.cut(model, api.plan(model, "depth", windows, **asked)).parameters()) / whole
        )

    assert removed(sparsity=0.06) > 0.1
    assert removed(params_removed=0.3, at_least=True) >= 0.3


def test_no_trial_has_a_loss(windows: Tensor, monkeypatch: Any) -> None:
    losses = iter([[3.0], [math.inf] * 6])
    monkeypatch.setattr(Ending, "losses", lambda *_: next(losses))
    with pytest.raises(api.SecateurError, match="the loss is inf; the checkpoint is damaged"):
        api.plan(tiny_model("llama"), "depth", windows, sparsity=0.2)


def test_models_without_any_mlp_keep_one_block(windows: Tensor) -> None:
    model = tiny_model("llama")
    for index in range(BLOCKS):  # all of the MLPs go
        plan = BlockPlan(index, keep={"ffn": torch.empty(0, dtype=torch.int32)}, of={"ffn": 48})
        model = api.cut(model, Plan({}, tuple(plan if index == n else BlockPlan(n) for n in range(BLOCKS))))
    view = api.view_model(model)
    assert [view.dims(index).missing for index in range(BLOCKS)] == [("mlp",)] * BLOCKS
    parts = depth_parts.Parts(view, "attention")
    assert parts.most() == 2 * parts.parameters(depth_parts.Candidate(0, "attention"))


def _prune_first(gone: str, dense: Path, ids_file: str, out: Path, monkeypatch: Any) -> dict[str, Any]:
    """Prune a part of the first block alone."""
    view, first = api.view_model(AutoModelForCausalLM.from_pretrained(dense)), depth_parts.Candidate(0, gone)
    sparsity = depth_parts.Parts(view, "submodules").parameters(first) / view.parameters()
    with monkeypatch.context() as patch:
        patch.setattr(depth_parts.Parts, "candidates", lambda parts: [] if parts.order else [first])
        record = api.prune(api.Request(str(dense), "depth", sparsity=sparsity, calibration=ids_file), out)
    assert record["pruning_ratio"] == pytest.approx(sparsity)
    return record


@pytest.mark.parametrize("model_type", ABLE)
@pytest.mark.parametrize("gone", ["attention", "mlp"])
def test_a_saved_model_without_parts_generates_as_it_should(
    model_type: str, gone: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """The first block loses the part: the cache of the first block is where a model looks up how far it is."""
    dense = saved(model_type)
    record = _prune_first(gone, dense, ids_file, tmp_path / "out", monkeypatch)
    assert record["removed_parts"] == [f"{gone} of block 0"]
    model, whole = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", dense))
    ids = some_ids(2, 20)
    with _without(whole, {(gone, 0)}), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # padded on the left
    with_cache, without = (
        model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)
    alone = model.generate(ids[:1, 5:], attention_mask=mask[:1, 5:], max_new_tokens=8, do_sample=False)
    assert torch.equal(alone[0], with_cache[0, 5:])
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("model_type", ABLE)
@pytest.mark.parametrize("gone", ["attention", "mlp"])
def test_more_pruning_of_a_model_without_parts(
    model_type: str, gone: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Weights are set to zero in what is there; more parts and whole blocks go; other methods refuse by name."""
    first = _prune_first(gone, saved(model_type), ids_file, tmp_path / "first", monkeypatch)
    shallow = api.Request(str(tmp_path / "first"), "depth", sparsity=0.2, calibration=ids_file)
    for method in ("magnitude", "wanda", "ria", "sparsegpt", "llm_surgeon"):
        unstructured = {"pattern": "unstructured"}
        record = api.prune(replace(shallow, method=method, sparsity=0.5, **unstructured), tmp_path / method)
        assert record["sparsity_measured"] == pytest.approx(0.5, abs=0.02)
        AutoModelForCausalLM.from_pretrained(tmp_path / method)(some_ids())
    _check_masks(tmp_path / "first", tmp_path / "wanda", ids_file, "down" if gone == "attention" else "o")
    _check_masks(tmp_path / "first", tmp_path / "wanda", ids_file, "up" if gone == "attention" else "q")
    record = api.prune(replace(shallow, options={"candidates": 0}), tmp_path / "second")
    assert record["params_after"] < first["params_after"]
    api.prune(replace(shallow, method="shortgpt", sparsity=0.5), tmp_path / "short")
    for method in ("llm_pruner", "search", "heads"):
        with pytest.raises(api.SecateurError, match=rf"block 0 has no {gone}, and {method} does not prune"):
            api.prune(replace(shallow, method=method), tmp_path / "refused")


def test_inspect_and_heal_take_a_model_without_parts(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """A part that is gone has no weights, so none of them is zero, and it gets no adapters."""
    _prune_first("mlp", saved("llama"), ids_file, tmp_path / "out", monkeypatch)
    first = api.inspect(tmp_path / "out")["blocks"][0]
    assert (first["ffn"], first["groups"]) == (0, 2)
    assert {
        name: (m["sparsity"], m["zero_rows"]) for name, m in first["matrices"].items() if m["zeros"] == 0
    } == dict.fromkeys(first["matrices"], (0.0, 0))
    request = api.HealRequest(str(tmp_path / "out"), ids_file, steps=2, batch=2, rank=4, seqlen=20, text=ids_file)
    api.heal(request, tmp_path / "healed")
    assert "in 18 adapters" in capsys.readouterr().err, "four in the first block, seven in each of the others"
    healed, before = (api.view_model(AutoModelForCausalLM.from_pretrained(tmp_path / n)) for n in ("healed", "out"))
    assert healed.dims(0) == before.dims(0)


def _check_masks(before: Path, after: Path, ids_file: str, name: str) -> None:
    """Wanda's mask of a matrix of the first block is that of its own inputs, which no dense model has there."""
    model, pruned = (AutoModelForCausalLM.from_pretrained(path) for path in (before, after))
    view, squares = api.view_model(model), []
    path = f"{view.family.blocks}.0.{view.family.matrices[name]}"
    model.get_submodule(path).register_forward_pre_hook(
        lambda _, inputs: squares.append(inputs[0].flatten(0, -2).double().square().sum(0))
    )
    with torch.no_grad():
        model(torch.from_numpy(np.load(ids_file)))
    weight_OI = view.block(0).matrix(name).double()
    score_OI = weight_OI.abs() * sum(squares).sqrt()
    gone = score_OI.argsort(1)[:, : weight_OI.shape[1] // 2]
    expected = torch.ones_like(score_OI).scatter_(1, gone, 0).bool()
    assert torch.equal(api.view_model(pruned).block(0).matrix(name) != 0, expected)


def test_whole_blocks_make_a_stock_model_and_parts_do_not(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    request = api.Request(str(saved("llama")), "depth", sparsity=0.25, calibration=ids_file, stock_only=True)
    with pytest.raises(api.UsageError, match="leaves blocks without attention or MLP"):
        api.prune(request, tmp_path / "parts")
    api.prune(replace(request, options={"part": "blocks"}), tmp_path / "blocks")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "blocks").config.model_type == "llama"


@pytest.mark.parametrize("part", ["submodules", "blocks"])
def test_fit_changes_the_last_matrices_and_not_what_goes(part: str, windows: Tensor) -> None:
    model, far = tiny_model("llama", dtype=torch.float64, seed=5), {}
    plans = {fit: api.plan(model, "depth", windows, sparsity=0.4, part=part, fit=fit) for fit in (True, False)}
    assert [(b.dropped, [*b.keep]) for b in plans[True].blocks] == [(b.dropped, [*b.keep]) for b in plans[False].blocks]
    assert any(block.updates for block in plans[True].blocks)
    with torch.no_grad():
        dense = model(windows).logits
        for fit, plan in plans.items():
            far[fit] = float((api.cut(model, plan)(windows).logits - dense).square().mean())
    assert far[True] < far[False]


def test_an_interrupted_search_goes_on(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """With one candidate a removal, what was measured before the interruption decides what is measured after it."""
    request = api.Request(str(saved("llama")), "depth", sparsity=0.4, calibration=ids_file, options={"candidates": 1})
    api.prune(request, tmp_path / "whole")
    save = depth_parts.Parts.save

    def save_and_stop(parts: Any, run: Any) -> None:
        save(parts, run)
        if len(parts.order) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(depth_parts.Parts, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            api.prune(request, tmp_path / "resumed")
    capsys.readouterr()
    api.prune(request, tmp_path / "resumed", resume=True)
    assert "continuing after 2 removals" in capsys.readouterr().err
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"sparsity": 0.9}, "is more than can go: with part=submodules at most"),
        ({"sparsity": 0.001}, "is less than half of the smallest part that can go; the least is"),
        (
            {"sparsity": 0.2, "options": {"part": "heads"}},
            "unknown part 'heads' (allowed: submodules, attention, blocks)",
        ),
        ({"sparsity": 0.2, "options": {"candidates": -1}}, "candidates is -1; it is a count, or 0 for all"),
        ({"sparsity": 0.2, "modules": "mlp"}, "--modules does not go with depth"),
    ],
)
def test_what_is_refused(
    asked: dict[str, Any], words: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    with pytest.raises(api.UsageError) as error:
        api.prune(replace(api.Request(str(saved("llama")), "depth", calibration=ids_file), **asked), tmp_path / "out")
    assert words in str(error.value)
