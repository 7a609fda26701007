"""The cut of a rotated residual stream: its readers and writers in the bases of a plan (arXiv:2401.15024, section 3).

With orthonormal columns B of the kept directions, a reader W [O, D] becomes W B, a writer W [D, I] becomes B^T W, an
embedding E [V, D] becomes E B. Products are in the dtype of the canonical model (float32 or better), the results in the
checkpoint's.

Shape letters: D residual, W its width after, V vocabulary, O outputs, I inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.models.spaces import COLUMNS, RESIDUAL_READERS, ROWS
from secateur.models.view import BlockView, ModelView, Residual
from secateur.plan.plan import BlockPlan, Place

_ROWS = 1 << 12  # rows of the embeddings in memory at a time, in float32


def rotate_block(block: BlockView, plan: BlockPlan) -> BlockView:
    """A block of the canonical model in the bases of its places; the given block stays unchanged."""
    enter, leave = plan.places["enter"], plan.places["leave"]
    between = plan.places.get("between")
    place_of = {"attention_in": enter, "attention_out": between or leave, "mlp_in": between or enter, "mlp_out": leave}
    tensors = dict(block.tensors)
    for path in dict.fromkeys(block.family.matrices.values()):
        name = next(n for n in block.names if block.family.matrices[n] == path)
        weight_OI = tensors[f"{path}.weight"]
        if name in RESIDUAL_READERS:
            tensors[f"{path}.weight"] = (weight_OI @ _basis(place_of[COLUMNS[name]], weight_OI)).to(block.dtype)
        else:
            basis = _basis(place_of[ROWS[name]], weight_OI)
            for key in (f"{path}.weight", f"{path}.bias"):
                if key in tensors:
                    tensors[key] = (basis.t() @ tensors[key]).to(block.dtype)
    places = [place for place in (between, leave) if place is not None]
    for number, place in enumerate(places):
        tensors |= {f"skips.{number}.{name}": tensor for name, tensor in place.skip.items()}
    dims = replace(block.dims, residual=residual_after(plan))
    return replace(
        block, dims=dims, tensors={name: tensor.to(block.dtype).contiguous() for name, tensor in tensors.items()}
    )


def residual_after(plan: BlockPlan) -> Residual:
    """The widths of the residual stream as the block sees it after the plan."""
    enter, between, leave = plan.places["enter"], plan.places.get("between"), plan.places["leave"]
    if between is None:
        end = (enter.width, leave.width)
        return Residual(end, end, (leave.form,))
    return Residual((enter.width, between.width), (between.width, leave.width), (between.form, leave.form))


def rotate_outer(view: ModelView, name: str, first: Place, last: Place) -> Tensor:
    """A tensor outside the blocks of the canonical model: embeddings in the first basis, the head in the last."""
    shape = view.source.shape(name)
    if len(shape) == 1:
        return view.source.read(name).to(view.dtype)
    if name.rpartition(".")[0] == view.family.tied_map:
        return _tied_map(view, first, last).to(view.dtype)
    place = first if name.rpartition(".")[0] in view.family.embeddings else last
    rotated = torch.empty(shape[0], place.width, dtype=view.dtype)
    for start in range(0, shape[0], _ROWS):
        rows = view.source.rows(name, slice(start, start + _ROWS))
        rotated[start : start + _ROWS] = rows @ _basis(place, rows)
    return rotated


def _tied_map(view: ModelView, first: Place, last: Place) -> Tensor:
    """The map M [W of the first place, W of the last] before a tied head: the table E' = E B gives the logits E' M u.

    Those of the dense model are E G Q u, with the canonical map G and the last basis Q. M is their least-squares
    solution over all rows of the table, (E'^T E')^-1 E'^T E G Q.
    """
    table = f"{view.family.embeddings[0]}.weight"
    basis_DW = _basis(first, torch.empty(0, dtype=torch.float64))
    hidden = basis_DW.shape[0]
    gram_DD = torch.zeros(hidden, hidden, dtype=torch.float64)
    for start in range(0, view.source.shape(table)[0], _ROWS):
        rows_ND = view.source.rows(table, slice(start, start + _ROWS)).double()
        gram_DD += rows_ND.t() @ rows_ND
    read_DW = view.source.read(f"{view.family.tied_map}.weight").double() @ _basis(last, gram_DD)
    left_WD = basis_DW.t() @ gram_DD
    map_WW: Tensor = torch.linalg.lstsq(left_WD @ basis_DW, left_WD @ read_DW, driver="gelsd").solution
    return map_WW.float()


def _basis(place: Place, like: Tensor) -> Tensor:
    if place.basis_DW is None:
        raise SecateurError(
            "this plan was read from a checkpoint, which keeps its rotations in its weights alone: load that "
            "checkpoint instead"
        )
    return place.basis_DW.to(like)
