"""`reconstruct`: from the request to a checkpoint of the same shapes whose blocks give what the dense model's give.

Shape letters: S windows, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.core import records
from secateur.core.device import resolve_device
from secateur.core.errors import SecateurError, UsageError
from secateur.core.paths import to_path
from secateur.core.progress import track
from secateur.core.timing import Clock, Stopwatch
from secateur.models.load import Checkpoint, open_checkpoint
from secateur.models.save import CheckpointWriter, Spent, is_finished
from secateur.models.view import BlockView
from secateur.plan.plan import read_plan_json
from secateur.prune.calibration import windows_of
from secateur.prune.rewrite import (
    check_seqlen,
    checked_plan,
    finish,
    finished_record,
    training_form,
    training_text,
    weight_parts,
)
from secateur.prune.settings import identity, refuse_out
from secateur.prune.write import block_part, count
from secateur.recipe.write import recipe_text
from secateur.reconstruct.blocks import reconstructed_blocks
from secateur.reconstruct.fit import Fitted, How
from secateur.requests import ReconstructRequest
from secateur.text.specs import check_spec, holds_ids
from secateur.text.tokens import check_ids
from secateur.text.windows import calibration_facts

_LONGEST = 512  # tokens in a window by default
_TOKENS_AT_ONCE = 512  # of a window or more: what the gradients of a block are computed for at a time

_SCRATCH = ("scratch-dense.bin", "scratch-pruned.bin")  # the residual streams


@dataclass(frozen=True)
class Prepared:
    """A request checked against its models."""

    request: ReconstructRequest
    checkpoint: Checkpoint
    dense: Checkpoint
    plan: dict[str, Any]
    spec: str
    form: str | None
    windows_ST: Tensor
    device: torch.device

    @property
    def kept(self) -> list[int]:
        """The blocks of the dense model that the pruned one has."""
        return [index for index, block in enumerate(self.plan["blocks"]) if not block.get("dropped")]

    @property
    def how(self) -> How:
        """The settings of a fit, in windows."""
        windows, seqlen = self.windows_ST.shape
        held_out = max(1, round(self.request.held_out * windows))
        together = max(1, _TOKENS_AT_ONCE // seqlen)
        batch = min(max(1, self.request.batch // seqlen), windows - held_out)
        return How(
            self.request.steps, batch, min(together, batch), self.request.lr, held_out=held_out, seed=self.request.seed
        )

    def settings(self) -> dict[str, Any]:
        """The settings that decide the result."""
        request = self.request
        return {
            **{name: getattr(request, name) for name in ("steps", "batch", "lr", "held_out", "seed")},
            "calibration": calibration_facts(self.spec, self.windows_ST, self.form),
            "device": str(self.device),
            **({"before": self.plan["reconstruct"]} if self.plan.get("reconstruct") else {}),
        }


def reconstruct(
    request: ReconstructRequest,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    records_file: str | Path | None = None,
    before: records.Record | None = None,
    clock: Clock = time.perf_counter,
) -> records.Record:
    """Train the blocks of a pruned checkpoint towards those of the dense model, and write the result to `out`.

    Args:
        request: the request.
        out: the folder to write: a checkpoint of the same shapes, with the same zeros.
        resume: continue an interrupted run after the last block that it finished; the result is the same.
        overwrite: replace the content of `out`.
        records_file: the file that the record is appended to; None is `records.jsonl` in the parent of `out`.
        before: the record of a pruning that belongs to this run, whose time and memory count too.
        clock: returns seconds. Those of the record are of all parts of a run that was interrupted and resumed.

    Returns:
        The record. `reconstruct` has the settings, and for each block the error on held-out windows `before` and
        `after` (the mean of |y - t|^2 / |t|^2 over tokens, y what the block gives and t what the dense model gives) and
        the `step` whose state is kept; 0 is the block as it was.

    Raises:
        UsageError, SecateurError: the request is wrong, or the run failed; `out` then holds nothing that looks
            finished.
    """
    started = clock()
    out = to_path(out).absolute()
    records_file = to_path(records_file) or out.parent / "records.jsonl"
    finished = is_finished(out, resume=resume, overwrite=overwrite)
    check_request(request)
    prepared = prepare(request, records_file)
    refuse_out(out, prepared.checkpoint, prepared.spec, records_file)
    settings = prepared.settings()
    if finished:
        new = ("reconstruct", "nonzero_after", "updated")
        done = finished_record("reconstruct", prepared.plan, settings, out, records_file, overwrite=overwrite, new=new)
        if done is not None:
            return done
    writer = CheckpointWriter(
        out,
        {"reconstruct": settings, "source": identity(prepared.checkpoint), "dense": identity(prepared.dense)},
        resume=resume,
        overwrite=overwrite,
        needed=2 * sum(file.stat().st_size for file in {file for file, _ in prepared.checkpoint.index.values()}),
    )
    watch = Stopwatch()

    def spent() -> Spent:
        return replace(writer.before, seconds=writer.before.seconds + clock() - started)

    with writer.counting(spent):
        facts = _run(prepared, settings, writer, watch)
    record = {
        "command": "reconstruct",
        "version": records.version(),
        **{key: value for key, value in prepared.plan.items() if key not in ("format", "blocks")},
        **facts,
        "model": records.original(prepared.plan["model"], Path(request.model), [records_file]),
        "reconstructed": str(source.absolute()) if (source := Path(request.model)).is_dir() else str(source),
        "device": settings["device"],
        "seconds": round(spent().seconds, 3),
        "seconds_by": watch.rounded(),
        **writer.before.facts,
        "peak_rss_bytes": records.peak_rss_bytes(),
        **({} if before is None else _with_pruning(before)),
        "versions": records.versions(),
        "out": str(out),
    }
    records.append(records_file, record)
    return record


def _with_pruning(before: records.Record) -> dict[str, Any]:
    """Return the fields of a record that count the pruning before it too."""
    return {
        "seconds_before": round(before["seconds"] + before.get("seconds_before", 0), 3),
        **({"seconds_at_least": True} if before.get("seconds_at_least") else {}),
        "peak_rss_bytes": max(records.peak_rss_bytes(), before.get("peak_rss_bytes", 0)),
    }


def check_request(request: ReconstructRequest) -> None:
    """Raise UsageError for what is wrong with a request on any model."""
    for name in ("samples", "steps", "batch"):
        if getattr(request, name) < 1:
            raise UsageError(f"--{name} {getattr(request, name)}: a count of at least 1 is needed")
    if request.samples < 2:
        raise UsageError("--samples 1: at least 2 windows are needed, one to learn from and one to test with")
    if not request.lr > 0:
        raise UsageError(f"--lr {request.lr:g}: it must be above 0")
    if not 0 < request.held_out <= 0.5:
        raise UsageError(f"--held-out {request.held_out:g}: a share of the windows above 0 and at most 0.5 is needed")
    if request.calibration is not None:
        check_spec(request.calibration)


def prepare(request: ReconstructRequest, records_file: Path, before: Mapping[str, Any] | None = None) -> Prepared:
    """Check a request against its models, and read its text.

    Args:
        request: the request.
        records_file: the records that may tell the dense model and the calibration text.
        before: what the plan would say, for an estimate on a model that is not pruned yet.

    Raises:
        UsageError, SecateurError: the request is wrong, or a text or a model cannot be read.
    """
    checkpoint = open_checkpoint(request.model)
    found = read_plan_json(checkpoint.folder) if before is None else before
    plan = checked_plan(found, request.model, "reconstruct mends")
    dense = _dense(request, plan, records_file)
    check_fits(checkpoint, dense, plan, request.model)
    spec = training_text(request, plan, records_file, "learn from")
    longest = min(checkpoint.max_length(), dense.max_length())
    seqlen = min(_LONGEST, longest) if request.seqlen is None else request.seqlen
    check_seqlen(seqlen, longest)
    form = training_form(request, checkpoint, spec, plan, request.text_field)
    windows_ST = windows_of(
        checkpoint,
        spec,
        samples=request.samples,
        seqlen=seqlen,
        seed=request.seed,
        text_field=request.text_field,
        include_path=request.include_path,
        form=form,
    )
    tokens = None if holds_ids(spec) else len(checkpoint.tokenizer())
    check_ids(windows_ST, checkpoint.config.vocab_size, longest, spec, tokens)
    if len(windows_ST) < 2:
        raise UsageError(f"'{spec}' has one window: at least 2 are needed, one to learn from and one to test with")
    device = resolve_device(request.device)
    return Prepared(request, checkpoint, dense, plan, spec, form, windows_ST, device)


def _dense(request: ReconstructRequest, plan: Mapping[str, Any], records_file: Path) -> Checkpoint:
    """Open the model that a checkpoint was pruned from."""
    if request.dense is not None:
        return open_checkpoint(request.dense, request.dense_revision)
    name = records.original(plan["model"], Path(request.model), [records_file])
    try:
        return open_checkpoint(name, plan.get("model_revision"))
    except SecateurError as error:
        raise UsageError(
            f"the dense model '{name}', from which '{request.model}' was pruned, cannot be opened: name it with "
            f"--dense MODEL ({error})"
        ) from error


def check_fits(checkpoint: Checkpoint, dense: Checkpoint, plan: Mapping[str, Any], model: str) -> None:
    """Check that a checkpoint may come from a dense model.

    Raises:
        UsageError: another family, vocabulary or number of blocks.
    """
    pruned, whole = checkpoint.view(), dense.view()
    facts = {
        "family": (pruned.family.name, whole.family.name),
        "vocabulary": (pruned.config.vocab_size, whole.config.vocab_size),
        "number of blocks before pruning": (len(plan["blocks"]), whole.blocks),
    }
    for what, (ours, theirs) in facts.items():
        if ours != theirs:
            raise UsageError(
                f"--dense '{dense.name}': its {what} is {theirs}, that of '{model}' {ours}; give the model that it was "
                "pruned from"
            )


def _run(prepared: Prepared, settings: Mapping[str, Any], writer: CheckpointWriter, watch: Stopwatch) -> dict[str, Any]:
    """Fit and write every block that is not written yet; return the facts for the record."""
    checkpoint, view = prepared.checkpoint, prepared.checkpoint.view()

    def finished(index: int) -> tuple[BlockView, Fitted] | None:
        if not writer.has(block_part(index)):
            return None
        tensors, note = writer.read(block_part(index))
        own = {name.removeprefix(view.block_prefix(index)): tensor for name, tensor in tensors.items()}
        return replace(view.block(index), tensors=own), Fitted(**note["fitted"], tensors={})

    blocks: list[dict[str, Any]] = []
    nonzero = 0
    found = reconstructed_blocks(
        view,
        prepared.dense.view(),
        prepared.kept,
        prepared.windows_ST,
        prepared.how,
        watch,
        device=prepared.device,
        spill=(writer.partial / _SCRATCH[0], writer.partial / _SCRATCH[1]) if prepared.request.spill else None,
        finished=finished,
    )
    for block, fitted in track(found, "reconstruct: blocks", view.blocks):
        part = block_part(block.index)
        if not writer.has(part):
            tensors = {view.block_prefix(block.index) + name: tensor for name, tensor in block.tensors.items()}
            writer.write(part, tensors, {"fitted": fitted.facts, **count(tensors)})
        note = writer.read_note(part)
        blocks.append(note["fitted"])
        nonzero += note["nonzero"]
        del block, fitted
    for part, names in weight_parts(view).items():
        if part.startswith("outer-"):
            tensors = {name: view.source.read(name) for name in names}
            nonzero += count(tensors)["nonzero"]
            if not writer.has(part):
                writer.write(part, tensors)
    facts = {"reconstruct": {**settings, "blocks": blocks}, "nonzero_after": nonzero, "updated": True}
    resolved = {
        "calibration": prepared.spec,
        "samples": len(prepared.windows_ST),
        "seqlen": prepared.windows_ST.shape[1],
    }
    recipe = partial(recipe_text, "reconstruct", prepared.request, resolved, checkpoint, settings["device"])
    finish(checkpoint, prepared.plan, facts, writer, recipe)
    return facts
