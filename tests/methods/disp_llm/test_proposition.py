"""Proposition 1 of arXiv:2410.11988.

If each selection depends on the one before, a residual can only become narrower. Independent selections for reading
and writing are not bound by that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur import api
from secateur.methods.disp_llm.masked import MaskedModel
from secateur.models.runtime import NORM_FIRST
from secateur.plan.structures import find_structures
from tests.tiny import some_ids, tiny_model

WIDTH, CASES = 24, 300


def selection(draw: torch.Generator) -> Tensor:
    """A pseudo-selection matrix: diagonal, 0 or 1, of any density."""
    return torch.diag((torch.rand(WIDTH, generator=draw) < torch.rand(1, generator=draw)).float())


def nnz(matrix: Tensor) -> int:
    return int(matrix.count_nonzero())


def test_an_adapter_between_two_selections_is_no_wider_than_either() -> None:
    draw = torch.Generator().manual_seed(0)
    equal = 0
    for case in range(CASES):
        first, second = selection(draw), selection(draw)
        if case % 3 == 0:
            second = second @ first  # contained in the first
        adapter = first.t() @ second
        assert nnz(adapter) <= min(nnz(first), nnz(second))
        a, b = (set(s.diagonal().nonzero().flatten().tolist()) for s in (first, second))
        assert (nnz(adapter) == min(nnz(first), nnz(second))) == (a <= b or b <= a)
        equal += a <= b or b <= a
    assert CASES // 3 <= equal < CASES


def test_widths_decrease_with_depth_where_each_follows_the_one_before() -> None:
    draw = torch.Generator().manual_seed(1)
    for _ in range(CASES // 10):
        carried, widths = torch.eye(WIDTH), []
        for _ in range(6):
            carried = carried.t() @ selection(draw)
            widths.append(nnz(carried))
        assert widths == sorted(widths, reverse=True)


def test_selections_of_ones_own_may_be_disjoint_and_still_pass_information() -> None:
    """Block 0 writes even features only, and what it writes reaches block 1, which reads and writes odd ones only."""
    view = api.view_model(tiny_model("llama"))
    structures = find_structures(view, constrained=False, form=NORM_FIRST, whole=True)
    masked = MaskedModel(view, structures, NORM_FIRST, device=torch.device("cpu"), dtype=torch.float32)

    def logits(**closed: str) -> Tensor:
        gates = [torch.ones(width) for width in structures.widths]
        for index in (0, 1):
            for name in ("attention_in", "attention_out", "mlp_in", "mlp_out"):
                gate_D = gates[structures.uses[index][name]]
                gate_D[index::2] = 0 if closed.get(f"block_{index}") == "all" else 1
                gate_D[1 - index :: 2] = 0
        return masked.logits(some_ids(), torch.cat(gates))

    both = logits()
    for index in (0, 1):
        assert not torch.allclose(both, logits(**{f"block_{index}": "all"}), atol=1e-3), (
            "each block still does something"
        )
