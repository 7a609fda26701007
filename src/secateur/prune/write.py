"""Write the result part by part: the blocks, their plans, and the tensors outside the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.calibrate.stream import Stream
from secateur.core.progress import track
from secateur.core.timing import Stopwatch
from secateur.cut import cut_outer, dims_after, family_after
from secateur.models import runtime
from secateur.models.save import CheckpointWriter
from secateur.models.view import BlockView
from secateur.plan.plan import BlockPlan
from secateur.prune.driver import pruned_blocks, whole_model_plan
from secateur.prune.prepare import Prepared, check_stock_plans
from secateur.prune.settings import identity
from secateur.prune.totals import Totals

LEARNING = "learning"  # the part with the saved state of a method that learns


def new_writer(
    prepared: Prepared, windows: Tensor | None, settings: Mapping[str, Any], out: Path, *, resume: bool, overwrite: bool
) -> tuple[CheckpointWriter, int]:
    """Return the writer of the result, and the bytes of the activation buffer."""
    checkpoint, view = prepared.checkpoint, prepared.job.view
    streams, differentiates = prepared.job.streams, prepared.job.whole_model and prepared.job.method.says.GRADIENTS
    kept_tokens = 0
    if windows is not None and (streams or differentiates):
        kept_tokens = (view.blocks + 1 if differentiates else 1) * windows.numel()
    buffer = kept_tokens * view.config.hidden_size * prepared.dtype.itemsize
    needed = 2 * sum(file.stat().st_size for file in {file for file, _ in checkpoint.index.values()}) + (
        buffer if prepared.request.spill else 0
    )
    return CheckpointWriter(
        out,
        {**settings, "source": identity(checkpoint)},
        resume=resume,
        overwrite=overwrite,
        needed=needed,
        may_change=prepared.job.method.says.MAY_CHANGE,
    ), buffer


def prune_blocks(
    prepared: Prepared, windows: Tensor | None, writer: CheckpointWriter, stream: Stream | None, watch: Stopwatch
) -> Totals:
    """Prune and write every block that is not written yet; return the counts."""
    job = replace(
        prepared.job,
        state_file=prepared.job.state_file or writer.part(LEARNING),
        spill=writer.scratch if prepared.request.spill else None,
    )
    view, rates = job.view, job.rates
    plans = whole_model_plan(job, windows, watch) if job.whole_model else None
    if plans is not None and prepared.request.stock_only:
        check_stock_plans(prepared, plans)

    def finished(index: int) -> tuple[BlockView, BlockPlan] | None:
        """Read a block and its plan from an interrupted run; None if they are not complete."""
        if not writer.has(plan_part(index)) or not (
            writer.has(block_part(index)) or writer.read_note(plan_part(index)).get("dropped")
        ):
            return None
        tensors, summary = writer.read(plan_part(index))
        for part in (_basis_part(index - 1), _basis_part(index), plan_part(index - 1)):
            tensors |= writer.read(part)[0] if job.rotates and writer.has(part) else {}
        plan = BlockPlan.read(summary, tensors)
        written = {} if plan.dropped else writer.read(block_part(index))[0]
        weights = {name.removeprefix(view.block_prefix(len(totals.kept))): t for name, t in written.items()}
        return BlockView(
            family_after(view.family, plan), dims_after(view.dims(index), plan), index, weights, rates[index]
        ), plan

    totals = Totals()
    for block, plan in track(
        pruned_blocks(job, stream, watch, finished, plans), f"{job.method.name}: blocks", view.blocks
    ):
        with watch("files"):
            part = block_part(block.index)
            if not (writer.has(part) and writer.has(plan_part(block.index))):
                if plan.places:
                    writer.write(_basis_part(block.index), plan.bases())
                writer.write(plan_part(block.index), plan.tensors(), plan.summary())
            if not plan.dropped and not writer.has(part):
                note = count(block.tensors) | {
                    "matrices": block.matrix_parameters() + _added(block),
                    "zero_rows": block.zero_rows(),
                }
                writer.write(
                    part,
                    {view.block_prefix(len(totals.kept)) + name: tensor for name, tensor in block.tensors.items()},
                    note,
                )
            if not plan.dropped:
                totals.add(writer.read_note(part))
        totals.add_block(view.dims(block.index), block, plan)
        del block, plan  # so that memory never holds the weights and bases of two blocks
    return totals


def write_outer(prepared: Prepared, writer: CheckpointWriter, watch: Stopwatch, totals: Totals) -> list[str]:
    """Copy or rotate the tensors outside the blocks, one at a time; return the names of their parts."""
    view = prepared.job.view
    assert totals.ends is not None
    parts = []
    for name in view.outer_names():
        part = f"outer-{name}"
        with watch("files"):
            if not writer.has(part):
                tensors = {name: cut_outer(view, name, *totals.ends)}
                writer.write(part, tensors, count(tensors))
                del tensors
            totals.add(writer.read_note(part))
        parts.append(part)
    return parts


def _added(block: BlockView) -> int:
    """Return the number of weights that a method added to a block: adapters on its residual connections."""
    return sum(
        tensor.numel()
        for name, tensor in block.tensors.items()
        if name.startswith("skips.") and not runtime.is_index_map(name)
    )


def count(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the numbers of parameters and of those that are not zero, `parameters` and `nonzero`."""
    counted = [tensor for name, tensor in tensors.items() if not runtime.is_index_map(name)]
    return {"parameters": sum(t.numel() for t in counted), "nonzero": sum(int(t.count_nonzero()) for t in counted)}


def block_part(index: int) -> str:
    """Return the name of the part that holds the weights of a block."""
    return f"block-{index:05}"


def _basis_part(index: int) -> str:
    return f"basis-{index:05}"


def plan_part(index: int) -> str:
    """Return the name of the part that holds the plan of a block."""
    return f"plan-{index:05}"
