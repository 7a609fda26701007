"""Properties of every method on every family. Methods and families are found, not listed.

Every method runs with every pattern on one model type of each family. On the other model types, and in bfloat16, it
runs with one pattern: what is particular there does not depend on the pattern.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from secateur import api
from secateur.calibrate.backward import Backward
from secateur.methods import find_method, method_names
from secateur.plan.pattern import parse_pattern
from tests.folders import contents
from tests.tiny import FAMILY_TYPES, MODEL_TYPES, some_ids, tiny_model

PATTERNS = ("unstructured", "2:4", "rows", "columns")


def _takes(method: str, pattern: str) -> bool:
    with suppress(api.UsageError):
        find_method(method).options({"pattern": pattern})
        return True
    return False


def _patterns(method: str) -> list[str | None]:
    return [p for p in PATTERNS if _takes(method, p)] or [None]


Case = tuple[str, str | None]
CASES: list[Case] = [(m, p) for m in method_names() for p in _patterns(m)]
WIDE = [(m, p) for m, p in CASES if p is None or parse_pattern(p).structured]
GROUPED = [(m, p) for m, p in CASES if p == "2:4"]
OTHER_TYPES = sorted(set(MODEL_TYPES) - set(FAMILY_TYPES))


def _one_pattern(cases: list[Case]) -> list[Case]:
    """The last of its patterns for each method: `columns`, where it has that."""
    return list(dict(cases).items())


def _on_every_type(cases: list[Case]) -> list[tuple[str, str | None, str]]:
    """(method, pattern, model type): all cases on one model type of each family, one pattern on the other types."""
    every = [(m, p, t) for m, p in cases for t in FAMILY_TYPES]
    return every + [(m, p, t) for m, p in _one_pattern(cases) for t in OTHER_TYPES]


IN_FLOAT32 = [(m, p, t, torch.float32) for m, p, t in _on_every_type(CASES)]
# the first pattern of a method is its default
IN_BFLOAT16 = [
    (m, p, t, torch.bfloat16)
    for m, p in dict.fromkeys([*_one_pattern(CASES[::-1]), *_one_pattern(CASES)])
    for t in FAMILY_TYPES
]


def _asked(pattern: str | None) -> dict[str, Any]:
    """The keywords that ask for a pattern, at a sparsity that goes with it."""
    return ({} if pattern is None else {"pattern": pattern}) | ({} if ":" in (pattern or "") else {"sparsity": 0.5})


def _quick(method: str) -> dict[str, Any]:
    """The options that keep a method of many steps short."""
    return find_method(method).says.QUICK


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_planning_leaves_the_model_as_it_is(
    method: str, pattern: str | None, model_type: str, windows: torch.Tensor
) -> None:
    model = tiny_model(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = api.plan(model, method, windows, **_asked(pattern), **_quick(method))
    pruned = api.cut(model, plan)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(pruned(some_ids()).logits, model(some_ids()).logits)


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
@pytest.mark.parametrize(("method", "pattern"), GROUPED)
def test_two_of_every_four_inputs_of_a_row_stay(
    method: str,
    pattern: str,
    model_type: str,
    windows: torch.Tensor,
) -> None:
    model = tiny_model(model_type)
    pruned = api.cut(model, api.plan(model, method, windows, pattern=pattern, **_quick(method)))
    for block in api.view_model(pruned).iterate():
        for name in block.names:
            kept = block.matrix(name).unflatten(1, (-1, 4)).count_nonzero(-1)
            assert (kept == 2).all(), f"block {block.index}, {name}"


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
@pytest.mark.parametrize("method", method_names())
def test_sparsity_zero_is_the_identity(method: str, model_type: str, windows: torch.Tensor) -> None:
    model = tiny_model(model_type)
    pruned = api.cut(model, api.plan(model, method, windows, sparsity=0.0))
    assert torch.equal(pruned(some_ids()).logits, model(some_ids()).logits)


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_the_same_seed_gives_the_same_plan(
    method: str, pattern: str | None, model_type: str, windows: torch.Tensor
) -> None:
    model = tiny_model(model_type)
    first, second = (api.plan(model, method, windows, **_asked(pattern), **_quick(method)) for _ in range(2))
    assert first == second
    other = api.plan(tiny_model(model_type, seed=9), method, windows, **_asked(pattern), **_quick(method))
    assert first.blocks != other.blocks


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_plans_round_trip(
    method: str, pattern: str | None, model_type: str, windows: torch.Tensor, tmp_path: Path
) -> None:
    plan = api.plan(tiny_model(model_type), method, windows, **_asked(pattern), **_quick(method))
    plan.save(tmp_path)
    assert api.read_plan(tmp_path) == plan


@pytest.mark.parametrize(("method", "pattern", "model_type"), _on_every_type(WIDE))
def test_cutting_equals_masking(method: str, pattern: str | None, model_type: str, windows: torch.Tensor) -> None:
    """Removed units and units whose output is zeroed give the same logits, and so do blocks."""
    model = tiny_model(model_type, dtype=torch.float64)
    plan = api.plan(model, method, windows, **_asked(pattern), **_quick(method))
    if any(block.select or block.places for block in plan.blocks):
        pytest.skip("what it removes is no unit")  # their own tests compare with a masked model
    narrow = api.cut(model, plan)
    view = api.view_model(model)  # shares the model's memory
    for block, block_plan in zip(view.iterate(), plan.blocks, strict=True):
        width = block.dims.head_width * block.dims.queries
        assert set(block_plan.keep) <= {"ffn", "groups", "heads"}
        for name, new_OI in block_plan.updates.items():
            block.matrix(name).copy_(new_OI)
        for name in ("o", "down") if block_plan.dropped else ():  # a block that writes nothing
            for tensor in (block.matrix(name), block.bias(name)):
                if tensor is not None:
                    tensor.zero_()
        for reader, space, each in (("down", "ffn", 1), ("o", "groups", width), ("o", "heads", block.dims.head_width)):
            if space not in block_plan.keep:
                continue
            gone = torch.ones(block.dims.shape(reader)[1], dtype=torch.bool)
            for unit in block_plan.keep[space].tolist():
                gone[unit * each : (unit + 1) * each] = False
            block.matrix(reader)[:, gone] = 0
    torch.testing.assert_close(narrow(some_ids()).logits, model(some_ids()).logits, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in narrow.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("method", "pattern", "model_type", "dtype"), IN_FLOAT32 + IN_BFLOAT16)
def test_streaming_equals_the_whole_model_and_reload_is_bit_exact(
    method: str,
    pattern: str | None,
    model_type: str,
    dtype: torch.dtype,
    saved: Callable[..., Path],
    ids_file: str,
    windows: torch.Tensor,
    tmp_path: Path,
) -> None:
    dense = saved(model_type, dtype=dtype, tied=dtype == torch.bfloat16)
    request = api.Request(str(dense), method, **_asked(pattern), options=_quick(method), calibration=ids_file)
    record = api.prune(request, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    expected = api.cut(
        model, api.plan(model, method, windows, **_asked(pattern), **_quick(method), dtype=torch.float32)
    ).state_dict()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert reloaded.dtype == dtype
    stored = load_file(tmp_path / "out" / "model.safetensors").values()
    assert {tensor.dtype for tensor in stored if tensor.is_floating_point()} == {dtype}
    assert expected.keys() == reloaded.state_dict().keys()
    for name, tensor in reloaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.is_contiguous()
    assert record["params_after"] == sum(p.numel() for p in reloaded.parameters())
    assert record["nonzero_after"] == sum(int(p.count_nonzero()) for p in reloaded.parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(again(some_ids()).logits, reloaded(some_ids()).logits)


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(
    method: str,
    pattern: str | None,
    model_type: str,
    saved: Callable[..., Path],
    ids_file: str,
    tmp_path: Path,
    interrupted_at: Callable[..., AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = api.Request(
        str(saved(model_type)), method, **_asked(pattern), options=_quick(method), calibration=ids_file
    )
    api.prune(request, tmp_path / "whole")
    with interrupted_at("block-00001", "plan-00002"):  # the second where that block is dropped
        api.prune(request, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    with pytest.raises(api.UsageError, match="--resume"):
        api.prune(request, tmp_path / "resumed")
    with monkeypatch.context() as patch:
        patch.setattr(Backward, "retreat", lambda *_: pytest.fail("gradients are taken once"))
        api.prune(request, tmp_path / "resumed", resume=True)
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "resumed") == whole
    assert {"model.safetensors", "secateur/plan.json"} <= whole.keys()


@pytest.mark.parametrize("method", method_names())
def test_every_method_says_where_it_comes_from(method: str) -> None:
    found = find_method(method)
    text = found.module.__doc__ or ""
    assert "arXiv" in text
    assert len(text.splitlines()) > 3
    for option in found.options_class.__dataclass_fields__:
        assert f"{option}:" in (found.options_class.__doc__ or ""), f"option {option} is not described"
