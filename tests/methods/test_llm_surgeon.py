"""LLM Surgeon: costs and updates against the exact constrained minimiser of the quadratic, factors against a naive reference, shots that go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur import api
from secateur.calibrate.backward import Backward
from secateur.calibrate.kronecker import Curvature, Factors
from secateur.plan.run import Run
from secateur.train import shots
from tests.tiny import FAMILY_TYPES, some_ids, tiny_model

CPU = torch.device("cpu")


def _case(rows: int = 4, columns: int = 5) -> tuple[Tensor, Curvature]:
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 2 * n, generator=draw, dtype=torch.float64) for n in (rows, columns))
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64), Curvature(left @ left.t(), right @ right.t())


def _exact(weight: Tensor, curvature: Curvature, zero: Tensor) -> tuple[Tensor, float]:
    """The weights that minimise d^T (G x A) d / 2 with some of them zero, by the normal equations of all of the others, and the minimum."""
    hessian = torch.kron(curvature.g_OO, curvature.a_II)
    free = (~zero).flatten()
    change = -weight.flatten()
    change[free] = torch.linalg.solve(hessian[free][:, free], hessian[free][:, ~free] @ weight.flatten()[~free])
    return weight + change.view_as(weight), float(change @ hessian @ change / 2)


@pytest.mark.parametrize(("rows", "columns"), [([1], []), ([], [3]), ([0, 2], []), ([3], [0, 4])])
def test_what_stays_is_the_exact_minimiser(rows: list[int], columns: list[int]) -> None:
    weight, curvature = _case()
    stay_O, stay_I = torch.ones(4, dtype=torch.bool), torch.ones(5, dtype=torch.bool)
    stay_O[rows], stay_I[columns] = False, False
    zero = ~(stay_O[:, None] & stay_I)
    expected, cost = _exact(weight, curvature, zero)
    torch.testing.assert_close(curvature.without(weight, stay_O, stay_I), expected)
    if len(rows) + len(columns) == 1:
        found = curvature.row_costs(weight)[rows] if rows else curvature.column_costs(weight)[columns]
        assert float(found) == pytest.approx(cost)


def test_what_is_gone_has_no_say() -> None:
    weight, curvature = _case()
    stay_O, stay_I = torch.tensor([True, False, True, True]), torch.tensor([True, True, True, False, True])
    part = curvature.part(stay_O, stay_I)
    torch.testing.assert_close(part.g_OO, curvature.g_OO[stay_O][:, stay_O])
    inside = torch.zeros(3, 4, dtype=torch.bool)
    inside[1] = True
    assert float(part.row_costs(weight[stay_O][:, stay_I])[1]) == pytest.approx(_exact(weight[stay_O][:, stay_I], part, inside)[1])


def test_degenerate_curvatures_are_those_of_the_weights_alone() -> None:
    weight, _ = _case()
    identity = Curvature(torch.eye(4, dtype=torch.float64), torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(identity.row_costs(weight), weight.square().sum(1) / 2)
    scale_O, scale_I = torch.rand(4, dtype=torch.float64) + 1, torch.rand(5, dtype=torch.float64) + 1
    diagonal = Curvature(scale_O.diag(), scale_I.diag())
    torch.testing.assert_close(diagonal.column_costs(weight), (weight.square() * scale_O[:, None]).sum(0) * scale_I / 2)


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_factors_are_the_second_moments_of_inputs_and_gradients(model_type: str, windows: Tensor) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    view = api.view_model(model)
    path = f"{view.family.blocks}.1.{view.family.matrices['up']}"
    seen: dict[str, Tensor] = {}

    def listen(_: Any, inputs: Any, output: Tensor) -> None:
        seen["x"] = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        output.register_hook(lambda g: seen.__setitem__("g", g.reshape(-1, g.shape[-1])))

    model.get_submodule(path).register_forward_hook(listen)
    logits = model(windows).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").backward()
    backward = Backward(view, windows, device=CPU, dtype=torch.float64)
    for block in backward.blocks():
        factors = Factors(block, backward, "kfac", 0.01)
        if block.index == 1:
            found = factors["up"]
            break
    rows = block.dims.shape("up")[0]
    g, x = seen["g"][:, -rows:], seen["x"]  # gate and up may be one module, up the second
    for factor, moment in ((found.g_OO, g.t() @ g / len(g)), (found.a_II, x.t() @ x / len(x))):
        torch.testing.assert_close(factor, moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64))


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_the_cut_is_the_model_whose_units_are_zero_and_costs_are_sums_over_a_units_rows_and_columns(model_type: str, windows: Tensor) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    view = api.view_model(model)
    work = shots.Shots(view, Run(0.2, 0, CPU, torch.float64), curvature="kfac", damping=0.01, update=True, rank="parameter")
    work.shot(windows, 0.2)
    masked = tiny_model(model_type, dtype=torch.float64)
    masked.load_state_dict(work.overlay.changed, strict=False)
    masked.tie_weights()
    plan = api.plan(model, "llm_surgeon", windows, sparsity=0.2, shots=1)
    narrow = api.cut(model, plan)
    torch.testing.assert_close(narrow(some_ids()).logits, masked(some_ids()).logits, rtol=1e-4, atol=1e-5)  # stock norms of LLaMA are in float32
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, narrow))
    assert (before - after) / before == pytest.approx(work.told[0]["removed"])
    assert work.told[0]["removed"] >= 0.2
    ids = some_ids(1, 12)
    mask = torch.ones_like(ids)
    with_cache, without = (narrow.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(with_cache, without)
    backward = Backward(view, windows, device=CPU, dtype=torch.float64)
    block = next(iter(backward.blocks()))
    factors = Factors(block, backward, "kfac", 0.01)
    alive = {space: torch.ones(count, dtype=torch.bool) for space, count in shots.units(view, block.index).items()}
    costs = shots.unit_costs(block, factors, alive)
    expected = factors["down"].column_costs(block.matrix("down"))[5]
    for name in ("gate", "up"):
        if name in block.names:
            expected = expected + factors[name].row_costs(block.matrix(name))[5]
    assert float(costs["ffn"][5]) == pytest.approx(float(expected))
    width = block.dims.head_width
    keys = sum(factors[name].row_costs(block.matrix(name))[width : 2 * width].sum() for name in ("k", "v"))
    queries = factors["q"].row_costs(block.matrix("q")) + factors["o"].column_costs(block.matrix("o"))
    across = width * block.dims.queries
    assert float(costs["groups"][1]) == pytest.approx(float(keys + queries[across : 2 * across].sum()))


def test_kobd_has_the_same_units_and_the_weights_as_they_were(windows: Tensor) -> None:
    model = tiny_model("llama")
    surgeon, kobd = (api.plan(model, "llm_surgeon", windows, sparsity=0.3, shots=1, update=update) for update in (True, False))
    for one, other in zip(surgeon.blocks, kobd.blocks, strict=True):
        assert all(torch.equal(one.keep[space], other.keep[space]) for space in one.keep)
        assert other.updates == {}
        assert one.updates.keys() == {"q", "k", "v", "o", "gate", "up", "down"}
    quadratic, plain = (_loss(api.cut(model, plan), windows) for plan in (surgeon, kobd))
    assert quadratic != plain


def _loss(model: Any, windows: Tensor) -> float:
    with torch.no_grad():
        return float(model(windows, labels=windows).loss)


@pytest.mark.parametrize("update", [True, False])
def test_a_run_stopped_between_shots_goes_on_to_the_same_bytes(
    update: bool, saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = api.Request(str(saved("phi3", dtype=torch.bfloat16)), "llm_surgeon", sparsity=0.3, calibration=ids_file, options={"shots": 3, "update": update})
    whole = api.prune(request, tmp_path / "whole")
    assert [shot["removed"] >= 0.1 * (n + 1) for n, shot in enumerate(whole["shots"])] == [True] * 3
    real = shots.Shots.shot

    def stopped(self: Any, *args: Any) -> None:
        if self.done == 2:
            raise KeyboardInterrupt
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(shots.Shots, "shot", stopped)
        with pytest.raises(KeyboardInterrupt):
            api.prune(request, tmp_path / "resumed")
    resumed = api.prune(request, tmp_path / "resumed", resume=True)
    assert resumed["shots"] == whole["shots"]
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert whole["updated"] is update
    AutoModelForCausalLM.from_pretrained(tmp_path / "resumed")(some_ids())


def test_what_cannot_be_done_is_refused(saved: Callable[..., Path], windows: Tensor) -> None:
    request = api.Request(str(saved("llama")), "llm_surgeon", sparsity=0.99)
    for wrong, words in (
        ({}, "--sparsity 0.99 would empty a block: .* at most 0."),
        ({"options": {"curvature": "hessian"}}, r"unknown curvature 'hessian' \(allowed: kfac, diagonal, identity\)"),
        ({"options": {"shots": -1}}, "shots is -1"),
        ({"options": {"damping": 0.0}}, "damping is 0; it must be above 0"),
        ({"sparsity": 0.2, "modules": "mlp"}, "--modules does not go with llm_surgeon"),
    ):
        with pytest.raises(api.UsageError, match=words):
            api.prepare(replace(request, **wrong))
    model = tiny_model("llama")
    model.lm_head.weight.data.zero_()
    with pytest.raises(api.SecateurError, match="all gradients are zero"):
        api.plan(model, "llm_surgeon", windows, sparsity=0.2, shots=1)
