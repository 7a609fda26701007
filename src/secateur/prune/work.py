"""The work of one run, from the checked request and its windows to the finished checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.calibrate.stream import Stream
from secateur.core.errors import HopelessError
from secateur.core.memory import give_back
from secateur.core.timing import Stopwatch
from secateur.models import card, runtime
from secateur.models.load import load_model
from secateur.models.pruned_config import drop_blocks, pruned_config, stock_problem
from secateur.models.save import PLAN_PATH, CheckpointWriter
from secateur.plan.plan import plan_json
from secateur.plan.quantity import words_of
from secateur.prune.allocation.allocate import Allocation, allocate
from secateur.prune.driver import check_finite
from secateur.prune.prepare import Prepared
from secateur.prune.settings import resolved
from secateur.prune.totals import facts_of
from secateur.prune.write import block_part, plan_part, prune_blocks, write_outer
from secateur.recipe.write import recipe_text

_ALLOCATION = "allocation"  # the part that holds the chosen sparsity of each matrix


def make_checkpoint(
    prepared: Prepared, windows: Tensor | None, settings: Mapping[str, Any], writer: CheckpointWriter, watch: Stopwatch
) -> tuple[dict[str, Any], bool]:
    """Prune and write the blocks and the tensors outside them, and finish the checkpoint.

    Returns:
        The facts for the record, and whether the result is a stock model.
    """
    try:
        dense = prepared.checkpoint.view()
        for name in dense.outer_names():  # the tensors of a block are checked when the block is read
            check_finite(dense.source.read(name), name)
        prepared = _allocated(prepared, windows, writer, watch)
    except HopelessError:
        writer.discard()
        raise
    checkpoint, view = prepared.checkpoint, prepared.job.view
    stream = None
    if windows is not None and prepared.job.streams:
        with watch("forward"), writer.disk():
            stream = Stream(
                view,
                windows,
                device=prepared.device,
                dtype=prepared.dtype,
                spill=writer.scratch if prepared.request.spill else None,
            )
    try:
        totals = prune_blocks(prepared, windows, writer, stream, watch)
    except HopelessError:
        writer.discard()
        raise
    weights = write_outer(prepared, writer, watch, totals) + [block_part(index) for index in totals.kept]
    raw = drop_blocks(view.raw_config, view.config, totals.kept)
    problem = stock_problem(raw, view.family, totals.dims)
    assert not (problem and prepared.request.stock_only), "--stock-only refuses it earlier"
    facts = facts_of(prepared, totals)
    with watch("files"):
        config = pruned_config(raw, view.family, totals.dims, stock=problem is None)
        words = card.model_card(checkpoint, settings, facts, problem, words_of(facts["sparsity_of"]))
        files = {"README.md": words, PLAN_PATH: plan_json({**settings, **facts}, totals.summaries)}
        if problem:
            files[f"{runtime.MODULE}.py"] = Path(runtime.__file__).read_text("utf-8")
            if (tokenizer_config := checkpoint.named_tokenizer()) is not None:
                files["tokenizer_config.json"] = tokenizer_config
    with watch("finish"):
        plans = [plan_part(index) for index in range(view.blocks)]
        recipe = partial(
            recipe_text, "prune", prepared.request, resolved(prepared, settings), checkpoint, settings["device"]
        )
        writer.finish(weights, plans, config, checkpoint.folder, files, recipe)
    return facts, problem is None


def _allocated(prepared: Prepared, windows: Tensor | None, writer: CheckpointWriter, watch: Stopwatch) -> Prepared:
    """Choose the sparsity of each matrix for `--modules auto` or `owl`; keep the choice of an interrupted run."""
    job = prepared.job
    if job.allocation is None:
        return prepared
    assert windows is not None, "an allocation always has a calibration text"
    if not writer.has(_ALLOCATION):
        with watch("allocation"):
            allocation = allocate(
                job, partial(load_model, prepared.checkpoint, device=job.device, dtype=job.dtype), windows
            )
        give_back()
        writer.write(_ALLOCATION, {}, allocation.facts)
    chosen = Allocation.read(writer.read_note(_ALLOCATION))
    return replace(prepared, job=replace(job, rates=chosen.rates, notes={**job.notes, "allocation": chosen.facts}))
