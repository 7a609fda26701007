"""DISP-LLM: the cut equals the masked model, learning lowers the loss, and wrong requests are refused in one line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from secateur import api
from secateur.methods import disp_llm
from secateur.methods.disp_llm.masked import MaskedModel, keep_gates
from secateur.models.runtime import SELECT_FORMS
from secateur.plan.structures import find_structures
from tests.tiny import FAMILY_TYPES, able, some_ids, tiny_model


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(("norm", "tied"), [("full", False), ("selected", True)])
@pytest.mark.parametrize("model_type", able("disp_llm"))
def test_the_cut_equals_the_masked_model(
    model_type: str, norm: str, tied: bool, separate: bool, windows: Tensor
) -> None:
    model = tiny_model(model_type, tied=tied, dtype=torch.float64)
    plan = api.plan(model, "disp_llm", windows, sparsity=0.4, unmet="cut", steps=2, norm=norm, separate=separate)
    form = SELECT_FORMS[norm == "selected"]
    view = api.view_model(model)
    structures = find_structures(view, constrained=False, form=form, whole=True, separate=separate)
    keep = [torch.empty(0)] * len(structures.widths)
    for block, uses in zip(plan.blocks, structures.uses, strict=True):
        assert block.select == form
        for selection, number in uses.items():
            keep[number] = block.keep[selection]
    masked = MaskedModel(view, structures, form, device=torch.device("cpu"), dtype=torch.float64)
    narrow = api.cut(model, plan)
    torch.testing.assert_close(
        narrow(some_ids()).logits, masked.logits(some_ids(), keep_gates(structures, keep)), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(narrow(some_ids()).logits, model(some_ids()).logits, atol=1e-2)
    assert structures.parameters([float(len(indices)) for indices in keep]) == sum(
        p.numel() for p in narrow.parameters()
    )
    if separate:
        assert len({tuple(plan.blocks[0].keep[f"{name}_in"].tolist()) for name in "qkv"}) == 3


@pytest.mark.parametrize(("norm", "separate"), [("full", False), ("selected", False), ("full", True)])
@pytest.mark.parametrize("model_type", able("disp_llm"))
def test_scales_are_folded_into_the_weights(model_type: str, norm: str, separate: bool, windows: Tensor) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    form, view = SELECT_FORMS[norm == "selected"], api.view_model(model)
    structures = find_structures(view, constrained=False, form=form, whole=True, separate=separate)
    keep = [torch.arange(0, width, 2, dtype=torch.int32) for width in structures.widths]
    scales = [torch.linspace(0.5, 1.5, width, dtype=torch.float64) for width in structures.widths]
    plan = api.Plan(
        {}, tuple(disp_llm._block_plan(view, structures, keep, scales, index, form) for index in range(view.blocks))
    )
    masked = MaskedModel(view, structures, form, device=torch.device("cpu"), dtype=torch.float64)
    expected = masked.logits(some_ids(), torch.cat([keep_gates(structures, keep).double(), *scales]))
    torch.testing.assert_close(api.cut(model, plan).double()(some_ids()).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, masked.logits(some_ids(), keep_gates(structures, keep).double()), atol=1e-2)


def test_a_scale_is_learned_only_when_asked_for_and_the_plan_says_so(windows: Tensor) -> None:
    model = tiny_model("llama")
    frozen, scaled = (
        api.plan(model, "disp_llm", windows, sparsity=0.4, unmet="cut", steps=2, scale=scale).blocks[0]
        for scale in (False, True)
    )
    assert not frozen.updated
    assert set(scaled.updated) == {"q", "k", "v", "o", "gate", "up", "down"}


@pytest.mark.slow
def test_learning_beats_a_choice_that_was_not_learned(windows: Tensor) -> None:
    """On the text it learns from, with the same budget."""
    model = tiny_model("llama")
    ids = windows % 8 + 4  # few tokens, so that there is something to learn

    def loss(**options: Any) -> float:
        narrow = api.cut(
            model, api.plan(model, "disp_llm", ids, sparsity=0.4, batch=6, lr=1e-2, unmet="cut", **options)
        )
        return float(narrow(input_ids=ids, labels=ids).loss.detach())

    unlearned, learned = loss(steps=1), loss(steps=150)
    assert learned < unlearned - 0.1


def test_settings_of_the_gates_change_what_is_kept_and_the_seed_does_too(windows: Tensor) -> None:
    model = tiny_model("llama")

    def blocks(**asked: Any) -> Any:
        return api.plan(model, "disp_llm", windows, sparsity=0.4, unmet="cut", steps=3, **asked).blocks

    first = blocks()
    for asked in (
        {"seed": 1},
        {"gate": "gumbel"},
        {"gate": "reinmax-printed"},
        {"hypernetwork": "linear"},
        {"hypernetwork": "none"},
        {"constrained": True},
        {"separate": True},
        {"round": 8},
        {"warm": 2},
        {"scale": True},
    ):
        assert blocks(**asked) != first, asked
    assert blocks() == first
    assert all(len(indices) % 8 == 0 for block in blocks(round=8) for indices in block.keep.values())


def test_a_budget_that_learning_did_not_reach_is_reported(windows: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    plan = api.plan(tiny_model("llama"), "disp_llm", windows, sparsity=0.4, unmet="cut", steps=1, cut="half")
    assert plan.settings["learning"]["removed_half"] == 0
    told = capsys.readouterr().err
    assert (
        "0.4000 of the parameters are to be removed; keeping the gates that are open more than half of the time removes 0.0000, the final choice removes 0.0000"
        in told
    )
    assert re.search(
        r"has not met its budget: the learned gates remove 0\.0\d+ of the parameters on average, not 0\.4000; the cut removes the lowest-ranked gates",
        told,
    )


def test_the_sparsity_is_that_of_the_whole_model(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    request = api.Request(
        str(saved("llama")), "disp_llm", params_removed=0.35, calibration=ids_file, options={"unmet": "cut", "steps": 2}
    )
    record = api.prune(request, tmp_path / "out")
    assert record["pruning_ratio"] == record["sparsity_measured"] == pytest.approx(0.35, abs=0.01)
    learning = api.read_plan(tmp_path / "out").settings["learning"]
    assert record["learning"] == learning
    assert learning["step"] == [2]
    model = tiny_model("llama")
    fixed = (
        find_structures(api.view_model(model), constrained=False, form=SELECT_FORMS[0], whole=True).fixed
        / model.num_parameters()
    )
    assert learning["budget"] == [pytest.approx(math.log((learning["left"][0] - fixed) / (0.65 - fixed)), abs=1e-3)]
    assert learning["removed_half"] < 0.35
    found = api.inspect(str(tmp_path / "out"))
    assert (
        found["parameters"]
        == record["params_after"]
        == sum(b["parameters"] for b in found["blocks"]) + 2 * 64 * 32 + 32
    )
    assert found["blocks"][0]["residual"]["skips"] == ("norm, select",) * 2
    dense = sum(
        m["shape"][0] * m["shape"][1]
        for b in api.inspect(str(saved("llama")))["blocks"]
        for m in b["matrices"].values()
    )
    assert record["pruning_ratio_blocks"] == pytest.approx(1 - found["parameters_blocks"] / dense), (
        "index maps are no weights"
    )
    with pytest.raises(api.SecateurError, match="pruned already; prune the original model"):
        api.prepare(api.Request(str(tmp_path / "out"), "disp_llm", sparsity=0.5))
    with pytest.raises(api.SecateurError, match="already selected from"):
        api.prepare(api.Request(str(tmp_path / "out"), "slicegpt", sparsity=0.5))


def test_the_constrained_choice_is_the_same_for_all_blocks(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    request = api.Request(
        str(saved("llama")),
        "disp_llm",
        0.4,
        calibration=ids_file,
        options={"unmet": "cut", "steps": 2, "constrained": True},
    )
    api.prune(request, tmp_path / "out")
    blocks = api.read_plan(tmp_path / "out").blocks
    shared = [block.keep[space] for block in blocks for space in ("attention_in", "attention_out", "mlp_in", "mlp_out")]
    assert all(torch.equal(indices, shared[0]) for indices in shared)


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_a_result_whose_readers_select_apart_is_pruned_further(
    model_type: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    """q, k and v are three matrices then, each with an input of its own, also where a stock block has one module for
    them.
    """
    dense = saved(model_type, dtype=torch.bfloat16)
    first = api.Request(
        str(dense),
        "disp_llm",
        sparsity=0.3,
        calibration=ids_file,
        options={"unmet": "cut", "steps": 2, "separate": True},
    )
    api.prune(first, tmp_path / "apart")
    assert (tmp_path / "apart" / "model.safetensors").is_file(), (
        "odd widths beside whole numbers are no reason for shards"
    )
    record = api.prune(
        api.Request(str(tmp_path / "apart"), "wanda", modules="k=0.5", calibration=ids_file), tmp_path / "sparse"
    )
    assert record["params_after"] == record["params_before"]
    before, after = (api.inspect(str(tmp_path / name))["blocks"] for name in ("apart", "sparse"))
    assert after[1]["residual"]["readers"] == before[1]["residual"]["readers"]
    assert len({block["matrices"][name]["shape"][1] for block in before for name in "qkv"}) > 2
    sparsities = {name: matrix["sparsity"] for name, matrix in after[1]["matrices"].items()}
    assert sparsities == {name: pytest.approx(0.5, abs=0.05) if name == "k" else 0 for name in sparsities}


@pytest.mark.parametrize("options", [{}, {"norm": "selected", "separate": True}])
@pytest.mark.parametrize("model_type", able("disp_llm", FAMILY_TYPES))
def test_the_pruned_model_compiles_without_breaks_or_recompiles(
    model_type: str, options: dict[str, Any], windows: Tensor
) -> None:
    model = tiny_model(model_type, num_hidden_layers=1)
    narrow = api.cut(model, api.plan(model, "disp_llm", windows, sparsity=0.3, unmet="cut", steps=1, **options))
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(narrow, fullgraph=True, backend=counter)
    with torch.no_grad():
        for seed in (1, 2):
            assert torch.equal(
                compiled(input_ids=some_ids(seed=seed), use_cache=False).logits,
                narrow(some_ids(seed=seed), use_cache=False).logits,
            )
    assert counter.frame_count == 1


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 0.95}, r"--sparsity 0.95 leaves almost nothing; it must be below 0.95"),
    (
        {"sparsity": 0.9},
        r"--sparsity 0.9 cannot be reached: at most 0\.\d+ of the parameters can go, .*; use --sparsity 0\.\d+ or less",
    ),
    ({}, r"disp_llm needs --sparsity S"),
    ({"sparsity": 1.2}, r"outside \[0, 1\)"),
    ({"sparsity": 0.5, "modules": "mlp"}, r"--modules does not go with disp_llm"),
    ({"sparsity": 0.5, "options": {"gate": "hard"}}, r"unknown gate 'hard' \(allowed: reinmax"),
    (
        {"sparsity": 0.5, "options": {"separate": "true", "constrained": "true"}},
        r"constrained=true and separate=true do not go together: .*; set only one of them",
    ),
    ({"sparsity": 0.5, "options": {"steps": "0"}}, r"steps is 0; it is a count, at least 1"),
    ({"sparsity": 0.5, "options": {"lr": "nan"}}, r"lr is nan; it must be above 0"),
    (
        {"sparsity": 0.5, "options": {"batch": "6", "accumulate": "4"}},
        r"batch=6 windows cannot be split into accumulate=4 equal parts",
    ),
    ({"sparsity": 0.5, "options": {"warm": "-1"}}, r"warm is -1; it is a count, 0 for none"),
    ({"sparsity": 0.5, "options": {"strength": "-1"}}, r"strength is -1; it must be at least 0"),
    ({"sparsity": 0.5, "stock_only": True}, r"--stock-only: disp_llm: it gives every block its own widths"),
]


@pytest.mark.parametrize(("asked", "words"), BAD)
def test_bad_input_is_refused_in_one_line(
    asked: dict[str, Any], words: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    with pytest.raises(api.UsageError, match=words) as caught:
        api.prune(api.Request(str(saved("llama")), "disp_llm", calibration=ids_file, **asked), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_with_the_step(windows: Tensor) -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(api.SecateurError, match=r"the loss is not finite .* at step 1;"):
        api.plan(model, "disp_llm", windows, sparsity=0.3, unmet="cut", steps=2)
