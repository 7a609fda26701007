"""Write a pruned checkpoint again, with other weights of the same shapes: what `heal` and `reconstruct` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from secateur.core import records
from secateur.core.errors import UsageError
from secateur.models import card, runtime
from secateur.models.load import Checkpoint
from secateur.models.pruned_config import stock_problem
from secateur.models.save import OWN_FOLDER, PLAN_PATH, PLAN_TENSORS, CheckpointWriter, plan_file
from secateur.models.view import ModelView
from secateur.plan.plan import plan_json
from secateur.plan.quantity import words_of
from secateur.text.files import file_hash
from secateur.text.specs import NAMED, TASK


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
