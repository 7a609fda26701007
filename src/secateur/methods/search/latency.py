"""What each width of a block takes in time, measured on this machine.

One block of each size is run at several widths, on the prompt of a prefill or on one token, as `secateur bench` times
whole models. What counts is the ratio to the full block, timed right before: other work on the machine slows both.
Between two measured widths the time is a straight line, and a wider block never counts as faster. Heads and
feed-forward units save time independently of each other, so the time of a block is its time at full width less what
each of the two saves. Below an eighth of the units nothing more is saved. The embedding, and attention over a cache,
are left out.

Shape letters: U units.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from torch import Tensor

from secateur.calibrate.ending import Ending
from secateur.calibrate.stream import Stream
from secateur.core.machine import best_time
from secateur.core.memory import give_back
from secateur.core.progress import track
from secateur.core.timing import work_seconds
from secateur.cut.block import cut_block
from secateur.models.spaces import MEMBERS
from secateur.models.view import BlockDims, BlockView, ModelView
from secateur.plan.plan import BlockPlan

_WIDTHS = 8  # of each space are measured, and the full block; what the narrowest saves is the most that counts
_ROUNDS, _FEWEST = 9, 3  # in each of which every width is timed once; the median of the ratios counts
_ENOUGH = 20.0  # seconds for the blocks of one size, after which the fewest rounds are enough
_SECONDS = 0.02  # for the calls of one timing, of which the shortest counts
_SLOPE = 1e-9  # of the time of a block, for each unit: no unit is free


def measure_times(view: ModelView, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Time the blocks of a model at several widths.

    Args:
        view: the model.
        tokens: the number of tokens of one sequence that runs through a block at a time.
        device, dtype: where and in which dtype it runs.

    Returns:
        `whole`, the time of all blocks and of the head for one token, and for each block and space
        `INDEX.SPACE.saved`: the time saved by the removal of 0, 1, ... U - 1 units. In seconds, float64.
    """
    stream = Stream(view, torch.zeros(1, tokens, dtype=torch.long), device=device, dtype=dtype)
    sizes: dict[BlockDims, list[int]] = {}
    for index in range(view.blocks):
        sizes.setdefault(view.dims(index), []).append(index)
    found: dict[str, Tensor] = {}
    whole = _head_time(stream)
    for alike in sizes.values():
        full, ratios = _block_times(stream, view.block(alike[0]))
        whole += full * len(alike)
        for space, of in ratios.items():
            saved_U = saved_time(view.dims(alike[0]).units()[space], full, of)
            found |= {f"{index}.{space}.saved": saved_U.clone() for index in alike}
    return {"whole": torch.tensor(whole, dtype=torch.float64), **found}


def saved_time(units: int, full: float, ratios: Mapping[int, float]) -> Tensor:
    """Return the seconds that the removal of 0, 1, ... U - 1 units saves, float64, strictly ascending.

    Args:
        units: U.
        full: the time of the block with all of them, in seconds.
        ratios: the number of units that stay, fewer than U -> the time of such a block, as a part of that of the full
            one; ascending.
    """
    measured = np.minimum([*ratios.values(), 1.0], 1.0)
    # half-way between the largest of the narrower ones and the smallest of the wider ones: so it never falls
    rising = (np.maximum.accumulate(measured) + np.minimum.accumulate(measured[::-1])[::-1]) / 2
    removed_U = np.arange(units)
    saved_U = 1 - np.interp(units - removed_U, [*ratios, units], rising)
    return full * torch.from_numpy(saved_U + _SLOPE * removed_U)


def _block_times(stream: Stream, block: BlockView) -> tuple[float, dict[str, dict[int, float]]]:
    """Return the time of a block in seconds, and by space the times with fewer units as parts of it."""
    units = block.dims.units()
    ready = {
        name: t.to(stream.device, stream.dtype if t.is_floating_point() else t.dtype)
        for name, t in block.tensors.items()
    }
    block = replace(block, tensors=ready, dtype=stream.dtype)
    ratios: dict[str, dict[int, list[float]]] = {
        space: {kept: [] for kept in _fewer(units[space])} for space in MEMBERS
    }
    full, started = _time(stream, block), time.perf_counter()
    for number in track(range(_ROUNDS), "search: rounds of timing"):
        if number >= _FEWEST and time.perf_counter() - started > _ENOUGH:
            break
        for space, counts in ratios.items():
            for kept, found in counts.items():
                first_K = torch.arange(kept, dtype=torch.int32)
                cut = cut_block(block, BlockPlan(block.index, keep={space: first_K}, of={space: units[space]}))
                before = _time(stream, block)
                found.append(_time(stream, cut) / before)
                full = min(full, before)
    give_back()
    return full, {space: {kept: median(of) for kept, of in counts.items()} for space, counts in ratios.items()}


def _fewer(units: int) -> list[int]:
    """Return the numbers of units to measure, ascending, without all of them."""
    return sorted({max(1, round(units * part / _WIDTHS)) for part in range(1, _WIDTHS)} - {units})


@torch.inference_mode()
def _time(stream: Stream, block: BlockView) -> float:
    """Return the least time of a block in seconds. Its weights are not packed, since a stock model's are not."""
    with stream.loaded(block, forward_only=False) as module:
        arguments = stream.arguments(block.index, 1)
        hidden_1TD = stream.hidden(slice(0, 1), block.dims.enters)
        return best_time(lambda: module(hidden_1TD, **arguments), stream.device, _SECONDS, work_seconds)


@torch.inference_mode()
def _head_time(stream: Stream) -> float:
    """Return the least time of the last norm and the head for one token, in seconds."""
    view = stream.view
    with Ending(stream, torch.zeros(1, 2, dtype=torch.long)).loaded() as (norm, head):
        hidden_1D = stream.hidden(slice(0, 1), view.dims(view.blocks - 1).leaves)[0, :1]
        seconds = _SECONDS * _ROUNDS
        return best_time(lambda: head(norm(hidden_1D)), stream.device, seconds, work_seconds)
