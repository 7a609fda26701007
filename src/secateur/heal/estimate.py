"""`--dry-run` of `heal`: what would be trained, and its memory and time, from steps on a few of the blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.core.errors import reason
from secateur.core.memory import resident_bytes
from secateur.core.paths import to_path
from secateur.core.progress import observed, say
from secateur.core.records import Record
from secateur.core.timing import Clock, Phases, line, work_seconds
from secateur.evaluate.estimate import perplexity_memory, perplexity_seconds
from secateur.evaluate.passes import BLOCKS, Small, small_model, weights_memory
from secateur.heal.heal import Prepared, check_request, prepare
from secateur.heal.lora import add_adapters, need_peft, recompute
from secateur.heal.tune import LOOK_EVERY, next_token_loss, train_step
from secateur.heal.watch import steps_watched
from secateur.models.loss import TRAINED_POSITIONS, positions_a_chunk
from secateur.requests import HealRequest

_DEPTHS = (BLOCKS, 4)
_SHORT_TOKENS = 32
_DISK_BYTES_A_SECOND = 500e6
_HOLES = 1.5  # times what all blocks keep: measured, what the allocator of a CPU takes for it
_OPTIMISER_BYTES = 16  # of a trained parameter: itself, its gradient and two moments


def estimate_heal(
    request: HealRequest,
    records_file: str | Path | None = None,
    clock: Clock = work_seconds,
    *,
    before: Mapping[str, Any] | None = None,
) -> Record:
    """Return what `heal` would train and measure, and its memory, disk and time. Reads the texts, writes nothing.

    Args:
        request: what would be done.
        records_file: the records that may tell the calibration text; None is `records.jsonl` beside the checkpoint.
        clock: returns seconds.
        before: what a plan would say, for a model that is not pruned yet: it stands for its result, which is smaller.

    Returns:
        A record with `dry_run`. `seconds_estimated` is None where nothing tells the time, and `seconds_unknown` says
        why.

    Raises:
        UsageError, SecateurError: the request is wrong, as `heal` would say.
    """
    started = clock()
    check_request(request)
    need_peft()
    records_file = to_path(records_file) or Path(request.model).absolute().parent / "records.jsonl"
    prepared = prepare(request, records_file, before)
    resident = resident_bytes(prepared.device)  # with the texts and the tokenizer, which the work keeps
    reading = clock() - started
    checkpoint, examples = prepared.checkpoint, prepared.examples
    blocks = checkpoint.view().blocks
    say(f"measuring {min(_DEPTHS[-1], blocks)} blocks of {blocks} to estimate the time")
    seconds, why = None, None
    try:
        with torch.random.fork_rng(), observed(Phases()):
            seconds = _seconds(prepared, clock)
    except Exception as error:  # whatever it is, a dry run only says that it has no estimate
        why = reason(error)
    parameters = checkpoint.view().parameters()
    return {
        "command": "heal",
        "dry_run": True,
        "model": prepared.plan["model"],
        "healed": request.model,
        "steps": request.steps,
        "batch": request.batch,
        "seqlen": examples.ids_ST.shape[1],
        "training_tokens": request.steps * request.batch * examples.ids_ST.shape[1],
        "calibration": prepared.spec,
        "trainable": _trainable(prepared),
        "adapters": len(prepared.targets),
        **prepared.measured,
        "device": str(prepared.device),
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "memory_bytes": _memory(prepared),
        "resident_bytes": resident,
        "disk_bytes": _trainable(prepared) * _OPTIMISER_BYTES
        + (0 if request.keep_adapter else 2 * parameters * checkpoint.dtype.itemsize),
        "seconds_estimated": None if seconds is None else round(reading + seconds, 2),
        **({} if why is None else {"seconds_unknown": why}),
    }


def _trainable(prepared: Prepared) -> int:
    """Return the number of parameters of all adapters."""
    shapes = prepared.checkpoint.shapes
    return sum(prepared.request.rank * sum(shapes[f"{path}.weight"]) for path in prepared.targets)


def _memory(prepared: Prepared) -> int:
    """Return the bytes of memory of the part that takes most: loading the model, measuring perplexity, or training.

    Training needs the model in the dtype of the work, the adapters, and what the way back needs of a step. With
    checkpointing that is what enters each block, and everything inside one block; without, the inside of all.
    """
    request, checkpoint, width = prepared.request, prepared.checkpoint, prepared.dtype.itemsize
    view, vocabulary = checkpoint.view(), int(checkpoint.config.vocab_size)
    hidden = view.dims(0).hidden
    tokens = request.batch * prepared.examples.ids_ST.shape[1]
    inside = tokens * (8 * hidden + 5 * view.widest_ffn) * width
    masks = _masks(prepared)
    logits = 3 * 4 * min(tokens, TRAINED_POSITIONS, positions_a_chunk(vocabulary)) * vocabulary
    if request.checkpointing:
        activations = view.blocks * tokens * hidden * width + inside + max(masks)
    else:
        holes = _HOLES if prepared.device.type == "cpu" else 1.0
        activations = round(holes * view.blocks * inside) + sum(masks)
    weights = view.parameters() * width
    training = weights + _trainable(prepared) * _OPTIMISER_BYTES + activations + logits
    measuring = perplexity_memory(checkpoint, prepared.held_out, prepared.dtype) if prepared.held_out else 0
    return max(weights_memory(checkpoint, prepared.dtype), weights + measuring, training)


def _masks(prepared: Prepared) -> list[int]:
    """Return, for each block, the bytes of masked updates: an update and its mask, in float32.

    Only adapters on modules of which pruning zeroed weights are masked, and none that is kept apart.
    """
    view, shapes = prepared.checkpoint.view(), prepared.checkpoint.shapes
    masked = set() if prepared.request.keep_adapter else prepared.zeroed & set(prepared.targets)
    prefixes = [f"{view.family.blocks}.{index}." for index in range(view.blocks)]
    return [
        sum(2 * 4 * math.prod(shapes[f"{path}.weight"]) for path in masked if path.startswith(prefix))
        for prefix in prefixes
    ]


def _seconds(prepared: Prepared, clock: Clock) -> float:
    request, view = prepared.request, prepared.checkpoint.view()
    touched = sorted({int(path.removeprefix(view.family.blocks + ".").split(".")[0]) for path in prepared.targets})
    points: list[tuple[float, float]] = []
    for depth in _DEPTHS:
        small = small_model(
            prepared.checkpoint, prepared.device, prepared.dtype, blocks=depth, among=touched, clock=clock
        )
        if not points:
            perplexity = perplexity_seconds(small, prepared.held_out) if prepared.held_out else 0.0
        step, forward = _step_seconds(prepared, small)
        points.append((len(small.kept), step))
        if len(small.kept) < depth or small.checkpoint is prepared.checkpoint:
            break
    whole = small.depth if small.checkpoint is not prepared.checkpoint else view.blocks
    step = line(points[0], points[-1], whole)
    rows = min(steps_watched(request.batch), request.steps) + min(LOOK_EVERY, request.save_every, request.steps)
    looks = rows * forward * step / points[-1][1]
    written = 3 * view.parameters() * prepared.checkpoint.dtype.itemsize / _DISK_BYTES_A_SECOND
    if request.keep_adapter:
        return small.load_seconds + 2 * perplexity + looks + request.steps * step
    return 2 * small.load_seconds + 2 * perplexity + looks + request.steps * step + written


def _step_seconds(prepared: Prepared, small: Small) -> tuple[float, float]:
    """Return the seconds of a step of training this model, and of its forward pass alone.

    One window and a short one tell what a token takes from what each step takes: masks of updates, the optimiser.
    """
    request, examples, model = prepared.request, prepared.examples, small.model
    whole = small.checkpoint is prepared.checkpoint
    numbers = {index: index if whole else place for place, index in enumerate(small.kept)}
    prefix = prepared.checkpoint.view().family.blocks + "."
    all_zeroed, targets, zeroed = prepared.zeroed, [], set()
    for path in prepared.targets:
        index, _, inside = path.removeprefix(prefix).partition(".")
        if int(index) in numbers:
            targets.append(f"{prefix}{numbers[int(index)]}.{inside}")
            if path in all_zeroed:
                zeroed.add(targets[-1])
    adapters = add_adapters(
        model,
        targets,
        rank=request.rank,
        alpha=request.alpha,
        seed=request.seed,
        masked=not request.keep_adapter,
        zeroed=zeroed,
    )
    if request.checkpointing:
        recompute(model.get_submodule(prefix.removesuffix(".")).children())
    trainable = adapters.trainable
    optimizer = torch.optim.AdamW(trainable, lr=request.lr, weight_decay=request.weight_decay)
    ids_1T, label_1T = examples.ids_ST[:1].to(model.device), examples.label_ST[:1].to(model.device)
    length = ids_1T.shape[1]
    short = min(length, _SHORT_TOKENS)

    def train(tokens: int) -> float:
        started = small.clock()
        # all tokens count here, also where a run counts the answers alone: the head is a part of a step
        train_step(model, trainable, optimizer, ids_1T[:, :tokens], ids_1T[:, :tokens])
        return small.clock() - started

    train(short)
    fixed, one = train(short), train(length)
    batch_tokens = request.batch * length
    step = line((short, fixed), (length, one), batch_tokens) if length > short else one * request.batch
    started = small.clock()
    with torch.no_grad():
        next_token_loss(model, ids_1T, label_1T)
    return step, (small.clock() - started) * request.batch
