"""`--dry-run`: estimate what `prune` would remove, and its memory, disk and time. Reads no weights, writes nothing."""

from __future__ import annotations

import torch

from secateur.calibrate.stream import TOKENS_A_BATCH
from secateur.core.machine import matrix_rate
from secateur.core.records import Record
from secateur.models.view import ModelView
from secateur.plan.counts import removed_from_matrix
from secateur.prune.allocation.allocate import TOKENS, cells_to_measure
from secateur.prune.prepare import Prepared, parameters_expected, say_expected
from secateur.prune.settings import prepared_settings

_OVERHEAD = 1.5  # a forward pass costs more than its matrix products
_DISK_BYTES_A_SECOND = 500e6


def estimate(prepared: Prepared) -> Record:
    """Estimate parameters, memory, disk and time from shapes and a short measurement of this machine.

    An entry is None if the text or options of the method decide it. Warns, as `prune` does, if the size will surprise.
    """
    say_expected(prepared)
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
    tokens = prepared.samples * prepared.seqlen if job.calibrates else 0
    passes = 4 if _differentiates(prepared) else 2  # passes of the tokens through the weights
    computing = forward_seconds(
        passes * tokens + TOKENS * cells_to_measure(job), view.matrix_parameters(), prepared.device, prepared.dtype
    )
    seconds = computing + 2 * before * stored / _DISK_BYTES_A_SECOND
    return {
        "command": "prune",
        "dry_run": True,
        **prepared_settings(prepared, None),
        "params_before": before,
        "params_after": after,
        "nonzero_after": None if after is None else after - zeroed,
        "pruning_ratio": None if after is None else 1 - after / before,
        "calibration_tokens": tokens,
        "memory_bytes": None if _trains(prepared) else _memory(prepared, tokens),
        "bytes_before": prepared.checkpoint.weight_bytes(),
        "bytes_after": None if after is None else after * stored,
        "disk_bytes": 2 * (before if after is None else after) * stored,
        "seconds_estimated": _training_seconds(prepared, tokens) if _trains(prepared) else round(seconds, 1),
    }


def _training_seconds(prepared: Prepared, tokens: int) -> float | None:
    job = prepared.job
    if job.method.says.operations is None:
        return None
    sparsity = job.sparsity or max(rate for rates in job.rates for rate in rates.values())
    return round(
        forward_seconds(
            1, job.method.says.operations(job.view, tokens, job.options, sparsity), prepared.device, prepared.dtype
        ),
        1,
    )


def forward_seconds(tokens: float, weights: float, device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds that `tokens` tokens take through matrices of `weights` weights in total, on this machine."""
    return 2 * tokens * weights / matrix_rate(device, dtype) * _OVERHEAD


def _differentiates(prepared: Prepared) -> bool:
    """Whether the method needs gradients of the loss through the blocks."""
    return prepared.job.whole_model and prepared.job.method.says.GRADIENTS


def _trains(prepared: Prepared) -> bool:
    """Whether time and memory depend on options that only the method knows."""
    return prepared.job.whole_model and prepared.job.method.says.TRAINS


def _targets(view: ModelView, index: int, rate: dict[str, float]) -> list[tuple[tuple[int, int], float]]:
    shapes = view.matrix_shapes(index)
    return [(shapes[name], value) for name, value in rate.items()]


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
    batch = (
        min(tokens, max(TOKENS_A_BATCH, prepared.seqlen))
        * 4
        * max(view.dims(i).ffn for i in range(view.blocks))
        * width
    )
    if _differentiates(prepared):  # the input of each block is kept, and perhaps sums of gradients and of their squares
        return int(max(2 * outer * width, block * (width + 8)) + buffer * (view.blocks + 1) + 3 * batch)
    streamed = int(max(2 * outer * stored, block * (width + 2 * stored)) + buffer + batch)
    return max(streamed, view.parameters() * width + buffer + batch) if prepared.job.allocation == "auto" else streamed
