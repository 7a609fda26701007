"""Prune a checkpoint: `prune`, from the first check to the record."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.core import records
from secateur.core.distributed import on_first, processes, rank
from secateur.core.errors import UsageError
from secateur.core.paths import to_path
from secateur.core.progress import expecting, say
from secateur.core.timing import Clock, Stopwatch
from secateur.core.torchrun import launched, refuse_pruning
from secateur.methods import find_method, sharing_methods
from secateur.models import runtime
from secateur.models.save import (
    Spent,
    clean,
    differing_from_plan,
    disk,
    is_finished,
    same_run,
    weight_bytes,
)
from secateur.plan.plan import read_plan_json
from secateur.prune.calibration import read_labelled
from secateur.prune.driver import few_tokens, whole_model_plan
from secateur.prune.estimate import announce
from secateur.prune.prepare import OFF, Prepared, prepare, say_expected
from secateur.prune.settings import identity, prepared_settings, refuse_out
from secateur.prune.work import make_checkpoint
from secateur.prune.write import LEARNING, new_writer
from secateur.requests import Request

STATES = "gradual"  # the folder beside the results with the saved states of gradual methods, shared by their runs
_ALLOCATION = "allocation"  # the part that holds the chosen sparsity of each matrix


def prune(
    request: Request,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    records_file: str | Path | None = None,
    states: str | Path | None = None,
    clock: Clock = time.perf_counter,
) -> records.Record:
    """Prune a model and write the result to `out`; return the record, which is also appended to `records_file`.

    Under torchrun, a method with SHARDS shares its work among the processes. The first process writes; the others
    return an empty record.

    Args:
        request: the settings of the run.
        out: the folder to write.
        resume: continue an interrupted run; do not touch the result of a finished one.
        overwrite: replace the content of `out`.
        records_file: the file to append the record to; None takes `records.jsonl` in the parent of `out`.
        states: a folder where a gradual method (`methods.contract.Gradual`) saves its state for a higher sparsity, and
            finds the state of a lower one; the caller removes it. None: the run shares no state.
        clock: returns seconds. Those of the record are of all parts of a run that was interrupted and resumed.

    Raises:
        UsageError, SecateurError: the run failed; `out` then holds nothing that looks like a result.
    """
    if launched():
        instead = None if find_method(request.method).says.SHARDS else sharing_methods()
        nothing = request.sparsity == 0 or request.params_removed == 0
        refuse_pruning(request.method, instead, nothing=nothing, device=request.device)
    with processes():
        return _prune(request, to_path(out), resume, overwrite, to_path(records_file), to_path(states), clock)


def _prune(
    request: Request,
    out: Path,
    resume: bool,
    overwrite: bool,
    records_file: Path | None,
    states: Path | None,
    clock: Clock,
) -> records.Record:
    started = clock()
    out = out.absolute()
    records_file = records_file or out.parent / "records.jsonl"
    finished = is_finished(out, resume=resume, overwrite=overwrite)
    prepared = prepare(request)
    refuse_out(out, prepared.checkpoint, prepared.calibration, records_file)
    watch = Stopwatch(clock)
    with watch("text"):
        windows, labels = read_labelled(prepared)
    prepared = replace(prepared, job=replace(prepared.job, labels=labels))
    settings = prepared_settings(prepared, windows)
    warnings = _warnings(prepared, windows)
    if (
        finished
        and (
            record := on_first(lambda: _finished(out, settings, warnings, records_file, overwrite, request.stock_only))
        )
        is not None
    ):
        return record if rank() == 0 else {}
    warned = say_expected(prepared)
    writer, buffer_bytes = on_first(
        lambda: new_writer(prepared, windows, settings, out, resume=resume, overwrite=overwrite)
    )
    if rank() > 0:
        whole_model_plan(replace(prepared.job, state_file=writer.part(LEARNING)), windows, watch)
        return {}
    state = None if states is None else _shared_state(prepared, settings, states)
    seconds_before = _seconds(state)
    # a run that goes on finishes its parts at another pace, and processes share their work
    expected = None if resume or launched() else announce(prepared, windows)
    for name, taken in writer.before.by.items():
        watch.seconds[name] += taken

    def spent() -> Spent:
        return replace(writer.before, seconds=writer.before.seconds + clock() - started, by=watch.rounded())

    with expecting(expected), writer.counting(spent):
        facts, stock = make_checkpoint(
            replace(prepared, job=replace(prepared.job, state_file=state)), windows, settings, writer, watch
        )
    seconds = round(spent().seconds, 3)
    if state is not None:
        state.with_suffix(".json").write_text(json.dumps(seconds_before | {str(prepared.sparsity): seconds}), "utf-8")
    record = {
        "command": "prune",
        "version": records.version(),
        **settings,
        **facts,
        "warnings": warnings,
        "stock": stock,
        "bytes_before": prepared.checkpoint.weight_bytes(),
        "bytes_after": weight_bytes(out),
        "seconds": seconds,
        **writer.before.facts,
        **({"seconds_before": round(sum(seconds_before.values()), 3)} if seconds_before else {}),
        "seconds_by": watch.rounded(),
        "peak_rss_bytes": records.peak_rss_bytes(),
        "buffer_bytes": buffer_bytes,
        "versions": records.versions(),
        "out": str(out),
    }
    records.append(records_file, record)
    _say_result(record, warned)
    return record


def _finished(
    out: Path, settings: Mapping[str, Any], warnings: list[str], records_file: Path, overwrite: bool, stock_only: bool
) -> records.Record | None:
    """Return the record of a run that is complete already; None to start again."""
    plan = read_plan_json(out)
    assert plan is not None
    if not same_run(out, differing_from_plan(plan, settings), overwrite):
        return None
    stock = not (out / f"{runtime.MODULE}.py").is_file()
    if stock_only and not stock:
        raise UsageError(
            f"--stock-only: '{out}' is finished, and it is not a stock model; use another method or sparsity"
        )
    clean(out)
    say(f"{out}: already there")
    if (last := records.last(records_file, "prune", out)) is not None:
        return last
    record = {
        "command": "prune",
        "version": records.version(),
        **{k: v for k, v in plan.items() if k not in ("format", "blocks")},
        **settings,
        "warnings": warnings,
        "stock": stock,
        "out": str(out),
    }
    records.append(records_file, record)
    return record


def _warnings(prepared: Prepared, windows: Tensor | None) -> list[str]:
    """Return the warnings that a reader of the result must know too."""
    line = None if windows is None else few_tokens(prepared.job, windows.numel())
    return [] if line is None else [line]


def _shared_state(prepared: Prepared, settings: Mapping[str, Any], states: Path) -> Path | None:
    """Return the file for the state of a gradual method, one for all sparsities; None if runs cannot share a state."""
    job = prepared.job
    if (
        not (job.whole_model and job.method.gradual(job.options))
        or len({rate for rates in job.rates for rate in rates.values()}) > 1
    ):
        return None
    shared = {
        **{name: value for name, value in settings.items() if name not in ("sparsity", "params_removed")},
        "source": identity(prepared.checkpoint),
    }
    with disk(states.parent):
        states.mkdir(parents=True, exist_ok=True)
    return states / f"{hashlib.sha256(json.dumps(shared, default=str).encode()).hexdigest()[:16]}.safetensors"


def _seconds(state: Path | None) -> dict[str, float]:
    """Return the seconds of the runs that a state comes from, by sparsity."""
    if state is None or not state.is_file() or not state.with_suffix(".json").is_file():
        return {}
    seconds: dict[str, float] = json.loads(state.with_suffix(".json").read_text("utf-8"))
    return seconds


def _say_result(record: records.Record, warned: bool) -> None:
    """Print warnings about the result that were not known before the work."""
    requested = record["params_removed"]
    if requested is not None and not warned and abs(record["pruning_ratio"] - requested) > OFF:
        say(f"warning: --params-removed {requested:g}: {record['pruning_ratio']:.1%} of the parameters were removed")
    if rows := record["zero_rows"]:
        say(
            f"note: {rows:,} rows of matrices are all zero; "
            "float8 weights with one scale per row turn such rows into NaN (int8 and int4 do not)"
        )
