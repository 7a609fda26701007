"""`--dry-run` of `sweep` and `compare`: the estimate of each run, and of measuring the dense model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from secateur.core.progress import say
from secateur.core.records import Record
from secateur.evaluate.estimate import estimate_evaluate
from secateur.methods import find_method
from secateur.prune.prepare import prepare
from secateur.reconstruct.estimate import estimate
from secateur.requests import CompareRequest, EvalRequest, Request
from secateur.study.compare import cells
from secateur.study.sweep import sweep_requests

Starting = Callable[[str, str | None], float | None]
"""Returns the seconds that a new process takes before its work on a model begins; None where nothing tells."""
_START = """
import sys, time
from secateur.models.load import build_skeleton, open_checkpoint
from secateur.study import compare
build_skeleton(open_checkpoint(sys.argv[1], sys.argv[2] or None).config)
print(time.process_time())
"""
_AT_MOST = 120.0  # seconds to wait for it


def start_seconds(model: str, revision: str | None) -> float | None:
    """Start a process that loads the libraries and opens a model; return the seconds of processor that it took."""
    command = [sys.executable, "-c", _START, model, revision or ""]
    with suppress(OSError, subprocess.SubprocessError, ValueError, IndexError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_AT_MOST, check=True)
        return float(done.stdout.split()[-1])
    return None


def estimate_sweep(
    request: Request, sparsities: Sequence[float], measure: EvalRequest, *, ratios: Sequence[float] = ()
) -> Iterator[Record]:
    """Yield what `sweep` would do: an estimate for each run, and a last record with the sums. Writes nothing.

    Args:
        request, sparsities, measure, ratios: as for `sweep`.

    Raises:
        UsageError, SecateurError: as `sweep` would say.
    """
    yield from _estimates("sweep", request, sweep_requests(request, sparsities, ratios), measure)


def estimate_compare(
    asked: CompareRequest, measure: EvalRequest, *, starting: Starting | None = None
) -> Iterator[Record]:
    """Yield what `compare` would do: an estimate for each run, and a last record with the sums. Writes nothing.

    Healing and timing are not in it: they have no model yet. Each run has a process of its own, and starting these is
    in the sum (`seconds_starting`).

    Args:
        asked, measure: as for `compare`.
        starting: returns the seconds that such a process takes before its work; None measures it once.

    Raises:
        UsageError, SecateurError: as `compare` would say.
    """
    todo = cells(asked)
    for note in todo.notes():
        say(note)
    once = (starting or start_seconds)(asked.base.model, asked.base.revision)
    starts = None if once is None else once * (2 + len(todo.runs))  # those of the command and of the dense model too
    runs = {name: replace(request, reconstruct=asked.base.reconstruct) for name, request in todo.runs.items()}
    yield from _estimates("compare", asked.base, runs, measure, starts, results=1 + asked.base.reconstruct)


def _estimates(
    command: str,
    base: Request,
    requests: Mapping[str, Request],
    measure: EvalRequest,
    starts: float | None = None,
    results: int = 1,
) -> Iterator[Record]:
    dense = estimate_evaluate(replace(measure, model=base.model, revision=base.revision, against=None))
    against = 1 + (measure.against is not None)  # a run that is compared with the dense model runs that too
    yield {"run": "dense", **dense}
    found = {}
    for name, request in requests.items():
        found[name] = estimate(prepare(request))
        yield {"run": name, **found[name]}
    measuring = (
        None
        if dense["seconds_estimated"] is None
        else dense["seconds_estimated"] * (1 + results * against * len(found))
    )
    pruning = _together(requests, {name: record["seconds_estimated"] for name, record in found.items()})
    known = [record["memory_bytes"] is not None for record in found.values()]
    written, more = [record["bytes_after"] for record in found.values()], starts or 0.0
    yield {
        "command": command,
        "dry_run": True,
        "runs": len(found),
        "memory_bytes": max(map(_process_bytes, (dense, *found.values()))) if all(known) else None,
        "disk_bytes": None if None in written else sum(written),
        "seconds_estimated": None if measuring is None or pruning is None else round(measuring + pruning + more, 1),
        "seconds_measuring": measuring,
        **({} if starts is None else {"seconds_starting": round(starts, 1)}),
    }


def _process_bytes(record: Record) -> int:
    return int(record["memory_bytes"]) + int(record["resident_bytes"])


def _together(requests: Mapping[str, Request], seconds: Mapping[str, float | None]) -> float | None:
    """Return the seconds of all prunes; of a gradual method the longest, which does the work of all."""
    alone, gradual = 0.0, dict[str, float]()
    for name, request in requests.items():
        if (once := seconds[name]) is None:
            return None
        method = find_method(request.method)
        if method.gradual(method.options(request.options)):
            gradual[request.method] = max(once, gradual.get(request.method, 0.0))
        else:
            alone += once
    return alone + sum(gradual.values())
