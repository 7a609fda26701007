"""The cut of a block, on matrices whose result is written down by hand; see `hand.py` for what the entries say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.cut import cut_block, dims_after, family_after
from secateur.models.runtime import NORM_FIRST, SELECT_FIRST
from secateur.models.view import BlockDims, BlockView, Residual
from secateur.plan.plan import BlockPlan, Mask
from tests.cut.hand import DIMS, F64, bias, block, equals, weight


def kept(**keep: list[int]) -> dict[str, Tensor]:
    return {space: torch.tensor(indices, dtype=torch.int32) for space, indices in keep.items()}


def unchanged(before: BlockView, after: BlockView, *names: str) -> None:
    for name in names:
        assert torch.equal(after.matrix(name), before.matrix(name)), name
        assert torch.equal(after.bias(name), before.bias(name)), name


def test_feed_forward_units() -> None:
    before = block("llama")
    after = cut_block(before, BlockPlan(0, keep=kept(ffn=[0, 2])))
    assert equals(after.matrix("gate"), [[5000, 5001], [5020, 5021]])
    assert equals(after.bias("gate"), [5000.5, 5020.5])
    assert equals(after.matrix("up"), [[6000, 6001], [6020, 6021]])
    assert equals(after.bias("up"), [6000.5, 6020.5])
    assert equals(after.matrix("down"), [[7000, 7002], [7010, 7012]])
    assert equals(after.bias("down"), [7000.5, 7010.5])
    unchanged(before, after, "q", "k", "v", "o")
    assert after.dims == BlockDims(hidden=2, heads=4, groups=2, head_width=2, ffn=2)
    assert all(tensor.is_contiguous() for tensor in after.tensors.values())


def test_feed_forward_units_where_there_is_no_gate() -> None:
    after = cut_block(block("opt"), BlockPlan(0, keep=kept(ffn=[1])))
    assert equals(after.tensors["fc1.weight"], [[6010, 6011]])
    assert equals(after.tensors["fc1.bias"], [6010.5])
    assert equals(after.tensors["fc2.weight"], [[7001], [7011]])
    assert equals(after.tensors["fc2.bias"], [7000.5, 7010.5])


def test_a_key_value_head_goes_with_its_query_heads() -> None:
    before = block("llama")
    after = cut_block(before, BlockPlan(0, keep=kept(groups=[1])))
    assert equals(after.matrix("k"), [[2020, 2021], [2030, 2031]])
    assert equals(after.bias("k"), [2020.5, 2030.5])
    assert equals(after.matrix("v"), [[3020, 3021], [3030, 3031]])
    assert equals(after.bias("v"), [3020.5, 3030.5])
    assert equals(after.matrix("q"), [[1040, 1041], [1050, 1051], [1060, 1061], [1070, 1071]])
    assert equals(after.bias("q"), [1040.5, 1050.5, 1060.5, 1070.5])
    assert equals(after.matrix("o"), [[4004, 4005, 4006, 4007], [4014, 4015, 4016, 4017]])
    assert equals(after.bias("o"), [4000.5, 4010.5])
    unchanged(before, after, "gate", "up", "down")
    assert after.dims == BlockDims(hidden=2, heads=2, groups=1, head_width=2, ffn=3)


def test_query_heads_go_from_every_group() -> None:
    before = block("llama")
    after = cut_block(before, BlockPlan(0, keep=kept(heads=[1, 2])))
    assert equals(after.matrix("q"), [[1020, 1021], [1030, 1031], [1040, 1041], [1050, 1051]])
    assert equals(after.bias("q"), [1020.5, 1030.5, 1040.5, 1050.5])
    assert equals(after.matrix("o"), [[4002, 4003, 4004, 4005], [4012, 4013, 4014, 4015]])
    unchanged(before, after, "k", "v", "gate", "up", "down")
    assert after.dims == BlockDims(hidden=2, heads=2, groups=2, head_width=2, ffn=3)


def test_query_heads_of_a_group_that_goes_go_too() -> None:
    after = cut_block(block("llama"), BlockPlan(0, keep=kept(groups=[1], heads=[0, 3])))
    assert equals(after.matrix("q"), [[1060, 1061], [1070, 1071]])
    assert equals(after.matrix("k"), [[2020, 2021], [2030, 2031]])
    assert equals(after.matrix("v"), [[3020, 3021], [3030, 3031]])
    assert equals(after.matrix("o"), [[4006, 4007], [4016, 4017]])
    assert after.dims == BlockDims(hidden=2, heads=1, groups=1, head_width=2, ffn=3)


def test_matrices_that_are_fused() -> None:
    after = cut_block(block("phi3"), BlockPlan(0, keep=kept(groups=[0], ffn=[1, 2])))
    q = [[1000, 1001], [1010, 1011], [1020, 1021], [1030, 1031]]
    qkv = [*q, [2000, 2001], [2010, 2011], [3000, 3001], [3010, 3011]]
    assert equals(after.tensors["self_attn.qkv_proj.weight"], qkv)
    assert equals(after.tensors["self_attn.qkv_proj.bias"], [row[0] + 0.5 for row in qkv])
    assert equals(after.tensors["self_attn.o_proj.weight"], [[4000, 4001, 4002, 4003], [4010, 4011, 4012, 4013]])
    assert equals(after.tensors["mlp.gate_up_proj.weight"], [[5010, 5011], [5020, 5021], [6010, 6011], [6020, 6021]])
    assert equals(after.tensors["mlp.gate_up_proj.bias"], [5010.5, 5020.5, 6010.5, 6020.5])
    assert equals(after.tensors["mlp.down_proj.weight"], [[7001, 7002], [7011, 7012]])


def test_a_model_without_biases_gets_none() -> None:
    after = cut_block(block("phi3", biases=False), BlockPlan(0, keep=kept(groups=[0], ffn=[1])))
    assert not [name for name in after.tensors if name.endswith("bias")]
    assert equals(after.tensors["mlp.gate_up_proj.weight"], [[5010, 5011], [6010, 6011]])


def test_masks_zero_weights_and_leave_no_minus_zero() -> None:
    before = block("llama")
    before.matrix("k").neg_()
    keep_OI = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=torch.bool)
    after = cut_block(before, BlockPlan(0, masks={"k": Mask.pack(keep_OI)}))
    assert equals(after.matrix("k"), [[-2000, 0], [0, -2011], [-2020, -2021], [0, 0]])
    assert not after.matrix("k")[~keep_OI].signbit().any()
    assert equals(after.bias("k"), [2000.5, 2010.5, 2020.5, 2030.5])
    assert torch.equal(before.matrix("k"), -weight("k")), "the given block stays as it is"
    unchanged(before, after, "q", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_masks_of_every_width_of_a_number(dtype: torch.dtype) -> None:
    whole = block("llama")
    small = replace(whole, tensors={name: -tensor / 1000 for name, tensor in whole.tensors.items()})
    small = replace(small, tensors={name: tensor.to(dtype) for name, tensor in small.tensors.items()})
    keep_OI = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool)
    after = cut_block(small, BlockPlan(0, masks={"down": Mask.pack(keep_OI)})).matrix("down")
    assert after.dtype == dtype
    assert torch.equal(after[keep_OI], small.matrix("down")[keep_OI])
    assert not after[~keep_OI].any()
    assert not after[~keep_OI].signbit().any()


def test_a_mask_of_one_of_several_fused_matrices() -> None:
    before = block("phi3")
    keep_OI = torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.bool)
    after = cut_block(before, BlockPlan(0, masks={"up": Mask.pack(keep_OI)}))
    rows = [[5000, 5001], [5010, 5011], [5020, 5021], [0, 6001], [6010, 0], [6020, 6021]]
    assert equals(after.tensors["mlp.gate_up_proj.weight"], rows)
    unchanged(before, after, "q", "k", "v", "o", "gate", "down")


def test_new_weights_are_put_in_place_then_masked_then_narrowed() -> None:
    new_OI = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=F64)
    keep_OI = torch.tensor([[1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    before = block("llama")
    plan = BlockPlan(0, masks={"down": Mask.pack(keep_OI)}, keep=kept(ffn=[0, 2]), updates={"down": new_OI})
    after = cut_block(before, plan)
    assert equals(after.matrix("down"), [[1, 0], [0, 6]])
    assert equals(after.matrix("gate"), [[5000, 5001], [5020, 5021]])
    assert torch.equal(before.matrix("down"), weight("down")), "the given block stays as it is"


def test_new_weights_of_one_of_several_fused_matrices() -> None:
    new_OI = torch.arange(8, dtype=F64).view(4, 2)
    before = block("phi3")
    after = cut_block(before, BlockPlan(0, updates={"k": new_OI}))
    assert torch.equal(after.tensors["self_attn.qkv_proj.weight"], torch.cat([weight("q"), new_OI, weight("v")]))
    assert torch.equal(after.tensors["self_attn.qkv_proj.bias"], torch.cat([bias("q"), bias("k"), bias("v")]))
    assert torch.equal(before.matrix("k"), weight("k")), "the given block stays as it is"


def test_a_plan_that_names_new_weights_by_hash_alone_is_refused() -> None:
    with pytest.raises(SecateurError, match=r"block 0: .* names the new weights of down, q by hash alone: load the"):
        cut_block(block("llama"), BlockPlan(0, hashes={"q": "00", "down": "11"}))


SELECTED = {"attention_in": [1], "attention_out": [0], "mlp_in": [0, 1], "mlp_out": [1]}


@pytest.mark.parametrize("form", [NORM_FIRST, SELECT_FIRST])
def test_features_that_are_read_and_written(form: str) -> None:
    after = cut_block(block("llama"), BlockPlan(0, keep=kept(**SELECTED), select=form))
    assert equals(after.matrix("q"), [[1001], [1011], [1021], [1031], [1041], [1051], [1061], [1071]])
    assert equals(after.bias("q"), [1000.5, 1010.5, 1020.5, 1030.5, 1040.5, 1050.5, 1060.5, 1070.5])
    assert equals(after.matrix("k"), [[2001], [2011], [2021], [2031]])
    assert equals(after.matrix("v"), [[3001], [3011], [3021], [3031]])
    assert equals(after.matrix("o"), [[4000, 4001, 4002, 4003, 4004, 4005, 4006, 4007]])
    assert equals(after.bias("o"), [4000.5])
    assert equals(after.matrix("gate"), [[5000, 5001], [5010, 5011], [5020, 5021]])
    assert equals(after.matrix("up"), [[6000, 6001], [6010, 6011], [6020, 6021]])
    assert equals(after.matrix("down"), [[7010, 7011, 7012]])
    assert equals(after.bias("down"), [7010.5])
    assert equals(after.tensors["input_layernorm.weight"], [2])
    assert equals(after.tensors["post_attention_layernorm.weight"], [11, 12])
    maps = {name: tensor.tolist() for name, tensor in after.tensors.items() if name.endswith("index_map")}
    assert maps == {
        "skips.0.read_index_map": [1],
        "skips.0.write_index_map": [0],
        "skips.1.read_index_map": [0, 1],
        "skips.1.write_index_map": [1],
    }
    assert after.dims == replace(DIMS, residual=Residual((1, 1), (2, 1), (form, form)))
    assert after.family == block("llama").family


def test_features_of_a_parallel_block_whose_norm_becomes_two() -> None:
    after = cut_block(block("phi"), BlockPlan(0, keep=kept(**SELECTED), select=NORM_FIRST))
    norms = {name: tensor.tolist() for name, tensor in after.tensors.items() if "norm" in name}
    assert norms == {
        "input_layernorm.weight": [2],
        "input_layernorm.bias": [4],
        "mlp_norm.weight": [1, 2],
        "mlp_norm.bias": [3, 4],
    }
    assert equals(after.matrix("o"), [[4000, 4001, 4002, 4003, 4004, 4005, 4006, 4007]])
    assert equals(after.matrix("down"), [[7010, 7011, 7012]])


APART = {"q_in": [0], "k_in": [1], "v_in": [0, 1], "attention_out": [1], "mlp_in": [1], "mlp_out": [0]}


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("form", [NORM_FIRST, SELECT_FIRST])
def test_features_that_q_k_and_v_read_each_for_itself(form: str, family: str) -> None:
    before, plan = block(family), BlockPlan(0, keep=kept(**APART, groups=[0], ffn=[2]), select=form)
    after = cut_block(before, plan)
    q, k, v = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    if family == "phi3":
        q, k, v = (f"self_attn.qkv_proj.{name}" for name in "qkv")
    assert equals(after.tensors[f"{q}.linear.weight"], [[1000], [1010], [1020], [1030]])
    assert equals(after.tensors[f"{q}.linear.bias"], [1000.5, 1010.5, 1020.5, 1030.5])
    assert equals(after.tensors[f"{k}.linear.weight"], [[2001], [2011]])
    assert equals(after.tensors[f"{v}.linear.weight"], [[3000, 3001], [3010, 3011]])
    assert equals(after.matrix("o"), [[4010, 4011, 4012, 4013]])
    assert equals(after.matrix("gate"), [[5021]])
    assert equals(after.matrix("up"), [[6021]])
    assert equals(after.matrix("down"), [[7002]])
    maps = {name: tensor.tolist() for name, tensor in after.tensors.items() if name.endswith("index_map")}
    assert maps == {
        f"{q}.read_index_map": [0],
        f"{k}.read_index_map": [1],
        f"{v}.read_index_map": [0, 1],
        "skips.0.write_index_map": [1],
        "skips.1.read_index_map": [1],
        "skips.1.write_index_map": [0],
    }
    norms = {name: tensor.tolist() for name, tensor in after.tensors.items() if "norm" in name}
    own = {f"{q}.norm.weight": [1], f"{k}.norm.weight": [2], f"{v}.norm.weight": [1, 2]}
    first = {"input_layernorm.weight": [1, 2]} if form == NORM_FIRST else own
    assert norms == {"post_attention_layernorm.weight": [12], **first}
    assert after.family == family_after(before.family, plan) == before.family.separated()
    residual = Residual((2, 1), (1, 1), (form, form), (1, 1, 2))
    assert after.dims == dims_after(before.dims, plan) == BlockDims(2, 2, 1, 2, 1, residual)


def test_the_shapes_of_the_sizes_are_those_of_the_tensors() -> None:
    for plan in (
        BlockPlan(0, keep=kept(groups=[1], ffn=[0])),
        BlockPlan(0, keep=kept(heads=[0, 3])),
        BlockPlan(0, keep=kept(**SELECTED, ffn=[0, 1]), select=NORM_FIRST),
        BlockPlan(0, keep=kept(**APART, groups=[1]), select=SELECT_FIRST),
    ):
        after = cut_block(block("llama"), plan)
        for name in after.names:
            assert after.dims.shape(name) == tuple(after.matrix(name).shape)
