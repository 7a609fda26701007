"""Counts that are summed while blocks are written, and the facts of the record that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.models.view import BlockDims, BlockView
from secateur.plan.plan import BlockPlan
from secateur.plan.quantity import BeforeAndAfter
from secateur.prune.prepare import Prepared


@dataclass
class Totals:
    """The counts of the blocks that are written; small for any number of blocks."""

    parameters: int = 0
    nonzero: int = 0
    matrices: int = 0
    zero_rows: int = 0
    removed: int = 0
    targeted: int = 0
    dims: list[BlockDims] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    summaries: list[dict[str, Any]] = field(default_factory=list)
    ends: tuple[BlockPlan, BlockPlan] | None = None

    def add(self, note: Mapping[str, int]) -> None:
        """Add the counts in the note of a part."""
        self.parameters += note["parameters"]
        self.nonzero += note["nonzero"]
        self.matrices += note.get("matrices", 0)
        self.zero_rows += note.get("zero_rows", 0)

    def add_block(self, before: BlockDims, block: BlockView, plan: BlockPlan) -> None:
        """Add a block: its widths, and what the plan removes from the matrices that have a rate."""
        self.summaries.append(plan.summary())
        if not plan.dropped:
            self.dims.append(block.dims)
            self.kept.append(plan.index)
        self.ends = (self.ends[0] if self.ends else _end(plan, "enter"), _end(plan, "leave"))
        for name, place in plan.places.items():
            if (name != "enter" or plan.index == 0) and place.spectrum_D is not None:
                self.targeted += place.of
                self.removed += place.of - place.width
        for name in block.rates:
            (rows, columns), (rows_after, columns_after) = before.shape(name), block.dims.shape(name)
            self.targeted += rows * columns
            self.removed += rows * columns - rows_after * columns_after
            self.removed += plan.masks[name].removed if name in plan.masks else 0


def _end(plan: BlockPlan, name: str) -> BlockPlan:
    """Return the part of a plan that embeddings or head need, without its other bases, which are large."""
    return BlockPlan(plan.index, places={name: plan.places[name]} if plan.places else {})


def facts_of(prepared: Prepared, totals: Totals) -> dict[str, Any]:
    """Return the facts about the result for the record."""
    view, quantity = prepared.checkpoint.view(), prepared.job.quantity
    before, matrices = view.parameters(), view.matrix_parameters()
    heads = sum(view.dims(index).heads for index in range(view.blocks))
    counts = BeforeAndAfter(
        totals.targeted,
        totals.removed,
        parameters=(before, totals.parameters),
        heads=(heads, sum(dims.heads for dims in totals.dims)),
        blocks=(view.blocks, len(totals.kept)),
        seconds=prepared.job.notes.get("seconds_expected"),
    )
    return {
        "sparsity_of": quantity.name,
        "sparsity_measured": quantity.share_gone(counts),
        "pruning_ratio": 1 - totals.parameters / before,
        "pruning_ratio_blocks": 1 - totals.matrices / matrices,
        "params_before": before,
        "params_after": totals.parameters,
        "nonzero_after": totals.nonzero,
        "zero_rows": totals.zero_rows,
        **prepared.job.notes,
        "updated": prepared.job.rotates or any("updates" in summary for summary in totals.summaries),
    }
