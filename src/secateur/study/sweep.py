"""One method at several sparsities: the dense model, then prune and measure at each. The same for any prunes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from secateur.core.paths import to_path
from secateur.core.records import Record
from secateur.evaluate.evaluate import evaluate
from secateur.methods import find_method
from secateur.models.save import is_finished, partial_folder, plan_file
from secateur.prune.prepare import prepare
from secateur.prune.run import STATES
from secateur.prune.settings import refuse_out
from secateur.reconstruct.prune import prune
from secateur.requests import EvalRequest, Request

RECONSTRUCTED = "reconstructed"


def sweep(
    request: Request,
    sparsities: Sequence[float],
    out: str | Path,
    measure: EvalRequest,
    *,
    resume: bool = False,
    overwrite: bool = False,
    records_file: str | Path | None = None,
    ratios: Sequence[float] = (),
) -> Iterator[Record]:
    """Prune at several sparsities, the lowest first, and measure each, and the dense model before them.

    Yields the evaluation records as they come. A gradual method goes on from sparsity to sparsity, in one run.

    Args:
        request: the prune, without its sparsity.
        sparsities: the fractions to remove; 0 is the dense model, which is always measured.
        out: the folder that receives one checkpoint a sparsity, and `records.jsonl`.
        measure: the evaluation; its model is replaced.
        resume: leave what is finished as it is; with `overwrite`, do again what was made with other settings.
        overwrite: replace checkpoints that are there.
        records_file: where records go instead.
        ratios: shares of all parameters to remove (`--params-removed`), beside or instead of sparsities.
    """
    requests = sweep_requests(request, sparsities, ratios)
    measure = replace(measure, model=request.model, revision=request.revision)
    how = {"resume": resume, "overwrite": overwrite}
    yield from prune_and_measure(requests, to_path(out), measure, records_file=to_path(records_file), **how)


def sweep_requests(request: Request, sparsities: Sequence[float], ratios: Sequence[float]) -> dict[str, Request]:
    """Return the prunes of a sweep by the names of their folders, the lowest first; 0 is the dense model, no prune."""
    requests = {point_name(request, s): replace(request, sparsity=s) for s in sorted(sparsities) if s != 0}
    return requests | {
        f"{point_name(request, ratio)}-params": replace(request, sparsity=None, params_removed=ratio)
        for ratio in sorted(ratios)
        if ratio != 0
    }


def prune_and_measure(
    requests: Mapping[str, Request],
    out: str | Path,
    measure: EvalRequest,
    *,
    resume: bool = False,
    overwrite: bool = False,
    records_file: str | Path | None = None,
) -> Iterator[Record]:
    """Prune as each request says and measure each, and the dense model first.

    Yields the evaluation records as they come.

    Args:
        requests: the prunes, of one model, by the names of their folders.
        out: the folder that receives the checkpoints, and `records.jsonl`.
        measure: the evaluation; its model is that of the requests.
        resume, overwrite, records_file: as for `sweep`.
    """
    out = to_path(out).absolute()
    records_file = to_path(records_file) or out / "records.jsonl"
    points = [(request, out / name) for name, request in requests.items()]
    states = out / STATES
    if not resume:
        shutil.rmtree(states, ignore_errors=True)
    for once, target in points:  # what is wrong with any of them shows before the work
        prepared = prepare(once)
        refuse_out(target, prepared.checkpoint, prepared.calibration, records_file)
        is_finished(target, resume=resume, overwrite=overwrite)
    dense = replace(measure, against=None)
    yield evaluate(dense, records_file=records_file, resume=resume, known=True, announced=False)
    for once, target in points:
        if resume:
            take_over(once, target)
        prune(once, target, resume=resume, overwrite=overwrite, records_file=records_file, states=states)
        yield evaluate(replace(measure, model=str(target), revision=None), records_file=records_file, resume=resume)
    shutil.rmtree(states, ignore_errors=True)


def take_over(request: Request, target: Path) -> None:
    """Give the interrupted run of a point the name of its new options, so that `--resume` goes on from there.

    Names of points hold the options. Some options may have another value when an interrupted run is resumed, such as
    `steps` (`Says.MAY_CHANGE`); `prune` checks all other settings as always.
    """
    may_change = find_method(request.method).says.MAY_CHANGE
    if not may_change or plan_file(target) or partial_folder(target).exists():
        return

    def fixed(name: str) -> list[str]:
        return [part for part in name.split("-") if part.partition("=")[0] not in may_change]

    runs = [partial for partial in target.parent.glob("*.partial") if fixed(partial.stem) == fixed(target.name)]
    if runs:
        max(runs, key=lambda run: run.stat().st_mtime).rename(partial_folder(target))


def point_name(request: Request, sparsity: float) -> str:
    """The folder name of one point of a sweep."""
    options = [f"{name}={value}" for name, value in sorted(request.options.items())]
    parts = [request.method, (request.pattern or "").replace(":", "of"), *options, f"{sparsity:g}"]
    if request.reconstruct:
        parts.append(RECONSTRUCTED)
    return "-".join(part for part in parts if part)
