"""What makes up for a gap, against naive least squares in float64, on every family that can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from secateur import api
from secateur.calibrate.making_up import MakingUp
from secateur.core.errors import SecateurError
from secateur.cut.block import cut_block
from secateur.plan.plan import BlockPlan, LaterPlans, Plan
from secateur.plan.run import Run
from tests.tiny import BLOCKS, FAMILY_TYPES, able, tiny_model

DAMPING = 0.05
GAPS: dict[str, dict[int, str]] = {
    "attention": {0: "attention"},
    "mlp": {1: "mlp"},
    "blocks": {1: "block", 2: "block"},
    "mlp and the block after it": {0: "mlp", 1: "block"},
    "the first block": {0: "block"},
}
SPACE = {"attention": "groups", "mlp": "ffn"}


def _outlines(view: Any, gaps: dict[int, str]) -> list[BlockPlan]:
    plans = []
    for index in range(BLOCKS):
        if (gone := gaps.get(index)) in SPACE:
            keep = {SPACE[gone]: torch.empty(0, dtype=torch.int32)}
            plans.append(BlockPlan(index, keep=keep, of={SPACE[gone]: view.dims(index).units()[SPACE[gone]]}))
        else:
            plans.append(BlockPlan(index, dropped=gone == "block"))
    return plans


def _plans(model: Any, windows: Tensor, gaps: dict[int, str], dtype: torch.dtype) -> LaterPlans:
    view = api.view_model(model)
    run = Run(0.0, 0, torch.device("cpu"), dtype)
    outlines = _outlines(view, gaps)
    return LaterPlans(outlines, MakingUp(view, windows, outlines, cut_block, DAMPING, "test", run))


def _naive(model_type: str, windows: Tensor, gaps: dict[int, str], index: int, name: str) -> Tensor:
    """The new weight, from hooks on the dense model and on the one with gaps, which gets the dense model's stream."""
    dense = tiny_model(model_type, dtype=torch.float64)
    view, seen = api.view_model(dense), {}
    blocks = [dense.get_submodule(f"{view.family.blocks}.{number}") for number in range(BLOCKS)]
    end = next(number for number in range(index + 1, BLOCKS + 1) if gaps.get(number) != "block") - 1
    blocks[index].register_forward_pre_hook(lambda _, inputs: seen.update(entering=inputs[0]))
    blocks[end].register_forward_hook(lambda _, __, output: seen.update(target=output))
    without = api.cut(tiny_model(model_type, dtype=torch.float64), Plan({}, tuple(_outlines(view, gaps))))
    place = index - sum(gaps.get(number) == "block" for number in range(index))
    block = without.get_submodule(f"{view.family.blocks}.{place}")
    matrix = block.get_submodule(view.family.matrices[name])
    block.register_forward_pre_hook(lambda _, inputs: (seen["entering"], *inputs[1:]))
    matrix.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    block.register_forward_hook(lambda _, __, output: seen.update(y=output))
    with torch.no_grad():
        dense(windows)
        without(windows)
    x, missing = seen["x"].flatten(0, -2), (seen["target"] - seen["y"]).flatten(0, -2)
    ridge = (DAMPING * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1]).double()
    rows, aim = torch.cat([x, ridge]), torch.cat([missing, torch.zeros(x.shape[1], missing.shape[1]).double()])
    change: Tensor = torch.linalg.lstsq(rows, aim).solution.t()
    return matrix.weight.detach() + change


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("model_type", [t for t in able("depth", FAMILY_TYPES) if t != "gemma3_text"])
def test_the_last_matrix_is_that_of_least_squares(model_type: str, gap: str, windows: Tensor) -> None:
    gaps = GAPS[gap]
    model = tiny_model(model_type, dtype=torch.float64)
    plans = list(_plans(model, windows, gaps, torch.float64))
    expected = {}
    for index in range(BLOCKS):
        after = index + 1 < BLOCKS and gaps.get(index + 1) == "block"
        if gaps.get(index) != "block" and (index in gaps or after):
            expected[index] = "o" if gaps.get(index) == "mlp" else "down"
    assert {plan.index: next(iter(plan.updates)) for plan in plans if plan.updates} == expected
    for index, name in expected.items():
        naive = _naive(model_type, windows, gaps, index, name)
        torch.testing.assert_close(plans[index].updates[name], naive, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("gap", [gap for gap in GAPS if gap != "the first block"])
def test_it_brings_the_model_nearer_to_the_dense_one(gap: str, windows: Tensor) -> None:
    model, far = tiny_model("qwen2"), {}
    plans = _plans(model, windows, GAPS[gap], torch.float32)
    with torch.no_grad():
        dense = model(windows).logits
        for fit, blocks in ((True, tuple(plans)), (False, tuple(plans.outlines))):
            far[fit] = float((api.cut(model, Plan({}, blocks))(windows).logits - dense).square().mean())
    assert far[True] < far[False]


def test_a_dtype_that_cannot_hold_the_weights_is_refused(windows: Tensor) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1e7)
    view = api.view_model(model.half())
    outlines = _outlines(view, {1: "block", 2: "block"})
    run = Run(0.0, 0, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(SecateurError, match=r"the new weights of down in block 0 are not finite in torch.float16"):
        list(LaterPlans(outlines, MakingUp(view, windows, outlines, cut_block, 1e-9, "test", run)))
