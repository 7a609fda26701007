"""From a checkpoint to a pruned checkpoint."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibrate.data import calibration_windows, check_ids, check_spec, holds_ids, ids_hash, read_text
from secateur.calibrate.stream import Stream
from secateur.core import records
from secateur.core.device import resolve_device, resolve_dtype
from secateur.core.errors import SecateurError, UsageError
from secateur.core.progress import track
from secateur.core.timing import Stopwatch
from secateur.cut import dims_after
from secateur.driver import Job, pruned_blocks
from secateur.methods import Method, find_method
from secateur.models import card, runtime
from secateur.models.load import BUNDLED, Checkpoint, open_checkpoint
from secateur.models.pruned_config import pruned_config, stock_problem
from secateur.models.save import CheckpointWriter, refuse_existing
from secateur.models.view import BlockDims, BlockView
from secateur.plan.budget import find_sparsity
from secateur.plan.pattern import Pattern, parse_pattern
from secateur.plan.plan import BlockPlan, Plan
from secateur.plan.rates import resolve_rates


@dataclass(frozen=True)
class Request:
    """What the user asks of `prune`; the defaults of the command line are these.

    Attributes:
        model: a local folder, a hub name, or `bundled`.
        method: the name of a method.
        sparsity: the fraction to remove; N:M implies it, `params_removed` or `modules` may replace it.
        params_removed: the pruning ratio to reach instead, over all parameters.
        modules: per-module sparsity, `NAME=S,...`.
        pattern: None takes the method's default.
        calibration: a text SPEC; None takes the method's default.
        samples, seqlen: calibration windows and their length; seqlen None is min(2048, the model's maximum).
        seed: of every random choice.
        device, dtype: `auto`, or a name.
        options: the method's own.
        spill: keep the activation buffer in a file beside the output.
        stock_only: refuse plans that a stock architecture cannot express.
    """

    model: str
    method: str
    sparsity: float | None = None
    params_removed: float | None = None
    modules: str | None = None
    pattern: str | None = None
    calibration: str | None = None
    samples: int = 128
    seqlen: int | None = None
    seed: int = 0
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    text_field: str = "text"
    spill: bool = False
    stock_only: bool = False


@dataclass(frozen=True)
class Prepared:
    """A request that has been checked against its model: everything but the calibration text is known."""

    request: Request
    checkpoint: Checkpoint
    job: Job
    pattern: Pattern
    sparsity: float | None
    device: torch.device
    dtype: torch.dtype
    seqlen: int

    @property
    def calibration(self) -> str | None:
        """The text SPEC, None where the method needs no calibration."""
        if not self.job.streams:
            return None
        default = "builtin" if self.request.model == BUNDLED else self.job.method.module.CALIBRATION
        return self.request.calibration or default


def prepare(request: Request) -> Prepared:
    """Check everything that can be checked without reading weights or text.

    Raises:
        UsageError, SecateurError: see design of errors in docs; the message says what to change.
    """
    method = find_method(request.method)
    options = method.options(_options(method, request))
    if request.samples < 1:
        raise UsageError(f"--samples {request.samples}: at least one window is needed")
    checkpoint = open_checkpoint(request.model, request.revision)
    view = checkpoint.view()
    pattern = parse_pattern(getattr(options, "pattern", "unstructured"))
    sparsity = request.sparsity
    if request.params_removed is not None:
        if sparsity is not None:
            raise UsageError("give --sparsity or --params-removed, not both")
        if getattr(options, "whole_model", False):
            raise UsageError("--params-removed goes with scope=block: with scope=model the ratio follows from the scores; use --sparsity")
        sparsity = find_sparsity(view, pattern, request.modules, request.params_removed)
    if sparsity is None and pattern.implied_sparsity is not None:
        sparsity = pattern.implied_sparsity
    job = Job(view, method, options, resolve_rates(view, sparsity, request.modules, pattern))
    device = resolve_device(request.device)
    seqlen = request.seqlen or min(2048, checkpoint.max_length())
    if not 1 < seqlen <= checkpoint.max_length():
        raise UsageError(f"--seqlen {seqlen} is outside [2, {checkpoint.max_length()}], the lengths this model knows")
    if request.calibration is not None:
        check_spec(request.calibration)
    return Prepared(request, checkpoint, job, pattern, sparsity, device, resolve_dtype(request.dtype, checkpoint.dtype, device), seqlen)


def _options(method: Method, request: Request) -> dict[str, Any]:
    given = dict(request.options)
    if request.pattern is not None:
        parse_pattern(request.pattern)
        given["pattern"] = request.pattern
    return given


def read_windows(prepared: Prepared) -> Tensor:
    """The calibration windows [S, T]."""
    request, checkpoint, spec = prepared.request, prepared.checkpoint, prepared.calibration
    assert spec is not None
    tokenizer = None if holds_ids(spec) else checkpoint.tokenizer()
    text = read_text(spec, "calibration", text_field=request.text_field)

    def tokenize(row: str) -> list[int]:
        assert tokenizer is not None
        found: list[int] = tokenizer(row, verbose=False)["input_ids"]
        return found

    windows = calibration_windows(text, tokenize, samples=request.samples, seqlen=prepared.seqlen, seed=request.seed)
    check_ids(windows, checkpoint.config.vocab_size, spec)
    if windows.shape[1] > checkpoint.max_length():
        raise SecateurError(f"{spec}: windows of {windows.shape[1]} tokens, but this model knows at most {checkpoint.max_length()}; cut them shorter")
    return windows


def prune(
    request: Request, out: Path, *, resume: bool = False, overwrite: bool = False, records_file: Path | None = None, append: bool = True
) -> records.Record:
    """Prune a model and write the result to `out`; returns (and appends) the record.

    Raises:
        UsageError, SecateurError: nothing that looks like a result is left behind.
    """
    started = time.perf_counter()
    refuse_existing(out, overwrite)
    prepared = prepare(request)
    if request.stock_only:
        _check_stock(prepared)
    watch = Stopwatch()
    with watch("text"):
        windows = read_windows(prepared) if prepared.job.streams else None
    settings = _settings(prepared, windows)
    checkpoint, view = prepared.checkpoint, prepared.job.view
    needed = sum(file.stat().st_size for file in {file for file, _ in checkpoint.index.values()}) * 2
    writer = CheckpointWriter(out, {**settings, "source": _identity(checkpoint)}, resume=resume, overwrite=overwrite, needed=needed)
    stream = None
    if windows is not None:
        spill = writer.partial / "activations.bin" if request.spill else None
        with watch("forward"):
            stream = Stream(view, windows, device=prepared.device, dtype=prepared.dtype, spill=spill)
    counts = _Counts()
    plans, dims = _write_blocks(prepared, writer, stream, watch, counts)
    parts = _write_outer(prepared, writer, watch, counts)
    if stream is not None and request.spill:
        (writer.partial / "activations.bin").unlink()
    problem = stock_problem(checkpoint.raw_config, view.family, [view.dims(i) for i in range(view.blocks)], dims)
    if problem and request.stock_only:
        writer.discard()
        raise UsageError(f"--stock-only: {problem}; nothing was written")
    facts = _facts(prepared, plans, counts)
    with watch("files"):
        config = pruned_config(checkpoint.raw_config, view.family, dims, stock=problem is None)
        plan = Plan(settings, tuple(plans))
        plan.save(writer.partial, **facts)
        files = {"README.md": card.model_card(checkpoint, settings, facts, problem)}
        if problem:
            files[f"{runtime.MODULE}.py"] = Path(runtime.__file__).read_text("utf-8")
        writer.finish(parts, config, checkpoint.folder, files)
    record = {
        "command": "prune",
        "version": records.version(),
        **settings,
        **facts,
        "stock": problem is None,
        "seconds": round(time.perf_counter() - started, 3),
        "seconds_by": watch.rounded(),
        "peak_rss_bytes": records.peak_rss_bytes(),
        "buffer_bytes": stream.buffer_bytes if stream else 0,
        "versions": records.versions(),
        "out": str(out),
    }
    if append:
        records.append(records_file or out.parent / "records.jsonl", record)
    return record


class _Counts:
    """Parameters of what was written."""

    def __init__(self) -> None:
        self.parameters = self.nonzero = self.matrices = 0

    def add(self, note: Mapping[str, int]) -> None:
        self.parameters += note["parameters"]
        self.nonzero += note["nonzero"]
        self.matrices += note.get("matrices", 0)


def _write_blocks(
    prepared: Prepared, writer: CheckpointWriter, stream: Stream | None, watch: Stopwatch, counts: _Counts
) -> tuple[list[BlockPlan], list[BlockDims]]:
    view = prepared.job.view

    def finished(index: int) -> tuple[BlockView, BlockPlan] | None:
        if not writer.has(_block_part(index)):
            return None
        plan = BlockPlan.read(writer.read(_plan_part(index))[1], writer.read(_plan_part(index))[0])
        tensors = {name.removeprefix(view.block_prefix(index)): t for name, t in writer.read(_block_part(index))[0].items()}
        return BlockView(view.family, dims_after(view.dims(index), plan), index, tensors, prepared.job.rates[index]), plan

    plans, dims = [], []
    blocks = pruned_blocks(prepared.job, stream, watch, finished)
    for block, plan in track(blocks, f"{prepared.job.method.name}: blocks", view.blocks):
        with watch("files"):
            if not writer.has(_block_part(block.index)):
                note = _count(block.tensors) | {"matrices": block.matrix_parameters()}
                writer.write(_plan_part(block.index), plan.tensors(), plan.summary())
                writer.write(_block_part(block.index), {view.block_prefix(block.index) + n: t for n, t in block.tensors.items()}, note)
            counts.add(writer.read_note(_block_part(block.index)))
        plans.append(plan)
        dims.append(block.dims)
    return plans, dims


def _write_outer(prepared: Prepared, writer: CheckpointWriter, watch: Stopwatch, counts: _Counts) -> list[str]:
    """Copy what lies outside the blocks, one tensor at a time; returns all parts in the order of the model."""
    view = prepared.job.view
    parts = []
    for name in view.outer_names():
        part = f"outer-{name}"
        with watch("files"):
            if not writer.has(part):
                tensors = {name: view.source.read(name)}
                writer.write(part, tensors, _count(tensors))
            counts.add(writer.read_note(part))
        parts.append(part)
    return parts + [_block_part(index) for index in range(view.blocks)]


def _count(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {"parameters": sum(t.numel() for t in tensors.values()), "nonzero": sum(int(t.count_nonzero()) for t in tensors.values())}


def _block_part(index: int) -> str:
    return f"block-{index:05}"


def _plan_part(index: int) -> str:
    return f"plan-{index:05}"


def _check_stock(prepared: Prepared) -> None:
    """Refuse before the work what shapes alone tell."""
    if getattr(prepared.job.options, "whole_model", False):
        raise UsageError("--stock-only: scope=model gives every block its own widths, which no stock architecture has; use scope=block")


def _settings(prepared: Prepared, windows: Tensor | None) -> dict[str, Any]:
    """What decides the result, repeated in the plan and the record."""
    request = prepared.request
    calibration = None
    if windows is not None:
        calibration = {"spec": prepared.calibration, "samples": len(windows), "seqlen": windows.shape[1], "sha256": ids_hash(windows)}
    return {
        "model": request.model,
        "model_revision": prepared.checkpoint.revision,
        "method": request.method,
        "options": asdict(prepared.job.options),
        "seed": request.seed,
        "sparsity": prepared.sparsity,
        "modules": request.modules,
        "pattern": str(prepared.pattern),
        "calibration": calibration,
        "device": str(prepared.device),
        "dtype": str(prepared.dtype).removeprefix("torch."),
    }


def prepared_facts(prepared: Prepared) -> dict[str, Any]:
    """What is known of a prune before its text is read."""
    return {**_settings(prepared, None), "calibration": prepared.calibration}


def _identity(checkpoint: Checkpoint) -> str:
    """A fingerprint of the original's files that costs no reading: a resumed run must start from the same ones."""
    files = sorted({file for file, _ in checkpoint.index.values()})
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([checkpoint.raw_config, facts]).encode()).hexdigest()


def _facts(prepared: Prepared, plans: list[BlockPlan], counts: _Counts) -> dict[str, Any]:
    view = prepared.job.view
    before, matrices = view.parameters(), view.matrix_parameters()
    return {
        "sparsity_measured": _measured_sparsity(prepared, plans),
        "pruning_ratio": 1 - counts.parameters / before,
        "pruning_ratio_blocks": 1 - counts.matrices / matrices,
        "params_before": before,
        "params_after": counts.parameters,
        "nonzero_after": counts.nonzero,
    }


def _measured_sparsity(prepared: Prepared, plans: list[BlockPlan]) -> float:
    """The removed fraction of the weights of the targeted matrices."""
    removed = targeted = 0
    for plan, rate in zip(plans, prepared.job.rates, strict=True):
        dims = prepared.job.view.dims(plan.index)
        after = dims_after(dims, plan)
        for name in rate:
            (rows, columns), (rows_after, columns_after) = dims.shape(name), after.shape(name)
            targeted += rows * columns
            removed += rows * columns - rows_after * columns_after
            removed += plan.masks[name].removed if name in plan.masks else 0
    return removed / targeted if targeted else 0.0
