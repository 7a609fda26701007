"""The loss of a model without each of some parts.

Shape letters: S windows, T tokens, D residual, X residual streams at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor

from secateur.calibrate.ending import Ending, check_loss
from secateur.calibrate.stream import Stream, new_buffer
from secateur.core.memory import give_back
from secateur.core.progress import track
from secateur.cut.block import cut_block
from secateur.methods.depth.parts import Candidate, Parts
from secateur.models.save import disk
from secateur.plan.run import Run

AT_ONCE = 8  # residual streams in memory, one for each candidate


class Trials:
    """The loss without each of some candidates.

    The residual stream of the model as it is runs through the blocks once. At the block of a candidate it branches: a
    copy goes on without that part, through the blocks behind.
    """

    def __init__(self, parts: Parts, windows: Tensor, run: Run) -> None:
        self._parts, self._view = parts, parts.view
        self._stream = Stream(self._view, windows, device=run.device, dtype=run.dtype)
        self._ending = Ending(self._stream, windows, run.labels)
        shape = min(AT_ONCE, len(parts.candidates())), *self._stream.hidden_STD.shape
        with nullcontext() if run.spill is None else disk(run.spill.parent):
            self._branches_XSTD = new_buffer(shape, run.dtype, run.spill)

    def loss(self) -> float:
        """Return the loss of the model as it is, in nats a token.

        Raises:
            NotFiniteError: it is NaN or infinite.
        """
        for block in track(self._view.iterate(), "depth: blocks of the model", self._view.blocks):
            self._stream.advance(block)
            give_back()
        (loss,) = self._ending.losses([self._stream.hidden_STD])
        check_loss(loss)
        return loss

    def without(self, candidates: Sequence[Candidate]) -> dict[Candidate, float]:
        """Return the loss without each candidate, infinite where it is not a number.

        Raises:
            NotFiniteError: it is not a number for any of them.
        """
        self._stream.begin()
        found: dict[Candidate, float] = {}
        at = 0
        for start in range(0, len(candidates), AT_ONCE):
            group = candidates[start : start + AT_ONCE]
            at = self._branch(group, at)
            losses = self._ending.losses(self._branches_XSTD[: len(group)])
            found |= zip(group, (loss if math.isfinite(loss) else math.inf for loss in losses), strict=True)
        check_loss(min(found.values()))
        return found

    def _branch(self, group: Sequence[Candidate], at: int) -> int:
        """Carry the branches of some candidates to the end, and the stream to the block of the last one.

        Args:
            group: the candidates, by block.
            at: the block that the stream enters.

        Returns:
            The block that the stream enters now.
        """
        begun: list[Tensor] = []
        for index in track(range(at, self._view.blocks), "depth: blocks"):
            block, plan = self._view.block(index), self._parts.plan(index)
            left = None if plan.dropped else cut_block(block, plan)
            if begun and left is not None:
                self._stream.carry(left, begun)
            for candidate in group:
                if candidate.index == index:
                    branch_STD = self._branches_XSTD[len(begun)].copy_(self._stream.hidden_STD)
                    without = self._parts.plan(index, candidate)
                    if not without.dropped:
                        self._stream.carry(cut_block(block, without), [branch_STD])
                    begun.append(branch_STD)
            if index < group[-1].index and left is not None:
                self._stream.advance(left)
            del block, left
            give_back()
        return group[-1].index
