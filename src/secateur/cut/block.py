"""The cut: put new weights in place, zero what masks remove, drop the rows and columns of removed units, rotate and
slice the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.cut.rotate import residual_after, rotate_block, rotate_outer
from secateur.models.family import Family
from secateur.models.runtime import SECOND_NORM, SELECT_FIRST
from secateur.models.spaces import COLUMNS, MEMBERS, OWN_COLUMNS, QUERY_HEADS, ROWS, SEPARATE_COLUMNS
from secateur.models.view import BlockDims, BlockView, ModelView, Residual
from secateur.plan.plan import BlockPlan

READS, WRITES = ("attention_in", "mlp_in"), ("attention_out", "mlp_out")  # of attention and of MLP
_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def cut_block(block: BlockView, plan: BlockPlan) -> BlockView:
    """The block after the plan; the tensors of the given block stay unchanged.

    Raises:
        SecateurError: the plan was read from disk, which has only the hashes of new weights.
    """
    if elsewhere := plan.updated.keys() - plan.updates.keys():
        raise SecateurError(
            f"block {plan.index}: this plan was read from disk, which names the new weights of "
            f"{', '.join(sorted(elsewhere))} by hash alone: load the checkpoint that was written with it, or make the "
            "plan again"
        )
    if plan.places:
        assert not plan.updates, "new weights are of the model as it was before the rotation"
        return rotate_block(block, plan)
    block = _masked(block, plan)
    return _narrowed(block, plan) if plan.keep else block


def cut_outer(view: ModelView, name: str, first: BlockPlan, last: BlockPlan) -> Tensor:
    """A tensor outside the blocks after the plans of the first and the last block."""
    if first.places:
        return rotate_outer(view, name, first.places["enter"], last.places["leave"])
    return view.source.read(name)


def dims_after(dims: BlockDims, plan: BlockPlan) -> BlockDims:
    """The sizes of the block after the plan."""
    if plan.places:
        return replace(dims, residual=residual_after(plan))
    if plan.select:
        reads, writes = (
            [len(plan.keep[space]) if space in plan.keep else dims.hidden for space in spaces]
            for spaces in (READS, WRITES)
        )
        q, k, v = (len(plan.keep.get(space, ())) for space in OWN_COLUMNS.values())
        readers = (q, k, v) if separates(plan) else None
        dims = replace(
            dims, residual=Residual((reads[0], writes[0]), (reads[1], writes[1]), (plan.select, plan.select), readers)
        )
    groups = len(plan.keep["groups"]) if "groups" in plan.keep else dims.groups
    ffn = len(plan.keep["ffn"]) if "ffn" in plan.keep else dims.ffn
    queries = len(plan.keep["heads"]) // dims.groups if "heads" in plan.keep else dims.queries
    return dims.with_units(groups, ffn, queries)


def separates(plan: BlockPlan) -> bool:
    """True if q, k and v have a selection each of what they read."""
    return OWN_COLUMNS["q"] in plan.keep


def family_after(family: Family, plan: BlockPlan) -> Family:
    """The family that describes the block after the plan."""
    return family.separated() if separates(plan) else family


def _masked(block: BlockView, plan: BlockPlan) -> BlockView:
    """Put new weights in place, and set the weights to zero that masks remove."""
    touched = {f"{block.family.matrices[name]}.weight" for name in (*plan.masks, *plan.updates)}
    tensors = {name: _own_copy(tensor) if name in touched else tensor for name, tensor in block.tensors.items()}
    block = replace(block, tensors=tensors)
    for name, new_OI in plan.updates.items():
        assert new_OI.shape == block.matrix(name).shape, "new weights are of the block before it is narrowed"
        block.matrix(name).copy_(new_OI)
    for name, mask in plan.masks.items():
        weight_OI = block.matrix(name)
        # as whole numbers, a product with 0 or 1 is exact and leaves no minus zero; masked_fill takes twenty times as
        # long
        weight_OI.view(_WHOLE[weight_OI.element_size()]).mul_(mask.unpack().to(weight_OI.device))
    return block


def _own_copy(tensor: Tensor) -> Tensor:
    """A copy in memory from numpy. From 4 MB on numpy requests huge pages, which saves a third of the time to write to
    new memory.
    """
    if tensor.device.type != "cpu":
        return tensor.clone()
    fresh = torch.from_numpy(np.empty(tensor.numel() * tensor.element_size(), np.uint8))
    return fresh.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _narrowed(block: BlockView, plan: BlockPlan) -> BlockView:
    rows, columns = _kept_rows_and_columns(block, plan)
    family = family_after(block.family, plan)
    tensors = {
        name: tensor
        for name, tensor in block.tensors.items()
        if name.rpartition(".")[0] not in block.family.matrices.values()
    }
    for path in dict.fromkeys(family.matrices.values()):
        members = [name for name in block.names if family.matrices[name] == path]
        tensors[f"{path}.weight"] = _stack([_pick(block.matrix(n), rows[n], columns[n]) for n in members])
        biases = [_pick(bias_O, rows[name], None) for name in members if (bias_O := block.bias(name)) is not None]
        if biases:
            tensors[f"{path}.bias"] = _stack(biases)
    if plan.select:
        tensors = _narrowed_norms(block, plan, tensors) | _index_maps(block.family, plan)
    return replace(block, family=family, tensors=tensors, dims=dims_after(block.dims, plan))


Kept = dict[str, Tensor | None]
"""Canonical matrix name -> the indices that stay; None if all stay."""


def _kept_rows_and_columns(block: BlockView, plan: BlockPlan) -> tuple[Kept, Kept]:
    """The rows and the columns of each matrix that stay."""
    units = {space: indices.long() for space, indices in plan.keep.items()}
    heads = _kept_heads(block.dims, units)
    columns = SEPARATE_COLUMNS if separates(plan) else COLUMNS

    def indices_of(name: str, space: str) -> Tensor | None:
        return heads.get(name) if space == "groups" else units.get(space)

    kept_rows = {name: indices_of(name, ROWS[name]) for name in block.names}
    return kept_rows, {name: indices_of(name, columns[name]) for name in block.names}


def _kept_heads(dims: BlockDims, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows that stay of each matrix with heads, for `o` the columns; empty if all heads stay."""
    if "groups" not in units and "heads" not in units:
        return {}
    groups, heads = units.get("groups", torch.arange(dims.groups)), units.get("heads", torch.arange(dims.heads))
    heads = heads[torch.isin(heads // dims.queries, groups)]  # the query heads of a group are neighbours
    of_key, of_query = (_spread(numbers, dims.head_width) for numbers in (groups, heads))
    members = MEMBERS["groups"]
    return {name: of_query if name in QUERY_HEADS else of_key for name in (*members.writers, members.reader)}


def _index_maps(family: Family, plan: BlockPlan) -> dict[str, Tensor]:
    """The indices of the features read and written, by their tensor names in `runtime.Select` and `runtime.Reader`."""
    maps = {f"skips.{number}.write_index_map": space for number, space in enumerate(WRITES)}
    maps |= {f"skips.{number}.read_index_map": space for number, space in enumerate(READS)}
    if separates(plan):
        del maps["skips.0.read_index_map"]
        maps |= {f"{_reader(family, name)}.read_index_map": space for name, space in OWN_COLUMNS.items()}
    return {name: plan.keep[space].long() for name, space in maps.items()}


def _reader(family: Family, name: str) -> str:
    """The path of the `runtime.Reader` of one of q, k and v."""
    return family.separated().matrices[name].rpartition(".")[0]


def _narrowed_norms(block: BlockView, plan: BlockPlan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with norms of the selected features only. A norm with several readers becomes one norm for each."""
    norms = block.family.norms
    targets = {(*norms, SECOND_NORM)[1]: (norms[-1], READS[1])}
    if not separates(plan):
        targets[norms[0]] = (norms[0], READS[0])
    elif plan.select == SELECT_FIRST:
        targets |= {f"{_reader(block.family, name)}.norm": (norms[0], space) for name, space in OWN_COLUMNS.items()}
        tensors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] != norms[0]}
    made = {}
    for target, (source, space) in targets.items():
        for kind in ("weight", "bias"):
            if f"{source}.{kind}" in block.tensors:
                made[f"{target}.{kind}"] = block.tensors[f"{source}.{kind}"][plan.keep[space].long()]
    return tensors | made


def _spread(groups: Tensor, width: int) -> Tensor:
    return (groups[:, None] * width + torch.arange(width)).flatten()


def _pick(weight_OI: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Some rows and columns of a weight, or some rows of a bias."""
    if rows is not None:
        weight_OI = weight_OI[rows]
    return weight_OI if columns is None else weight_OI[:, columns].contiguous()


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
