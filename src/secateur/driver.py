"""The flow from blocks to pruned blocks, for any method: read, calibrate, plan, cut, one block at a time.

What happens to the results is the caller's: `prune` writes them, `make_plan` keeps the plans alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secateur.calibrate.statistics import Statistics
from secateur.calibrate.stream import Stream
from secateur.core.errors import NotFiniteError
from secateur.core.memory import give_back
from secateur.core.timing import Stopwatch
from secateur.cut import cut_block
from secateur.methods import Method
from secateur.models.view import BlockView, ModelView
from secateur.plan.plan import BlockPlan
from secateur.plan.rates import Rates

_LARGE_BYTES = 1 << 25
Finished = Callable[[int], tuple[BlockView, BlockPlan] | None]


@dataclass(frozen=True)
class Job:
    """What to do: a method with its options, and the sparsity of every matrix of every block."""

    view: ModelView
    method: Method
    options: Any
    rates: Rates

    @property
    def whole_model(self) -> bool:
        """Whether the plan is made for all blocks at once."""
        return self.method.plan_block is None or bool(getattr(self.options, "whole_model", False))

    @property
    def streams(self) -> bool:
        """Whether calibration tokens have to pass through the blocks."""
        return self.method.statistics is not None and not self.whole_model and any(self.rates)

    @property
    def last(self) -> int:
        """The last block that anything is asked of (-1: none); what lies behind it need not be run."""
        return max((index for index, rates in enumerate(self.rates) if rates), default=-1)


def pruned_blocks(
    job: Job, windows: Tensor | None, stream: Stream | None, watch: Stopwatch, finished: Finished = lambda _: None
) -> Iterator[tuple[BlockView, BlockPlan]]:
    """Every block after its cut, with its plan, in order.

    Args:
        job: what to do.
        windows: the calibration token ids [S, T]; None where the method needs none.
        stream: the same on their way through the blocks; None where `job.streams` is false.
        watch: receives the seconds of `files`, `forward`, `statistics` and `selection`.
        finished: gives blocks that an interrupted run has already done: they are run, not pruned again.

    Raises:
        NotFiniteError: a weight or an input is not finite; the block and the matrix are named.
    """
    plans = _whole_model_plan(job, windows, watch) if job.whole_model else None
    for index in range(job.view.blocks):
        done = finished(index)
        if done is None:
            with watch("files"):
                block = job.view.block(index, job.rates[index])
            _check_weights(block)
            plan = plans[index] if plans else _plan_one(job, block, stream, watch)
            with watch("selection"):
                done = cut_block(block, plan), plan
            del block  # the uncut weights
            give_back()
        if stream is not None and index < job.last:
            with watch("forward"):
                stream.advance(done[0])
            give_back()
        yield done
        del done  # the caller has finished with it
        give_back()


def _whole_model_plan(job: Job, windows: Tensor | None, watch: Stopwatch) -> Sequence[BlockPlan]:
    assert job.method.plan_model is not None
    with watch("selection"):
        plans: Sequence[BlockPlan] = job.method.plan_model(replace(job.view, rates=job.rates), windows, job.options)
    return plans


def _plan_one(job: Job, block: BlockView, stream: Stream | None, watch: Stopwatch) -> BlockPlan:
    if not block.rates:
        return BlockPlan(block.index)
    statistics = None if stream is None else _collect(job, block, stream, watch)
    if sum(tensor.nbytes for tensor in block.tensors.values()) > _LARGE_BYTES:
        give_back()  # what the forward freed is of sizes that the plan cannot use; a small block is planned faster in warm memory
    assert job.method.plan_block is not None
    with watch("selection"):
        plan: BlockPlan = job.method.plan_block(block, statistics, job.options)
    return plan


def _collect(job: Job, block: BlockView, stream: Stream, watch: Stopwatch) -> Statistics:
    assert job.method.statistics is not None
    family = block.family
    inputs = sorted({family.input_of(name) for name in block.rates})
    collected = {name: job.method.statistics(block.dims.shape(name)[1], stream.device) for name in inputs}

    def listener(name: str) -> Callable[[Tensor], None]:
        def listen(x_NI: Tensor) -> None:
            with watch("statistics"):
                collected[name].update(x_NI)

        return listen

    with watch("forward"):
        stream.observe(block, {family.matrices[name]: listener(name) for name in inputs})
    statistics = Statistics(family, collected)
    statistics.check_finite(block.index)
    return statistics


def _check_weights(block: BlockView) -> None:
    for name in block.names:
        # a sum is one cheap pass and is not finite where an entry is not; it may also overflow, so the entries decide
        # (in the weight's own dtype: torch would first copy all of it to another)
        weight_OI = block.matrix(name)
        if not torch.isfinite(weight_OI.sum()) and not torch.isfinite(weight_OI).all():
            raise NotFiniteError(f"block {block.index}: matrix {name} has weights that are not finite (NaN or infinity); the checkpoint is damaged")
