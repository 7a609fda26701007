"""The dense residual stream, in the coordinates of a pruned one.

Where the residual stream stays whole, a block's target is what the dense model has at the same place. A pruned model
whose residual was rotated and sliced, or narrowed, has other coordinates: hidden' = hidden B. The matrix B follows from
weights alone. What writes to the residual stream was multiplied by it, so

    W'_down = B^T W_down        after a block            E' = E B        after the embeddings

and B is their least-squares solution, exact where pruning changed nothing else.

Shape letters: D residual of the dense model, W residual of the pruned model, F feed-forward units, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.calibrate.stream import Stream
from secateur.core.errors import SecateurError
from secateur.core.memory import give_back
from secateur.models.canonical import canonical_view
from secateur.models.view import BlockView, ModelView

_ROWS = 1 << 15  # rows of an embedding that are enough to tell a basis


def ends(kept: list[int], blocks: int) -> list[int]:
    """Return for each block of the pruned model the block of the dense model before which its target lies.

    A block that was dropped falls to the one before it, and at the beginning to the first one that stays.

    Args:
        kept: the indices in the dense model of the blocks that stay.
        blocks: the number of blocks of the dense model, which stands for its end.
    """
    return [*kept[1:], blocks]


class DenseStream:
    """The residual stream of the dense model, from block to block, in the coordinates of a pruned model.

    Args:
        dense: the dense model.
        pruned: the pruned model.
        windows: token ids [S, T].
        how: `device`, `dtype` and `spill` as for `Stream`.
    """

    def __init__(self, dense: ModelView, pruned: ModelView, windows: Tensor, **how: Any) -> None:
        self._pruned = pruned
        residual = pruned.dims(0).residual
        self._rotated = residual is not None and not residual.selected
        self._dense = canonical_view(dense, torch.float32) if self._rotated else dense
        self._stream = Stream(self._dense, windows, **how)
        self._basis: Tensor | None = None
        if not self._rotated and pruned.config.hidden_size != dense.config.hidden_size:
            self._basis = _of_embeddings(dense, pruned)
        self._index = 0

    def advance(self, after: int, index: int) -> None:
        """Carry the stream to the block `after`, where block `index` of the pruned model ends."""
        for number in range(self._index, after):
            dense = self._dense.block(number)
            self._stream.advance(dense)
            if self._rotated and number == after - 1:
                self._basis = _of_block(dense, self._pruned.block(index))
            del dense
            give_back()
        self._index = after

    def target(self, rows: Tensor) -> Tensor:
        """Return the stream of some windows, [B, T, W] on the device."""
        hidden_BTD = self._stream.hidden_STD[rows].to(self._stream.device)
        return hidden_BTD if self._basis is None else hidden_BTD @ self._basis.to(hidden_BTD)


def _of_block(dense: BlockView, pruned: BlockView) -> Tensor:
    """Return B [D, W] of the residual after a block."""
    before_DF, after_WF = dense.matrix("down"), pruned.matrix("down")
    if before_DF.shape[1] != after_WF.shape[1]:
        raise SecateurError(
            f"block {pruned.index}: its residual stream was rotated, and of {before_DF.shape[1]} feed-forward units it "
            f"has {after_WF.shape[1]}, so how it was rotated cannot be told; reconstruct before units go"
        )
    return _solved(before_DF.t(), after_WF.t())


def _of_embeddings(dense: ModelView, pruned: ModelView) -> Tensor:
    """Return B [D, W] of a residual stream that lost features, the same for all blocks."""
    rows = slice(0, _ROWS)
    path = f"{dense.family.embeddings[0]}.weight"
    return _solved(dense.source.rows(path, rows), pruned.source.rows(path, rows))


def _solved(before: Tensor, after: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.lstsq(before.double(), after.double(), driver="gelsd").solution
    return basis.float()
