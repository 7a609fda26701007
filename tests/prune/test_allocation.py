"""`--modules auto` and `owl`: the greedy choice, budgets, resuming and refusals.

Also the model that is pruned for a while and then restored.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from secateur import api
from secateur.calibrate.stream import Stream
from secateur.methods import find_method
from secateur.prune.allocation import allocate
from secateur.prune.allocation.curves import Curve, cheapest, fitted, hull_slopes
from secateur.prune.allocation.dense import DenseModel
from secateur.prune.job import make_job
from tests.folders import contents
from tests.tiny import FAMILY_TYPES, MODEL_TYPES, tiny_model

LEVELS = (0.25, 0.5, 0.75)


def _dense(model_type: str, windows: torch.Tensor, method: str = "wanda", modules: str | None = None) -> DenseModel:
    model, found = tiny_model(model_type), find_method(method)
    job = make_job(api.view_model(tiny_model(model_type)), torch.float32, found, found.options({}), 0.5, modules)
    return DenseModel(job, model, windows)


@torch.inference_mode()
def _loss(model: PreTrainedModel, windows: torch.Tensor) -> float:
    return float(cross_entropy(model(windows).logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))


def test_a_fit_meets_an_exponential_of_a_parabola_and_slopes_of_the_hull_never_fall() -> None:
    at = np.linspace(0, 1, 11)
    truth = np.exp(-8 + 3 * at + 4 * at**2)
    np.testing.assert_allclose(fitted((0.2, 0.5, 0.9), truth[[2, 5, 9]], at), truth, rtol=1e-9)
    rough = np.random.default_rng(0).random(30).cumsum() ** 2 + 5 * np.random.default_rng(1).random(30)
    slopes = hull_slopes(rough)
    assert (np.diff(slopes) > -1e-12).all()
    assert (rough[0] + slopes.cumsum() <= rough[1:] + 1e-9).all()


def test_the_greedy_choice_is_the_best_of_all_choices() -> None:
    curves = [
        Curve(0, "q", 2, 4, (0.01, 0.05, 0.4)),
        Curve(0, "k", 1, 4, (0.02, 0.03, 0.05)),
        Curve(1, "q", 2, 4, (0.002, 0.05, 0.6)),
    ]
    grids = [fitted(LEVELS, c.increase_L, np.arange(5) / 4) for c in curves]
    assert all((np.diff(y, 2) > 0).all() for y in grids), "the curves of this test are convex, so the hull is the curve"
    for budget in (2, 7, 12):
        steps = [round(rate * 4) for rate in cheapest(LEVELS, curves, budget)]
        removed = sum(n * c.outputs for n, c in zip(steps, curves, strict=True))
        assert budget <= removed < budget + 2
        cost = sum(y[n] for y, n in zip(grids, steps, strict=True))
        every = itertools.product(range(4), repeat=3)  # 4 of 4 is beyond what may be removed
        best = min(
            sum(y[n] for y, n in zip(grids, s, strict=True))
            for s in every
            if sum(n * c.outputs for n, c in zip(s, curves, strict=True)) == removed
        )
        assert cost == pytest.approx(best)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_model_is_pruned_for_a_while_and_known_blocks_need_not_run(model_type: str, windows: torch.Tensor) -> None:
    dense = _dense(model_type, windows)
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    batches = list(windows.split(4))
    assert dense.loss(batches) == pytest.approx(_loss(dense.model, windows), rel=1e-5)
    entering = dense.leaving(1, batches, dense.leaving(0, batches))
    rates: tuple[dict[str, float], ...] = ({}, {}, {"v": 0.5, "down": 1.0})
    with dense.pruned(rates) as removed:
        zeros = sum(int((t == 0).sum()) for t in dense.model.state_dict().values())
        assert zeros - sum(int((t == 0).sum()) for t in before.values()) == removed > 0
        assert dense.loss(batches, 2, entering) == dense.loss(batches)
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.model.state_dict().items())


def test_a_decoder_may_ask_its_blocks_their_kind(windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some decoders choose the mask of a block by an attribute of it."""
    dense = _dense("llama", windows)
    decoder, layer = type(dense.model.get_decoder()), type(dense.model.get_decoder().layers[0])
    forward = decoder.forward
    asked = 0

    def asks(self: Any, *args: Any, **named: Any) -> Any:
        nonlocal asked
        asked += len({block.attention_type for block in self.layers})
        return forward(self, *args, **named)

    monkeypatch.setattr(layer, "attention_type", "full_attention", raising=False)
    monkeypatch.setattr(decoder, "forward", asks)
    Stream(dense.job.view, windows, device=torch.device("cpu"), dtype=torch.float32)
    assert asked
    entering = dense.leaving(1, [windows])
    assert dense.loss([windows], 2, entering) == dense.loss([windows])


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
@pytest.mark.parametrize("allocation", ["auto", "owl"])
def test_as_many_weights_go_as_at_one_sparsity_and_the_model_stays(
    allocation: str, model_type: str, windows: torch.Tensor
) -> None:
    model = tiny_model(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plans = [api.plan(model, "wanda", windows, sparsity=0.5, modules=m) for m in (None, allocation, allocation)]
    uniform, chosen = (
        sum(mask.removed for block in plan.blocks for mask in block.masks.values()) for plan in plans[:2]
    )
    rows = [
        [mask.shape[0] for mask in block.masks.values()] for block in plans[0].blocks
    ]  # a step of a matrix, which owl takes in a whole block at once
    assert 0 <= chosen - uniform < (max(map(max, rows)) if allocation == "auto" else max(map(sum, rows)))
    assert plans[1] == plans[2]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    rates = plans[1].settings["allocation"]["rates"]
    assert [rate.keys() for rate in rates] == [block.masks.keys() for block in plans[1].blocks]


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("allocation", ["auto", "owl"])
def test_weights_are_counted_as_the_method_counts(allocation: str, method: str, windows: torch.Tensor) -> None:
    """60% of a row of 32 is 19 weights, and of 32 rows in a matrix 614, not 608."""
    model = tiny_model("llama")
    plans = [api.plan(model, method, windows, sparsity=0.6, modules=m) for m in (None, allocation)]
    assert plans[0].blocks[0].masks["q"].removed == (608 if method == "wanda" else 614)
    uniform, chosen = (sum(mask.removed for block in plan.blocks for mask in block.masks.values()) for plan in plans)
    assert 0 <= chosen - uniform < (48 if allocation == "auto" else 208 if method == "wanda" else 21)


def test_rates_that_are_held_at_their_limits_are_made_up_for_by_the_others() -> None:
    view = api.view_model(tiny_model("phi3"))
    sizes = [
        {name: math.prod(view.dims(index).shape(name)) for name in view.matrix_shapes(index)} for index in range(3)
    ]
    for rate, change in (
        (0.9, [-0.16, 0.08, 0.08]),
        (0.05, [0.1, -0.02, -0.08]),
        (0.97, [-0.1, 0.0, 0.1]),
        (0.6, [0.08, 0.0, -0.08]),
    ):
        uniform = tuple(dict.fromkeys(sizes[index], rate) for index in range(3))
        found = allocate.balanced(view, uniform, change, by_rows=False)
        removed, asked = (
            sum(math.floor(sizes[index][n] * r) for index in range(3) for n, r in rates[index].items())
            for rates in (found, uniform)
        )
        assert 0 <= removed - asked <= 21
        assert all(0 <= r <= max(0.95, (1 + rate) / 2) for rates in found for r in rates.values())
        if rate == 0.6:  # none is held
            assert [block["q"] for block in found] == pytest.approx([0.52, 0.6, 0.68], abs=1e-3)


def test_losses_of_the_choice_are_those_of_the_pruned_model_and_not_above_one_sparsity(windows: torch.Tensor) -> None:
    model = tiny_model("llama")
    plan = api.plan(model, "magnitude", windows, sparsity=0.6, modules="auto")
    facts = plan.settings["allocation"]
    uniform = api.cut(model, api.plan(model, "magnitude", sparsity=0.6))
    assert facts["loss"]["uniform"] == pytest.approx(_loss(uniform, windows), rel=1e-5)
    assert _loss(api.cut(model, plan), windows) == pytest.approx(min(facts["loss"].values()), rel=1e-5)


def test_owl_against_a_reference(windows: torch.Tensor) -> None:
    """Shares of outliers and densities by hand in float64 (arXiv:2310.05175, section 3.2)."""
    model = tiny_model("llama")
    facts = api.plan(model, "magnitude", windows, sparsity=0.5, modules="owl").settings["allocation"]
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(lambda _, x, n=name: inputs.__setitem__(n, x[0].flatten(0, 1).double()))
    model(windows)
    shares = []
    for index in range(3):
        scores = [
            (model.get_submodule(n).weight.double().abs() * x.norm(dim=0)).flatten()
            for n, x in inputs.items()
            if f"layers.{index}." in n
        ]
        score = torch.cat(scores)
        shares.append(float((score > 5 * score.mean()).double().mean()))
    assert facts["outliers"] == pytest.approx(shares, abs=2e-4)
    above = np.array([0.16 * (share - min(shares)) / (max(shares) - min(shares)) for share in facts["outliers"]])
    assert [block["q"] for block in facts["rates"]] == pytest.approx((0.5 - (above - above.mean())).tolist(), abs=0.02)
    assert all(len(set(block.values())) == 1 for block in facts["rates"])


def test_an_interrupted_run_keeps_its_decision(
    saved: Callable[..., Path],
    ids_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interrupted_at: Callable[..., AbstractContextManager[None]],
) -> None:
    request = api.Request(str(saved("llama")), "wanda", sparsity=0.5, modules="auto", calibration=ids_file)
    record = api.prune(request, tmp_path / "whole")
    assert record["sparsity_measured"] == pytest.approx(0.5, abs=0.003)
    with interrupted_at("block-00001"):
        api.prune(request, tmp_path / "resumed")
    with monkeypatch.context() as patch:
        patch.setattr(allocate, "sensitivities", lambda *_: pytest.fail("measured again"))
        api.prune(request, tmp_path / "resumed", resume=True)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    plan = json.loads((tmp_path / "whole" / "secateur" / "plan.json").read_text())
    assert plan["allocation"]["rates"][0]["q"] == pytest.approx(
        plan["blocks"][0]["masks"]["q"]["removed"] / math.prod(plan["blocks"][0]["masks"]["q"]["shape"])
    )


def test_a_loss_that_is_not_finite_counts_as_the_worst(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = DenseModel.loss

    def overflowing(
        dense: DenseModel, batches: list[torch.Tensor], index: int = 0, entering: list[torch.Tensor] | None = None
    ) -> float:
        return math.inf if index == 1 else true(dense, batches, index, entering)

    monkeypatch.setattr(DenseModel, "loss", overflowing)
    api.prune(
        api.Request(str(saved("llama")), "sparsegpt", sparsity=0.5, modules="auto", calibration=ids_file),
        tmp_path / "out",
    )
    found = json.loads((tmp_path / "out" / "secateur" / "plan.json").read_text())["allocation"]
    assert {value for matrix in found["increase"][1].values() for value in matrix} == {allocate.WORST}


def test_a_dry_run_removes_as_much_and_takes_longer(saved: Callable[..., Path], ids_file: str) -> None:
    folder = str(saved("llama"))
    uniform, auto = (
        api.estimate(api.prepare(api.Request(folder, "wanda", sparsity=0.5, modules=modules, calibration=ids_file)))
        for modules in (None, "auto")
    )
    assert auto["nonzero_after"] == uniform["nonzero_after"]
    assert auto["memory_bytes"] >= uniform["memory_bytes"]
    assert auto["seconds_estimated"] > uniform["seconds_estimated"]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"pattern": "2:4"}, "pattern 2:4 fixes the sparsity of every matrix"),
        ({"pattern": "rows", "sparsity": 0.5}, "needs pattern unstructured"),
        ({}, "needs --sparsity S"),
        ({"method": "slicegpt", "sparsity": 0.5}, "does not go with slicegpt"),
    ],
)
def test_where_nothing_can_be_allocated(how: dict[str, Any], words: str, saved: Callable[..., Path]) -> None:
    with pytest.raises(api.UsageError, match=words):
        api.prepare(api.Request(str(saved("llama")), **{"method": "wanda", "modules": "auto", **how}))


def test_a_sparsity_of_zero_has_nothing_to_decide(windows: torch.Tensor) -> None:
    assert "allocation" not in api.plan(tiny_model("llama"), "wanda", windows, sparsity=0.0, modules="auto").settings
