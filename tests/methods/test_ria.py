"""RIA against a naive float64 reference, on every family, also with rows and columns of zeros.

The reference uses nothing of the package: it runs the whole stock model with hooks, scores each weight in a Python
loop, and prunes block after block in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from secateur import api
from secateur.methods import find_method
from secateur.methods.ria import relative_importance
from tests.layouts import Layout, layout_of
from tests.methods.test_masks_against_reference import keep_mask
from tests.tiny import MODEL_TYPES, tiny_model

Case = tuple[str, float, str, float]  # pattern, sparsity, scope, power


def share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def scores(weight: torch.Tensor, norms: list[float], power: float) -> torch.Tensor:
    sizes = weight.abs().tolist()
    rows = [math.fsum(row) for row in sizes]
    columns = [math.fsum(column) for column in zip(*sizes, strict=True)]
    score = torch.zeros_like(weight)
    for i, row in enumerate(sizes):
        for j, size in enumerate(row):
            score[i, j] = (share(size, columns[j]) + share(size, rows[i])) * norms[j] ** power
    return score


def norms_of(inputs: torch.Tensor) -> list[float]:
    return [math.sqrt(math.fsum(x * x for x in column)) for column in inputs.flatten(0, -2).t().tolist()]


def part_of(layer: torch.nn.Module, path: str, rows: slice) -> torch.Tensor:
    return layer.get_submodule(path).weight.data[rows]


def reference_masks(
    model: torch.nn.Module,
    layout: Layout,
    windows: torch.Tensor,
    keep_lowest_out: Callable[[torch.Tensor], torch.Tensor],
    power: float,
) -> list[dict[str, torch.Tensor]]:
    blocks = []
    for layer in model.get_submodule(layout.blocks):
        inputs: dict[str, torch.Tensor] = {}
        hooks = []
        for name, (path, _) in layout.matrices.items():

            def note(_: Any, given: Any, name: str = name, inputs: dict[str, torch.Tensor] = inputs) -> None:
                inputs[name] = given[0]

            hooks.append(layer.get_submodule(path).register_forward_pre_hook(note))
        with torch.no_grad():
            model(windows)
        for hook in hooks:
            hook.remove()
        masks = {}
        for name, (path, rows) in layout.matrices.items():
            part = part_of(layer, path, rows)
            masks[name] = keep_lowest_out(scores(part, norms_of(inputs[name]), power))
            part *= masks[name]  # later blocks see the pruned one
        blocks.append(masks)
    return blocks


def check(model_type: str, windows: torch.Tensor, case: Case, zero: bool = False) -> None:
    pattern, rate, scope, power = case
    layout = layout_of(model_type)
    dense, copy = (tiny_model(model_type, dtype=torch.float64) for _ in range(2))
    for model in (dense, copy) if zero else ():
        weight = part_of(model.get_submodule(layout.blocks)[1], *layout.matrices["up"])
        weight[:, 5] = 0
        weight[3] = 0
    expected = reference_masks(copy, layout, windows, lambda score: keep_mask(score, pattern, rate, scope), power)
    asked = None if ":" in pattern else rate
    plan = api.plan(dense, "ria", windows, sparsity=asked, pattern=pattern, scope=scope, power=power)
    for block, masks in zip(plan.blocks, expected, strict=True):
        assert block.masks.keys() == masks.keys()
        for name, keep in masks.items():
            assert torch.equal(block.masks[name].unpack(), keep), f"block {block.index}, {name}"


CASES: list[Case] = [
    ("unstructured", 0.5, "matrix", 0.5),
    ("unstructured", 0.37, "row", 0.5),
    ("unstructured", 0.6, "matrix", 0.0),
    ("2:4", 0.5, "matrix", 0.5),
    ("3:16", 13 / 16, "matrix", 1.0),
]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("case", CASES)
def test_masks_equal_the_reference(model_type: str, case: Case, windows: torch.Tensor) -> None:
    check(model_type, windows, case)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("case", [("unstructured", 0.5, "matrix", 0.5), ("1:4", 0.75, "matrix", 0.5)])
def test_masks_equal_the_reference_with_a_row_and_a_column_of_zeros(
    model_type: str, case: Case, windows: torch.Tensor
) -> None:
    check(model_type, windows, case, zero=True)


def test_relative_importance_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0, 0.0], [0.0, 0.0, 0.0], [-3.0, 1.0, 0.0]])
    expected = torch.tensor([[1 / 4 + 1 / 4, 3 / 4 + 3 / 4, 0.0], [0.0, 0.0, 0.0], [3 / 4 + 3 / 4, 1 / 4 + 1 / 4, 0.0]])
    before = weight.clone()
    assert torch.equal(relative_importance(weight), expected)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_share_of_a_column_is_the_same_whatever_the_column_is_multiplied_by(scale: float) -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = weight.clone()
    scaled[:, 2] *= scale
    of_rows = [w.abs() / w.abs().sum(1, keepdim=True) for w in (weight, scaled)]
    torch.testing.assert_close(relative_importance(scaled) - of_rows[1], relative_importance(weight) - of_rows[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "rows"}, r"ria: pattern rows removes whole units, .* \(allowed: unstructured, or N:M such as 2:4"),
        ({"pattern": "columns"}, "ria: pattern columns removes whole units"),
        ({"scope": "model"}, r"ria: unknown scope 'model' \(allowed: row, matrix\)"),
        ({"power": "-1"}, r"ria: power -1 is outside \[0, inf\)"),
        ({"power": "nan"}, r"ria: power nan is outside \[0, inf\)"),
    ],
)
def test_options_it_does_not_take(options: dict[str, str], message: str) -> None:
    with pytest.raises(api.UsageError, match=message):
        find_method("ria").options(options)
