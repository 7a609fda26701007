"""Plans as data: packing, merging, reading."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from secateur import api
from secateur.plan.plan import BlockPlan, Mask, Plan, read_plan
from tests.tiny import some_ids, tiny_model


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (7, 9)])
def test_masks_take_a_bit_an_entry(shape: tuple[int, int]) -> None:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    mask = Mask.pack(keep)
    assert torch.equal(mask.unpack(), keep)
    assert mask.removed == int((~keep).sum())
    assert mask.bits.numel() == -(-shape[0] * shape[1] // 8)


def test_merging_keeps_what_both_keep(windows: torch.Tensor) -> None:
    model = tiny_model("llama")
    attention = api.plan(model, "magnitude", modules="attention=0.5")
    units = api.plan(model, "magnitude", modules="mlp=0.5", pattern="rows")
    other = api.plan(model, "magnitude", modules="mlp=0.25", pattern="columns")
    both = attention.merge(units).merge(other)
    for a, b, c, merged in zip(attention.blocks, units.blocks, other.blocks, both.blocks, strict=True):
        assert merged.masks == a.masks
        assert set(merged.keep["ffn"].tolist()) == set(b.keep["ffn"].tolist()) & set(c.keep["ffn"].tolist())
    assert torch.isfinite(api.cut(model, both)(some_ids()).logits).all()
    masks = attention.merge(api.plan(model, "magnitude", modules="q=0.7"))
    assert masks.blocks[0].masks["q"].removed == int(32 * 32 * 0.7)


def test_merging_to_nothing_is_refused() -> None:
    one, two = (BlockPlan(0, keep={"ffn": torch.tensor([i])}, of={"ffn": 2}) for i in (0, 1))
    with pytest.raises(api.SecateurError, match="keep no common ffn"):
        one.merge(two)


def test_plans_for_other_depths_do_not_fit() -> None:
    plan = Plan({}, (BlockPlan(0),))
    with pytest.raises(api.SecateurError, match="plan is for 1 blocks, the model has 3"):
        api.cut(tiny_model("llama"), plan)
    with pytest.raises(api.SecateurError, match="1 and 2 blocks"):
        plan.merge(Plan({}, (BlockPlan(0), BlockPlan(1))))


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(api.SecateurError, match=r"has no plan\.json"):
        read_plan(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"format": 99, "blocks": []}))
    with pytest.raises(api.SecateurError, match="has format 99"):
        read_plan(tmp_path)


def test_plans_differ_in_their_tensors_alone() -> None:
    keep = torch.ones(2, 8, dtype=torch.bool)
    one, two = keep.clone(), keep.clone()
    one[0, 0] = two[1, 1] = False
    a, b = (BlockPlan(0, {"q": Mask.pack(m)}) for m in (one, two))
    assert a.summary() == b.summary()
    assert a != b
    assert a == BlockPlan(0, {"q": Mask.pack(one)})


@pytest.mark.parametrize("model_type", ["llama", "phi3"])  # matrices of their own, and fused ones
def test_new_weights_are_cut_in_and_named_by_hash(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, dtype=torch.bfloat16)
    view = api.view_model(model)
    new_OI = torch.randn(view.matrix_shapes(1)["k"])
    keep_OI = torch.rand(new_OI.shape) > 0.5
    blocks = [BlockPlan(0), BlockPlan(1, {"k": Mask.pack(keep_OI)}, updates={"k": new_OI}), BlockPlan(2)]
    plan = Plan({}, tuple(blocks))
    changed = api.view_model(api.cut(model, plan)).block(1)
    expected_OI = new_OI.to(torch.bfloat16).masked_fill(~keep_OI, 0)
    assert torch.equal(changed.matrix("k").view(torch.int16), expected_OI.view(torch.int16))  # no minus zero
    for name in set(changed.names) - {"k"}:
        assert torch.equal(changed.matrix(name), view.block(1).matrix(name))

    units = api.plan(model, "magnitude", modules="attention=0.5", pattern="rows")
    narrow = api.view_model(api.cut(model, units.merge(plan))).block(1).matrix("k")
    group, width = int(units.blocks[1].keep["groups"]), view.dims(1).head_width
    assert torch.equal(narrow, expected_OI[group * width : (group + 1) * width])

    plan.save(tmp_path)
    assert set(load_file(tmp_path / "plan.safetensors")) == {"blocks.1.k.mask"}
    read = read_plan(tmp_path)
    assert read == plan
    assert read.blocks[1].updated == {"k": hashlib.sha256(new_OI.numpy().tobytes()).hexdigest()}
    with pytest.raises(
        api.SecateurError, match="block 1: this plan was read from disk, which names the new weights of k by hash alone"
    ):
        api.cut(model, read)
    assert replace(blocks[1], updates={"k": new_OI + 1}) != blocks[1]
    with pytest.raises(api.SecateurError, match="block 1: both plans have new weights for k"):
        plan.merge(read)
