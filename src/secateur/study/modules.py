"""Which module matters: one kind of matrix pruned at a time, at every sparsity, each result measured and none written.

After the report on module-specific pruning (its sections 2.4.3, 4.1 and 4.2): each projection alone, attention, MLP and
all; against the sparsity and against the number of weights removed; the grid of attention rate x MLP rate; calibration
on the text of the task itself.

Two modes. `shared`: the statistics of the dense model are collected once, and every cell is cut from the dense weights
by them. `sequential`: every cell is what `secateur prune --modules` gives, where a block is calibrated on the outputs
of the pruned ones before it. A cell is a record; those that are in the records are not made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from secateur.calibrate.stream import TOKENS_A_BATCH, Stream
from secateur.core import records
from secateur.core.errors import SecateurError, UsageError, unknown
from secateur.core.paths import to_path
from secateur.core.progress import observed, say
from secateur.core.records import Record
from secateur.core.timing import Phases, Stopwatch
from secateur.core.workers import end_with_parent
from secateur.evaluate.estimate import perplexity_seconds
from secateur.evaluate.evaluate import Questions, announce, prepare_questions
from secateur.evaluate.passes import small_model
from secateur.evaluate.tasks import task_text
from secateur.models.load import BUNDLED, load_model
from secateur.models.save import refuse_existing
from secateur.models.view import ModelView
from secateur.plan.pattern import Pattern, parse_pattern
from secateur.plan.rates import Rates, resolve_rates
from secateur.prune.allocation.dense import DenseModel
from secateur.prune.calibration import read_windows
from secateur.prune.driver import pruned_blocks
from secateur.prune.job import Job, make_job
from secateur.prune.prepare import Prepared, prepare
from secateur.prune.rehearse import rehearse
from secateur.prune.settings import identity, prepared_settings
from secateur.requests import EvalRequest, ModulesRequest, Request
from secateur.text.specs import TASK, task_names
from secateur.text.windows import ids_hash

GROUPS = ("attention", "mlp", "all")
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
MODES = ("shared", "sequential")


@dataclass(frozen=True)
class Cell:
    """One version of the model: a kind, and what `--modules` says of it."""

    kind: str
    sparsity: float
    modules: str


DENSE = Cell("dense", 0.0, "")


def cells(view: ModelView, pattern: Pattern, asked: ModulesRequest) -> list[Cell]:
    """The cells, each once.

    Raises:
        UsageError: a kind that matches nothing, a sparsity outside [0, 1], N:M that does not divide a matrix, a mode
            that there is not, more weights than any kind has, nothing to prune.
    """
    if asked.mode not in MODES:
        raise UsageError(f"--mode {asked.mode}: unknown (known: {', '.join(MODES)})")
    if pattern.structured:
        raise UsageError(
            f"study modules: pattern {pattern} removes units that several matrices share, so a kind cannot be pruned "
            "alone; use unstructured or N:M"
        )
    kinds = list(dict.fromkeys(asked.kinds or (*view.matrix_shapes(0), *GROUPS)))
    implied = pattern.implied_sparsity
    sparsities = list(asked.sparsities) or (list(SPARSITIES) if implied is None else [implied])
    if implied is not None and (asked.weights or asked.grid):
        raise UsageError(
            f"study modules: pattern {pattern} fixes the sparsity at {implied:g}; leave --weights and --grid out"
        )
    found = [Cell(kind, s, f"{kind}={s:g}") for kind in kinds for s in sparsities if s]
    sizes = {kind: _size(view, kind, pattern) for kind in kinds}
    for n in asked.weights:
        if n > max(sizes.values()):
            raise UsageError(
                f"--weights {n}: no kind has so many (the largest is {max(sizes, key=sizes.__getitem__)}, with "
                f"{max(sizes.values()):,})"
            )
    for kind, size in sizes.items():
        found += [Cell(kind, n / size, f"{kind}={n / size:.6g}") for n in asked.weights if 0 < n <= size]
    found += [_grid_cell(a, m) for a in asked.grid for m in asked.grid if a or m]
    if not found:
        raise UsageError(
            "study modules: nothing would be pruned at a sparsity of 0; ask for others with --sparsity, or for "
            "--weights N or --grid S,S"
        )
    for cell in found:
        _rates(view, cell, pattern)
    return list({cell.modules: cell for cell in found}.values())


def _grid_cell(attention: float, mlp: float) -> Cell:
    """Where one of them is 0, or they are equal, it is a cell of another name."""
    if attention == mlp:
        return Cell("all", mlp, f"all={mlp:g}")
    if not attention or not mlp:
        kind, s = ("mlp", mlp) if mlp else ("attention", attention)
        return Cell(kind, s, f"{kind}={s:g}")
    return Cell("attention x mlp", math.nan, f"attention={attention:g},mlp={mlp:g}")


def _rates(view: ModelView, cell: Cell, pattern: Pattern) -> Rates:
    if not cell.modules:
        return tuple({} for _ in range(view.blocks))
    return resolve_rates(view, pattern.implied_sparsity, cell.modules, pattern)


def _size(view: ModelView, kind: str, pattern: Pattern) -> int:
    rates = resolve_rates(view, None, f"{kind}={pattern.implied_sparsity or 0.5:g}", pattern)
    return sum(math.prod(view.matrix_shapes(index)[name]) for index, rate in enumerate(rates) for name in rate)


def run(
    request: Request,
    asked: ModulesRequest,
    out: str | Path,
    measure: EvalRequest,
    *,
    resume: bool = False,
    overwrite: bool = False,
    records_file: str | Path | None = None,
) -> Iterator[Record]:
    """Measure the dense model, then every cell; yields the records, the dense model's first, in the order of the cells.

    Args:
        request: the model, method and calibration; `task:NAME` calibrates on the text of tasks.
        asked: what is varied, and in how many processes.
        out: the folder of the study, which receives `records.jsonl`.
        measure: the evaluation; its model is that of the request.
        resume: cells that are in the records already are not made again.
        overwrite: forget the records of another study in `out`.
        records_file: where records go instead.

    Raises:
        UsageError, SecateurError: nothing is measured.
    """
    out, records_file = to_path(out).absolute(), to_path(records_file)
    file = records_file or out / "records.jsonl"
    if asked.jobs < 1:
        raise UsageError(f"--jobs {asked.jobs}: at least one process is needed")
    _check_engine(asked.engine)
    if not resume:
        refuse_existing(out, overwrite)
    work, wanted = _prepare(request, asked, measure, out)
    if overwrite and not resume and records_file is None:
        file.unlink(missing_ok=True)
    done = _finished(file)
    missing = [cell for cell in wanted if work.key(cell) not in done]
    if missing:
        announce(work.questions.protocol, work.questions.windows)
    if len(missing) < len(wanted):
        say(f"{len(wanted) - len(missing)} of {len(wanted)} cells are in {file} already")
    here = not missing or (asked.jobs == 1 and asked.engine == "processes")
    made = work.make(missing) if here else _ENGINES[asked.engine](work, missing, min(asked.jobs, len(missing)))
    started = time.monotonic()
    for number, record in enumerate(made, start=1):  # no bar: measuring a cell shows one of its own
        left = (time.monotonic() - started) / number * (len(missing) - number)
        say(
            f"study: {number} of {len(missing)}, {record['modules'] or 'dense'}: ppl {record['ppl']:.4g}, about "
            f"{left:.0f} s left"
        )
        records.append(file, record)
        done[record["key"]] = record
    yield from (done[work.key(cell)] for cell in wanted)


def _finished(file: Path) -> dict[str, Record]:
    """The cells that a file of records holds, by their keys."""
    return {r["key"]: r for r in records.read([file]) if r.get("command") == "study"} if file.is_file() else {}


def estimate(
    request: Request, asked: ModulesRequest, measure: EvalRequest, *, records_file: str | Path | None = None
) -> Record:
    """`--dry-run`: what `run` would do. Text and tasks are read, two blocks are measured, nothing is written.

    Args:
        request, asked, measure: as for `run`.
        records_file: cells that it holds are done already; None where none are.

    Returns:
        `cells`, `cells_done`, `cells_to_calibrate`, `calibrations` (passes over the calibration text),
        `calibration_tokens` and `evaluation_tokens` of all of them, and `seconds_estimated` of one process, without
        what tasks take.

    Raises:
        UsageError, SecateurError: as `run` does before it measures.
    """
    records_file = to_path(records_file)
    with TemporaryDirectory() as folder:
        work, wanted = _prepare(request, asked, measure, Path(folder))
        settings = work.settings
    job = work.prepared.job
    done = _finished(records_file) if records_file else {}
    missing = [cell for cell in wanted if not done or work.key(cell) not in done]
    calibrated = sum(bool(cell.modules) for cell in missing) if job.streams else 0
    passes = min(calibrated, 1) if asked.mode == "shared" else calibrated
    calibration_tokens = 0 if work.windows is None else passes * work.windows.numel()
    evaluation_tokens = len(missing) * sum(len(window) for window in work.questions.windows)
    seconds = _calibrating_seconds(work, passes, calibrated) + _measuring_seconds(work, len(missing))
    return {
        "command": "study",
        "study": "modules",
        "dry_run": True,
        **{name: value for name, value in settings.items() if name not in ("sparsity", "modules")},
        "cells": len(wanted),
        "cells_done": len(wanted) - len(missing),
        "cells_to_calibrate": calibrated,
        "calibrations": passes,
        "calibration_tokens": calibration_tokens,
        "evaluation_tokens": evaluation_tokens,
        "seconds_estimated": round(seconds, 1),
    }


def _calibrating_seconds(work: _Work, passes: int, calibrated: int) -> float:
    """Return the seconds of some passes over the calibration text, and of the cuts of some cells."""
    shape = None if work.windows is None else (work.windows.shape[0], work.windows.shape[1])
    if not calibrated:
        return 0.0
    whole = rehearse(work.prepared, shape).seconds
    if passes == calibrated or shape is None:
        return passes * whole
    # a cell that shares the statistics of the others costs about what a run over few tokens does
    few = (min(shape[0], max(1, TOKENS_A_BATCH // shape[1])), shape[1])
    return passes * whole + (calibrated - passes) * min(whole, rehearse(work.prepared, few).seconds)


def _measuring_seconds(work: _Work, cells: int) -> float:
    """Return the seconds of the perplexity of some cells."""
    questions = work.questions
    if not cells:
        return 0.0
    small = small_model(work.prepared.checkpoint, questions.device, questions.dtype)
    with observed(Phases()):
        return small.load_seconds + cells * perplexity_seconds(small, questions.windows)


def _prepare(request: Request, asked: ModulesRequest, measure: EvalRequest, folder: Path) -> tuple[_Work, list[Cell]]:
    """What makes the cells, and all of them.

    The text of tasks to calibrate on is written into `folder`, and stays there if nothing is wrong with it.
    """
    names = task_names(request.calibration or "")
    asking = replace(
        measure,
        model=request.model,
        revision=request.revision,
        include_path=measure.include_path if measure.tasks or not names else None,
    )
    work = _Work(
        replace(request, calibration=None, include_path=None) if names else request, asked.mode, asking, str(folder)
    )
    wanted = [DENSE, *cells(work.prepared.job.view, work.pattern, asked)]
    if names:
        file = _write_task_text(names, request.include_path or measure.include_path, folder)
        work = replace(work, request=replace(work.request, calibration=str(file), text_field="text"))
        try:
            _ = work.settings  # reads the text
        except SecateurError:
            file.unlink()
            with suppress(OSError):
                folder.rmdir()
            raise
    return work, wanted


def _write_task_text(names: Sequence[str], include_path: str | Path | None, folder: Path) -> Path:
    """One file for all processes."""
    texts = task_text(f"{TASK}{'+'.join(names)}", include_path).rows
    file = folder / f"task-{'-'.join(names)}.jsonl"
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if not (file.is_file() and file.read_text("utf-8") == content):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, "utf-8")
    return file


@dataclass(frozen=True)
class _Work:
    """Everything that makes cells; what is large is made when it is first needed, and not sent to other processes."""

    request: Request
    mode: str
    measure: EvalRequest
    out: str

    def __getstate__(self) -> dict[str, Any]:
        return asdict(self) | {"request": self.request, "measure": self.measure}

    @cached_property
    def prepared(self) -> Prepared:
        prepared = prepare(replace(self.request, sparsity=None if self._implied else 0.5, modules=None))
        job = prepared.job
        if job.method.says.plan_block is None or job.whole_model:
            raise UsageError(
                f"study modules: {job.method.name} has no mask for each matrix, so no kind can be pruned alone; use "
                "wanda, sparsegpt or magnitude"
            )
        return prepared

    @property
    def _implied(self) -> float | None:
        return parse_pattern(self.request.pattern or "unstructured").implied_sparsity

    @property
    def pattern(self) -> Pattern:
        return self.prepared.pattern or parse_pattern("unstructured")

    @cached_property
    def windows(self) -> Tensor | None:
        return read_windows(self.prepared)

    @cached_property
    def questions(self) -> Questions:
        return prepare_questions(self.measure, self.prepared.checkpoint, bundled=self.request.model == BUNDLED)

    @cached_property
    def dense(self) -> DenseModel:
        prepared = self.prepared
        return DenseModel(
            prepared.job,
            load_model(prepared.checkpoint, device=prepared.device, dtype=self.questions.dtype),
            self.windows,
        )

    @cached_property
    def settings(self) -> dict[str, Any]:
        return {**prepared_settings(self.prepared, self.windows), **self.questions.facts, "mode": self.mode}

    @cached_property
    def _about(self) -> str:
        """What decides all cells: settings, weights, tasks."""
        calibration = self.settings["calibration"] and {
            **self.settings["calibration"],
            "spec": None,
        }  # the tokens tell, wherever they lie
        about = {
            **self.settings,
            "calibration": calibration,
            "weights": identity(self.prepared.checkpoint),
            **self.questions.tasks.facts(),
        }
        about["windows"] = self.windows is not None and ids_hash(self.windows)
        return records.to_json({k: v for k, v in about.items() if k not in ("sparsity", "modules")})

    def key(self, cell: Cell) -> str:
        """Two cells with one key are the same."""
        return hashlib.sha256(f"{self._about}{cell.modules}".encode()).hexdigest()[:16]

    def make(self, wanted: Sequence[Cell]) -> Iterator[Record]:
        for cell in wanted:
            yield self.record(cell)

    def record(self, cell: Cell) -> Record:
        """Prune, measure, put back."""
        started = time.perf_counter()
        view = self.prepared.job.view
        rates = _rates(view, cell, self.pattern)
        targeted = sum(math.prod(view.matrix_shapes(index)[name]) for index, rate in enumerate(rates) for name in rate)
        pruned = (
            self.dense.pruned(rates) if self.mode == "shared" or not cell.modules else self._sequentially(cell, rates)
        )
        with pruned as removed:
            parameters = list(self.dense.model.parameters())
            nonzero = sum(int(p.count_nonzero()) for p in parameters)
            measured = self.questions.ask(self.dense.model)
        count = sum(p.numel() for p in parameters)
        return {
            "command": "study",
            "study": "modules",
            "version": records.version(),
            **self.settings,
            "kind": cell.kind,
            "sparsity": None if math.isnan(cell.sparsity) else cell.sparsity,
            "modules": cell.modules,
            "sparsity_measured": removed / targeted if targeted else 0.0,
            "weights_removed": removed,
            "weights_targeted": targeted,
            "pruning_ratio": 0.0,
            "pruning_ratio_blocks": 0.0,
            "params_before": count,
            "params_after": count,
            "nonzero_after": nonzero,
            **measured,
            **({} if cell.modules else dict.fromkeys(("method", "options", "modules", "pattern", "calibration"))),
            "key": self.key(cell),
            "seconds": round(time.perf_counter() - started, 3),
            "peak_rss_bytes": records.peak_rss_bytes(),
            "versions": records.versions() | self.questions.tasks.versions(),
            "out": f"{self.out}#{cell.modules or cell.kind}",
        }

    @contextmanager
    def _sequentially(self, cell: Cell, rates: Rates) -> Iterator[int]:
        """As `secateur prune --modules` prunes, in memory."""
        prepared, dense = self.prepared, self.dense
        view, base = prepared.job.view, prepared.job
        job: Job = make_job(
            view,
            prepared.checkpoint.dtype,
            base.method,
            base.options,
            self.pattern.implied_sparsity,
            cell.modules,
            base.seed,
        )
        job = replace(job, device=prepared.device, dtype=prepared.dtype)
        stream = None
        if job.streams and self.windows is not None:
            stream = Stream(view, self.windows, device=prepared.device, dtype=prepared.dtype)
        removed = 0
        try:
            for block, plan in pruned_blocks(job, stream, Stopwatch()):
                removed += sum(mask.removed for mask in plan.masks.values())
                dense.put(block, rates[block.index])
            yield removed
        finally:
            for index, rate in enumerate(rates):
                dense.put(view.block(index), rate)


_worker: _Work | None = None


def _start(work: _Work, threads: int, folder: str) -> None:
    global _worker
    end_with_parent()  # Ray's have no such parent, and their own ways
    os.chdir(folder)  # paths may be relative to it
    torch.set_num_threads(threads)
    _worker = work


def _make(cell: Cell) -> Record:
    assert _worker is not None
    return _worker.record(cell)


def _in_processes(work: _Work, wanted: Sequence[Cell], jobs: int) -> Iterator[Record]:
    """As they are done, so that each is on record at once, whatever those before it take."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=_shared(work, jobs)) as pool:
        try:
            for future in as_completed([pool.submit(_make, cell) for cell in wanted]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _in_ray(work: _Work, wanted: Sequence[Cell], jobs: int) -> Iterator[Record]:
    from ray.util.multiprocessing import Pool

    with Pool(jobs, _start, _shared(work, jobs)) as pool:
        yield from pool.imap_unordered(_make, wanted)


def _shared(work: _Work, jobs: int) -> tuple[_Work, int, str]:
    return work, max(1, torch.get_num_threads() // jobs), str(Path.cwd())


def _check_engine(engine: str) -> None:
    """Raises UsageError for one that is not known or not installed."""
    if engine not in _ENGINES:
        raise unknown("engine", engine, _ENGINES)
    if engine == "ray" and find_spec("ray") is None:
        raise UsageError(
            "--engine ray: Ray is not installed: pip install 'secateur[ray]'; without --engine, --jobs N has N "
            "processes on this machine"
        )


_ENGINES = {"processes": _in_processes, "ray": _in_ray}
