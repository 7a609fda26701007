"""Write a pruned checkpoint again, with other weights of the same shapes: what `heal` and `reconstruct` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.core import records
from secateur.core.errors import SecateurError, UsageError
from secateur.core.progress import say
from secateur.models import card, runtime
from secateur.models.load import BUNDLED, Checkpoint
from secateur.models.pruned_config import stock_problem
from secateur.models.save import (
    OWN_FOLDER,
    PLAN_PATH,
    PLAN_TENSORS,
    CheckpointWriter,
    differing_from_plan,
    plan_file,
    same_run,
)
from secateur.models.view import ModelView
from secateur.plan.plan import plan_json, read_plan_json
from secateur.plan.quantity import words_of
from secateur.prune.calibration import say_form
from secateur.requests import HealRequest, ReconstructRequest
from secateur.text.files import file_hash
from secateur.text.specs import NAMED, TASK, prompt_form


def checked_plan(plan: Mapping[str, Any] | None, model: str, does: str) -> dict[str, Any]:
    """Return the plan of a pruned checkpoint, if it says what it was pruned from.

    Args:
        plan: the plan; None where the checkpoint has none.
        model: the name of the checkpoint, as it was given.
        does: what the command does, for the message, such as `heal mends`.

    Raises:
        UsageError: secateur did not prune it.
    """
    if plan is None or not {"model", "calibration", "blocks"} <= plan.keys():
        raise UsageError(
            f"'{model}' has no plan of secateur's: {does} what 'secateur prune' made; give the folder that it wrote"
        )
    return dict(plan)


def calibration_of(plan: dict[str, Any], folder: Path, records_file: Path) -> str | None:
    """Return the text that a checkpoint was pruned with; None if pruning needed none.

    The plan holds the name of a file alone; the record holds its path.

    Raises:
        UsageError: the file is missing, or its content has changed.
    """
    calibration = plan["calibration"] or {}
    spec = calibration.get("spec")
    if spec is None or spec.startswith(TASK) or spec.partition("@")[0] in NAMED:
        return None if spec is None else str(spec)
    places = [records_file, folder.absolute().parent / "records.jsonl"]
    pruned = next(filter(None, (records.last(place, "prune", folder.absolute()) for place in places)), {})
    known = calibration.get("file_sha256")
    for place in (spec, str((pruned.get("calibration") or {}).get("spec"))):
        if Path(place).expanduser().is_file() and known in (None, file_hash(place)):
            return place
    raise UsageError(
        f"--calibration SPEC is missing: it was pruned with '{spec}', which is not here (any more); name that file, "
        "or another text"
    )


def training_text(request: HealRequest | ReconstructRequest, plan: dict[str, Any], records_file: Path, to: str) -> str:
    """Return the text SPEC to train on: the given one, that of the pruning, or the built-in one for its model.

    Args:
        request: what was asked for.
        plan: the plan of the checkpoint.
        records_file: records that may tell where the text of the pruning is.
        to: what the text is for, for messages: `heal on`.

    Raises:
        UsageError: there is none, it is not where it was, or `include_path` has nothing to do with it.
    """
    bundled = "builtin" if plan["model"] == BUNDLED else None
    spec = request.calibration or calibration_of(plan, Path(request.model), records_file) or bundled
    if spec is None:
        raise UsageError(f"--calibration SPEC is missing: the text to {to} (the pruning itself needed none)")
    if request.include_path is not None and not spec.startswith(TASK):
        folder = f"--include-path {request.include_path} says where task files are"
        raise UsageError(f"{folder}: {to} a task too, --calibration task:NAME")
    return spec


def training_form(
    request: HealRequest | ReconstructRequest,
    checkpoint: Checkpoint,
    spec: str,
    plan: Mapping[str, Any],
    text_field: str | None,
) -> str | None:
    """Return the form in which instructions become text; on the text of the pruning, the form that it had there."""
    asked = request.prompt_form
    if request.calibration is None and asked == "auto":
        asked = (plan["calibration"] or {}).get("form") or asked
    form = prompt_form(spec, asked, checkpoint.tokenizer, text_field)
    if asked == "auto":
        say_form(spec, form, checkpoint)
    return form


def check_seqlen(seqlen: int, longest: int) -> None:
    """Raise UsageError for a window that is longer than the model knows, or shorter than two tokens."""
    if not 1 < seqlen <= longest:
        raise UsageError(f"--seqlen {seqlen} is outside [2, {longest}], the lengths this model knows")


def finished_record(
    command: str,
    plan: Mapping[str, Any],
    settings: Mapping[str, Any],
    out: Path,
    records_file: Path,
    *,
    overwrite: bool,
    new: Sequence[str],
) -> records.Record | None:
    """Return the record of a run that is complete already; None if it must run again.

    Args:
        command: the command, which is also the field of the plan that has its settings.
        plan: the plan of the checkpoint that the run starts from.
        settings: the settings of this run.
        out: the result.
        records_file: the file that should have its record.
        overwrite: a result of other settings may be replaced.
        new: the fields of the plan that the command changes.

    Raises:
        UsageError: the result belongs to another run, and may not be replaced.
        SecateurError: its record is missing.
    """
    written = read_plan_json(out)
    assert written is not None
    before = {key: value for key, value in plan.items() if key not in new}
    difference = differing_from_plan(written.get(command) or {}, settings) or differing_from_plan(written, before)
    if not same_run(out, difference, overwrite):
        return None
    record = records.last(records_file, command, out)
    if record is None:
        raise SecateurError(
            f"'{out}' is finished, but {records_file} has no record of it; measure it with 'secateur eval {out}', "
            "or start again with --overwrite"
        )
    say(f"{out}: already there")
    return record


def weight_parts(view: ModelView) -> dict[str, list[str]]:
    """Return part of the checkpoint -> names of its tensors; the same parts, in the same order, as in `prune`."""
    names, prefixes = view.source.names(), [view.block_prefix(index) for index in range(view.blocks)]
    blocks = {
        f"block-{index:05}": [name for name in names if name.startswith(prefix)]
        for index, prefix in enumerate(prefixes)
    }
    return {f"outer-{name}": [name] for name in view.outer_names()} | blocks


def finish(
    checkpoint: Checkpoint,
    plan: Mapping[str, Any],
    facts: Mapping[str, Any],
    writer: CheckpointWriter,
    recipe: Callable[[Mapping[str, str]], str],
) -> None:
    """Finish a checkpoint whose parts (`weight_parts`) are written.

    Args:
        checkpoint: what was changed.
        plan: its plan.
        facts: what is new: the fields that the plan and the card of the result have too.
        writer: the writer of the result.
        recipe: see `CheckpointWriter.finish`.
    """
    view = checkpoint.view()
    problem = stock_problem(view.raw_config, view.family, [view.dims(index) for index in range(view.blocks)])
    files = texts(checkpoint, plan, facts, problem)
    if problem:
        files[f"{runtime.MODULE}.py"] = Path(runtime.__file__).read_text("utf-8")
    if (plan_tensors := plan_file(checkpoint.folder, PLAN_TENSORS)) is not None:
        with writer.disk():
            (writer.partial / OWN_FOLDER).mkdir(exist_ok=True)
            (writer.partial / OWN_FOLDER / PLAN_TENSORS).write_bytes(plan_tensors.read_bytes())
    writer.finish(list(weight_parts(view)), [], view.raw_config, checkpoint.folder, files, recipe)


def texts(
    checkpoint: Checkpoint, plan: Mapping[str, Any], facts: Mapping[str, Any], problem: str | None
) -> dict[str, str]:
    """Return the plan and the card of a result: the facts of the pruning, and the new ones."""
    together = {**plan, **facts}
    content = {key: value for key, value in together.items() if key not in ("format", "blocks")}
    return {
        "README.md": card.model_card(checkpoint, together, together, problem, words_of(together.get("sparsity_of"))),
        PLAN_PATH: plan_json(content, together["blocks"]),
    }
