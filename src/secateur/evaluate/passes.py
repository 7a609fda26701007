"""How long work takes that runs the whole model, from a model with two of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.calibrate.miniature import in_memory, miniature
from secateur.core.machine import synchronize
from secateur.core.timing import Clock, work_seconds
from secateur.models.load import Checkpoint, load_model
from secateur.models.view import block_modules

BLOCKS = 2


@dataclass(frozen=True)
class Small:
    """A model with a few of the blocks of another one.

    Attributes:
        checkpoint: where its tensors are.
        model: the model in memory.
        kept: the indices of its blocks in the whole model.
        depth: the blocks of the whole model, counted in mean blocks of this one.
        load_seconds: what loading the whole model takes.
        clock: returns seconds, after the device has finished.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    kept: Sequence[int]
    depth: float
    load_seconds: float
    clock: Clock

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds that forward passes of this model would take with all blocks."""
        blocks = block_modules(self.model, self.checkpoint.view().family)
        with _timed(blocks, self.clock) as spent:
            started = self.clock()
            work()
            total = self.clock() - started
        return total + sum(spent) * (self.depth / len(blocks) - 1)


def small_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    blocks: int = BLOCKS,
    among: Sequence[int] | None = None,
    clock: Clock = work_seconds,
) -> Small:
    """Load the last blocks of a model; all of them where they do not fit one another alone.

    Args:
        checkpoint: the whole model.
        device, dtype: where and in which dtype it computes.
        blocks: how many blocks to keep.
        among: the indices to choose from; None is all.
        clock: returns seconds.
    """

    def now() -> float:
        synchronize(device)
        return clock()

    view = checkpoint.view()
    places = range(view.blocks) if among is None else among
    kept = list(places)[-blocks:]
    started = now()
    with suppress(Exception):  # blocks of unequal width may fit their neighbours alone
        small = miniature(checkpoint, kept)
        model = in_memory(small, device=device, dtype=dtype)
        loaded = now() - started
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
        depth = len(kept) * view.matrix_parameters() / small.view().matrix_parameters()
        share = view.parameters() / small.view().parameters()
        return Small(small, model, kept, depth, loaded * share, now)
    started = now()
    model = load_model(checkpoint, device=device, dtype=dtype)
    return Small(checkpoint, model, range(view.blocks), view.blocks, now() - started, now)


@contextmanager
def _timed(blocks: nn.ModuleList, clock: Clock) -> Iterator[list[float]]:
    """Note the seconds of each forward pass of each block inside the `with` statement."""
    spent: list[float] = []
    started = [0.0]

    def before(*_: Any) -> None:
        started[0] = clock()

    def after(*_: Any) -> None:
        spent.append(clock() - started[0])

    hooks = [
        hook
        for block in blocks
        for hook in (block.register_forward_pre_hook(before), block.register_forward_hook(after))
    ]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def weights_memory(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Return the bytes of a whole model in memory; weights that change their dtype are there in both for a while."""
    itemsizes = dtype.itemsize + (0 if dtype == checkpoint.dtype else checkpoint.dtype.itemsize)
    return checkpoint.view().parameters() * itemsizes
