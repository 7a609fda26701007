"""A dense model in memory, with the statistics of its activations; its blocks can be pruned and restored.

Every pruned version starts from the dense weights and the statistics of the dense model. So one calibration pass is
enough for all of them.

Shape letters: S windows, B windows of a batch, T tokens, D residual.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.calibrate.statistics import Statistics
from secateur.calibrate.stream import Stream
from secateur.core.progress import track
from secateur.core.timing import Stopwatch
from secateur.cut import cut_block
from secateur.models.loss import hidden_states, token_losses
from secateur.models.view import BlockView, block_modules, other_forwards
from secateur.plan.plan import BlockPlan
from secateur.plan.rates import Rates
from secateur.prune.driver import collect
from secateur.prune.job import Job


class DenseModel:
    """A dense model that can be pruned and restored.

    Args:
        job: the method, which plans block by block, and its options. Its rates list the matrices that may be pruned
            later; statistics are collected for these.
        model: the whole model of `job.view`, on its device; it is changed in place while it is pruned.
        windows: calibration token ids [S, T]; None if the method needs none.

    Raises:
        NotFiniteError: an input is not finite; the message names the block and the matrix.
    """

    def __init__(self, job: Job, model: PreTrainedModel, windows: Tensor | None) -> None:
        self.job, self.model = job, model
        self._state = dict(model.state_dict())
        self._blocks = block_modules(model, job.view.family)
        self._windows = windows

    @cached_property
    def statistics(self) -> list[Statistics[Any] | None]:
        """The statistics of the dense model, one entry per block; collected at the first use."""
        return _dense_statistics(self.job, self._windows)

    def cut(self, index: int, rates: Mapping[str, float]) -> tuple[BlockView, BlockPlan]:
        """Return one block pruned at these rates, and its plan. The model does not change."""
        block = self.job.view.block(index, rates)
        assert self.job.method.says.plan_block is not None
        plan = self.job.method.says.plan_block(block, self.statistics[index], self.job.options)
        return cut_block(block, plan), plan

    def put(self, block: BlockView, names: Iterable[str]) -> None:
        """Write some matrices of a block into the model; their shapes must be the same there."""
        prefix = self.job.view.block_prefix(block.index)
        with torch.no_grad():
            for weight in {f"{block.family.matrices[name]}.weight" for name in names}:
                self._state[prefix + weight].copy_(block.tensors[weight])

    @contextmanager
    def pruned(self, rates: Rates) -> Iterator[int]:
        """Prune the model at these rates inside a `with` statement, then restore it; give the weights removed."""
        removed = 0
        touched = [index for index, rate in enumerate(rates) if any(rate.values())]
        try:
            for index in touched:
                block, plan = self.cut(index, rates[index])
                removed += sum(mask.removed for mask in plan.masks.values())
                self.put(block, rates[index])
            yield removed
        finally:
            for index in touched:
                self.put(self.job.view.block(index), rates[index])

    @torch.inference_mode()
    def leaving(self, index: int, batches: list[Tensor], entering: list[Tensor] | None = None) -> list[Tensor]:
        """Return the residual stream after block `index`, [B, T, D] per batch; `entering` as for `loss`."""
        outputs: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            outputs.append(output)
            raise _Enough

        hook = self._blocks[index].register_forward_hook(keep)
        try:
            for number, batch_BT in enumerate(batches):
                with self._known(index, entering and entering[number]), suppress(_Enough):
                    self.model.get_decoder()(input_ids=batch_BT, use_cache=False)
        finally:
            hook.remove()
        return outputs

    @torch.inference_mode()
    def loss(self, batches: list[Tensor], index: int = 0, entering: list[Tensor] | None = None) -> float:
        """Return the mean loss per predicted token, in nats.

        Args:
            batches: token ids [B, T] each, on the device of the model.
            index, entering: the residual stream before block `index`, [B, T, D] per batch, if it is known. The blocks
                before it are then skipped.
        """
        total = 0.0
        for number, batch_BT in enumerate(batches):
            with self._known(index, entering and entering[number]):
                hidden_BTD = hidden_states(self.model, batch_BT)
                total += float(
                    token_losses(self.model, hidden_BTD[:, :-1].flatten(0, 1), batch_BT[:, 1:].flatten()).double().sum()
                )
        return total / sum(batch.numel() - len(batch) for batch in batches)

    @contextmanager
    def _known(self, index: int, hidden_BTD: Tensor | list[Tensor] | None) -> Iterator[None]:
        """Skip the blocks before `index`, and feed the known residual stream into it."""
        if not isinstance(hidden_BTD, Tensor):
            yield
            return
        known_BTD = hidden_BTD
        with other_forwards(list(self._blocks)[:index], [lambda *_, **__: known_BTD] * index):
            yield


class _Enough(Exception):
    """Raised inside a forward pass to end it early."""


def _dense_statistics(job: Job, windows: Tensor | None) -> list[Statistics[Any] | None]:
    view = job.view
    if windows is None or job.method.says.STATISTICS is None:
        return [None] * view.blocks
    watch, statistics = Stopwatch(), []
    stream = Stream(view, windows, device=job.device, dtype=job.dtype)
    for index in track(range(view.blocks), "statistics of the dense model: blocks"):
        block = view.block(index, job.rates[index])
        statistics.append(collect(job, block, stream, watch) if block.rates else None)
        if index < job.last:
            stream.advance(block)
    return statistics
