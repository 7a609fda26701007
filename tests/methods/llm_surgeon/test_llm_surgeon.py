"""LLM Surgeon: costs and updates against the exact constrained minimiser of the quadratic, factors against a naive
reference, shots that go on.
"""

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
from secateur.core import records
from secateur.methods import llm_surgeon
from secateur.methods.llm_surgeon import shots, units, weights
from secateur.methods.llm_surgeon.kronecker import Curvature, Factors
from secateur.plan.pattern import parse_pattern
from secateur.plan.run import Run
from secateur.prune.run import STATES
from tests.tiny import FAMILY_TYPES, able, some_ids, tiny_model

CPU = torch.device("cpu")


def _case(rows: int = 4, columns: int = 5) -> tuple[Tensor, Curvature]:
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 2 * n, generator=draw, dtype=torch.float64) for n in (rows, columns))
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64), Curvature(
        left @ left.t(), right @ right.t()
    )


def _exact(weight: Tensor, curvature: Curvature, zero: Tensor) -> tuple[Tensor, float]:
    """The weights that minimise d^T (G x A) d / 2 with some of them zero, by the normal equations of all of the others,
    and the minimum.
    """
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


def test_weights_that_stay_anywhere_are_the_exact_minimiser_and_one_weight_costs_what_it_says() -> None:
    weight, curvature = _case()
    zero = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    expected, _ = _exact(weight, curvature, zero)
    torch.testing.assert_close(curvature.masked(weight, ~zero, tolerance=1e-14), expected)
    assert torch.equal(curvature.masked(weight, torch.zeros_like(zero)), torch.zeros_like(weight))
    assert torch.equal(curvature.masked(weight, ~torch.zeros_like(zero)), weight)
    one = torch.zeros_like(zero)
    one[2, 3] = True
    assert float(curvature.weight_costs(weight)[2, 3]) == pytest.approx(_exact(weight, curvature, one)[1])


def test_removed_rows_and_columns_leave_the_curvature() -> None:
    weight, curvature = _case()
    stay_O, stay_I = torch.tensor([True, False, True, True]), torch.tensor([True, True, True, False, True])
    part = curvature.part(stay_O, stay_I)
    torch.testing.assert_close(part.g_OO, curvature.g_OO[stay_O][:, stay_O])
    inside = torch.zeros(3, 4, dtype=torch.bool)
    inside[1] = True
    assert float(part.row_costs(weight[stay_O][:, stay_I])[1]) == pytest.approx(
        _exact(weight[stay_O][:, stay_I], part, inside)[1]
    )


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
        factors = Factors.measured(block, backward, "kfac", 0.01)
        if block.index == 1:
            found = factors["up"]
            break
    rows = block.dims.shape("up")[0]
    g, x = seen["g"][:, -rows:], seen["x"]  # gate and up may be one module, up the second
    for factor, moment in ((found.g_OO, g.t() @ g / len(g)), (found.a_II, x.t() @ x / len(x))):
        torch.testing.assert_close(
            factor, moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        )


@pytest.mark.parametrize("model_type", able("llm_surgeon", FAMILY_TYPES, pattern="rows"))
def test_the_cut_is_the_model_whose_units_are_zero_and_costs_are_exact(model_type: str, windows: Tensor) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    view = api.view_model(model)
    work = units.UnitShots(
        view, Run(0.2, 0, CPU, torch.float64), curvature="kfac", damping=0.01, update=True, rank="parameter"
    )
    work.shot(windows, 0.2)
    masked = tiny_model(model_type, dtype=torch.float64)
    masked.load_state_dict(work.overlay.changed, strict=False)
    masked.tie_weights()
    plan = api.plan(model, "llm_surgeon", windows, sparsity=0.2, shots=1)
    narrow = api.cut(model, plan)
    torch.testing.assert_close(
        narrow(some_ids()).logits, masked(some_ids()).logits, rtol=1e-4, atol=1e-5
    )  # stock norms of LLaMA are in float32
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, narrow))
    assert (before - after) / before == pytest.approx(work.told[0]["removed"])
    assert work.told[0]["removed"] >= 0.2
    ids = some_ids(1, 12)
    mask = torch.ones_like(ids)
    with_cache, without = (
        narrow.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False)
    )
    assert torch.equal(with_cache, without)
    backward = Backward(view, windows, device=CPU, dtype=torch.float64)
    block = next(iter(backward.blocks()))
    factors = Factors.measured(block, backward, "kfac", 0.01)
    alive = {space: torch.ones(count, dtype=torch.bool) for space, count in units.units(view, block.index).items()}
    costs = units.unit_costs(block, factors, alive)
    for space, name, unit, size in (
        ("ffn", "down", 5, 1),
        ("groups", "o", 1, block.dims.head_width * block.dims.queries),
    ):
        zero = torch.zeros_like(block.matrix(name), dtype=torch.bool)
        zero[:, unit * size : (unit + 1) * size] = True
        assert float(costs[space][unit]) == pytest.approx(_exact(block.matrix(name), factors[name], zero)[1], rel=1e-6)
    read = [factors[name].column_costs(block.matrix(name)) for name in ("gate", "up") if name in block.names]
    torch.testing.assert_close(costs["mlp_in"], torch.stack(read).sum(0))
    torch.testing.assert_close(costs["mlp_out"], factors["down"].row_costs(block.matrix("down")))


@pytest.mark.parametrize("space", ["ffn", "groups"])
def test_what_two_matrices_share_is_made_up_for_once_where_it_is_read(
    space: str, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To make up for it in the matrices that give it too would be to do so twice."""
    model = tiny_model("llama", dtype=torch.float64)
    view = api.view_model(model)
    given, reader = {"ffn": (("gate", "up"), "down"), "groups": (("q", "k", "v"), "o")}[space]
    monkeypatch.setattr(
        units,
        "choose",
        lambda view, alive, *_: [
            {s: _without_first(u) if s == space else u for s, u in found.items()} for found in alive
        ],
    )
    work = units.UnitShots(
        view, Run(0.2, 0, CPU, torch.float64), curvature="kfac", damping=0.01, update=True, rank="parameter"
    )
    work.shot(windows, 0.2)
    factors = _naive_factors(model, windows)
    for name in given:
        after, before = work.view.block(1).matrix(name), view.block(1).matrix(name)
        count = len(before) // (view.dims(1).groups if space == "groups" else view.dims(1).ffn)
        assert not after[:count].any()
        assert torch.equal(after[count:], before[count:]), name
    weight = view.block(1).matrix(reader)
    zero = torch.zeros_like(weight, dtype=torch.bool)
    zero[:, : weight.shape[1] // (view.dims(1).groups if space == "groups" else view.dims(1).ffn)] = True
    torch.testing.assert_close(work.view.block(1).matrix(reader), _exact(weight, factors[1, reader], zero)[0])


def _without_first(units: Tensor) -> Tensor:
    return torch.arange(len(units)) > 0


def _naive_factors(model: Any, windows: Tensor) -> dict[tuple[int, str], Curvature]:
    """G and A of every matrix, from the gradients that autograd gives the outputs of the whole model's modules."""
    view = api.view_model(model)
    seen: dict[str, list[Tensor]] = {}

    def listen(path: str, inputs: Any, output: Tensor) -> None:
        seen[path] = [inputs[0].detach().reshape(-1, inputs[0].shape[-1])]
        output.register_hook(lambda g: seen[path].append(g.reshape(-1, g.shape[-1])))

    paths = {
        f"{view.family.blocks}.{index}.{path}" for index in range(view.blocks) for path in view.family.matrices.values()
    }
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _, x, y, path=path: listen(path, x, y)) for path in paths
    ]
    logits = model(windows).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    found = {}
    for block in view.iterate():
        for name in block.names:
            x, g = seen[f"{view.family.blocks}.{block.index}.{view.family.matrices[name]}"]
            first = sum(
                block.dims.shape(other)[0] for other in view.family.fused(name)[: view.family.fused(name).index(name)]
            )
            g = g[:, first : first + block.dims.shape(name)[0]]
            damped = [
                m + 0.01 * m.diagonal().mean() * torch.eye(len(m), dtype=m.dtype)
                for m in (g.t() @ g / len(g), x.t() @ x / len(x))
            ]
            found[block.index, name] = Curvature(*damped)
    return found


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_single_weights_go_by_one_threshold_and_the_others_make_up_for_them(
    model_type: str, pattern: str, windows: Tensor
) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    view = api.view_model(model)
    factors = _naive_factors(model, windows)
    costs, live = [], []
    for (index, name), curvature in factors.items():
        weight = view.block(index).matrix(name)
        inverse = [torch.linalg.inv(m).diagonal() for m in (curvature.g_OO, curvature.a_II)]
        cost = weight.square() / (2 * torch.outer(*inverse))
        costs.append(cost.flatten())
        live.append(
            (cost.view(-1, 4).argsort(1).argsort(1) < 2).flatten()
            if pattern == "2:4"
            else torch.ones_like(cost, dtype=torch.bool).flatten()
        )
    all_costs = torch.cat(costs).masked_fill(~torch.cat(live), torch.inf)
    gone = torch.zeros_like(all_costs, dtype=torch.bool)
    gone[all_costs.argsort()[: int(0.5 * len(all_costs))]] = True
    asked = {"sparsity": 0.5} if pattern == "unstructured" else {}
    plan = api.plan(model, "llm_surgeon", windows, shots=1, pattern=pattern, **asked)
    for ((index, name), curvature), zero in zip(
        factors.items(), gone.split([len(cost) for cost in costs]), strict=True
    ):
        weight = view.block(index).matrix(name)
        assert torch.equal(plan.blocks[index].masks[name].unpack(), ~zero.view_as(weight)), (index, name)
        if index == 1 and name in ("k", "down"):
            change = plan.blocks[index].updates[name] - weight
            found = float((curvature.g_OO @ change @ curvature.a_II * change).sum() / 2)
            assert found == pytest.approx(_exact(weight, curvature, zero.view_as(weight))[1], rel=1e-5)


def test_n_of_m_is_reached_shot_by_shot_and_no_group_loses_more(windows: Tensor) -> None:
    view = replace(api.view_model(tiny_model("qwen2")), rates=({"q": 0.75, "down": 0.75}, {}, {"k": 0.75}))
    work = weights.WeightShots(
        view, Run(0.0, 0, CPU, torch.float32), curvature="kfac", damping=0.01, update=True, pattern=parse_pattern("1:4")
    )
    before = {place: mask.unpack() for place, mask in work.masks.items()}
    for shot, wanted in enumerate((0.25, 0.5, 0.75)):
        work.shot(windows, wanted)
        assert work.told[shot]["removed"] == pytest.approx(wanted, abs=1e-3)
        for (index, name), mask in work.masks.items():
            keep = mask.unpack()
            assert not (keep & ~before[index, name]).any()
            assert int(keep.view(-1, 4).sum(1).min()) >= 1
            assert not work.view.block(index).matrix(name)[~keep].any()
            before[index, name] = keep
    assert all(bool((keep.view(-1, 4).sum(1) == 1).all()) for keep in before.values())
    assert {index: set(work.plan(index).updates) for index in range(3)} == {0: {"q", "down"}, 1: set(), 2: {"k"}}


def test_matrices_asked_for_less_lose_less_and_no_others_anything(windows: Tensor) -> None:
    model = tiny_model("llama")
    plan = api.plan(
        model, "llm_surgeon", windows, modules="attention=0.5,up=0.25", pattern="unstructured", shots=2, update=False
    )
    masks = [block.masks for block in plan.blocks]
    assert {name for mask in masks for name in mask} == {"q", "k", "v", "o", "up"}
    for names, share in (("qkvo", 0.5), (("up",), 0.25)):
        taken = [mask[name] for mask in masks for name in names]
        assert sum(m.removed for m in taken) == int(share * sum(m.unpack().numel() for m in taken))
    assert len({m["q"].removed for m in masks}) > 1  # one threshold, not one share


def test_equal_costs_are_removed_in_order(windows: Tensor) -> None:
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.data.fill_(0.25)
    plan = api.plan(model, "llm_surgeon", windows, sparsity=0.1, pattern="unstructured", shots=3, curvature="identity")
    gone = torch.cat([~mask.unpack().flatten() for block in plan.blocks for mask in block.masks.values()])
    assert bool(gone[: int(gone.sum())].all())
    assert int(gone.sum()) == int(0.1 * len(gone))


def test_kobd_removes_the_same_units_and_keeps_the_other_weights(windows: Tensor) -> None:
    model = tiny_model("llama")
    surgeon, kobd = (
        api.plan(model, "llm_surgeon", windows, sparsity=0.3, shots=1, update=update) for update in (True, False)
    )
    for one, other in zip(surgeon.blocks, kobd.blocks, strict=True):
        assert all(torch.equal(one.keep[space], other.keep[space]) for space in one.keep)
        assert other.updates == {}
        assert one.updates.keys() == {"q", "k", "v", "o", "gate", "up", "down"}
    quadratic, plain = (_loss(api.cut(model, plan), windows) for plan in (surgeon, kobd))
    assert quadratic != plain


def _loss(model: Any, windows: Tensor) -> float:
    with torch.no_grad():
        return float(model(windows, labels=windows).loss)


@pytest.mark.parametrize(
    ("pattern", "update"), [("rows", True), ("rows", False), ("unstructured", True), ("1:4", True)]
)
def test_a_run_stopped_between_shots_goes_on_to_the_same_bytes(
    pattern: str,
    update: bool,
    saved: Callable[..., Path],
    ids_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"shots": 3, "update": update, "pattern": pattern}
    sparsity = 0.75 if pattern == "1:4" else 0.3
    request = api.Request(
        str(saved("phi3", dtype=torch.bfloat16)),
        "llm_surgeon",
        sparsity=sparsity,
        calibration=ids_file,
        options=options,
    )
    whole = api.prune(request, tmp_path / "whole")
    assert [shot["removed"] >= sparsity / 3 * (n + 1) - 1e-4 for n, shot in enumerate(whole["shots"])] == [True] * 3
    real = shots.Shots._changed

    def stopped(self: Any, block: Any, factors: Any) -> None:
        if len(self.told) == 2 and block.index == 1:  # another block of this shot is written already
            raise KeyboardInterrupt
        real(self, block, factors)

    with monkeypatch.context() as patch:
        patch.setattr(shots.Shots, "_changed", stopped)
        with pytest.raises(KeyboardInterrupt):
            api.prune(request, tmp_path / "resumed")
    resumed = api.prune(request, tmp_path / "resumed", resume=True)
    assert resumed["shots"] == whole["shots"]
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert whole["updated"] is update
    AutoModelForCausalLM.from_pretrained(tmp_path / "resumed")(some_ids())


@pytest.mark.parametrize("pattern", ["rows", "unstructured"])
def test_a_sweep_is_one_run_with_the_bytes_of_separate_ones_and_goes_on_after_a_kill(
    pattern: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = api.Request(str(saved("llama")), "llm_surgeon", pattern=pattern, calibration=ids_file, samples=1)
    measure = api.EvalRequest("", text=ids_file)
    folders = {s: tmp_path / "sweep" / f"llm_surgeon-{pattern}-{s}" for s in (0.025, 0.045)}
    wanted: list[float] = []
    real = shots.Shots.shot

    def stopped(self: Any, windows: Tensor, to: float) -> None:
        if to == 0.0375 and to not in wanted:
            wanted.append(to)
            raise KeyboardInterrupt
        wanted.append(to)
        real(self, windows, to)

    with monkeypatch.context() as patch:
        patch.setattr(shots.Shots, "shot", stopped)
        with pytest.raises(KeyboardInterrupt):
            list(api.sweep(request, sorted(folders, reverse=True), tmp_path / "sweep", measure))
        list(api.sweep(request, list(folders), tmp_path / "sweep", measure, resume=True))
    assert wanted == [0.0125, 0.025, 0.0375, 0.0375, 0.045]
    assert not (tmp_path / "sweep" / STATES).exists()
    for sparsity, folder in folders.items():
        alone = api.prune(replace(request, sparsity=sparsity), tmp_path / f"alone-{sparsity}")
        assert (folder / "model.safetensors").read_bytes() == (
            tmp_path / f"alone-{sparsity}" / "model.safetensors"
        ).read_bytes()
        record = next(
            r
            for r in records.read([tmp_path / "sweep" / "records.jsonl"])
            if r["command"] == "prune" and r["out"] == str(folder)
        )
        assert record["shots"] == alone["shots"]
        assert ("seconds_before" in record) is (sparsity > 0.025)


def test_the_schedule_of_a_lower_sparsity_is_the_first_part_of_that_of_a_higher_one() -> None:
    paper = llm_surgeon.LLMSurgeon().step
    assert llm_surgeon.left(0.05, 0, paper) == [0.0125, 0.025, 0.0375, 0.05]
    for k in range(1, 80):
        assert len(llm_surgeon.left(k / 80, 0, paper) or ()) == k
        assert llm_surgeon.left(0.99, 0, paper, [k / 80]) == (llm_surgeon.left(0.99, 0, paper) or [])[k:]
    assert llm_surgeon.left(0.03, 0, paper, [0.0125, 0.02]) == [0.025, 0.03]
    assert llm_surgeon.left(0.03, 0, paper, [0.0125, 0.03]) == []
    assert llm_surgeon.left(0.03, 0, paper, [0.0375]) is None
    assert llm_surgeon.left(0.2, 0, 1 / 16) == [0.0625, 0.125, 0.1875, 0.2]
    assert llm_surgeon.left(0.3, 0, 1 / 16, [0.0625, 0.125, 0.1875, 0.2]) == [0.25, 0.3]
    assert llm_surgeon.left(0.3, 0, 1.0) == [0.3]
    assert llm_surgeon.left(0.4, 2, paper, [0.1]) is None
    assert llm_surgeon.left(0.4, 2, paper, [0.2]) == [0.4]


@pytest.mark.parametrize("pattern", ["rows", "unstructured"])
def test_factors_without_room_are_measured_again_to_the_same_bytes(
    pattern: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = api.Request(
        str(saved("llama")), "llm_surgeon", sparsity=0.2, calibration=ids_file, options={"shots": 2, "pattern": pattern}
    )
    passes, real = [], shots.Shots._backward

    def counted(self: Any, windows: Tensor) -> Any:
        passes.append(len(self.told))
        return real(self, windows)

    monkeypatch.setattr(shots.Shots, "_backward", counted)
    api.prune(request, tmp_path / "kept")
    assert passes == [0, 1]
    passes.clear()
    monkeypatch.setattr(shots, "_room", lambda _: 100)
    api.prune(request, tmp_path / "again")
    assert passes == [0, 0, 1, 1]
    assert (tmp_path / "kept" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


def test_a_state_that_is_past_the_sparsity_is_left_alone(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = api.Request(str(saved("llama")), "llm_surgeon", calibration=ids_file, samples=1)
    for sparsity in (0.0375, 0.025):
        api.prune(replace(request, sparsity=sparsity), tmp_path / f"{sparsity}", states=tmp_path / "states")
    assert "was saved at sparsity 0.0375, which is not a step of the schedule of this run" in capsys.readouterr().err
    alone = api.prune(replace(request, sparsity=0.025), tmp_path / "alone")
    assert (tmp_path / "0.025" / "model.safetensors").read_bytes() == (
        tmp_path / "alone" / "model.safetensors"
    ).read_bytes()
    assert len(alone["shots"]) == 2
    api.prune(replace(request, sparsity=0.025, options={"shots": 1}), tmp_path / "one", states=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_done_is_refused(saved: Callable[..., Path], windows: Tensor) -> None:
    request = api.Request(str(saved("llama")), "llm_surgeon", sparsity=0.99)
    for wrong, words in (
        ({}, "--sparsity 0.99 would empty a block: .* at most 0."),
        ({"options": {"curvature": "hessian"}}, r"unknown curvature 'hessian' \(allowed: kfac, diagonal, identity\)"),
        ({"options": {"shots": -1}}, "shots is -1"),
        ({"options": {"step": 0.0}}, "step is 0; it is the sparsity of a shot, above 0"),
        ({"options": {"damping": 0.0}}, "damping is 0; it must be above 0"),
        ({"pattern": "columns"}, "pattern 'columns' is not allowed, since pattern rows removes columns too"),
        (
            {"sparsity": None, "params_removed": 0.2, "pattern": "unstructured"},
            "pattern unstructured zeroes weights and removes no parameters",
        ),
        (
            {"pattern": "unstructured", "sparsity": 0.2, "modules": "auto"},
            "--modules auto does not go with llm_surgeon",
        ),
        ({"sparsity": 0.2, "modules": "mlp"}, "--modules does not go with llm_surgeon"),
    ):
        with pytest.raises(api.UsageError, match=words):
            api.prepare(replace(request, **wrong))
    model = tiny_model("llama")
    model.lm_head.weight.data.zero_()
    with pytest.raises(api.SecateurError, match="all gradients are zero"):
        api.plan(model, "llm_surgeon", windows, sparsity=0.2, shots=1)
