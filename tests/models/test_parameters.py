"""Parameters counted from sizes against those of real models, in memory and written, for every family and space."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from secateur import api
from secateur.cut import dims_after
from secateur.methods.llm_surgeon.units import removed_parameters
from secateur.models.canonical import canonical_view, why_not_tied
from secateur.models.family import ROTATE
from secateur.models.load import open_checkpoint
from secateur.models.parameters import block_cost, block_parameters, count_parameters, mean_block, unit_parameters
from secateur.models.runtime import NORM_FIRST, SELECT_FIRST, is_index_map
from secateur.models.spaces import MEMBERS, OWN_COLUMNS, SPACES
from secateur.models.view import ModelView
from secateur.plan.counts import units_left
from secateur.plan.plan import BlockPlan
from secateur.plan.structures import SELECTIONS, SEPARATE, find_structures
from tests.tiny import FAMILY_TYPES, HEADS, MODEL_TYPES, tiny_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{model_type: (model_type, {}) for model_type in MODEL_TYPES},
    **{f"{model_type}, tied": (model_type, {"tied": True}) for model_type in FAMILY_TYPES},
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 12}),
    "opt, no biases": ("opt", {"enable_bias": False}),
    "opt, norms without weights": ("opt", {"layer_norm_elementwise_affine": False}),
}
UNITS = {
    "feed-forward units": ("ffn",),
    "groups": ("groups",),
    "query heads": ("heads",),
    "groups and feed-forward units": ("groups", "ffn"),
}
SELECTED = {"what is read and written": SELECTIONS, "what q, k and v read apart": SEPARATE}
SLICED: dict[str, dict[str, Any]] = {
    "factors": {"sparsity": 0.25},
    "factors, unequal widths": {"energy": 0.99, "round": 1, "slice_head": True},
    "dense": {"sparsity": 0.25, "adapters": "dense"},
    "dense, unequal widths": {"energy": 0.9, "round": 1, "slice_head": True, "adapters": "dense"},
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    model_type, how = MODELS[request.param]
    return tiny_model(model_type, **how)


def keep(view: ModelView, index: int, spaces: tuple[str, ...]) -> dict[str, Tensor]:
    """Other units of each space of each block."""
    dims = view.dims(index)
    sizes = {**dict.fromkeys(OWN_COLUMNS.values(), dims.hidden), **dims.units()}
    if spaces == ("heads",):  # as many of every group
        one_of_each_group = torch.arange(dims.groups) * dims.queries
        return {"heads": one_of_each_group if index else torch.arange(dims.heads)}
    first = {space: min(sizes[space] - 1, 1 + 2 * index + number) for number, space in enumerate(spaces)}
    return {space: torch.arange(first[space] if space != "groups" else index % 2, sizes[space]) for space in spaces}


def plan(view: ModelView, spaces: tuple[str, ...], form: str | None = None) -> api.Plan:
    kept = [keep(view, index, spaces) for index in range(view.blocks)]
    sizes = {"heads": HEADS, **dict.fromkeys(OWN_COLUMNS.values(), view.dims(0).hidden), **view.dims(0).units()}
    of = {space: sizes[space] for space in spaces}
    return api.Plan({}, tuple(BlockPlan(index, keep=kept[index], of=of, select=form) for index in range(view.blocks)))


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())  # a tied one once


def stored(folder: Path) -> int:
    total = 0
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            names = [name for name in handle.keys() if not is_index_map(name)]  # noqa: SIM118
            total += sum(math.prod(handle.get_slice(name).get_shape()) for name in names)
    return total


def own_count(view: ModelView) -> int:
    return count_parameters(view, [view.dims(index) for index in range(view.blocks)])


def check(view: ModelView, after: list[Any], cut: Any, folder: Path) -> None:
    """The count before the cut, the model after it, its own count, and what is written are one number."""
    expected = parameters(cut)
    assert expected != view.parameters()
    assert count_parameters(view, after) == expected
    assert own_count(api.view_model(cut)) == expected
    cut.save_pretrained(folder)
    assert own_count(open_checkpoint(str(folder)).view()) == stored(folder) == expected


def test_a_dense_model(model: Any, tmp_path: Path) -> None:
    view = api.view_model(model)
    assert own_count(view) == parameters(model)
    blocks = model.get_submodule(view.family.blocks)
    assert [block_parameters(view, index) for index in range(view.blocks)] == [parameters(block) for block in blocks]
    assert mean_block(view) == parameters(blocks[0])
    model.save_pretrained(tmp_path)
    assert own_count(open_checkpoint(str(tmp_path)).view()) == stored(tmp_path) == parameters(model)


@pytest.mark.parametrize("spaces", UNITS)
def test_units(spaces: str, model: Any, tmp_path: Path) -> None:
    view = api.view_model(model)
    if spaces == "query heads" and view.dims(0).queries == 1:
        pytest.skip("every query head has a key-value head of its own")
    made = plan(view, UNITS[spaces])
    after = [dims_after(view.dims(block.index), block) for block in made.blocks]
    cut = api.cut(model, made)
    check(view, after, cut, tmp_path)


def test_one_unit(model: Any) -> None:
    view = api.view_model(model)
    for space, members in MEMBERS.items():
        size = view.dims(1).units()[space]
        blocks = [BlockPlan(index) for index in range(view.blocks)]
        blocks[1] = BlockPlan(1, keep={space: torch.arange(size - 1)}, of={space: size})
        left = parameters(api.cut(model, api.Plan({}, tuple(blocks))))
        assert unit_parameters(view, 1, space) == parameters(model) - left
        rates: list[dict[str, float]] = [{}, {members.reader: 1.5 / size}, {}]
        after = [units_left(view.dims(index), rate) for index, rate in enumerate(rates)]
        assert count_parameters(view, after) == left


def test_blocks(model: Any, tmp_path: Path) -> None:
    view = api.view_model(model)
    cut = api.cut(model, api.Plan({}, tuple(BlockPlan(index, dropped=index == 1) for index in range(view.blocks))))
    check(view, [view.dims(0), None, view.dims(2)], cut, tmp_path)


@pytest.mark.parametrize("form", [NORM_FIRST, SELECT_FIRST])
@pytest.mark.parametrize("spaces", SELECTED)
def test_a_selected_residual(spaces: str, form: str, model: Any, tmp_path: Path) -> None:
    view = api.view_model(model)
    made = plan(view, SELECTED[spaces], form)
    cut = api.cut(model, made)
    check(view, [dims_after(view.dims(block.index), block) for block in made.blocks], cut, tmp_path)
    separate = SELECTED[spaces] == SEPARATE
    structures = find_structures(view, constrained=False, form=form, whole=True, separate=separate)
    kept = [len(made.blocks[index].keep[space]) for index, use in enumerate(structures.uses) for space in use]
    assert structures.parameters(kept) == parameters(cut)
    assert structures.total == parameters(model)
    inside = find_structures(view, constrained=False, form=form, whole=False, separate=separate)
    assert inside.parameters(kept) == parameters(cut.get_submodule(view.family.blocks))
    assert inside.total == parameters(model.get_submodule(view.family.blocks))


def test_units_of_every_space(model: Any, tmp_path: Path) -> None:
    view = api.view_model(model)
    made = plan(view, SPACES, NORM_FIRST)
    cut = api.cut(model, made)
    check(view, [dims_after(view.dims(block.index), block) for block in made.blocks], cut, tmp_path)
    kept = [{space: len(indices) for space, indices in block.keep.items()} for block in made.blocks]
    assert removed_parameters(view, kept) == parameters(model) - parameters(cut)


@pytest.mark.parametrize("options", SLICED)
def test_a_sliced_residual(options: str, model: Any, windows: Tensor, tmp_path: Path) -> None:
    if api.view_model(model).family.why_not(ROTATE):
        pytest.skip("the residual stream of this family cannot be sliced")
    cut = api.cut(model, api.plan(model, "slicegpt", windows, **SLICED[options]))
    dense, sliced = api.view_model(model), api.view_model(cut)
    view = canonical_view(dense, model.dtype, tied=why_not_tied(dense) is None)
    after = [sliced.dims(index) for index in range(sliced.blocks)]
    first = after[0].residual
    assert (first.skips[0] == "dense") == options.startswith("dense"), "the adapters that are meant"
    assert (first.attention[0] != first.attention[1]) == options.endswith("unequal widths")
    check(view, after, cut, tmp_path)


def test_the_cost_of_a_block_in_terms_of_its_spaces() -> None:
    """By hand: OPT, 32 features, 4 heads of width 8, 48 feed-forward units, biases and LayerNorms everywhere."""
    view = api.view_model(tiny_model("opt"))
    cost = block_cost(view, 0)
    assert cost.products == {
        (): 0,
        ("attention_in", "groups"): 3 * 8,
        ("groups",): 3 * 8,
        ("groups", "attention_out"): 8,
        ("attention_out",): 1,
        ("mlp_in", "ffn"): 1,
        ("ffn",): 1,
        ("ffn", "mlp_out"): 1,
        ("mlp_out",): 1,
        ("attention_in",): 2,
        ("mlp_in",): 2,
    }
    units = view.dims(0).units()
    assert cost.unit_parameters("groups", units) == 8 * (3 * 32 + 3 + 32)
    assert cost.unit_parameters("ffn", units) == 32 + 1 + 32
    fixed = cost.fixed({"groups": 4, "mlp_in": 5})
    assert fixed.products == {
        (): 4 * 24 + 5 * 2,
        ("attention_in",): 4 * 24 + 2,
        ("attention_out",): 4 * 8 + 1,
        ("ffn",): 5 + 1,
        ("ffn", "mlp_out"): 1,
        ("mlp_out",): 1,
    }
    assert fixed.parameters({**units, "mlp_in": 0, "groups": 0}) == cost.parameters({**units, "groups": 4, "mlp_in": 5})
