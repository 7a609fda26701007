"""`--dry-run`: what `prune` would remove, and its memory, disk and time. Writes nothing that stays."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from secateur.calibrate.stream import TOKENS_A_BATCH
from secateur.core.errors import SecateurError, reason
from secateur.core.machine import matrix_rate
from secateur.core.memory import resident_bytes
from secateur.core.progress import observed, say
from secateur.core.records import Record
from secateur.core.timing import Clock, Expected, Phases, work_seconds
from secateur.core.words import rough_duration_words, size_words
from secateur.models.view import ModelView
from secateur.plan.counts import removed_from_matrix
from secateur.prune.calibration import read_labelled
from secateur.prune.driver import warn_of_few_tokens
from secateur.prune.prepare import Prepared, parameters_expected, prepare, say_expected, what_is_added
from secateur.prune.rehearse import BLOCKS, rehearse
from secateur.prune.settings import prepared_settings
from secateur.text.specs import holds_ids

_LONG = 60.0  # seconds; a run that seems shorter is not rehearsed
_SLOWEST = 2e9  # floating-point operations a second that any machine does
_LIBRARIES_BYTES = 1 << 24  # what the libraries of products and the allocator hold besides
_READ_BYTES = 1 << 26  # a longer text is not read for an estimate


def estimate(prepared: Prepared, clock: Clock = work_seconds) -> Record:
    """Estimate parameters, memory and disk from shapes, and the time from a rehearsal (`rehearse.py`).

    An entry is None if the text or options of the method decide it; `seconds_unknown` and `memory_unknown` say why
    there is no time and no memory. With `seconds_rough` the work is so small that it was measured once, and cold.
    `memory_bytes` is what the work needs, above the `resident_bytes` that the process holds already. Warns, as `prune`
    does, if the size will surprise.

    Args:
        prepared: the run.
        clock: returns seconds.
    """
    say_expected(prepared)
    resident = resident_bytes(prepared.device)
    view, job = prepared.job.view, prepared.job
    before = prepared.checkpoint.view().parameters()
    after = parameters_expected(prepared)
    zeroed = (
        0
        if after is None or after < before
        else sum(
            removed_from_matrix(r, o, i, by_rows=job.method.by_rows(job.options))
            for n, rate in enumerate(job.rates)
            for (o, i), r in _targets(view, n, rate)
        )
    )
    stored = prepared.checkpoint.dtype.itemsize
    opening = _opening_seconds(prepared, clock)
    text, windows, ids = _text(prepared, clock)
    tokens = 0 if windows is None else math.prod(windows)
    if tokens:
        warn_of_few_tokens(job, tokens)
    expected, why = _rehearsed(prepared, windows, ids, clock)
    memory, no_memory = _memory_expected(prepared, tokens, expected, why)
    return {
        "command": "prune",
        "dry_run": True,
        **prepared_settings(prepared, None),
        "sparsity_of": prepared.job.quantity.name,
        **({"size_note": note} if (note := what_is_added(prepared)) else {}),
        "params_before": before,
        "params_after": after,
        "nonzero_after": None if after is None else after - zeroed,
        "pruning_ratio": None if after is None else 1 - after / before,
        "calibration_tokens": tokens,
        "memory_bytes": memory,
        "resident_bytes": resident,
        "bytes_before": prepared.checkpoint.weight_bytes(),
        "bytes_after": None if after is None else after * stored,
        "disk_bytes": 2 * (before if after is None else after) * stored + _spilled(prepared, tokens),
        "seconds_estimated": None if expected is None else round(opening + text + expected.seconds, 2),
        **({"seconds_rough": True} if expected is not None and expected.rough else {}),
        **({} if why is None else {"seconds_unknown": why}),
        **({} if no_memory is None else {"memory_unknown": no_memory}),
    }


def _memory_expected(
    prepared: Prepared, tokens: int, expected: Expected | None, why: str | None
) -> tuple[int | None, str | None]:
    """Return the bytes of memory, or None and the reason.

    They follow from shapes; where a method trains they depend on its options, and the rehearsal measures them.
    """
    if not _trains(prepared):
        return _memory(prepared, tokens), None
    if expected is None:
        return None, why
    if expected.memory is None:
        return (
            None,
            f"{prepared.job.method.name} is measured for it, and this system does not tell the peak of a process",
        )
    return round(expected.memory), None


def _rehearsed(
    prepared: Prepared, windows: tuple[int, int] | None, ids: Tensor | None, clock: Clock = work_seconds
) -> tuple[Expected | None, str | None]:
    """Return what the run is expected to take without its text, or None and the reason."""
    blocks = prepared.job.view.blocks
    say(f"measuring {min(BLOCKS, blocks)} blocks of {blocks} to estimate the time")
    try:
        return rehearse(prepared, windows, clock, ids), None
    except Exception as error:  # whatever the run itself would say, a dry run says that it has no estimate
        return None, reason(error)


def announce(prepared: Prepared, windows: Tensor | None) -> Expected | None:
    """Before a run that takes minutes, say how long and how much memory; None before a short one, without a rehearsal.

    Args:
        prepared: the run.
        windows: its token ids [S, T].
    """
    if windows is None or _crude_seconds(prepared, windows.numel()) < _LONG:
        return None
    expected, _ = _rehearsed(prepared, (windows.shape[0], windows.shape[1]), windows)
    if expected is not None:
        bytes_above, _ = _memory_expected(prepared, windows.numel(), expected, None)
        memory = ""
        if bytes_above is not None:
            memory = f", {size_words(resident_bytes(prepared.device) + bytes_above)} of memory"
        say(f"{prepared.job.method.name}: about {rough_duration_words(expected.seconds)}{memory}")
    return expected


def _crude_seconds(prepared: Prepared, tokens: int) -> float:
    """Return seconds from a count of products: enough to tell a long run from a short one."""
    job, repeats = prepared.job, 1
    if job.whole_model and job.method.says.rehearsal is not None:
        with suppress(SecateurError):  # then it has no estimate either
            counts = job.method.says.rehearsal(job.view, job.options, job.sparsity or 0.5)[1]
            repeats = max([1, *counts.values()])
    passes = 4 if _differentiates(prepared) else 2
    if job.allocation == "auto":
        repeats = sum(map(len, job.rates))
    products = 2 * passes * tokens * repeats * job.view.matrix_parameters()
    if products < _LONG * _SLOWEST:
        return 0.0
    return products / matrix_rate(prepared.device, prepared.dtype)


def _opening_seconds(prepared: Prepared, clock: Clock) -> float:
    """Return the seconds that the checks before the work take: the most of a very short run."""
    started = clock()
    with observed(Phases()):  # what is to be said was said
        prepare(prepared.request)
        prepared_settings(prepared, None)
    return clock() - started


def _text(prepared: Prepared, clock: Clock) -> tuple[float, tuple[int, int] | None, Tensor | None]:
    """Return the seconds that reading the text takes, the number of windows and their tokens, and their token ids.

    A text on this machine is read. One from the hub is not: its seconds are left out, and there are no token ids.

    Raises:
        SecateurError: the text cannot be read, or is too short.
    """
    spec, started = prepared.calibration, clock()
    if spec is None:
        return 0.0, None, None
    file = Path(spec).expanduser()
    if spec != "builtin" and not (file.is_file() and (holds_ids(spec) or file.stat().st_size < _READ_BYTES)):
        return 0.0, (prepared.samples, prepared.seqlen), None
    windows, _ = read_labelled(prepared)
    assert windows is not None
    return clock() - started, (windows.shape[0], windows.shape[1]), windows


def _differentiates(prepared: Prepared) -> bool:
    """Whether the method needs gradients of the loss through the blocks."""
    return prepared.job.whole_model and prepared.job.method.says.GRADIENTS


def _trains(prepared: Prepared) -> bool:
    """Whether time and memory depend on options that only the method knows."""
    return prepared.job.whole_model and prepared.job.method.says.TRAINS


def _targets(view: ModelView, index: int, rate: dict[str, float]) -> list[tuple[tuple[int, int], float]]:
    shapes = view.matrix_shapes(index)
    return [(shapes[name], value) for name, value in rate.items()]


def _spilled(prepared: Prepared, tokens: int) -> int:
    """Return the bytes of the activations that `--spill` keeps on disk."""
    if not prepared.request.spill:
        return 0
    streams = prepared.job.method.streams(prepared.job.options)
    copies = prepared.job.view.blocks + 1 if _differentiates(prepared) else max(1, streams - 1)
    return copies * tokens * int(prepared.job.view.config.hidden_size) * prepared.dtype.itemsize


def _memory(prepared: Prepared, tokens: int) -> int:
    """Return the bytes of memory that a prune takes.

    They are one block as stored and as computed, the largest tensor outside the blocks, the activation buffer, and one
    batch inside a block.
    """
    view, width = prepared.job.view, prepared.dtype.itemsize
    block = max(sum(o * i for o, i in view.matrix_shapes(index).values()) for index in range(view.blocks))
    outer = max(torch.Size(view.source.shape(name)).numel() for name in view.outer_names())
    stored = prepared.checkpoint.dtype.itemsize
    if not tokens:
        return 2 * max(block, outer) * stored
    buffer = tokens * view.config.hidden_size * width
    batch = min(tokens, max(TOKENS_A_BATCH, prepared.seqlen)) * 4 * view.widest_ffn * width
    if _differentiates(prepared):  # the input of each block is kept, and perhaps sums of gradients and of their squares
        inputs = buffer * (view.blocks + 1)
        return int(max(2 * outer * width, block * (width + 8)) + inputs + 3 * batch) + _LIBRARIES_BYTES
    buffer *= 1 if prepared.request.spill else prepared.job.method.streams(prepared.job.options)
    streamed = int(max(2 * outer * stored, block * (width + 2 * stored)) + buffer + batch) + _LIBRARIES_BYTES
    return max(streamed, view.parameters() * width + buffer + batch) if prepared.job.allocation == "auto" else streamed
