"""How long a run takes, from a rehearsal: the real code on two real blocks and a few windows of random tokens.

What takes the time of a run grows with its blocks and with its tokens, and with nothing else:

    seconds = outside + sum over tracks of (times it runs) x (items) x (seconds an item)

A track is the loop behind a progress line (`core/progress.track`), such as the blocks of a pass. `Phases` times its
items in short runs of `work.make_checkpoint`. Two numbers of windows separate what each window costs from what each
block costs once (eigenproblems, factorisations, files), which has its true size. A track whose description says
"blocks" has as many items as the model has blocks; `Says.rehearsal` gives the counts of what a method repeats. Where
each of those items runs the whole model, two depths tell what a block adds. No method has a formula here.

A rehearsal should cost less than the run. Where the short runs would take more than a quarter of the work, there is one
alone, on fewer windows and cold, so it tells little (`Expected.rough`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.calibrate.miniature import in_memory, miniature
from secateur.calibrate.packed import packed_as_if
from secateur.calibrate.stream import TOKENS_A_BATCH
from secateur.core.machine import synchronize
from secateur.core.memory import PeakMemory, give_back
from secateur.core.progress import observed
from secateur.core.timing import Clock, Expected, Phases, Stopwatch, line, work_seconds
from secateur.models.canonical import canonical_view
from secateur.models.view import ModelView
from secateur.plan.quantity import sparsity_of_part
from secateur.prune.allocation.allocate import measuring_seconds
from secateur.prune.prepare import Prepared
from secateur.prune.settings import prepared_settings
from secateur.prune.work import make_checkpoint
from secateur.prune.write import new_writer

BLOCKS, DEEPER = 2, 6  # the depths of the models that are rehearsed with
_WARM_TOKENS = 128  # of the windows of the first run, which is not timed
_ITERATING_TOKENS = 16384  # of a method whose iterations depend on how many tokens it has seen
_MORE = 2  # windows of the second run, for each of the first
_SHARE = 1 / 4  # of the work, in blocks times windows: the most that short runs may be together


@dataclass(frozen=True)
class Short:
    """A short run: its size, and what it took."""

    blocks: int
    windows: int
    phases: Phases
    finish: float = 0.0
    memory: int | None = None  # bytes, above those before; None where they were not measured


def rehearse(
    prepared: Prepared,
    windows: tuple[int, int] | None,
    clock: Clock = work_seconds,
    ids: Tensor | None = None,
) -> Expected:
    """Return what a run would take. Nothing is written outside a temporary folder, and no text is read.

    Args:
        prepared: the run.
        windows: the number of its windows and their tokens; None without calibration.
        ids: the token ids [S, T] of the run, where they are known: an iteration may take longer on random tokens.
        clock: returns seconds.

    Raises:
        SecateurError: the rehearsal fails, as the run perhaps will.
    """
    job, device = prepared.job, prepared.device

    def now() -> float:
        synchronize(device)
        return clock()

    sparsity = job.sparsity or max((rate for rates in job.rates for rate in rates.values()), default=0.0)
    short: Any = job.options
    counts: Mapping[str, int] = {}
    if job.whole_model and (rehearsal := job.method.says.rehearsal) is not None:
        short, counts = rehearsal(job.view, job.options, sparsity)
    play = partial(_play, replace(prepared, job=replace(job, options=short)), clock=now, text=ids)
    with _as_before(device), packed_as_if(0 if windows is None else math.prod(windows)):
        if windows is None:
            small = _SHARE * job.view.blocks < 2 * BLOCKS
            if not small:
                play(BLOCKS, None)
            return replace(_extrapolated(prepared, [play(BLOCKS, None)], 0, counts), rough=small)
        samples, seqlen = windows
        # what repeats with a pass of the blocks inside may iterate, and needs more steps on few tokens than on many
        iterates = bool(counts) and job.method.says.GRADIENTS
        few = min(samples, max(_least(prepared, seqlen), math.ceil(_ITERATING_TOKENS / seqlen) if iterates else 1))
        several = samples if samples <= _MORE * few else _MORE * few
        if not counts and job.allocation != "auto" and BLOCKS * (few + several) > _SHARE * job.view.blocks * samples:
            fewer = max(_needed(prepared, seqlen), math.floor(_SHARE * job.view.blocks * samples / BLOCKS))
            only = play(BLOCKS, (min(samples, fewer), seqlen))
            return replace(_extrapolated(prepared, [only], samples, counts), rough=True)
        if job.allocation != "auto" and not iterates:
            play(BLOCKS, _warm_windows(prepared, few, seqlen))
        first = play(BLOCKS, (few, seqlen))
        runs = [first]
        if _repeats_whole(first.phases, counts):
            runs.append(play(DEEPER, (few, seqlen)))
        elif several > few:
            runs.append(play(BLOCKS, (several, seqlen)))
        expected = replace(_extrapolated(prepared, runs, samples, counts), memory=_peak(prepared, runs, windows))
        if job.allocation == "auto":
            more = _allocating(prepared, windows, now)
            expected = replace(expected, tracks={**expected.tracks, "auto: blocks measured": more})
        return expected


def _least(prepared: Prepared, seqlen: int) -> int:
    """The fewest windows that tell the time of more: one full batch, and those that the method needs."""
    return max(_needed(prepared, seqlen), TOKENS_A_BATCH // seqlen)


def _needed(prepared: Prepared, seqlen: int) -> int:
    """The fewest windows that a method works with: a basis needs as many tokens as it has directions."""
    tokens = int(prepared.job.view.config.hidden_size) if prepared.job.rotates else 1
    return max(2 if prepared.job.method.says.GRADIENTS else 1, math.ceil(tokens / seqlen))


def _warm_windows(prepared: Prepared, few: int, seqlen: int) -> tuple[int, int]:
    short = min(seqlen, _WARM_TOKENS)
    tokens = int(prepared.job.view.config.hidden_size) if prepared.job.rotates else 1
    return max(min(few, 2), math.ceil(tokens / short)), short


def _repeats_whole(phases: Phases, counts: Mapping[str, int]) -> bool:
    """Whether what a method repeats runs the whole model at once: no track of blocks is inside it."""
    parents = {phase.parent for phase in phases.phases.values()}
    return any(name in phases.phases and name not in parents for name in counts)


@contextmanager
def _as_before(device: torch.device) -> Iterator[None]:
    """Leave the random state of the process as it was."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        give_back()


def _kept(prepared: Prepared, blocks: int) -> list[int]:
    """The last blocks that lose something: the last ones of a sliced model fit one another and the head."""
    view, rates = prepared.job.view, prepared.job.rates
    touched = [index for index, rate in enumerate(rates) if rate] or list(range(view.blocks))
    others = [index for index in range(view.blocks) if index not in set(touched)]
    return sorted(touched[-blocks:] + others[len(others) - max(0, blocks - len(touched)) :])


def _play(
    prepared: Prepared, blocks: int, windows: tuple[int, int] | None, *, clock: Clock, text: Tensor | None
) -> Short:
    """Run the work on some blocks and some windows of the text, or of random tokens."""
    mini = _small(prepared, _kept(prepared, min(blocks, prepared.job.view.blocks)))
    ids = None if windows is None else _ids(mini.job.view, windows, text)
    phases, watch = Phases(clock), Stopwatch(clock)
    memory = PeakMemory(mini.device) if mini.job.whole_model and mini.job.method.says.TRAINS else None
    settings = prepared_settings(mini, None)
    with TemporaryDirectory(prefix="secateur-rehearsal-") as folder, observed(phases):
        writer, _ = new_writer(mini, ids, settings, Path(folder) / "out", resume=False, overwrite=False)
        with phases.whole():
            make_checkpoint(mini, ids, settings, writer, watch)
    peak = None if memory is None else memory.peak()
    give_back()
    return Short(mini.job.view.blocks, 0 if windows is None else windows[0], phases, watch.seconds["finish"], peak)


def _ids(view: ModelView, windows: tuple[int, int], text: Tensor | None) -> Tensor:
    if text is not None and len(text) >= windows[0]:
        return text[: windows[0], : windows[1]]
    return torch.randint(0, int(view.config.vocab_size), windows, generator=torch.Generator().manual_seed(0))


def _small(prepared: Prepared, kept: Sequence[int]) -> Prepared:
    """The same run on a model with some of the blocks, which takes as much from each of them."""
    job = prepared.job
    checkpoint = miniature(prepared.checkpoint, kept)
    stock = checkpoint.view()
    tied = job.method.keeps_tied(stock, job.options)
    view = canonical_view(stock, prepared.checkpoint.dtype, tied=tied) if job.rotates else stock
    sparsity = job.sparsity
    if sparsity:
        sparsity = sparsity_of_part(job.quantity, prepared.checkpoint.view(), stock, sparsity)
    small = replace(
        job,
        view=view,
        rates=tuple(job.rates[index] for index in kept),
        sparsity=sparsity,
        notes={},
        state_file=None,
        labels=None,
        allocation=None if job.allocation == "auto" else job.allocation,
    )
    request = replace(prepared.request, stock_only=False)
    subject = replace(prepared.subject, view=stock)
    return replace(prepared, request=request, checkpoint=checkpoint, job=small, subject=subject, sparsity=sparsity)


def _peak(prepared: Prepared, runs: Sequence[Short], windows: tuple[int, int]) -> float | None:
    """Return the bytes of memory of the whole run, from those of the short ones; None where they were not measured.

    Where the blocks of the whole model are in memory, two depths tell what a block adds. Else, of what grows with the
    run, only what enters each block is kept for all of it.
    """
    first, last = runs[0], runs[-1]
    if first.memory is None or last.memory is None:
        return None
    blocks = prepared.job.view.blocks
    if last.blocks > first.blocks:
        return line((first.blocks, first.memory), (last.blocks, last.memory), blocks)
    if prepared.request.spill or not prepared.job.method.says.GRADIENTS:
        return float(last.memory)
    window = windows[1] * int(prepared.job.view.config.hidden_size) * prepared.dtype.itemsize
    kept, short = (blocks + 1) * windows[0], (last.blocks + 1) * last.windows
    return float(last.memory + max(0, kept - short) * window)


def _extrapolated(prepared: Prepared, runs: Sequence[Short], samples: int, counts: Mapping[str, int]) -> Expected:
    view = prepared.job.view
    small = _small(prepared, _kept(prepared, runs[0].blocks)).job.view
    weights = sum(math.prod(shape) for shape in view.matrix_shapes(0).values())
    scale = view.matrix_parameters() / small.matrix_parameters() * small.blocks if weights else view.blocks
    rated = sum(map(bool, prepared.job.rates)) or view.blocks
    if rated < view.blocks:  # a block that loses nothing is read, run once and written
        scale = (rated + (prepared.job.last + 1 - rated) / 2) * scale / view.blocks
    expected = extrapolated(runs, blocks=scale, windows=samples, counts=counts)
    sizes = prepared.checkpoint.view().parameters() / small.parameters()
    return replace(expected, outside=expected.outside + runs[-1].finish * max(0.0, sizes - 1))


def extrapolated(runs: Sequence[Short], *, blocks: float, windows: int, counts: Mapping[str, int]) -> Expected:
    """Return the seconds of the whole run, from one or two short ones that differ in their windows or in their depth.

    Args:
        runs: the short runs. Of two, the second has more windows or more blocks. Of one alone with fewer windows than
            the whole run, all seconds are taken to grow with the windows.
        blocks, windows: the size of the whole run.
        counts: description of a track -> the items that it has in the whole run, each time that it runs.
    """
    first, last = runs[0], runs[-1]
    deeper = last.blocks > first.blocks
    tracks: dict[str, float] = {}
    times: dict[str, float] = {}
    items: dict[str, float] = {}

    def at_full_size(of: Callable[[Phases], float]) -> float:
        """The value at the size of the whole run, on the line through those of the short ones."""
        low, high = of(first.phases), of(last.phases)
        if len(runs) == 1 and 0 < first.windows < windows:
            return high * windows / first.windows
        before, after, whole = (first.blocks, last.blocks, blocks) if deeper else (first.windows, last.windows, windows)
        return line((before, low), (after, high), whole)

    for name, phase in last.phases.phases.items():
        once = len(phase.runs[0])
        if phase.parent is None:
            times[name] = len(phase.runs)
        else:
            inside = sum(map(len, last.phases.phases[phase.parent].runs))
            times[name] = len(phase.runs) / max(1, inside) * items[phase.parent] * times[phase.parent]
        if name in counts:
            items[name] = counts[name]
            seconds = items[name] * at_full_size(partial(_mean_later, name))
        elif "blocks" in name and once == last.blocks:
            items[name] = blocks
            # after the last block the stream need not go on, so it may take less time than the others
            others, end = partial(_mean_but_last, name), partial(_last, name)
            if deeper:
                seconds = (blocks - 1) * others(last.phases) + end(last.phases)
            else:
                seconds = (blocks - 1) * at_full_size(others) + at_full_size(end)
        else:
            items[name] = once
            seconds = at_full_size(partial(_sum, name))
        tracks[name] = times[name] * seconds
    return Expected(at_full_size(lambda phases: phases.outside), tracks, times)


def _mean_later(name: str, phases: Phases) -> float:
    """The mean of the items after the first, which is slower."""
    return fmean(second for run in phases.phases[name].runs for second in run[1:] or run)


def _mean_but_last(name: str, phases: Phases) -> float:
    return fmean(second for run in phases.phases[name].runs for second in run[:-1] or run)


def _last(name: str, phases: Phases) -> float:
    return fmean(run[-1] for run in phases.phases[name].runs)


def _sum(name: str, phases: Phases) -> float:
    return fmean(sum(run) for run in phases.phases[name].runs)


def _allocating(prepared: Prepared, windows: tuple[int, int], clock: Clock) -> float:
    """The seconds of the measurements of `--modules auto`, and of the statistics of the dense model."""
    mini = _small(prepared, _kept(prepared, min(BLOCKS, prepared.job.view.blocks)))
    model = in_memory(mini.checkpoint, device=mini.device, dtype=mini.dtype)
    with observed(Phases(clock)):
        return measuring_seconds(mini.job, prepared.job, model, windows, clock)
