"""Run a recipe: check all of its steps, then do one after the other, each on the result of the one before.

Results are numbered by their place among results, so that a step that writes none does not change their names: the
folders `1-prune` and `2-heal`, `records.jsonl`, and `report.html`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from secateur.core import records
from secateur.core.device import resolve_device
from secateur.core.errors import SecateurError, UsageError
from secateur.core.paths import to_path
from secateur.core.progress import say
from secateur.core.records import Record
from secateur.evaluate.estimate import estimate_evaluate
from secateur.evaluate.evaluate import evaluate, prepare_questions
from secateur.heal.estimate import estimate_heal
from secateur.heal.heal import check_request, heal
from secateur.heal.lora import find_targets, need_peft
from secateur.models.load import BUNDLED, Checkpoint, open_checkpoint
from secateur.models.save import plan_file, refuse_existing
from secateur.plan.plan import read_plan_json
from secateur.plan.quantity import WEIGHTS
from secateur.predict.find import find_records
from secateur.prune.default import with_method
from secateur.prune.prepare import prepare
from secateur.recipe.fields import WRITES
from secateur.recipe.read import Recipe, Step, written_recipe
from secateur.reconstruct.estimate import estimate
from secateur.reconstruct.prune import prune
from secateur.reconstruct.reconstruct import check_request as check_reconstruct
from secateur.reconstruct.reconstruct import reconstruct
from secateur.text.protocols import find_protocol

RECORDS, REPORT = "records.jsonl", "report.html"
_NOT_VERSIONS = ("weights", "model_fingerprint")  # the entries of `made` that are no versions


@dataclass(frozen=True)
class _Task:
    """A step, ready to be done.

    Attributes:
        step: the step.
        request: its settings, with the model that it works on.
        out: the folder that it writes, or None.
        bundled: whether its result, or the model that it measures, is known as the model in the package.
    """

    step: Step
    request: Any
    out: Path | None
    bundled: bool


def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[Record]:
    """Do the steps of a recipe; yield the record of each, and a last one with `command` `run`.

    All steps are checked before the first one starts.

    Args:
        recipe: from `read_recipe`.
        out: the folder for the results, `records.jsonl` and `report.html`.
        device: where every step computes; None leaves it to the recipe.
        resume: go on with an interrupted run; finished steps are not done again.
        overwrite: replace results that are there.

    Raises:
        UsageError, SecateurError: a step is wrong, or failed; what was finished before it stays.
    """
    out = to_path(out).absolute()
    if out.is_dir() and any(out.iterdir()) and not (resume or overwrite):
        raise UsageError(
            f"--out '{out}' exists and is not empty: go on there with --resume, choose another folder, or replace its "
            "results with --overwrite"
        )
    refuse_existing(out, overwrite=True)
    checkpoint = _open(recipe)
    tasks = _tasks(recipe, checkpoint, out, device)
    _check(recipe, checkpoint, tasks)
    for number, task in enumerate(tasks, start=1):
        target = "" if task.out is None else f" -> {task.out}"
        say(f"step {number} of {len(tasks)}, {task.step.kind}{target}")
        with _named(recipe, task.step):
            yield _do(task, out, resume=resume, overwrite=overwrite)
    yield _compared(recipe, checkpoint, tasks, out)


def estimate_recipe(recipe: Recipe, *, device: str | None = None) -> Iterator[Record]:
    """Yield what `--dry-run` prints: the estimate of each step that has one, and the settings of the others.

    All steps are checked; nothing is written. An `eval` and a `heal` are estimated on the model of the recipe, which
    is larger than their own (`at_most`); a later `prune` has no estimate before its model is there.
    """
    checkpoint = _open(recipe)
    tasks = _tasks(recipe, checkpoint, Path(), device)
    _check(recipe, checkpoint, tasks)
    for number, task in enumerate(tasks):
        if task.step.kind == "prune" and number == 0:
            yield {"step": task.step.where, **estimate(prepare(task.request))}
        elif task.step.kind == "heal" and number == 0:
            yield {"step": task.step.where, **estimate_heal(task.request)}
        elif task.step.kind == "eval":
            on_dense = replace(task.request, model=recipe.model, revision=recipe.revision, against=None)
            yield {"step": task.step.where, **estimate_evaluate(on_dense)}
        elif task.step.kind == "heal":
            yield _healing_at_most(recipe, checkpoint, tasks[:number], task)
        else:
            yield {"command": "run", "dry_run": True, "step": task.step.where, "waits": task.step.kind != "report"}


def _healing_at_most(recipe: Recipe, checkpoint: Checkpoint, before: list[_Task], task: _Task) -> Record:
    """Estimate a healing on the model of the recipe instead of the pruned one; if a text cannot be read, say why.

    Matrices count as zeroed where a pruning before may zero weights: their adapters take more memory.
    """
    view = checkpoint.view()
    prunings = [one.request for one in before if one.step.kind == "prune"]
    jobs = [prepare(replace(request, model=recipe.model, revision=recipe.revision)) for request in prunings]
    zeroes = any(job.job.quantity is WEIGHTS for job in jobs)
    masks = {name: {"removed": 1} for name in view.family.matrices} if zeroes else {}
    calibrations = [spec for job in jobs if (spec := job.calibration) is not None]
    plan = {
        "model": BUNDLED if task.bundled else recipe.model,
        "calibration": {"spec": calibrations[-1]} if calibrations else None,
        "blocks": [{"masks": masks}] * view.blocks,
    }
    model = recipe.model if recipe.model == BUNDLED else str(checkpoint.folder)
    try:
        found = estimate_heal(replace(task.request, model=model), before=plan)
    except UsageError:
        raise
    except SecateurError as error:
        return {"command": "run", "dry_run": True, "step": task.step.where, "waits": True, "why": str(error)}
    return {"step": task.step.where, "at_most": True, **found}


def _check(recipe: Recipe, checkpoint: Checkpoint, tasks: list[_Task]) -> None:
    """Check every step as far as can be known before the work: as if it worked on the model of the recipe.

    Raises:
        UsageError, SecateurError: the message names the step.
    """
    plan = _plan(checkpoint)
    pruned, has_text = bool(plan), bool(plan.get("calibration"))  # a healing without a text takes that of the pruning
    for task in tasks:
        request = task.request
        with _named(recipe, task.step):
            if task.step.kind == "prune":
                on_dense = replace(request, model=recipe.model, revision=recipe.revision)
                has_text, pruned = prepare(on_dense).calibration is not None, True
            elif task.step.kind == "heal":
                check_request(request)
                need_peft()
                resolve_device(request.device)
                _check_pruned(task.step.kind, pruned=pruned)
                find_targets(checkpoint.view(), request.targets)
                find_protocol(request.protocol, request.text, bundled=task.bundled)
                _check_text(task, "heal on", has_text=has_text)
            elif task.step.kind == "reconstruct":
                check_reconstruct(request)
                resolve_device(request.device)
                _check_pruned(task.step.kind, pruned=pruned)
                _check_text(task, "learn from", has_text=has_text)
            elif task.step.kind == "eval":
                prepare_questions(request, checkpoint, bundled=task.bundled)


def _check_pruned(kind: str, *, pruned: bool) -> None:
    """Raise UsageError if a step that mends a pruned model has none."""
    if not pruned:
        raise UsageError(
            f"{kind} mends what prune made: put a prune step before it, or give a model that secateur pruned"
        )


def _check_text(task: _Task, to: str, *, has_text: bool) -> None:
    """Raise UsageError if a step that trains has no text; `to` says what for, and `has_text` if the pruning had one."""
    if task.request.calibration is None and not (has_text or task.bundled):
        raise UsageError(f"calibration is missing: the text to {to} (the pruning itself needs none)")


def _plan(checkpoint: Checkpoint) -> dict[str, Any]:
    return (read_plan_json(checkpoint.folder) if plan_file(checkpoint.folder) else None) or {}


def _open(recipe: Recipe) -> Checkpoint:
    try:
        return open_checkpoint(recipe.model, recipe.revision)
    except SecateurError as error:
        there = recipe.model == BUNDLED or Path(recipe.model).expanduser().exists()
        if recipe.replaced or there:
            raise
        if recipe.made is None or recipe.revision is not None:
            raise type(error)(f"{recipe.file}: {error}, or give its folder with --model FOLDER") from error
        raise UsageError(
            f"{recipe.file}: the recipe was made with a folder '{recipe.model}', which is neither beside it nor in the "
            f"working folder: name it with --model FOLDER ({error})"
        ) from error


@contextmanager
def _named(recipe: Recipe, step: Step) -> Iterator[None]:
    """Let the errors of a step begin with its place in the recipe."""
    try:
        yield
    except SecateurError as error:
        raise type(error)(f"{recipe.file}, {step.where}: {error}") from error


def _tasks(recipe: Recipe, checkpoint: Checkpoint, out: Path, device: str | None) -> list[_Task]:
    """Give each step the result of the step before it, the folder for its own, and what it is compared with."""
    model, revision, written = recipe.model, recipe.revision, 0
    built_in = BUNDLED in (recipe.model, _plan(checkpoint).get("model"))  # the built-in text is then that of every step
    # Whether a command sees that by itself: a second pruning names its plan after the first result.
    bundled = built_in
    tasks: list[_Task] = []
    for step in recipe.steps:
        request, target = step.request, None
        if request is not None:
            names = {field.name for field in fields(request)}
            changes: dict[str, Any] = {"model": model, **({"revision": revision} if "revision" in names else {})}
            if device is not None:
                changes["device"] = device
            if step.kind == "eval" and written and "against" not in step.given:
                changes |= {"against": recipe.model, "against_revision": recipe.revision}
            if built_in and model != BUNDLED and step.kind == "prune" and not request.calibration:
                changes["calibration"] = "builtin"
            measures = step.kind == "eval" or (step.kind == "heal" and request.evaluate)
            if built_in and not bundled and measures and not (request.text or request.protocol):
                changes["text"] = "builtin"
            if built_in and not bundled and step.kind in ("heal", "reconstruct") and not request.calibration:
                changes["calibration"] = next(
                    (t.request.calibration for t in tasks[::-1] if t.step.kind == "prune"), None
                )
            request = replace(request, **changes)
        if step.kind == "prune":
            bundled = model == BUNDLED
            with _named(recipe, step):
                request = with_method(request)
        if step.kind in WRITES:
            written += 1
            target = out / f"{written}-{step.kind}"
            model, revision = str(target), None
        tasks.append(_Task(step, request, target, bundled))
    return tasks


def _do(task: _Task, out: Path, *, resume: bool, overwrite: bool) -> Record:
    """Do one step, and return its record."""
    file = out / RECORDS
    if task.step.kind == "report":
        from secateur.report import html  # imported here: matplotlib takes a second to load

        written = html.write_report(find_records([out]), out / REPORT, title=f"Recipe {out.name}")
        return {"command": "report", "out": str(out / REPORT), "files": [str(path) for path in written]}
    if task.step.kind == "eval":
        return evaluate(task.request, records_file=file, resume=resume)
    assert task.out is not None
    works: dict[str, Callable[..., Record]] = {"prune": prune, "reconstruct": reconstruct, "heal": heal}
    return works[task.step.kind](task.request, task.out, resume=resume, overwrite=overwrite, records_file=file)


def _compared(recipe: Recipe, checkpoint: Checkpoint, tasks: list[_Task], out: Path) -> Record:
    """Compare the last result with what the recipe says of it, in words and as a record.

    Its `same` is None where the recipe does not say, or was run on another model.
    """
    result = next((task.out for task in reversed(tasks) if task.out is not None), None)
    record: Record = {
        "command": "run",
        "version": records.version(),
        "recipe": str(recipe.file),
        "model": recipe.model,
        "out": str(out),
        "result": None if result is None else str(result),
        "same": None,
        "differs": [],
        "versions_differ": {},
    }
    ours = ((written_recipe(result) or {}).get("made") or {}) if result is not None else {}
    made = recipe.made or {}
    expected = made.get("weights")
    if not ours or not isinstance(expected, Mapping) or not expected:
        return record
    if made.get("model_fingerprint") != checkpoint.fingerprint() and made.get("model_fingerprint") is not None:
        model = "the model is not the one" if recipe.replaced else f"warning: the model '{recipe.model}' is not the one"
        say(f"{model} that the recipe was made with, so the weights are others too")
        return record
    weights = ours["weights"]
    files = sorted({*weights, *expected})
    record["differs"] = [name for name in files if weights.get(name) != expected.get(name)]
    record["same"] = not record["differs"]
    if record["same"]:
        say(f"{result}: the same bytes as the recipe says ({', '.join(files)})")
        return record
    record["versions_differ"] = {
        name: [made.get(name), now] for name, now in ours.items() if name not in _NOT_VERSIONS and made.get(name) != now
    }
    why = ", ".join(f"{name} {had or 'unknown'}, now {now}" for name, (had, now) in record["versions_differ"].items())
    say(
        f"warning: other bytes than the recipe says, in {', '.join(record['differs'])}: "
        + (f"it was made with {why}" if why else "was a step changed, or is the processor another? The versions agree")
    )
    return record
