"""`prune --reconstruct`: prune, then reconstruct; only the last result stays.

The pruned checkpoint lies beside the result while the work goes on, under a hidden name, and both stages resume.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.core import records
from secateur.core.distributed import rank
from secateur.core.errors import UsageError
from secateur.core.paths import to_path
from secateur.core.progress import say
from secateur.core.torchrun import launched
from secateur.models.load import BUNDLED
from secateur.models.save import (
    differing_from_plan,
    is_finished,
    partial_folder,
    plan_file,
    refuse_existing,
    same_run,
)
from secateur.plan.plan import read_plan_json
from secateur.prune import run as pruning
from secateur.prune.calibration import read_windows
from secateur.prune.default import with_method
from secateur.prune.prepare import Prepared, prepare
from secateur.prune.settings import prepared_settings
from secateur.reconstruct.reconstruct import check_request, reconstruct
from secateur.requests import ReconstructRequest, Request


def prune(
    request: Request,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    records_file: str | Path | None = None,
    **how: Any,
) -> records.Record:
    """Prune a model and write the result to `out`, reconstructed if `request.reconstruct` says so.

    Args:
        request, out, resume, overwrite, records_file, how: as for `secateur.prune.run.prune`; a request without a
            method gets one (`prune.default`).

    Returns:
        The record: of `prune`, or of `reconstruct` with the time and the memory of both.

    Raises:
        UsageError, SecateurError: the run failed; `out` then holds nothing that looks like a result.
    """
    request = with_method(request)
    again: dict[str, Any] = {"resume": resume, "overwrite": overwrite}
    if not request.reconstruct:
        return pruning.prune(request, out, records_file=records_file, **again, **how)
    if launched():
        raise UsageError("--reconstruct works in one process: prune under torchrun, then `secateur reconstruct DIR`")
    out = to_path(out).absolute()
    records_file = to_path(records_file) or out.parent / "records.jsonl"
    mended = reconstruction_of(request)
    check_request(mended)
    check_text(prepare(replace(request, reconstruct=False)))
    if is_finished(out, resume=resume, overwrite=overwrite) and _same(request, out, overwrite):
        say(f"{out}: already there")
        if (record := records.last(records_file, "reconstruct", out)) is not None:
            return record
    pruned = out.with_name(f".{out.name}-pruned")
    notes = pruned.with_name(f"{pruned.name}.jsonl")
    if not resume:
        if not overwrite and (plan_file(pruned) or partial_folder(pruned).exists()):
            raise UsageError(
                f"'{pruned}' is left from an interrupted run: go on with --resume, or start again with --overwrite"
            )
        refuse_existing(out, overwrite)
        for left in (pruned, partial_folder(pruned)):
            shutil.rmtree(left, ignore_errors=True)
        notes.unlink(missing_ok=True)
    first = pruning.prune(replace(request, reconstruct=False), pruned, resume=resume, records_file=notes, **how)
    assert rank() == 0
    record = reconstruct(replace(mended, model=str(pruned)), out, records_file=records_file, before=first, **again)
    shutil.rmtree(pruned)
    notes.unlink(missing_ok=True)
    return record


def check_text(pruning: Prepared) -> None:
    """Raise UsageError if neither the pruning nor the request names a text for the reconstruction after it."""
    request = pruning.request
    if pruning.calibration is None and request.calibration is None and request.model != BUNDLED:
        raise UsageError(
            "--reconstruct learns from a text, and this method needs none: name one with --calibration SPEC"
        )


def reconstruction_of(request: Request) -> ReconstructRequest:
    """Return the reconstruction that follows a prune: its text, windows and seed, and the defaults of `reconstruct`."""
    given = {
        name: getattr(request, name) for name in ("calibration", "seqlen", "seed", "spill", "device", "text_field")
    }
    given |= {name: getattr(request, name) for name in ("include_path", "prompt_form")}
    if request.samples is not None:
        given["samples"] = request.samples
    return ReconstructRequest("", dense=request.model, dense_revision=request.revision, **given)


def _same(request: Request, out: Path, overwrite: bool) -> bool:
    """Whether a finished result was pruned as the request says, and reconstructed."""
    plan = read_plan_json(out)
    assert plan is not None
    prepared = prepare(replace(request, reconstruct=False))
    settings = prepared_settings(prepared, read_windows(prepared))
    difference = differing_from_plan(plan, settings)
    if difference is None and not plan.get("reconstruct"):
        difference = "was not reconstructed"
    return same_run(out, difference, overwrite)
