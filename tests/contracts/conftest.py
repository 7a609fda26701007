"""Skip the methods that a family refuses: `test_refusals.py` tests the refusals, and no other file does."""

from __future__ import annotations

import pytest

from tests.layouts import layout_of


@pytest.fixture(autouse=True)
def _only_what_the_family_can(request: pytest.FixtureRequest) -> None:
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if not {"model_type", "method", "pattern"} <= given.keys():
        return  # such as sparsity 0, which is never refused
    if layout_of(given["model_type"]).refusal(given["method"], pattern=given["pattern"]):
        pytest.skip("the family cannot do this: test_refusals.py")
