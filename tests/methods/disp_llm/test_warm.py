"""The first gates: scores against finite differences, and logits that meet the budget."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur import api
from secateur.methods.disp_llm.masked import MaskedModel
from secateur.methods.disp_llm.warm import SURE, begin, importance
from secateur.models.runtime import NORM_FIRST
from secateur.plan.structures import find_structures
from tests.tiny import tiny_model


def test_scores_are_squared_slopes_for_each_parameter_saved(windows: Tensor) -> None:
    view = api.view_model(tiny_model("llama", dtype=torch.float64))
    structures = find_structures(view, constrained=False, form=NORM_FIRST, whole=True)
    masked = MaskedModel(view, structures, NORM_FIRST, device=torch.device("cpu"), dtype=torch.float64)
    score_N = importance(masked, windows[:2])
    count, step = sum(structures.widths), 1e-3
    for gate in range(0, count, count // 7):
        nudge_N = torch.zeros(count, dtype=torch.float64)
        nudge_N[gate] = step
        ends = [
            [float(masked.loss(window_T[None], 1 + sign * nudge_N)) for sign in (-1, 1)] for window_T in windows[:2]
        ]
        square = sum(((high - low) / (2 * step)) ** 2 for low, high in ends) / 2
        saved = [
            float(structures.parameters([p.sum() for p in structures.split(1 - sign * nudge_N)])) for sign in (-1, 1)
        ]
        torch.testing.assert_close(
            float(score_N[gate]), square / ((saved[0] - saved[1]) / (2 * step)), rtol=1e-2, atol=1e-12
        )


def test_the_first_gates_that_are_likelier_open_than_not_meet_the_budget() -> None:
    view = api.view_model(tiny_model("llama"))
    structures = find_structures(view, constrained=False, form=NORM_FIRST, whole=True)
    masked = MaskedModel(view, structures, NORM_FIRST, device=torch.device("cpu"), dtype=torch.float32)
    score_N = torch.rand(sum(structures.widths), generator=torch.Generator().manual_seed(0))
    logit_N = begin(score_N, masked, 0.6 * structures.total)
    assert torch.equal(torch.argsort(logit_N), torch.argsort(score_N))
    assert float(logit_N.max()) == SURE
    assert -SURE <= float(logit_N.min()) < -0.9 * SURE
    left = float(structures.parameters([float((part > 0).sum()) for part in structures.split(logit_N)]))
    assert abs(left / structures.total - 0.6) < 0.02
