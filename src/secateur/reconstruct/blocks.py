"""The loop over the blocks of a pruned model: targets from the dense one, inputs from the blocks before, a fit.

Shape letters: S windows, B windows of a batch, T tokens, D residual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.calibrate.stream import Stream
from secateur.core.memory import give_back
from secateur.core.timing import Stopwatch
from secateur.models.view import BlockView, ModelView
from secateur.reconstruct.fit import Fitted, How, fit
from secateur.reconstruct.targets import DenseStream, ends

Finished = Callable[[int], tuple[BlockView, Fitted] | None]


def reconstructed_blocks(
    pruned: ModelView,
    dense: ModelView,
    kept: list[int],
    windows: Tensor,
    how: How,
    watch: Stopwatch,
    *,
    device: torch.device,
    spill: tuple[Path, Path] | None = None,
    finished: Finished = lambda _: None,
) -> Iterator[tuple[BlockView, Fitted]]:
    """Yield every block of the pruned model after its fit, in order.

    Args:
        pruned, dense: the two models.
        kept: the indices in the dense model of the blocks that the pruned one has.
        windows: token ids [S, T]; the last ones are held out.
        how: the settings of a fit.
        watch: receives the seconds of `files`, `forward` and `fit`.
        device: where blocks run, in float32.
        spill: two files for the residual streams, the dense one first; None keeps them in memory.
        finished: returns a block that an interrupted run has fitted already.
    """
    files = spill or (None, None)
    with watch("forward"):
        targets = DenseStream(dense, pruned, windows, device=device, dtype=torch.float32, spill=files[0])
        stream = Stream(pruned, windows, device=device, dtype=torch.float32, spill=files[1])
    for index, end in enumerate(ends(kept, dense.blocks)):
        with watch("forward"):
            targets.advance(end, index)
        done = finished(index)
        if done is None:
            with watch("fit"):
                found = _fitted(stream, targets, index, len(windows), how)
            give_back()
            with watch("files"):
                block = pruned.block(index)
            done = replace(block, tensors={**block.tensors, **found.tensors}), found
            del block, found
        give_back()
        if index < pruned.blocks - 1:
            with watch("forward"):
                stream.advance(done[0])
            give_back()
        yield done
        del done
        give_back()


def _fitted(stream: Stream, targets: DenseStream, index: int, windows: int, how: How) -> Fitted:
    """Return what becomes of a block of the pruned model."""
    block = stream.view.block(index)
    dims, dtypes = block.dims, {name: tensor.dtype for name, tensor in block.tensors.items()}
    sizes = {
        min(how.together, how.batch),
        how.batch % how.together,
        min(how.together, how.held_out),
        how.held_out % how.together,
    }
    arguments = {size: stream.arguments(index, size) for size in sizes - {0}}

    def run(module: nn.Module, rows: Tensor) -> Tensor:
        entering_BTD = stream.hidden_STD[rows, :, : dims.enters].to(stream.device)
        out: Tensor = module(entering_BTD, **arguments[len(rows)])
        return out

    with stream.loaded(block, forward_only=False) as module:
        del block  # the module has its weights, in float32
        return fit(module, dtypes, run, targets.target, windows, replace(how, seed=how.seed + index))
