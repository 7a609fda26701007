"""A dense model in memory whose blocks are exchanged for pruned ones and put back, with the statistics of its own activations.

Every pruned version is cut from the dense weights by the dense model's statistics, so one calibration pass serves all of them.

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
from secateur.calibrate.stream import Stream, other_forwards
from secateur.core.progress import track
from secateur.core.timing import Stopwatch
from secateur.cut import cut_block
from secateur.models.loss import hidden_states, token_losses
from secateur.models.view import BlockView
from secateur.plan.plan import BlockPlan
from secateur.plan.rates import Rates
from secateur.prune.driver import Job, collect


class DenseModel:
    """A model that can be pruned for a while.

    Args:
        job: the method and its options, which plans block by block. Its rates say which matrices will ever be pruned, so what statistics are needed.
        model: the whole model of `job.view`, on its device; it is changed in place while it is pruned.
        windows: calibration token ids [S, T]; None where the method needs none.

    Raises:
        NotFiniteError: an input is not finite; the block and the matrix are named.
    """

    def __init__(self, job: Job, model: PreTrainedModel, windows: Tensor | None) -> None:
        self.job, self.model = job, model
        self._state = dict(model.state_dict())
        self._blocks: nn.ModuleList = model.get_submodule(job.view.family.blocks)  # type: ignore[assignment]
        self._windows = windows

    @cached_property
    def statistics(self) -> list[Statistics[Any] | None]:
        """Of the dense model, a block each; collected when they are first needed."""
        return _dense_statistics(self.job, self._windows)

    def cut(self, index: int, rates: Mapping[str, float]) -> tuple[BlockView, BlockPlan]:
        """One block pruned at these rates, and its plan; the model stays as it is."""
        block = self.job.view.block(index, rates)
        assert self.job.method.says.plan_block is not None
        plan = self.job.method.says.plan_block(block, self.statistics[index], self.job.options)
        return cut_block(block, plan), plan

    def put(self, block: BlockView, names: Iterable[str]) -> None:
        """Write some matrices of a block of the same shapes into the model."""
        prefix = self.job.view.block_prefix(block.index)
        with torch.no_grad():
            for weight in {f"{block.family.matrices[name]}.weight" for name in names}:
                self._state[prefix + weight].copy_(block.tensors[weight])

    @contextmanager
    def pruned(self, rates: Rates) -> Iterator[int]:
        """The model at these rates for as long as this lasts; gives the number of weights removed."""
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
        """The residual stream behind block `index`, [B, T, D] a batch; `entering` as for `loss`."""
        found: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            found.append(output)
            raise _Enough

        hook = self._blocks[index].register_forward_hook(keep)
        try:
            for number, batch_BT in enumerate(batches):
                with self._known(index, entering and entering[number]), suppress(_Enough):
                    self.model.get_decoder()(input_ids=batch_BT, use_cache=False)
        finally:
            hook.remove()
        return found

    @torch.inference_mode()
    def loss(self, batches: list[Tensor], index: int = 0, entering: list[Tensor] | None = None) -> float:
        """The mean loss per predicted token in nats.

        Args:
            batches: token ids [B, T] each, on the device of the model.
            index, entering: the residual where it enters block `index`, [B, T, D] a batch, where it is known: the blocks before it are not run.
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
        """The blocks before `index` stand aside, and what enters it is what is known to enter it."""
        if not isinstance(hidden_BTD, Tensor):
            yield
            return
        known_BTD = hidden_BTD
        with other_forwards(list(self._blocks)[:index], [lambda *_, **__: known_BTD] * index):
            yield


class _Enough(Exception):
    """Raised inside a forward once all that was wanted is known."""


def _dense_statistics(job: Job, windows: Tensor | None) -> list[Statistics[Any] | None]:
    view = job.view
    if windows is None or job.method.says.STATISTICS is None:
        return [None] * view.blocks
    watch, found = Stopwatch(), []
    stream = Stream(view, windows, device=job.device, dtype=job.dtype)
    for index in track(range(view.blocks), "statistics of the dense model: blocks"):
        block = view.block(index, job.rates[index])
        found.append(collect(job, block, stream, watch) if block.rates else None)
        if index < job.last:
            stream.advance(block)
    return found
