"""Masks of magnitude and Wanda against a naive float64 reference, on every family.

The reference uses nothing of the package: it runs the whole stock model with hooks, prunes block after block in place,
and selects with Python's own sort. Of equal scores, the entry with the lower index goes first, as in a stable sort.
"""

from __future__ import annotations

import math

import pytest
import torch

from secateur import api
from tests.layouts import layout_of
from tests.tiny import FFN, GROUPS, HEADS, HIDDEN, MODEL_TYPES, tiny_model

K = HIDDEN // HEADS


def lowest(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda j: scores[j])[:count]


def keep_mask(score: torch.Tensor, pattern: str, rate: float, scope: str) -> torch.Tensor:
    keep = torch.ones(score.shape, dtype=torch.bool)
    rows, columns = score.shape
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        for i in range(rows):
            for start in range(0, columns, m):
                for j in lowest(score[i, start : start + m].tolist(), m - n):
                    keep[i, start + j] = False
    elif scope == "row":
        for i in range(rows):
            for j in lowest(score[i].tolist(), math.floor(columns * rate)):
                keep[i, j] = False
    else:
        for flat in lowest(score.flatten().tolist(), math.floor(rows * columns * rate)):
            keep[flat // columns, flat % columns] = False
    return keep


def reference_masks(
    model_type: str, windows: torch.Tensor, method: str, pattern: str, rate: float, scope: str
) -> list[dict[str, torch.Tensor]]:
    model = tiny_model(model_type, dtype=torch.float64)
    layout = layout_of(model_type)
    layers = model.get_submodule(layout.blocks)
    masks: list[dict[str, torch.Tensor]] = []
    for layer in layers:
        squares: dict[str, torch.Tensor] = {}
        hooks = []
        for name, (path, _) in layout.matrices.items():

            def note(
                _: torch.nn.Module,
                inputs: tuple[torch.Tensor, ...],
                name: str = name,
                squares: dict[str, torch.Tensor] = squares,
            ) -> None:
                x = inputs[0].reshape(-1, inputs[0].shape[-1])
                squares[name] = squares.get(name, torch.zeros(x.shape[1], dtype=torch.float64)) + sum(
                    row * row for row in x
                )

            hooks.append(layer.get_submodule(path).register_forward_pre_hook(note))
        with torch.no_grad():
            for window in windows:
                model(window[None])
        for hook in hooks:
            hook.remove()
        found = {}
        for name, (path, rows) in layout.matrices.items():
            weight = layer.get_submodule(path).weight.data
            part = weight[rows]
            score = part.abs() if method == "magnitude" else part.abs() * squares[name].sqrt()
            found[name] = keep_mask(score, pattern, rate, scope)
            part *= found[name]  # later blocks see the pruned one
        masks.append(found)
    return masks


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    ("method", "pattern", "rate", "scope"),
    [
        ("wanda", "unstructured", 0.5, "row"),
        ("wanda", "unstructured", 0.37, "matrix"),
        ("wanda", "2:4", 0.5, "row"),
        ("wanda", "4:8", 0.5, "row"),
        ("wanda", "3:16", 13 / 16, "row"),
        ("magnitude", "unstructured", 0.63, "matrix"),
        ("magnitude", "unstructured", 0.5, "row"),
        ("magnitude", "1:4", 0.75, "row"),
    ],
)
def test_masks_equal_the_reference(
    model_type: str, method: str, pattern: str, rate: float, scope: str, windows: torch.Tensor
) -> None:
    expected = reference_masks(model_type, windows, method, pattern, rate, scope)
    options = {"scope": scope} if ":" not in pattern else {}
    plan = api.plan(
        tiny_model(model_type, dtype=torch.float64),
        method,
        windows,
        sparsity=None if ":" in pattern else rate,
        pattern=pattern,
        **options,
    )
    for block, masks in zip(plan.blocks, expected, strict=True):
        assert block.masks.keys() == masks.keys()
        for name, keep in masks.items():
            assert torch.equal(block.masks[name].unpack(), keep), f"block {block.index}, {name}"


def test_later_blocks_are_calibrated_on_pruned_earlier_ones(windows: torch.Tensor) -> None:
    """The masks of block 2 change when block 0 is pruned: a pass on the dense model would not give them."""
    model = tiny_model("llama", dtype=torch.float64)
    alone = api.plan(model, "wanda", windows, sparsity=0.6, modules="model.layers.2.*=0.6")
    after = api.plan(model, "wanda", windows, sparsity=0.6)
    assert alone.blocks[0].masks == {}
    assert alone.blocks[2].masks["down"] != after.blocks[2].masks["down"]


def test_float32_masks_differ_from_float64_only_at_near_ties(windows: torch.Tensor) -> None:
    wide = api.plan(tiny_model("llama", dtype=torch.float64), "wanda", windows, sparsity=0.5)
    narrow = api.plan(tiny_model("llama"), "wanda", windows, sparsity=0.5)
    differing = sum(
        int((a.masks[n].unpack() != b.masks[n].unpack()).sum())
        for a, b in zip(wide.blocks, narrow.blocks, strict=True)
        for n in a.masks
    )
    total = sum(mask.unpack().numel() for block in wide.blocks for mask in block.masks.values())
    assert differing / total < 1e-3


def test_structured_magnitude_against_brute_force() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    rows = api.plan(model, "magnitude", sparsity=0.5, pattern="rows")
    columns = api.plan(model, "magnitude", sparsity=0.5, pattern="columns")
    layer = model.model.layers[1]
    writes = (layer.mlp.gate_proj.weight**2 + layer.mlp.up_proj.weight**2).sum(1)
    reads = (layer.mlp.down_proj.weight**2).sum(0)
    for plan, score in ((rows, writes), (columns, reads)):
        assert plan.blocks[1].keep["ffn"].tolist() == sorted(score.argsort(descending=True)[: FFN // 2].tolist())
    heads = [
        sum(
            float((w.weight[start : start + size].detach() ** 2).sum())
            for w, start, size in _group_rows(layer.self_attn, group)
        )
        for group in range(GROUPS)
    ]
    assert rows.blocks[1].keep["groups"].tolist() == [max(range(GROUPS), key=lambda g: heads[g])]


def _group_rows(attention: torch.nn.Module, group: int) -> list[tuple[torch.nn.Linear, int, int]]:
    queries = HEADS // GROUPS
    return [
        (attention.q_proj, group * queries * K, queries * K),
        (attention.k_proj, group * K, K),
        (attention.v_proj, group * K, K),
    ]


def test_scope_model_ranks_the_units_of_all_blocks_together() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.01)
        model.model.layers[2].mlp.down_proj.weight.mul_(100)
    plan = api.plan(model, "magnitude", sparsity=0.5, modules="mlp", pattern="columns", scope="model")
    kept = [len(block.keep["ffn"]) for block in plan.blocks]
    assert kept[0] == 1, "the weakest block keeps its best unit"
    assert kept[2] == FFN
    assert sum(kept) == 3 * FFN - math.floor(FFN * 0.5) * 3
