"""Search: costs, updates and the mix of widths against naive float64 references, and what the options promise."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from secateur import api
from secateur.calibrate.statistics import damped
from secateur.methods import search as method
from secateur.methods.search import latency
from secateur.methods.search.budget import Curve, curve, spend, spend_alike
from secateur.methods.search.removal import removal, without
from secateur.models.spaces import MEMBERS
from secateur.models.view import ModelView
from secateur.plan.plan import BlockPlan, LaterPlans
from secateur.plan.run import Run
from tests.layouts import layout_of
from tests.tiny import FAMILY_TYPES, tiny_model

CPU = torch.device("cpu")


def _moments(seed: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, and the second moments of correlated inputs and of output gradients, float64."""
    draw = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=draw, dtype=torch.float64)
    x_NI = torch.randn(200, inputs, generator=draw, dtype=torch.float64)
    x_NI[:, 1:] += x_NI[:, :-1]  # neighbours can stand in for one another
    g_NO = torch.randn(200, outputs, generator=draw, dtype=torch.float64)
    return weight_OI, x_NI.t() @ x_NI / 200, g_NO.t() @ g_NO / 200


def _best_without(weight_OI: Tensor, a_II: Tensor, gone: list[int]) -> Tensor:
    """The matrix with these columns zero that is nearest in the metric of A: least squares on its square root."""
    stays = [column for column in range(len(a_II)) if column not in gone]
    root_II = torch.linalg.cholesky(a_II).t()
    made_OI = torch.zeros_like(weight_OI)
    if stays:
        made_OI[:, stays] = torch.linalg.lstsq(root_II[:, stays], root_II @ weight_OI.t()).solution.t()
    return made_OI


def _cost(weight_OI: Tensor, a_II: Tensor, g_OO: Tensor, gone: list[int]) -> float:
    change_OI = _best_without(weight_OI, a_II, gone) - weight_OI
    return float((g_OO @ change_OI @ a_II * change_OI).sum()) / 2


@pytest.mark.parametrize("width", [1, 2])
def test_units_go_one_by_one_at_the_least_further_cost(width: int) -> None:
    weight_OI, a_II, g_OO = _moments(0, 5, 6)
    units = 6 // width
    found = removal(weight_OI, a_II, g_OO, units, rounds=units)
    gone: list[int] = []
    for k in range(units):
        columns = [unit * width + c for unit in gone for c in range(width)]
        assert found.cost_U[k] == pytest.approx(_cost(weight_OI, a_II, g_OO, columns), rel=1e-9, abs=1e-12)
        further = {
            unit: _cost(weight_OI, a_II, g_OO, columns + [unit * width + c for c in range(width)])
            for unit in range(units)
            if unit not in gone
        }
        assert int(found.order_U[k]) == min(further, key=lambda unit: further[unit])
        gone.append(int(found.order_U[k]))


def test_after_each_round_the_cost_is_that_of_all_that_went() -> None:
    weight_OI, a_II, g_OO = _moments(1, 4, 12)
    found = removal(weight_OI, a_II, g_OO, 12, rounds=3)
    for k in (0, 4, 8):
        assert found.cost_U[k] == pytest.approx(_cost(weight_OI, a_II, g_OO, found.order_U[:k].tolist()), rel=1e-9)
    assert bool((found.cost_U.diff() >= 0).all())
    assert sorted(found.order_U.tolist()) == list(range(12))


def test_units_that_nothing_feels_go_first_at_no_cost() -> None:
    weight_OI, a_II, g_OO = _moments(2, 4, 6)
    weight_OI[:, 3] = 0
    found = removal(weight_OI, a_II, g_OO, 6, rounds=6)
    assert int(found.order_U[0]) == 3
    assert float(found.cost_U[1]) == pytest.approx(0, abs=1e-12)
    nothing = removal(weight_OI, a_II, damped(torch.zeros(4, 4), 0.01), 6, rounds=6)
    assert float(nothing.cost_U.max()) < 1e-20


def test_what_stays_makes_up_best() -> None:
    weight_OI, a_II, _ = _moments(3, 5, 8)
    stays_I = torch.tensor([True, False, True, True, False, True, True, False])
    expected = _best_without(weight_OI, a_II, [1, 4, 7])
    torch.testing.assert_close(without(weight_OI, a_II, stays_I), expected, rtol=1e-9, atol=1e-9)


def _convex(seed: int, units: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(units, generator=draw, dtype=torch.float64).sort().values.cumsum(0).sub_(0) * torch.tensor(
        [0.0] + [1.0] * (units - 1), dtype=torch.float64
    )


@pytest.mark.parametrize("budget", [1, 7, 20, 33])
def test_no_mix_that_removes_a_unit_more_costs_less(budget: int) -> None:
    sizes = (2, 3, 5)
    curves = [curve(_convex(seed, 5), size * torch.arange(5).double()) for seed, size in enumerate(sizes)]

    def cost(counts: tuple[int, ...]) -> float:
        return sum(float(c.cost_K[k]) for c, k in zip(curves, counts, strict=True))

    def removed(counts: tuple[int, ...]) -> int:
        return sum(k * size for k, size in zip(counts, sizes, strict=True))

    found = tuple(spend(curves, budget))
    assert budget <= removed(found) < budget + max(sizes)
    more = [counts for counts in product(range(5), repeat=3) if removed(counts) >= budget + max(sizes) - 1]
    assert cost(found) <= min(map(cost, more)) + 1e-12


def test_a_dent_in_a_curve_is_no_trap() -> None:
    dented = Curve(torch.tensor([0.0, 10, 11, 12], dtype=torch.float64), torch.arange(4), torch.arange(4).double())
    straight = Curve(torch.tensor([0.0, 5, 10, 15], dtype=torch.float64), torch.arange(4), torch.arange(4).double())
    assert spend([dented, straight], 1) == [0, 1]
    assert spend([dented, straight], 2) == [0, 2]
    assert spend([dented, straight], 3) == [3, 0]


def test_gradients_that_are_all_zero_are_refused(windows: Tensor) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("model.norm").weight.zero_()
    with pytest.raises(api.SecateurError, match="search: all gradients are zero"):
        api.plan(model, "search", windows, sparsity=0.3)


def test_widths_can_be_multiples_and_equal() -> None:
    one = curve(_convex(0, 10), 3 * torch.arange(10).double(), multiple=4)
    assert one.removed_K.tolist() == [0, 2, 6]
    first, second = (
        curve(_convex(seed, units), size * torch.arange(units).double())
        for seed, units, size in ((1, 3, 10), (2, 8, 2))
    )
    lost = spend_alike([first, second], 15)
    every = [(a, b) for a in range(3) for b in range(8) if a * 10 + b * 2 >= 15]
    cheapest = min(every, key=lambda pair: float(first.cost_K[pair[0]] + second.cost_K[pair[1]]))
    assert tuple(lost) == cheapest


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_the_library_is_that_of_autograd(model_type: str, windows: Tensor) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    view, layout = api.view_model(model), layout_of(model_type)
    options = method.Search(rounds=1000)
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name in ("o", "down"):
        path, _ = layout.matrices[name]

        def listen(_: Any, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            output.register_hook(lambda g: pairs.setdefault(name, []).append((inputs[0].detach(), g)))

        model.get_submodule(f"{layout.blocks}.1.{path}").register_forward_hook(listen)
    logits = model(input_ids=windows).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="sum").backward()
    run = Run(0.0, 0, CPU, torch.float64)
    found = method._library(view, windows, options, run)
    for space, members in MEMBERS.items():
        ((x, g),) = pairs[members.reader]
        x_NI, g_NO = x.flatten(0, -2), g.flatten(0, -2)
        predicted = windows[:, 1:].numel()
        expected = removal(
            view.block(1).matrix(members.reader),
            damped(x_NI.t() @ x_NI / len(x_NI), options.damping),
            damped(g_NO.t() @ g_NO / predicted, options.damping),
            view.dims(1).units()[space],
            options.rounds,
        )
        torch.testing.assert_close(found[f"1.{space}.cost"], expected.cost_U, rtol=1e-6, atol=1e-12)
        assert torch.equal(found[f"1.{space}.order"], expected.order_U)


@pytest.mark.parametrize("wanted", [0.1, 0.3])
def test_the_budget_is_met_to_the_unit(
    wanted: float, saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    record = api.prune(
        api.Request(str(saved("llama")), "search", params_removed=wanted, calibration=ids_file), tmp_path / "out"
    )
    largest = 3 * 32  # a feed-forward unit of the tiny model
    assert 0 <= record["params_before"] - record["params_after"] - wanted * record["params_before"] < largest
    assert record["expected_loss"] > 0


@pytest.mark.parametrize(("model_type", "name"), [("llama", "LlamaForCausalLM"), ("opt", "OPTForCausalLM")])
def test_equal_widths_are_a_stock_model(
    model_type: str, name: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    request = api.Request(
        str(saved(model_type)),
        "search",
        params_removed=0.2,
        calibration=ids_file,
        options={"uniform": True, "multiple": 8},
        stock_only=True,
    )
    record = api.prune(request, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == name
    assert getattr(model.config, "intermediate_size" if model_type == "llama" else "ffn_dim") % 8 == 0
    assert sum(p.numel() for p in model.parameters()) == record["params_after"]


def test_one_library_serves_every_budget(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    whole = method.Backward
    monkeypatch.setattr(method, "Backward", lambda *a, **k: passes.append(1) or whole(*a, **k))
    request = api.Request(str(saved("llama")), "search", calibration=ids_file)
    budgets = [0.1, 0.2, 0.3]
    measured = list(api.sweep(request, budgets, tmp_path / "sweep", api.EvalRequest("", text=ids_file)))
    assert len(passes) == 1
    assert len(measured) == 4
    alone = api.Request(request.model, "search", sparsity=0.2, calibration=ids_file)
    api.prune(alone, tmp_path / "alone")
    (same,) = [Path(record["out"]) for record in measured[1:] if record["sparsity"] == 0.2]
    assert (same / "model.safetensors").read_bytes() == (tmp_path / "alone" / "model.safetensors").read_bytes()


def test_time_between_two_measured_widths_is_a_straight_line_that_never_falls() -> None:
    linear = {kept: (1.0 + kept) / 9 for kept in (2, 4, 6)}
    expected = torch.arange(8).double().clamp(max=6)
    torch.testing.assert_close(latency.saved_time(8, 9.0, linear), expected, rtol=0, atol=1e-6)
    swapped = latency.saved_time(8, 9.0, {2: 5 / 9, 4: 3 / 9, 6: 20.0})
    torch.testing.assert_close(swapped[[2, 4, 6]], torch.tensor([0.0, 5, 5]).double(), rtol=0, atol=1e-6)
    assert bool((latency.saved_time(8, 9.0, dict.fromkeys((2, 4, 6), 1.0)).diff() > 0).all()), "no unit is free"
    assert latency.saved_time(1, 9.0, {}).tolist() == [0.0]


def _operations(work: Callable[[], Any], *_: Any) -> float:
    """In place of a clock: the floating-point operations of the work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("tokens", [1, 128])
@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_what_units_save_is_the_work_of_the_block_less_that_of_a_narrower_one(
    model_type: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "best_time", _operations)
    model = tiny_model(model_type, max_position_embeddings=128)
    view, layout = api.view_model(model), layout_of(model_type)
    times = latency.measure_times(view, tokens, CPU, torch.float32)
    units, head = view.dims(0).units(), 2 * view.config.vocab_size * view.config.hidden_size
    block = model.get_submodule(f"{layout.blocks}.0")
    products = sum(2 * tokens * m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
    whole = float(times.pop("whole"))
    assert view.blocks * products + head <= whole < view.blocks * (products + 8 * tokens**2 * 64) + head
    assert times.keys() == {f"{index}.{space}.saved" for index in range(view.blocks) for space in MEMBERS}
    mlp = [name for name in ("gate", "up", "down") if name in view.block(0).names]
    unit = 2 * tokens * sum(view.block(0).matrix(name).numel() for name in mlp) / units["ffn"]
    least = latency._fewer(units["ffn"])[0]
    expected_U = unit * torch.arange(units["ffn"]).double().clamp(max=units["ffn"] - least)
    for index in range(view.blocks):
        torch.testing.assert_close(times[f"{index}.ffn.saved"], expected_U, rtol=1e-5, atol=1.0)
        assert (
            float(times[f"{index}.groups.saved"][1]) > 2 * tokens * view.block(0).matrix("o").numel() / units["groups"]
        )


def test_a_block_of_one_head_and_one_unit_has_a_time_and_nothing_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "best_time", _operations)
    view = api.view_model(tiny_model("llama", intermediate_size=1, num_key_value_heads=1))
    times = latency.measure_times(view, 4, CPU, torch.float32)
    assert 0 < float(times["whole"]) < 1e9
    assert [times[f"0.{space}.saved"].tolist() for space in MEMBERS] == [[0.0], [0.0]]


@pytest.mark.parametrize("uniform", [False, True])
def test_the_times_of_one_run_serve_every_sparsity(
    uniform: bool, saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "best_time", _operations)
    runs, measure = [], method.measure_times
    monkeypatch.setattr(method, "measure_times", lambda *a: runs.append(1) or measure(*a))
    options = {"budget": "decode", "uniform": uniform, "multiple": 4}
    request = api.Request(str(saved("llama")), "search", calibration=ids_file, options=options)
    _, *measured = api.sweep(request, [0.1, 0.3], tmp_path / "sweep", api.EvalRequest("", text=ids_file))
    assert len(runs) == 1
    for record, sparsity in zip(measured, (0.1, 0.3), strict=True):
        assert sparsity <= record["sparsity_measured"] < sparsity + 0.2
        widths = AutoConfig.from_pretrained(record["out"])
        assert (getattr(widths, "pruned_widths", None) is None) == uniform


def test_a_dry_run_of_a_time_needs_no_times(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    options = {"budget": "decode"}
    request = api.Request(str(saved("llama")), "search", sparsity=0.5, calibration=ids_file, options=options)
    expected = api.estimate(api.prepare(request))
    assert expected["seconds_estimated"] > 0
    assert expected["params_after"] is None
    assert "seconds_unknown" not in expected


@pytest.mark.parametrize(("budget", "tokens"), [("prefill", 128), ("decode", 1)])
def test_the_budget_can_be_the_measured_time(
    budget: str,
    tokens: int,
    saved: Callable[..., Path],
    ids_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, each = [], {"groups": 20.0, "ffn": 1.0}

    def measure(view: ModelView, tokens: int, *_: Any) -> dict[str, Tensor]:
        asked.append(tokens)
        return {"whole": torch.tensor(view.blocks * 100.0).double()} | {
            f"{index}.{space}.saved": each[space] * torch.arange(view.dims(index).units()[space]).double()
            for index in range(view.blocks)
            for space in MEMBERS
        }

    monkeypatch.setattr(method, "measure_times", measure)
    model, options = str(saved("llama", max_position_embeddings=128)), {"budget": budget}
    request = api.Request(model, "search", sparsity=0.25, calibration=ids_file, options=options)
    record = api.prune(request, tmp_path / "out")
    assert asked == [tokens]
    assert record["sparsity_of"] == budget
    assert record["sparsity_measured"] >= 0.25
    before, after = record["seconds_expected"]
    dense, pruned = (AutoConfig.from_pretrained(folder) for folder in (model, tmp_path / "out"))
    widths = pruned.pruned_widths
    lost = sum(
        20 * (dense.num_key_value_heads - block["groups"]) + dense.intermediate_size - block["ffn"] for block in widths
    )
    assert (before, after) == (100 * len(widths), 100 * len(widths) - lost)
    assert record["sparsity_measured"] == pytest.approx(1 - after / before)
    assert "| time of " in (tmp_path / "out" / "README.md").read_text()


def test_the_update_brings_the_output_nearer(windows: Tensor) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        expected = model(input_ids=windows).logits
        far = {}
        for update in (True, False):
            plan = api.plan(model, "search", windows, sparsity=0.3, update=update)
            found = api.cut(model, plan)(input_ids=windows).logits
            far[update] = float((found - expected).square().mean())
    assert far[True] < far[False]


def test_a_plan_is_the_same_whenever_it_is_asked_for(windows: Tensor) -> None:
    view = api.view_model(tiny_model("llama"))
    plans = method.plan_model(view, windows, method.Search(), Run(0.4, 0, CPU, torch.float32))
    in_order = list(plans)
    assert [plan.index for plan in in_order] == list(range(view.blocks))
    for index in (-1, 0, view.blocks - 1):
        again = plans[index]
        expected = in_order[index]
        assert again.index == expected.index
        assert again.updates.keys() == expected.updates.keys() != set()
        assert all(again.updates[name].equal(new) for name, new in expected.updates.items())
    with pytest.raises(IndexError):
        plans[view.blocks]
    assert [plan.keep for plan in plans.outlines] == [plan.keep for plan in in_order]


def test_each_block_is_fitted_once_and_the_weights_of_one_are_held(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    held: list[int] = []
    fit = method._updates

    def counted(*given: Any) -> Any:
        held.append(sum(one() is not None for one in made))
        found = fit(*given)
        made.extend(weakref.ref(new) for new in found.values())
        return found

    monkeypatch.setattr(method, "_updates", counted)
    options = {"uniform": True}
    request = api.Request(
        str(saved("llama")), "search", params_removed=0.3, calibration=ids_file, options=options, stock_only=True
    )
    api.prune(request, tmp_path / "out")
    assert len(held) == len(api.read_plan(tmp_path / "out").blocks)
    assert not any(held)


def test_plans_are_made_by_their_number() -> None:
    plans = LaterPlans([BlockPlan(0), BlockPlan(1)], BlockPlan)
    assert [plan.index for plan in plans] == [0, 1]
    assert plans[-1].index == 1


def test_wrong_requests(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    for how, message in (
        (
            {"sparsity": 0.99},
            "--sparsity 0.99 would empty a block: each keeps a key-value head and a feed-forward unit",
        ),
        ({"sparsity": 0.2, "options": {"multiple": 0}}, "multiple is 0; it is a count of at least 1"),
        ({"sparsity": 0.2, "options": {"damping": 0.0}}, "damping is 0; it must be above 0"),
        (
            {"sparsity": 0.2, "options": {"budget": "flops"}},
            "unknown budget 'flops' .allowed: parameters, prefill, decode",
        ),
        (
            {"sparsity": 0.2, "options": {"budget": "prefill"}, "model": "short"},
            "budget=prefill times 128 tokens, and .* knows 64 positions",
        ),
        ({"params_removed": 0.2, "options": {"budget": "decode"}}, "the sparsity is then a fraction of the time"),
        (
            {"sparsity": 0.99, "options": {"budget": "decode"}},
            "would empty a block: .* at most 0[.][0-9]* of the time of one decoded token can be removed",
        ),
    ):
        asked: dict[str, Any] = {"calibration": ids_file, "model": "long", **how}
        positions = 64 if asked.pop("model") == "short" else 128
        with pytest.raises(api.SecateurError, match=message):
            api.prune(
                api.Request(str(saved("llama", max_position_embeddings=positions)), "search", **asked), tmp_path / "out"
            )
        assert not list(tmp_path.glob("out*"))
    api.prune(api.Request(str(saved("llama")), "search", sparsity=0.2, calibration=ids_file), tmp_path / "uneven")
    again = api.Request(
        str(tmp_path / "uneven"), "search", sparsity=0.3, calibration=ids_file, options={"uniform": True}
    )
    with pytest.raises(api.UsageError, match="different widths already"):
        api.prune(again, tmp_path / "out")
    assert not (tmp_path / "out").exists()
