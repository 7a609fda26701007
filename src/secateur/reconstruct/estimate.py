"""`--dry-run` of `reconstruct`: memory from shapes, and the time from a few steps on one block of each model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from secateur.calibrate.miniature import miniature
from secateur.calibrate.stream import TOKENS_A_BATCH, Stream
from secateur.core.errors import reason
from secateur.core.machine import synchronize
from secateur.core.memory import resident_bytes
from secateur.core.paths import to_path
from secateur.core.progress import observed, say
from secateur.core.records import Record
from secateur.core.timing import Clock, Phases, work_seconds
from secateur.models.load import Checkpoint
from secateur.models.view import ModelView
from secateur.prune.estimate import estimate as estimate_prune
from secateur.prune.prepare import Prepared as Pruning
from secateur.reconstruct.fit import fit
from secateur.reconstruct.prune import check_text, reconstruction_of
from secateur.reconstruct.reconstruct import Prepared, check_request, prepare
from secateur.requests import ReconstructRequest

_STEPS = 2  # that are timed, after one that is not
_BLOCK_COPIES = 5  # weights, gradients, two moments of Adam, the best state
_FLOAT = 4  # bytes


def estimate_reconstruct(
    request: ReconstructRequest,
    records_file: str | Path | None = None,
    clock: Clock = work_seconds,
    *,
    before: Mapping[str, Any] | None = None,
) -> Record:
    """Return what `reconstruct` would do, and its memory, disk and time. Reads the text, writes nothing.

    Args:
        request: what would be done.
        records_file: the records that may tell the dense model and the calibration text; None is `records.jsonl`
            beside the checkpoint.
        clock: returns seconds.
        before: what a plan would say, for a model that is not pruned yet: it stands for its result, which is smaller.

    Returns:
        A record with `dry_run`. `seconds_estimated` is None where nothing tells the time, and `seconds_unknown` says
        why.

    Raises:
        UsageError, SecateurError: the request is wrong, as `reconstruct` would say.
    """
    started = clock()
    check_request(request)
    records_file = to_path(records_file) or Path(request.model).absolute().parent / "records.jsonl"
    prepared = prepare(request, records_file, before)
    resident = resident_bytes(prepared.device)
    reading = clock() - started
    view, how = prepared.checkpoint.view(), prepared.how
    say("measuring a block of each model to estimate the time")
    seconds, why = None, None
    try:
        with torch.random.fork_rng(), observed(Phases()):
            seconds = _seconds(prepared, clock)
    except Exception as error:  # whatever it is, a dry run only says that it has no estimate
        why = reason(error)
    buffers = 2 * prepared.windows_ST.numel() * int(prepared.dense.config.hidden_size) * _FLOAT
    return {
        "command": "reconstruct",
        "dry_run": True,
        "model": prepared.plan["model"],
        "reconstructed": request.model,
        "blocks": view.blocks,
        "steps": request.steps,
        "batch": how.batch * prepared.windows_ST.shape[1],
        "calibration": prepared.spec,
        "calibration_tokens": prepared.windows_ST.numel(),
        "device": str(prepared.device),
        "memory_bytes": _memory(prepared) + (0 if request.spill else buffers),
        "resident_bytes": resident,
        "disk_bytes": 2 * prepared.checkpoint.weight_bytes() + (buffers if request.spill else 0),
        "seconds_estimated": None if seconds is None else round(reading + seconds, 2),
        **({} if why is None else {"seconds_unknown": why}),
    }


def estimate(pruning: Pruning, clock: Clock = work_seconds) -> Record:
    """Return what `prune` would do, with the reconstruction after it where that is asked for.

    The reconstruction is estimated on the dense model, whose blocks are the largest that the result may have.

    Args:
        pruning: the prune, checked.
        clock: returns seconds.
    """
    record = estimate_prune(pruning, clock)
    request = pruning.request
    if not request.reconstruct:
        return record
    check_text(pruning)
    plan: dict[str, Any] = {
        "model": request.model,
        "calibration": {"spec": pruning.calibration} if pruning.calibration else None,
        "blocks": [{}] * pruning.checkpoint.view().blocks,
    }
    mended = estimate_reconstruct(replace(reconstruction_of(request), model=request.model), clock=clock, before=plan)
    seconds, more = record["seconds_estimated"], mended["seconds_estimated"]
    memory = record["memory_bytes"]
    return {
        **record,
        "reconstruct": True,
        "memory_bytes": None if memory is None else max(memory, mended["memory_bytes"]),
        "disk_bytes": record["disk_bytes"] + mended["disk_bytes"],
        "seconds_estimated": None if seconds is None or more is None else round(seconds + more, 2),
        **{name: mended[name] for name in ("seconds_unknown",) if name in mended and name not in record},
    }


def _memory(prepared: Prepared) -> int:
    """Return the bytes of one block in training, and of what a few windows keep for the way back."""
    view = prepared.checkpoint.view()
    largest = max(sum(torch.Size(shape).numel() for shape in shapes.values()) for shapes in view.block_shapes)
    tokens = prepared.how.together * prepared.windows_ST.shape[1]
    return _FLOAT * (_BLOCK_COPIES * largest + tokens * (8 * view.dims(0).hidden + 5 * view.widest_ffn))


def _seconds(prepared: Prepared, clock: Clock) -> float:
    """Return the seconds of two passes through all blocks, and of all steps of all blocks."""

    def now() -> float:
        synchronize(prepared.device)
        return clock()

    windows = prepared.windows_ST
    few = max(1, min(len(windows) - 1, TOKENS_A_BATCH // windows.shape[1]))
    how = prepared.how
    forward = sum(
        _forward_seconds(model, prepared, few, now) * len(windows) / few
        for model in (prepared.checkpoint, prepared.dense)
    )
    view = prepared.checkpoint.view()
    stream = _stream(prepared.checkpoint, prepared, how.together + 1)
    block = stream.view.block(0)
    arguments = {size: stream.arguments(0, size) for size in {how.together, 1}}
    short = replace(how, steps=1, batch=how.together, looks=1, held_out=1)
    times = []
    with stream.loaded(block, forward_only=False) as module:
        for _ in range(_STEPS + 1):
            begun = now()
            fit(
                module,
                {name: tensor.dtype for name, tensor in block.tensors.items()},
                lambda part, rows: part(stream.hidden_STD[rows, :, : block.dims.enters], **arguments[len(rows)]),
                lambda rows: stream.hidden_STD[rows, :, : block.dims.leaves],
                how.together + 1,
                short,
            )
            times.append(now() - begun)
    a_step = min(times[1:]) * how.batch / how.together
    looks = (how.looks + 1) * forward / 2 * how.held_out / len(windows)
    return forward + _depth(view) * how.steps * a_step + looks


def _stream(checkpoint: Checkpoint, prepared: Prepared, windows: int) -> Stream:
    """Return the stream of some windows through a model that has the last block alone."""
    view = checkpoint.view()
    small = miniature(checkpoint, [view.blocks - 1]).view()
    ids = prepared.windows_ST[:1].expand(windows, -1)
    return Stream(small, ids, device=prepared.device, dtype=torch.float32)


def _forward_seconds(checkpoint: Checkpoint, prepared: Prepared, windows: int, now: Clock) -> float:
    """Return the seconds of some windows through all blocks of a model."""
    view, stream = checkpoint.view(), _stream(checkpoint, prepared, windows)
    times = []
    for _ in range(2):
        begun = now()
        stream.advance(stream.view.block(0))
        times.append(now() - begun)
    return min(times) * _depth(view)


def _depth(view: ModelView) -> float:
    """Return the blocks of a model, counted in its last one."""
    return view.matrix_parameters() / max(1, sum(o * i for o, i in view.matrix_shapes(view.blocks - 1).values()))
