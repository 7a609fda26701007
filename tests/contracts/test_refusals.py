"""A family refuses what it cannot do before any work, in one line with the reason; sparsity 0 is never refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import api
from tests.layouts import layout_of
from tests.tiny import FAMILY_TYPES, tiny_model

REFUSED = [(model_type, what) for model_type in FAMILY_TYPES for what in layout_of(model_type).refuses]


def _asked(what: str) -> tuple[str, dict[str, Any]]:
    """A method and its options, from `method option=value`."""
    method, *options = what.split()
    return method, dict(option.split("=") for option in options)


def test_there_is_something_to_refuse() -> None:
    assert ("gemma3_text", "slicegpt") in REFUSED


@pytest.mark.parametrize("amount", [{"sparsity": 0.25}, {"params_removed": 0.25}], ids=["sparsity", "params-removed"])
@pytest.mark.parametrize(("model_type", "what"), REFUSED)
def test_a_request_is_refused_before_text_is_read(
    model_type: str,
    what: str,
    amount: dict[str, float],
    saved: Callable[..., Path],
    tmp_path: Path,
) -> None:
    method, options = _asked(what)
    dense, text = saved(model_type), tmp_path / "empty.txt"
    text.write_text("")  # would be refused as it is read
    request = api.Request(str(dense), method, calibration=str(text), options=options, **amount)
    with pytest.raises(api.SecateurError) as refused:
        api.prune(request, tmp_path / "out")
    message = str(refused.value)
    reason, _, instead = message.partition("; ")
    assert layout_of(model_type).refuses[what] in reason
    assert reason.startswith(f"{dense}: the ")
    assert "wanda" in instead
    assert "\n" not in message
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("model_type", "what"), REFUSED)
def test_a_plan_in_memory_is_refused_too(model_type: str, what: str, windows: torch.Tensor) -> None:
    method, options = _asked(what)
    with pytest.raises(api.SecateurError, match=r"of .* models cannot .*, because "):
        api.plan(tiny_model(model_type), method, windows, sparsity=0.25, **options)
