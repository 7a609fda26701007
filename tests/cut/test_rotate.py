"""The cut of a rotated residual stream, on a block of 2 features whose rotated weights are written down by hand.

The bases: `ENTER` swaps the two features, `BETWEEN` keeps the direction (0.6, 0.8) alone, `LEAVE` turns by a quarter.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from secateur import api
from secateur.core.errors import SecateurError
from secateur.cut import cut_block, cut_outer, dims_after
from secateur.models.view import BlockView, ModelView, Residual
from secateur.plan.plan import BlockPlan, Place
from tests.cut.hand import DIMS, F64, block, family
from tests.tiny import tiny_config

SWAP = torch.tensor([[0, 1], [1, 0]], dtype=F64)
ONE = torch.tensor([[0.6], [0.8]], dtype=F64)
QUARTER = torch.tensor([[0, -1], [1, 0]], dtype=F64)

ADAPTER = {"weight": torch.tensor([[7.0, 8.0]], dtype=F64)}
FACTORS = {"left": torch.tensor([[3.0]], dtype=F64), "right": torch.tensor([[5.0], [6.0]], dtype=F64)}
ENTER = Place(SWAP, None, 2, 2)
BETWEEN = Place(ONE, None, 1, 2, "dense", ADAPTER)
LEAVE = Place(QUARTER, None, 2, 2, 1, FACTORS)

# Small whole numbers in place of those of `hand.py`, so that products are easy: [rows] of each matrix.
WEIGHTS = {
    "q": [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14], [15, 16]],
    "k": [[1, 3], [5, 7], [2, 4], [6, 8]],
    "v": [[1, 0], [0, 1], [2, 0], [0, 2]],
    "o": [[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]],
    "gate": [[5, 0], [0, 5], [5, 10]],
    "up": [[10, 5], [15, 20], [20, 15]],
    "down": [[1, 2, 3], [4, 5, 6]],
}
BIASES = {"o": [5, 10], "down": [1, 2]}


def small(family_name: str) -> BlockView:
    """A block of the canonical model: norms without gain, weights as above, a bias on every matrix."""
    made = block(family_name)
    for name in made.names:
        made.matrix(name).copy_(torch.tensor(WEIGHTS[name], dtype=F64))
        made.bias(name).copy_(torch.tensor(BIASES.get(name, [9.0] * len(WEIGHTS[name])), dtype=F64))
    return replace(made, tensors={name: tensor for name, tensor in made.tensors.items() if "norm" not in name})


def is_close(tensor: Tensor, expected: list[float] | list[list[float]]) -> bool:
    wanted = torch.tensor(expected, dtype=F64)
    return tensor.shape == wanted.shape and torch.allclose(tensor, wanted, rtol=0, atol=1e-12)


def test_what_reads_and_what_writes_in_the_bases_of_their_places() -> None:
    before = small("llama")
    after = cut_block(before, BlockPlan(0, places={"enter": ENTER, "between": BETWEEN, "leave": LEAVE}))
    assert is_close(after.matrix("q"), [[2, 1], [4, 3], [6, 5], [8, 7], [10, 9], [12, 11], [14, 13], [16, 15]])
    assert is_close(after.matrix("k"), [[3, 1], [7, 5], [4, 2], [8, 6]])
    assert is_close(after.matrix("v"), [[0, 1], [1, 0], [0, 2], [2, 0]])
    # 0.6 x the first row + 0.8 x the second
    assert is_close(after.matrix("o"), [[7.0, 6.8, 6.6, 6.4, 6.2, 6.0, 5.8, 5.6]])
    assert is_close(after.bias("o"), [11.0])
    # 0.6 x the first column + 0.8 x the second
    assert is_close(after.matrix("gate"), [[3.0], [4.0], [11.0]])
    assert is_close(after.matrix("up"), [[10.0], [25.0], [24.0]])
    # the transpose of a quarter turn: the second row, then minus the first
    assert is_close(after.matrix("down"), [[4, 5, 6], [-1, -2, -3]])
    assert is_close(after.bias("down"), [2, -1])
    for name in ("q", "k", "v", "gate", "up"):
        assert torch.equal(after.bias(name), before.bias(name)), "what reads gives as before"
    skips = {name: tensor.tolist() for name, tensor in after.tensors.items() if name.startswith("skips")}
    assert skips == {"skips.0.weight": [[7, 8]], "skips.1.left": [[3]], "skips.1.right": [[5], [6]]}
    assert after.dims == replace(DIMS, residual=Residual((2, 1), (1, 2), ("dense", 1)))
    assert all(tensor.is_contiguous() for tensor in after.tensors.values())
    assert torch.equal(before.matrix("q"), torch.tensor(WEIGHTS["q"], dtype=F64)), "the given block stays as it is"


def test_a_parallel_block_has_two_places() -> None:
    after = cut_block(small("phi"), BlockPlan(0, places={"enter": BETWEEN, "leave": LEAVE}))
    assert is_close(after.matrix("k"), [[3.0], [8.6], [4.4], [10.0]])
    assert is_close(after.matrix("up"), [[10.0], [25.0], [24.0]])
    assert is_close(after.matrix("o"), [[8, 7, 6, 5, 4, 3, 2, 1], [-1, -2, -3, -4, -5, -6, -7, -8]])
    assert is_close(after.bias("o"), [10, -5])
    assert is_close(after.matrix("down"), [[4, 5, 6], [-1, -2, -3]])
    assert is_close(after.bias("down"), [2, -1])
    assert {name for name in after.tensors if name.startswith("skips")} == {"skips.0.left", "skips.0.right"}
    assert after.dims == replace(DIMS, residual=Residual((1, 2), (1, 2), (1,)))


def test_fused_matrices_are_rotated_together() -> None:
    after = cut_block(small("phi3"), BlockPlan(0, places={"enter": BETWEEN, "between": ENTER, "leave": LEAVE}))
    q = [[2.2], [5.0], [7.8], [10.6], [13.4], [16.2], [19.0], [21.8]]
    k, v = [[3.0], [8.6], [4.4], [10.0]], [[0.6], [0.8], [1.2], [1.6]]
    assert is_close(after.tensors["self_attn.qkv_proj.weight"], [*q, *k, *v])
    assert is_close(after.tensors["mlp.gate_up_proj.weight"], [[0, 5], [5, 0], [10, 5], [5, 10], [20, 15], [15, 20]])
    assert is_close(after.matrix("o"), [[8, 7, 6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6, 7, 8]])


def test_the_same_function_in_other_bases() -> None:
    """With complete bases, what a reader receives and what a writer gives are the same vectors in other coordinates."""
    before = small("llama")
    places = {"enter": ENTER, "between": Place(QUARTER, None, 2, 2), "leave": Place(SWAP, None, 2, 2)}
    after = cut_block(before, BlockPlan(0, places=places))
    x_D, y_I = torch.tensor([3.0, -2.0], dtype=F64), torch.arange(1, 9, dtype=F64)
    assert torch.equal(after.matrix("q") @ (SWAP.t() @ x_D), before.matrix("q") @ x_D)
    assert torch.equal(QUARTER @ (after.matrix("o") @ y_I), before.matrix("o") @ y_I)
    assert torch.equal(after.matrix("up") @ (QUARTER.t() @ x_D), before.matrix("up") @ x_D)
    assert torch.equal(SWAP @ (after.matrix("down") @ y_I[:3]), before.matrix("down") @ y_I[:3])


OUTER = {
    "model.decoder.embed_tokens.weight": torch.tensor([[1, 2], [3, 4], [5, 10]], dtype=F64),
    "model.decoder.embed_positions.weight": torch.tensor([[5, 0], [0, 5]], dtype=F64),
    "lm_head.weight": torch.tensor([[1, 0], [0, 1], [5, 6]], dtype=F64),
    "lm_head.bias": torch.tensor([1, 2, 3], dtype=F64),
}


def outer_view() -> ModelView:
    return ModelView("by hand", tiny_config("opt"), {}, family("opt"), api.ModelSource(OUTER), dtype=F64)


@pytest.mark.parametrize("rows", [2, 4096])
def test_embeddings_are_in_the_first_basis_and_the_head_in_the_last(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.cut.rotate._ROWS", rows)
    first = BlockPlan(0, places={"enter": BETWEEN, "between": ENTER, "leave": ENTER})
    last = BlockPlan(1, places={"enter": ENTER, "between": BETWEEN, "leave": LEAVE})
    rotated = {name: cut_outer(outer_view(), name, first, last) for name in OUTER}
    assert is_close(rotated["model.decoder.embed_tokens.weight"], [[2.2], [5.0], [11.0]])
    assert is_close(rotated["model.decoder.embed_positions.weight"], [[3.0], [4.0]])
    assert is_close(rotated["lm_head.weight"], [[0, -1], [1, 0], [6, -5]])
    assert is_close(rotated["lm_head.bias"], [1, 2, 3])


def test_tensors_outside_the_blocks_stay_where_nothing_is_rotated() -> None:
    for name, tensor in OUTER.items():
        assert cut_outer(outer_view(), name, BlockPlan(0), BlockPlan(1)) is tensor


def test_a_plan_without_its_bases_is_refused() -> None:
    place = Place(None, None, 2, 2)
    with pytest.raises(SecateurError, match="keeps its rotations in its weights alone: load that checkpoint instead"):
        cut_block(small("llama"), BlockPlan(0, places={"enter": place, "between": place, "leave": place}))


def test_the_sizes_of_a_sliced_block_follow_from_its_places() -> None:
    plan = BlockPlan(0, places={"enter": ENTER, "between": BETWEEN, "leave": LEAVE})
    after = dims_after(DIMS, plan)
    shapes = {"q": (8, 2), "k": (4, 2), "v": (4, 2), "o": (1, 8), "gate": (3, 1), "up": (3, 1), "down": (2, 3)}
    assert {name: after.shape(name) for name in shapes} == shapes
    assert (after.enters, after.leaves) == (2, 2)
