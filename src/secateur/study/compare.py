"""Methods side by side: one model, one protocol, the same measured pruning ratio; the table that papers print.

A cell is one method at one ratio, or at one sparsity where it zeroes weights; with `heal`, each is also measured after
low-rank recovery. Every prune and every healing runs in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeVar

from secateur.core import records
from secateur.core.errors import SecateurError, UsageError
from secateur.core.names import named, shown
from secateur.core.paths import to_path
from secateur.core.progress import say, sent_elsewhere
from secateur.core.records import Record
from secateur.core.words import perplexity_words
from secateur.core.workers import start_work
from secateur.evaluate.evaluate import evaluate
from secateur.evaluate.throughput import bench
from secateur.heal.heal import heal
from secateur.methods import find_method
from secateur.models.save import plan_file, refuse_existing
from secateur.plan.pattern import parse_pattern
from secateur.prune.prepare import prepare
from secateur.prune.run import STATES, prune
from secateur.reconstruct.prune import reconstruction_of
from secateur.reconstruct.reconstruct import reconstruct
from secateur.report.compare import Comparison, comparison, markdown, winner
from secateur.report.rows import collect, group
from secateur.requests import BenchRequest, CompareRequest, EvalRequest, HealRequest, ReconstructRequest, Request
from secateur.study.sweep import RECONSTRUCTED, point_name, take_over

T = TypeVar("T")

_HEALED = "-healed"
_LOOK_SECONDS = 0.2  # between two looks at the lines of a process
_STRUCTURED = "rows"  # what a method that zeroes weights by default is asked for where parameters are to go
_ZEROED = "unstructured"  # and one that removes parameters by default, where weights are to be zeroed


@dataclass
class Cells:
    """What will be run, and what cannot be done, with the reason; `failed`, `untimed` and `unhealed` fill during the
    run.
    """

    runs: dict[str, Request] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    untimed: dict[str, str] = field(default_factory=dict)
    unhealed: dict[str, str] = field(default_factory=dict)
    unmended: dict[str, str] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What was not run, timed or healed, and why, a line a reason."""
        reasons: dict[tuple[str, str], list[str]] = {}
        for what, missing in {
            "run": self.refused | self.failed,
            "timed": self.untimed,
            "reconstructed": self.unmended,
            "healed": self.unhealed,
        }.items():
            for label, reason in missing.items():
                reasons.setdefault((what, reason), []).append(label)
        return [f"Not {what}: {', '.join(labels)}: {reason}" for (what, reason), labels in reasons.items()]

    def incomplete(self) -> list[str]:
        """The runs of which a part failed, in their order."""
        parts = self.failed | self.untimed | self.unhealed | self.unmended
        return [label for label in self.runs if any(part == label or part.startswith(f"{label}-") for part in parts)]


@dataclass(frozen=True)
class Compared:
    """What a comparison found.

    Attributes:
        records: the evaluation records, the dense model's first.
        cells: the runs, and what could not be done.
        table: what `compare.md` prints; None where nothing can be put side by side.
        finding: the winner and what it was compared with, in one sentence or two; as the report has it.
    """

    records: list[Record]
    cells: Cells
    table: Comparison | None
    finding: str


def compare(
    asked: CompareRequest,
    out: str | Path,
    measure: EvalRequest,
    *,
    resume: bool = False,
    overwrite: bool = False,
    records_file: str | Path | None = None,
) -> Compared:
    """Run methods side by side, and write `compare.md` and `report.html`; says each result as it comes.

    Args:
        asked: what is compared.
        out: the folder that receives the checkpoints, `records.jsonl` and the pages.
        measure: the evaluation; its model is replaced.
        resume, overwrite, records_file: as for `study.sweep`.

    Raises:
        UsageError, SecateurError: nothing can be compared, a folder is in the way, or the dense model cannot be
            measured.
    """
    out, records_file = to_path(out), to_path(records_file)
    todo, measured = cells(asked), []
    for note in todo.notes():
        say(note)
    for record in run(asked, todo, out, measure, resume=resume, overwrite=overwrite, records_file=records_file):
        measured.append(record)
        name = Path(record["out"]).name if record.get("method") else "dense"
        say(f"{name}: ppl {perplexity_words(record['ppl'])}")
    table, finding = summary(asked, todo, out.absolute(), measured, records_file=records_file)
    return Compared(measured, todo, table, finding)


def cells(asked: CompareRequest) -> Cells:
    """The runs, by the names of their folders.

    Raises:
        UsageError: nothing to compare, an unknown method, options of a method that is not compared.
        SecateurError: no cell can be done; the reason of the first is given.
    """
    if not asked.methods:
        raise UsageError(
            "--methods is empty: name methods, as in --methods slicegpt,magnitude (`secateur methods` lists them)"
        )
    kinds = [parse_pattern(pattern).kind for pattern in asked.patterns]
    if not (asked.ratios or asked.sparsities or "n:m" in kinds):
        raise UsageError(
            "nothing to compare at: give --params-removed R,..., or --sparsity S,... or --patterns N:M for methods "
            "that zero weights"
        )
    if others := sorted(set(asked.options) - set(asked.methods)):
        raise UsageError(f"--set {others[0]}.OPTION: '{others[0]}' is not among --methods {','.join(asked.methods)}")
    found, errors = Cells(), []
    for name in dict.fromkeys(asked.methods):
        method, options = find_method(name), asked.options.get(name, {})
        own = getattr(method.options(options), "pattern", None)
        base = replace(
            asked.base,
            method=name,
            sparsity=None,
            params_removed=None,
            pattern=None,
            modules=None,
            options=options,
            at_least=False,
            reconstruct=False,
        )
        attempts = _attempts(base, asked, own)
        for label, (request, guessed) in attempts.items():
            try:
                prepare(request)
            except SecateurError as error:
                if not (guessed and len(attempts) > sum(g for _, g in attempts.values())):
                    found.refused[label] = str(error)
                    errors.append(error)
                continue
            found.runs[label] = request
        if not attempts:
            found.refused[name] = (
                "it removes parameters: give --params-removed R"
                if own is None
                else f"its patterns ({own}) zero weights: give --sparsity S, or --patterns N:M"
            )
            errors.append(UsageError(f"{name}: {found.refused[name]}"))
    if not found.runs:
        raise errors[0]
    return found


def _attempts(base: Request, asked: CompareRequest, own: str | None) -> dict[str, tuple[Request, bool]]:
    """Label -> what one method may be asked for, and whether its pattern is a guess of ours."""
    patterns: Sequence[str | None] = [None] if own is None else asked.patterns or [own]
    guesses = []
    if own is not None and not asked.patterns:
        other, wanted = (_ZEROED, asked.sparsities) if parse_pattern(own).structured else (_STRUCTURED, asked.ratios)
        guesses = [other] if wanted else []
    found = {}
    for pattern in [*patterns, *guesses]:
        request = replace(base, pattern=pattern if own is not None else None)
        kind = None if pattern is None else parse_pattern(pattern)
        if kind is None or kind.structured:
            for ratio in sorted(
                filter(None, asked.ratios)
            ):  # of a gradual method the higher ones go on from the lower; the dense model is always measured
                found[f"{point_name(request, ratio)}-params"] = (
                    replace(request, params_removed=ratio, at_least=asked.base.at_least),
                    pattern in guesses,
                )
        elif kind.implied_sparsity is not None:
            found[point_name(request, kind.implied_sparsity)] = (request, False)
        else:
            for sparsity in sorted(filter(None, asked.sparsities)):
                found[point_name(request, sparsity)] = (replace(request, sparsity=sparsity), False)
    return found


def run(
    asked: CompareRequest,
    todo: Cells,
    out: Path,
    measure: EvalRequest,
    *,
    resume: bool = False,
    overwrite: bool = False,
    records_file: Path | None = None,
) -> Iterator[Record]:
    """Prune, measure, heal and measure again; yields the evaluation records as they come, the dense model's first.

    Args:
        asked: what is compared.
        todo: from `cells`; what fails on the way is noted there, and the others go on.
        out: the folder that receives the checkpoints and `records.jsonl`.
        measure: the evaluation; its model is replaced.
        resume, overwrite, records_file: as for `study.sweep`.

    Raises:
        UsageError, SecateurError: a folder is in the way, or the dense model cannot be measured.
    """
    out = out.absolute()
    records_file = records_file or out / "records.jsonl"
    mended = f"-{RECONSTRUCTED}" if asked.base.reconstruct else ""
    parts = dict.fromkeys(["", mended, *([_HEALED, mended + _HEALED] if asked.heal else [])])
    for label in [label + part for label in todo.runs for part in parts]:
        if not (resume and plan_file(out / label)):
            refuse_existing(out / label, overwrite)
    if not resume:
        rmtree(out / STATES, ignore_errors=True)
    dense = replace(measure, model=asked.base.model, revision=asked.base.revision, against=None)
    yield in_own_process(_evaluate, dense, records_file, resume)
    for label, request in todo.runs.items():
        target = out / label
        asking = replace(measure, model=str(target), revision=None)
        with _noted(todo.failed, label, "failed"):
            if resume:
                take_over(request, target)
            yield _finished_here(target, resume)(_prune, request, target, asking, records_file, resume, overwrite)
        if label in todo.failed:
            continue
        if asked.bench is not None:
            with _noted(todo.untimed, label, "was not timed"):
                _bench(asked.bench, asked.base.model, target, records_file, resume)
        if mended:
            better, how = out / (label + mended), replace(reconstruction_of(request), model=str(target))
            with _noted(todo.unmended, label, "was not reconstructed"):
                yield _finished_here(better, resume)(
                    _reconstruct, how, better, replace(asking, model=str(better)), records_file, resume, overwrite
                )
        if asked.heal is not None:
            for source in dict.fromkeys([label] if label in todo.unmended else [label, label + mended]):
                healed = out / (source + _HEALED)
                again = replace(asked.heal, model=str(out / source))
                with _noted(todo.unhealed, source, "was not healed"):
                    yield _finished_here(healed, resume)(
                        _heal, again, healed, replace(asking, model=str(healed)), records_file, resume, overwrite
                    )
    rmtree(out / STATES, ignore_errors=True)


@contextmanager
def _noted(where: dict[str, str], label: str, words: str) -> Iterator[None]:
    """What goes wrong is written down, and the others go on."""
    try:
        yield
    except SecateurError as error:
        where[label] = str(error)
        say(f"{label} {words}: {error}")


def _bench(request: BenchRequest, dense: str, target: Path, records_file: Path, resume: bool) -> None:
    """Time a result beside the dense model, unless that was done."""
    done = (
        [r for r in records.read([records_file]) if r.get("command") == "bench" and r.get("out") == str(target)]
        if resume
        else []
    )
    if not done:
        in_own_process(_time, replace(request, model=str(target), dense=dense), records_file)


def summary(
    asked: CompareRequest, todo: Cells, out: Path, found: Sequence[Record], *, records_file: Path | None = None
) -> tuple[Comparison | None, str]:
    """Write `compare.md` and `report.html` into `out`; returns the table, and the winner in words.

    Args:
        asked, todo, out, records_file: as for `run`.
        found: what it yielded.
    """
    places = {record["out"] for record in found}
    taken = [
        record
        for record in records.read([records_file or out / "records.jsonl"])
        if record.get("command") in ("prune", *records.CHANGES, "bench") and record.get("out") in places
    ]
    both, model = named([*taken, *found]), shown(asked.base.model)
    main = group(collect(both))[0]
    result, finding = comparison(main.rows, both), winner(main)
    if result is not None:
        notes = [*result.notes, *todo.notes()]
        (out / "compare.md").write_text(
            f"# {model}: methods compared\n\n{finding}\n\n{markdown(replace(result, notes=tuple(notes)))}", "utf-8"
        )
    from secateur.report import html  # matplotlib takes a second

    html.write_report(both, out / "report.html", title=f"{model}: methods compared")
    return result, finding


def _finished_here(target: Path, resume: bool) -> Callable[..., Record]:
    """What is made already needs no process of its own."""
    return _here if resume and plan_file(target) else in_own_process


def _here(work: Callable[..., T], *given: Any) -> T:
    return work(*given)


def in_own_process(work: Callable[..., T], *given: Any) -> T:
    """Run a function in a new process that knows nothing of this one.

    Raises:
        SecateurError: what the function raises, or that its process died.
    """
    context = get_context("spawn")
    lines = context.SimpleQueue() if sent_elsewhere() else None
    try:
        with ProcessPoolExecutor(1, mp_context=context, initializer=start_work, initargs=(lines,)) as pool:
            future = pool.submit(work, *given)
            while lines is not None and not wait([future], _LOOK_SECONDS).done:
                _pass_on(lines)
            return future.result()
    except BrokenProcessPool as error:
        raise SecateurError(
            "its process died, for want of memory perhaps; use fewer --samples or a shorter --seqlen, and go on with "
            "--resume"
        ) from error
    finally:
        if lines is not None:
            _pass_on(lines)
            lines.close()


def _pass_on(lines: SimpleQueue[str]) -> None:
    while not lines.empty():
        say(lines.get())


def _evaluate(measure: EvalRequest, records_file: Path, resume: bool) -> Record:
    _quiet()
    return evaluate(measure, records_file=records_file, resume=resume, known=True, announced=False)


def _prune(
    request: Request, target: Path, measure: EvalRequest, records_file: Path, resume: bool, overwrite: bool
) -> Record:
    _quiet()
    prune(request, target, resume=resume, overwrite=overwrite, records_file=records_file, states=target.parent / STATES)
    return evaluate(measure, records_file=records_file, resume=resume)


def _reconstruct(
    request: ReconstructRequest, target: Path, measure: EvalRequest, records_file: Path, resume: bool, overwrite: bool
) -> Record:
    _quiet()
    reconstruct(request, target, resume=resume, overwrite=overwrite, records_file=records_file)
    return evaluate(measure, records_file=records_file, resume=resume)


def _heal(
    request: HealRequest, target: Path, measure: EvalRequest, records_file: Path, resume: bool, overwrite: bool
) -> Record:
    _quiet()
    heal(request, target, resume=resume, overwrite=overwrite, records_file=records_file)
    return evaluate(measure, records_file=records_file, resume=resume)


def _time(request: BenchRequest, records_file: Path) -> None:
    _quiet()
    bench(request, records_file=records_file)


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
