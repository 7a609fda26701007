"""The sparsity at which a method removes a given fraction of all parameters."""

from __future__ import annotations

import pytest

from secateur import api
from secateur.plan.pattern import parse_pattern
from secateur.plan.quantity import UNITS, Subject
from tests.tiny import FAMILY_TYPES, tiny_model


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
@pytest.mark.parametrize("wanted", [0.0, 0.1, 0.25, 0.4])
def test_the_step_nearest_to_the_ratio_is_taken_or_the_first_that_reaches_it(model_type: str, wanted: float) -> None:
    model = tiny_model(model_type)
    view = api.view_model(model)
    pattern = parse_pattern("rows")
    sparsity = UNITS.sparsity_for(Subject(view, "magnitude", pattern), wanted, False)
    pruned = api.cut(model, api.plan(model, "magnitude", sparsity=sparsity, pattern="rows"))
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, pruned))
    assert after == UNITS.parameters(Subject(view, "magnitude", pattern), sparsity)
    units = {size for index in range(view.blocks) for size in (view.dims(index).ffn, view.dims(index).groups)}
    steps = sorted({k / n + 1e-9 for n in units for k in range(1, n)})
    subject = Subject(view, "magnitude", pattern)
    ratios = {step: 1 - UNITS.parameters(subject, step) / before for step in steps}
    enough = UNITS.sparsity_for(Subject(view, "magnitude", pattern), wanted, True)
    if wanted:
        assert abs(1 - after / before - wanted) == pytest.approx(min(abs(ratio - wanted) for ratio in ratios.values()))
        assert enough == min(step for step, ratio in ratios.items() if ratio >= wanted)
    else:
        assert sparsity == enough == 0
