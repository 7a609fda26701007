"""From a checkpoint to a pruned checkpoint."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.allocation.allocate import Allocation, allocate
from secateur.calibrate.data import TASK, calibration_facts, check_ids, check_spec, holds_ids, labelled_windows, read_text
from secateur.calibrate.stream import Stream
from secateur.core import records
from secateur.core.device import resolve_device, resolve_dtype
from secateur.core.distributed import on_first, processes, rank, size
from secateur.core.errors import HopelessError, UsageError
from secateur.core.memory import give_back
from secateur.core.progress import say, track
from secateur.core.timing import Stopwatch
from secateur.cut import cut_outer, dims_after, family_after
from secateur.driver import Job, check_finite, make_job, pruned_blocks, whole_model_plan
from secateur.evaluate.tasks import task_text
from secateur.methods import Method, find_method
from secateur.models import card, runtime
from secateur.models.load import BUNDLED, Checkpoint, load_model, open_checkpoint
from secateur.models.pruned_config import drop_blocks, pruned_config, stock_problem
from secateur.models.save import PLAN_PATH, CheckpointWriter, clean, differing_from_plan, disk, is_finished, refuse_inside, same_run
from secateur.models.view import BlockDims, BlockView, ModelView, Residual
from secateur.plan.allocate import removed_blocks, units_left
from secateur.plan.budget import (
    dims_parameters,
    find_dropped,
    find_heads,
    find_sliced,
    find_sparsity,
    mean_block,
    parameters_left,
    sliced_parameters,
)
from secateur.plan.pattern import Pattern, parse_pattern
from secateur.plan.plan import BlockPlan, plan_json, read_plan_json
from secateur.requests import Request

OFF = 0.01  # a pruning ratio that is further from the one asked for is said
_ALLOCATION = "allocation"  # the part that holds a decision about the sparsity of each matrix
_LEARNING = "learning"  # the part that a method that learns goes on from
STATES = "gradual"  # the folder, beside several results, that holds what runs of a gradual method go on from


@dataclass(frozen=True)
class Prepared:
    """A request that has been checked against its model: everything but the calibration text is known."""

    request: Request
    checkpoint: Checkpoint
    job: Job
    pattern: Pattern | None
    sparsity: float | None
    device: torch.device
    dtype: torch.dtype
    samples: int
    seqlen: int

    @property
    def calibration(self) -> str | None:
        """The text SPEC, None where the method needs no calibration."""
        own = self.job.method.module.CALIBRATION or ("c4" if self.job.allocation else None)
        if own is None or not (self.job.rotates or self.job.whole_model or any(self.job.rates)):
            return None
        default = "builtin" if self.request.model == BUNDLED else own
        return self.request.calibration or default


def prepare(request: Request) -> Prepared:
    """Check everything that can be checked without reading weights or text.

    Raises:
        UsageError: the request is wrong in itself, or does not go with the model.
        SecateurError: the model cannot be pruned.
    """
    method = find_method(request.method)
    options = method.options(_options(request))
    pattern = method.pattern(options)
    samples = getattr(method.module, "SAMPLES", 128) if request.samples is None else request.samples
    if samples < 1:
        raise UsageError(f"--samples {samples}: at least one window is needed")
    if request.calibration is not None:
        check_spec(request.calibration)
    if request.include_path is not None and not (request.calibration or "").startswith(TASK):
        raise UsageError(f"--include-path {request.include_path} says where task files are: calibrate on a task too, --calibration task:NAME")
    checkpoint = open_checkpoint(request.model, request.revision, ignore_unknown=request.ignore_unknown)
    view = checkpoint.view()
    sparsity = _sparsity(request, view, pattern, method, options)
    job = make_job(view, checkpoint.dtype, method, options, sparsity, request.modules, request.seed)
    device = resolve_device(request.device)
    seqlen = min(getattr(method.module, "SEQLEN", 2048), checkpoint.max_length()) if request.seqlen is None else request.seqlen
    if not 1 < seqlen <= checkpoint.max_length():
        raise UsageError(f"--seqlen {seqlen} is outside [2, {checkpoint.max_length()}], the lengths this model knows")
    dtype = resolve_dtype(request.dtype, checkpoint.dtype, device)
    prepared = Prepared(request, checkpoint, replace(job, device=device, dtype=dtype), pattern, sparsity, device, dtype, samples, seqlen)
    if request.stock_only:
        _check_stock(prepared)
    return prepared


def _options(request: Request) -> dict[str, Any]:
    return {**request.options, **({} if request.pattern is None else {"pattern": str(parse_pattern(request.pattern))})}


def _sparsity(request: Request, view: ModelView, pattern: Pattern | None, method: Method, options: Any) -> float | None:
    wanted, at_least = request.params_removed, request.at_least
    if wanted is None:
        if at_least:
            raise UsageError("--at-least belongs to --params-removed R: add it")
        return pattern.implied_sparsity if request.sparsity is None and pattern is not None else request.sparsity
    if request.sparsity is not None:
        raise UsageError("give --sparsity or --params-removed, not both")
    if getattr(options, "whole_model", False):
        raise UsageError("--params-removed goes with scope=block: with scope=model the ratio follows from the scores; use --sparsity")
    if method.removes == "blocks":
        return find_dropped(view, wanted, at_least=at_least)
    if method.removes == "heads":
        return find_heads(view, wanted, partial(method.module.dims_left, view, options), at_least=at_least)
    if method.counts_parameters(options):
        return wanted
    if method.plan_place is not None:
        if options.implied_sparsity:
            raise UsageError(f"--params-removed does not go with --set energy={options.energy:g}: the widths follow from the spectrum; give one of them")
        return find_sliced(view, wanted, partial(_residuals, view, method, options), at_least=at_least)
    assert pattern is not None
    return find_sparsity(view, pattern, request.modules, wanted, at_least=at_least)


def _residuals(view: ModelView, method: Method, options: Any, sparsity: float) -> list[Residual]:
    """The widths of the residual stream in all blocks at a sparsity."""
    found: list[Residual] = method.module.residuals(view.config.hidden_size, view.blocks, view.family.parallel, sparsity, options)
    return found


def parameters_expected(prepared: Prepared) -> int | None:
    """All parameters of the result, from shapes alone; None where widths follow from the text."""
    view, job = prepared.job.view, prepared.job
    if job.rotates:
        return None if job.options.implied_sparsity else sliced_parameters(view, _residuals(view, job.method, job.options, job.sparsity or 0.0))
    if job.learns and job.method.removes == "blocks":
        return round(view.parameters() - removed_blocks(job.sparsity or 0.0, view.blocks) * mean_block(view))
    if job.learns and job.method.removes == "heads":
        return dims_parameters(view, job.method.module.dims_left(view, job.options, job.sparsity))
    if job.learns:
        return round((1 - (job.sparsity or 0.0)) * view.parameters())
    return parameters_left(view, job.rates) if prepared.pattern is not None and prepared.pattern.structured else view.parameters()


def say_expected(prepared: Prepared) -> bool:
    """Say, before the work, where the size of the result is not what one would think; returns whether it did."""
    before, after = prepared.checkpoint.view().parameters(), parameters_expected(prepared)
    if after is None or not prepared.sparsity:
        return False
    removed, asked = 1 - after / before, prepared.request.params_removed
    if asked is not None and abs(removed - asked) > OFF:
        other = "" if prepared.request.at_least or removed > asked else "; --at-least takes the next one"
        say(f"warning: --params-removed {asked:g}: whole units go, and the nearest step removes {removed:.4f}{other}")
        return True
    tied = prepared.checkpoint.config.tie_word_embeddings
    if asked is None and prepared.job.rotates and (tied or removed <= 0):
        why = "its tied head gets weights of its own, and adapters are added" if tied else "adapters are added"
        sizes = f"{before:,} parameters become {after:,} ({-removed:+.1%})"
        say(f"warning: {prepared.job.method.name} at sparsity {prepared.sparsity:.4g}: {sizes}, since {why}{_instead(prepared)}")
        return True
    return False


def _instead(prepared: Prepared) -> str:
    """What it takes to remove the share of the parameters that a sparsity of the residual width may be taken for."""
    view, job, wanted = prepared.checkpoint.view(), prepared.job, round(prepared.sparsity or 0.0, 3)
    try:
        sparsity = find_sliced(view, wanted, partial(_residuals, view, job.method, job.options))
    except UsageError:
        return ""
    return f"; --params-removed {wanted:g} would take sparsity {sparsity:.3g}"


def _check_stock(prepared: Prepared) -> None:
    """Refuse before the work what shapes alone tell."""
    view = prepared.job.view
    if prepared.job.learns and prepared.job.method.removes != "blocks":
        raise UsageError(f"--stock-only: {prepared.job.method.name} gives every block its own widths, which no stock architecture has; use another method")
    if prepared.job.whole_model and prepared.pattern is not None and prepared.pattern.structured:
        raise UsageError("--stock-only: ranking all blocks together gives every block its own widths, which no stock architecture has; use scope=block")
    dims = [view.dims(index) for index in range(view.blocks)]
    if prepared.pattern is not None and prepared.pattern.structured:
        dims = [units_left(d, rate) for d, rate in zip(dims, prepared.job.rates, strict=True)]
    if problem := stock_problem(view.raw_config, view.family, dims):
        raise UsageError(f"--stock-only: {problem}; nothing was written")


def read_windows(prepared: Prepared) -> Tensor | None:
    """The calibration windows [S, T]; None where the method needs none."""
    return _read_labelled(prepared)[0]


def _read_labelled(prepared: Prepared) -> tuple[Tensor | None, Tensor | None]:
    """The windows, and the labels of those of a task."""
    request, spec = prepared.request, prepared.calibration
    if spec is None:
        return None, None
    much = {"samples": prepared.samples, "seqlen": prepared.seqlen, "seed": request.seed}
    return _labelled_of(prepared.checkpoint, spec, text_field=request.text_field, include_path=request.include_path, **much)


def windows_of(
    checkpoint: Checkpoint,
    spec: str,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    text_field: str,
    include_path: str | Path | None = None,
) -> Tensor:
    """Windows [S, T] of the calibration part of a text SPEC, in the tokens of a model."""
    much = {"samples": samples, "seqlen": seqlen, "seed": seed}
    return _labelled_of(checkpoint, spec, text_field=text_field, include_path=include_path, **much)[0]


def _labelled_of(
    checkpoint: Checkpoint, spec: str, *, samples: int, seqlen: int, seed: int, text_field: str, include_path: str | Path | None = None
) -> tuple[Tensor, Tensor | None]:
    tokenizer = None if holds_ids(spec) else checkpoint.tokenizer()
    text = task_text(spec, include_path) if spec.startswith(TASK) else read_text(spec, "calibration", text_field=text_field)

    def tokenize(row: str) -> list[int]:
        assert tokenizer is not None
        found: list[int] = tokenizer(row, verbose=False)["input_ids"]
        return found

    windows, labels = labelled_windows(text, tokenize, samples=samples, seqlen=seqlen, seed=seed)
    check_ids(windows, checkpoint.config.vocab_size, checkpoint.max_length(), spec, None if tokenizer is None else len(tokenizer))
    return windows, labels


@processes()
def prune(
    request: Request, out: Path, *, resume: bool = False, overwrite: bool = False, records_file: Path | None = None, states: Path | None = None
) -> records.Record:
    """Prune a model and write the result to `out`; returns the record, which is also appended to `records_file`.

    Started by torchrun, a method that learns does so in all processes together; the first writes, and the others return an empty record.

    Args:
        request: what to do.
        out: the folder to write.
        resume: go on with an interrupted run; the result of a finished one is left as it is.
        overwrite: replace what is in `out`.
        records_file: None is `records.jsonl` in the parent of `out`.
        states: a folder where a gradual method leaves its state for a higher sparsity, and finds that of a lower one; the caller removes it. None: each run
            is its own.

    Raises:
        UsageError, SecateurError: nothing that looks like a result is left behind.
    """
    started = time.perf_counter()
    out = out.absolute()
    records_file = records_file or out.parent / "records.jsonl"
    finished = is_finished(out, resume=resume, overwrite=overwrite)
    prepared = prepare(request)
    _refuse_together(prepared)
    refuse_out(out, prepared.checkpoint, prepared.calibration, records_file)
    watch = Stopwatch()
    with watch("text"):
        windows, labels = _read_labelled(prepared)
    prepared = replace(prepared, job=replace(prepared.job, labels=labels))
    settings = prepared_settings(prepared, windows)
    if finished and (record := on_first(lambda: _finished(out, settings, records_file, overwrite))) is not None:
        return record if rank() == 0 else {}
    said = say_expected(prepared)
    writer, buffer_bytes = on_first(lambda: _writer(prepared, windows, settings, out, resume=resume, overwrite=overwrite))
    if rank() > 0:
        whole_model_plan(replace(prepared.job, checkpoint=writer.part(_LEARNING)), windows, watch)
        return {}
    state = None if states is None else _shared_state(prepared, settings, states)
    taken = _seconds(state)
    facts, stock = _run(replace(prepared, job=replace(prepared.job, checkpoint=state)), windows, settings, writer, watch)
    seconds = round(time.perf_counter() - started, 3)
    if state is not None:
        state.with_suffix(".json").write_text(json.dumps(taken | {str(prepared.sparsity): seconds}), "utf-8")
    record = {
        "command": "prune",
        "version": records.version(),
        **settings,
        **facts,
        "stock": stock,
        "seconds": seconds,
        **({"seconds_before": round(sum(taken.values()), 3)} if taken else {}),
        "seconds_by": watch.rounded(),
        "peak_rss_bytes": records.peak_rss_bytes(),
        "buffer_bytes": buffer_bytes,
        "versions": records.versions(),
        "out": str(out),
    }
    records.append(records_file, record)
    _say_result(record, said)
    return record


def _say_result(record: records.Record, said: bool) -> None:
    """Say, after the work, what shapes alone did not tell."""
    asked = record["params_removed"]
    if asked is not None and not said and abs(record["pruning_ratio"] - asked) > OFF:
        say(f"warning: --params-removed {asked:g}: {record['pruning_ratio']:.4f} of the parameters were removed")
    if rows := record["zero_rows"]:
        say(f"note: {rows:,} rows of matrices are all zero; float8 weights with a scale a row turn such rows into NaN (int8 and int4 do not)")


def _shared_state(prepared: Prepared, settings: Mapping[str, Any], states: Path) -> Path | None:
    """The file for the state of a gradual method, the same for all sparsities; None where runs at several of them have no state in common."""
    job = prepared.job
    if not (job.whole_model and job.method.gradual(job.options)) or len({rate for rates in job.rates for rate in rates.values()}) > 1:
        return None
    same = {**{name: value for name, value in settings.items() if name != "sparsity"}, "source": identity(prepared.checkpoint)}
    with disk(states.parent):
        states.mkdir(parents=True, exist_ok=True)
    return states / f"{hashlib.sha256(json.dumps(same, default=str).encode()).hexdigest()[:16]}.safetensors"


def _seconds(state: Path | None) -> dict[str, float]:
    """What the runs took that a state comes from, by sparsity."""
    if state is None or not state.is_file() or not state.with_suffix(".json").is_file():
        return {}
    found: dict[str, float] = json.loads(state.with_suffix(".json").read_text("utf-8"))
    return found


def refuse_out(out: Path, checkpoint: Checkpoint, spec: str | None, records_file: Path) -> None:
    """Raises UsageError where `out` is no place for a result: around or inside the model, around the text `spec` or the records."""
    precious = {"the model": checkpoint.folder, "the records": records_file}
    if spec is not None and (text := Path(spec).expanduser()).is_file():
        precious["the calibration text"] = text
    refuse_inside(out, precious)


def _finished(out: Path, settings: Mapping[str, Any], records_file: Path, overwrite: bool) -> records.Record | None:
    """The record of a run that was complete already; None to start again."""
    made = read_plan_json(out)
    assert made is not None
    if not same_run(out, differing_from_plan(made, settings), overwrite):
        return None
    clean(out)
    say(f"{out}: already there")
    if (found := records.last(records_file, "prune", out)) is not None:
        return found
    stock = not (out / f"{runtime.MODULE}.py").is_file()
    record = {
        "command": "prune",
        "version": records.version(),
        **{k: v for k, v in made.items() if k not in ("format", "blocks")},
        **settings,
        "stock": stock,
        "out": str(out),
    }
    records.append(records_file, record)
    return record


def _refuse_together(prepared: Prepared) -> None:
    """What several processes cannot do together."""
    if size() > 1 and not prepared.job.learns:
        raise UsageError(f"torchrun: {prepared.job.method.name} works in one process, at this sparsity; start it without torchrun")
    if size() > 1 and prepared.device.index is not None:
        raise UsageError(f"torchrun: --device {prepared.device} is one device for {size()} processes; use --device {prepared.device.type}")


def _writer(
    prepared: Prepared, windows: Tensor | None, settings: Mapping[str, Any], out: Path, *, resume: bool, overwrite: bool
) -> tuple[CheckpointWriter, int]:
    """What writes the result, and the size of the activation buffer."""
    checkpoint, view = prepared.checkpoint, prepared.job.view
    streams, differentiates = prepared.job.streams, prepared.job.whole_model and prepared.job.method.gradients
    kept = (view.blocks + 1 if differentiates else 1) * windows.numel() if windows is not None and (streams or differentiates) else 0
    buffer = kept * view.config.hidden_size * prepared.dtype.itemsize
    needed = 2 * sum(file.stat().st_size for file in {file for file, _ in checkpoint.index.values()}) + (buffer if prepared.request.spill else 0)
    return CheckpointWriter(
        out,
        {**settings, "source": identity(checkpoint)},
        resume=resume,
        overwrite=overwrite,
        needed=needed,
        may_change=prepared.job.method.may_change,
    ), buffer


def _run(prepared: Prepared, windows: Tensor | None, settings: Mapping[str, Any], writer: CheckpointWriter, watch: Stopwatch) -> tuple[dict[str, Any], bool]:
    """The work: blocks, the rest, the finish. Returns the facts, and whether the result is stock."""
    try:
        dense = prepared.checkpoint.view()
        for name in dense.outer_names():  # those of a block are looked at when their turn comes
            check_finite(dense.source.read(name), name)
        prepared = _allocated(prepared, windows, writer, watch)
    except HopelessError:
        writer.discard()
        raise
    checkpoint, view = prepared.checkpoint, prepared.job.view
    stream = None
    if windows is not None and prepared.job.streams:
        with watch("forward"), writer.disk():
            stream = Stream(view, windows, device=prepared.device, dtype=prepared.dtype, spill=writer.scratch if prepared.request.spill else None)
    try:
        totals = _write_blocks(prepared, windows, writer, stream, watch)
    except HopelessError:
        writer.discard()
        raise
    weights = _write_outer(prepared, writer, watch, totals) + [_block_part(index) for index in totals.kept]
    raw = drop_blocks(view.raw_config, view.config, totals.kept)
    problem = stock_problem(raw, view.family, totals.dims)
    assert not (problem and prepared.request.stock_only), "prepare has refused it"
    facts = _facts(prepared, totals)
    with watch("files"):
        config = pruned_config(raw, view.family, totals.dims, stock=problem is None)
        files = {"README.md": card.model_card(checkpoint, settings, facts, problem), PLAN_PATH: plan_json({**settings, **facts}, totals.summaries)}
        if problem:
            files[f"{runtime.MODULE}.py"] = Path(runtime.__file__).read_text("utf-8")
        writer.finish(weights, [_plan_part(index) for index in range(view.blocks)], config, checkpoint.folder, files)
    return facts, problem is None


def _allocated(prepared: Prepared, windows: Tensor | None, writer: CheckpointWriter, watch: Stopwatch) -> Prepared:
    """With the sparsity of each matrix decided, where that was left open; an interrupted run keeps its decision."""
    job = prepared.job
    if job.allocation is None:
        return prepared
    assert windows is not None, "an allocation has a calibration text"
    if not writer.has(_ALLOCATION):
        with watch("allocation"):
            found = allocate(job, partial(load_model, prepared.checkpoint, device=job.device, dtype=job.dtype), windows)
        give_back()
        writer.write(_ALLOCATION, {}, found.facts)
    chosen = Allocation.read(writer.read_note(_ALLOCATION))
    return replace(prepared, job=replace(job, rates=chosen.rates, notes={**job.notes, "allocation": chosen.facts}))


@dataclass
class _Totals:
    """What is known of the blocks that are written; small, whatever their number."""

    parameters: int = 0
    nonzero: int = 0
    matrices: int = 0
    zero_rows: int = 0
    removed: int = 0
    targeted: int = 0
    dims: list[BlockDims] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    summaries: list[dict[str, Any]] = field(default_factory=list)
    ends: tuple[BlockPlan, BlockPlan] | None = None

    def add(self, note: Mapping[str, int]) -> None:
        """Count a part by its note."""
        self.parameters += note["parameters"]
        self.nonzero += note["nonzero"]
        self.matrices += note.get("matrices", 0)
        self.zero_rows += note.get("zero_rows", 0)

    def add_block(self, before: BlockDims, block: BlockView, plan: BlockPlan) -> None:
        """Count what the plan removes from the matrices it was asked for."""
        self.summaries.append(plan.summary())
        if not plan.dropped:
            self.dims.append(block.dims)
            self.kept.append(plan.index)
        self.ends = (self.ends[0] if self.ends else _end(plan, "enter"), _end(plan, "leave"))
        for name, place in plan.places.items():
            if (name != "enter" or plan.index == 0) and place.spectrum_D is not None:
                self.targeted += place.of
                self.removed += place.of - place.width
        for name in block.rates:
            (rows, columns), (rows_after, columns_after) = before.shape(name), block.dims.shape(name)
            self.targeted += rows * columns
            self.removed += rows * columns - rows_after * columns_after
            self.removed += plan.masks[name].removed if name in plan.masks else 0


def _end(plan: BlockPlan, name: str) -> BlockPlan:
    """What embeddings or head need of a plan; the other bases are as large as matrices."""
    return BlockPlan(plan.index, places={name: plan.places[name]} if plan.places else {})


def _write_blocks(prepared: Prepared, windows: Tensor | None, writer: CheckpointWriter, stream: Stream | None, watch: Stopwatch) -> _Totals:
    job = replace(prepared.job, checkpoint=prepared.job.checkpoint or writer.part(_LEARNING), spill=writer.scratch if prepared.request.spill else None)
    view, rates = job.view, job.rates

    def finished(index: int) -> tuple[BlockView, BlockPlan] | None:
        if not writer.has(_plan_part(index)) or not (writer.has(_block_part(index)) or writer.read_note(_plan_part(index)).get("dropped")):
            return None
        tensors, summary = writer.read(_plan_part(index))
        for part in (_basis_part(index - 1), _basis_part(index), _plan_part(index - 1)):
            tensors |= writer.read(part)[0] if job.rotates and writer.has(part) else {}
        plan = BlockPlan.read(summary, tensors)
        written = {} if plan.dropped else writer.read(_block_part(index))[0]
        weights = {name.removeprefix(view.block_prefix(len(totals.kept))): t for name, t in written.items()}
        return BlockView(family_after(view.family, plan), dims_after(view.dims(index), plan), index, weights, rates[index]), plan

    totals = _Totals()
    for block, plan in track(pruned_blocks(job, windows, stream, watch, finished), f"{job.method.name}: blocks", view.blocks):
        with watch("files"):
            part = _block_part(block.index)
            if not (writer.has(part) and writer.has(_plan_part(block.index))):
                if plan.places:
                    writer.write(_basis_part(block.index), plan.bases())
                writer.write(_plan_part(block.index), plan.tensors(), plan.summary())
            if not plan.dropped and not writer.has(part):
                note = _count(block.tensors) | {"matrices": block.matrix_parameters() + _added(block), "zero_rows": block.zero_rows()}
                writer.write(part, {view.block_prefix(len(totals.kept)) + name: tensor for name, tensor in block.tensors.items()}, note)
            if not plan.dropped:
                totals.add(writer.read_note(part))
        totals.add_block(view.dims(block.index), block, plan)
        del block, plan  # not the weights and bases of two blocks at a time
    return totals


def _write_outer(prepared: Prepared, writer: CheckpointWriter, watch: Stopwatch, totals: _Totals) -> list[str]:
    """Copy, or rotate, what lies outside the blocks, one tensor at a time."""
    view = prepared.job.view
    assert totals.ends is not None
    parts = []
    for name in view.outer_names():
        part = f"outer-{name}"
        with watch("files"):
            if not writer.has(part):
                tensors = {name: cut_outer(view, name, *totals.ends)}
                writer.write(part, tensors, _count(tensors))
                del tensors
            totals.add(writer.read_note(part))
        parts.append(part)
    return parts


def _added(block: BlockView) -> int:
    """Weights that a method put into a block: adapters on its residual connections."""
    return sum(tensor.numel() for name, tensor in block.tensors.items() if name.startswith("skips.") and not runtime.is_index_map(name))


def _count(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    counted = [tensor for name, tensor in tensors.items() if not runtime.is_index_map(name)]
    return {"parameters": sum(t.numel() for t in counted), "nonzero": sum(int(t.count_nonzero()) for t in counted)}


def _block_part(index: int) -> str:
    return f"block-{index:05}"


def _basis_part(index: int) -> str:
    return f"basis-{index:05}"


def _plan_part(index: int) -> str:
    return f"plan-{index:05}"


def prepared_settings(prepared: Prepared, windows: Tensor | None) -> dict[str, Any]:
    """What decides the result, repeated in the plan and the record."""
    request = prepared.request
    calibration = None
    if windows is not None:
        assert prepared.calibration is not None
        calibration = calibration_facts(prepared.calibration, windows)
    return {
        "model": request.model,
        "model_revision": prepared.checkpoint.revision,
        "model_fingerprint": prepared.checkpoint.fingerprint(),
        "method": request.method,
        "options": asdict(prepared.job.options),
        "seed": request.seed,
        "sparsity": prepared.sparsity,
        "params_removed": request.params_removed,
        "modules": request.modules,
        "pattern": None if prepared.pattern is None else str(prepared.pattern),
        "calibration": calibration,
        "device": str(prepared.device),
        "dtype": str(prepared.dtype).removeprefix("torch."),
    }


def identity(checkpoint: Checkpoint) -> str:
    """A hash that changes when the files on this machine do, without reading them: a resumed run must start from the same ones."""
    files = sorted({file for file, _ in checkpoint.index.values()})
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([checkpoint.raw_config, facts]).encode()).hexdigest()


def _share_gone(view: ModelView, totals: _Totals, what: str) -> float:
    """Of parameters, of query heads, or of blocks."""
    if what == "blocks":
        return 1 - len(totals.kept) / view.blocks
    if what == "heads":
        return 1 - sum(dims.heads for dims in totals.dims) / sum(view.dims(index).heads for index in range(view.blocks))
    return 1 - totals.parameters / view.parameters()


def _quantity(prepared: Prepared) -> str:
    """What the sparsity is a fraction of: a key of `card.QUANTITIES`."""
    method = prepared.job.method
    if method.plan_place is not None:
        return "width"
    if method.counts_parameters(prepared.job.options):
        return method.removes
    return "units" if prepared.pattern is not None and prepared.pattern.structured else "weights"


def _facts(prepared: Prepared, totals: _Totals) -> dict[str, Any]:
    view = prepared.checkpoint.view()
    before, matrices = view.parameters(), view.matrix_parameters()
    targeted = totals.removed / totals.targeted if totals.targeted else 0.0
    return {
        "sparsity_of": _quantity(prepared),
        "sparsity_measured": _share_gone(view, totals, prepared.job.method.removes) if prepared.job.learns else targeted,
        "pruning_ratio": 1 - totals.parameters / before,
        "pruning_ratio_blocks": 1 - totals.matrices / matrices,
        "params_before": before,
        "params_after": totals.parameters,
        "nonzero_after": totals.nonzero,
        "zero_rows": totals.zero_rows,
        **prepared.job.notes,
        "updated": prepared.job.rotates or any("updates" in summary for summary in totals.summaries),
    }
