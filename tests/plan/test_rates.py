"""`--modules`: names, groups, own names, globs, on plain and fused weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secateur import api
from secateur.plan.pattern import parse_pattern
from secateur.plan.rates import resolve_rates
from tests.tiny import MODEL_TYPES, tiny_model

PLAIN = parse_pattern("unstructured")


def rates(model_type: str, sparsity: float | None, modules: str | None) -> Any:
    return resolve_rates(api.view_model(tiny_model(model_type)), sparsity, modules, PLAIN)


def test_sparsity_alone_is_for_every_matrix() -> None:
    assert rates("llama", 0.5, None) == (dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 0.5),) * 3
    assert rates("opt", 0.5, None)[0].keys() == {"q", "k", "v", "o", "up", "down"}


def test_groups_names_and_later_entries() -> None:
    assert rates("llama", None, "attention=0.3,v=0.6")[1] == {"q": 0.3, "k": 0.3, "v": 0.6, "o": 0.3}
    assert rates("llama", 0.4, "mlp,down=0.1")[2] == {"gate": 0.4, "up": 0.4, "down": 0.1}
    assert rates("llama", None, "q=1")[0] == {"q": 1.0}


def test_own_names() -> None:
    assert rates("phi", None, "dense=0.5,fc1=0.2")[0] == {"o": 0.5, "up": 0.2}
    assert rates("opt", None, "out_proj=0.5")[0] == {"o": 0.5}
    assert rates("phi3", None, "qkv_proj=0.5")[0] == {"q": 0.5, "k": 0.5, "v": 0.5}


def test_globs_reach_single_blocks() -> None:
    found = rates("llama", None, "model.layers.1.*=0.5,*.2.mlp.down_proj=0.25")
    assert found[0] == {}
    assert len(found[1]) == 7
    assert found[2] == {"down": 0.25}


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("name", ["q", "k", "v", "o", "gate", "up", "down"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_pruning_one_module_leaves_the_rest_bit_identical(
    model_type: str, name: str, method: str, windows: torch.Tensor
) -> None:
    model = tiny_model(model_type)
    view = api.view_model(model)
    if name not in view.family.matrices:
        with pytest.raises(api.UsageError, match="matches nothing"):
            api.plan(model, method, windows, modules=f"{name}=0.5")
        return
    pruned = api.view_model(api.cut(model, api.plan(model, method, windows, modules=f"{name}=0.5")))
    for before, after in zip(view.iterate(), pruned.iterate(), strict=True):
        for other in before.names:
            zeros = int((after.matrix(other) == 0).sum())
            if other == name:
                assert zeros == before.matrix(other).numel() // 2
            else:
                assert torch.equal(before.matrix(other), after.matrix(other))
    named = dict(pruned.source.tensors)  # type: ignore[attr-defined]
    touched = {f"{view.family.blocks}.{i}.{view.family.matrices[name]}.weight" for i in range(view.blocks)}
    for key, tensor in view.source.tensors.items():  # type: ignore[attr-defined]
        assert key in touched or torch.equal(tensor, named[key])


def test_a_module_may_be_removed_whole(windows: torch.Tensor) -> None:
    model = tiny_model("phi3")
    pruned = api.view_model(api.cut(model, api.plan(model, "wanda", windows, modules="v=1")))
    assert not pruned.block(2).matrix("v").any()
    assert pruned.block(2).matrix("k").all()
