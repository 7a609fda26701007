"""Counts of parameters from shapes alone, and the step whose pruning ratio is nearest to a wanted one. See `quantity`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from secateur.core.errors import UsageError
from secateur.models.view import BlockDims, ModelView, Residual
from secateur.plan.allocate import MEMBERS, removed_units
from secateur.plan.rates import Rates


def nearest(steps: Iterable[float], ratio: Callable[[float], float], wanted: float, *, at_least: bool, what: str) -> float:
    """The step whose pruning ratio is nearest to the one wanted; of two as near, the one that removes less, but not nothing.

    Args:
        steps: sparsities, ascending from 0; what they remove rises with them, or nearly so. No more of them are looked at than it takes.
        ratio: the pruning ratio, over all parameters, of one of them.
        wanted: the ratio that was asked for.
        at_least: take the first step that removes as much, however much more that is.
        what: what removes, for the message.

    Raises:
        UsageError: the ratio is outside its range, or no step removes so much.
    """
    if not 0 <= wanted < 1:
        raise UsageError(f"--params-removed {wanted:g} is outside [0, 1)")
    below, most = (0.0, 0.0), 0.0
    for step in steps:
        if (removed := ratio(step)) >= wanted:
            nothing = below[0] == 0 < wanted
            return step if at_least or nothing or removed - wanted < wanted - below[1] else below[0]
        below, most = max(below, (step, removed), key=lambda found: found[1]), max(most, removed)
    raise UsageError(f"--params-removed {wanted:g}: {what} can remove at most {most:.3f} of this model")


def mean_block(view: ModelView) -> float:
    """The parameters of a block, in the mean."""
    outer = sum(math.prod(view.source.shape(name)) for name in view.outer_names())
    return (view.parameters() - outer) / view.blocks


def parameters_left(view: ModelView, rates: Rates) -> int:
    """All parameters after whole units are removed at these rates."""
    left = view.parameters()
    for index, rate in enumerate(rates):
        dims = view.dims(index)
        for space, units in (("ffn", dims.ffn), ("groups", dims.groups)):
            reader = MEMBERS[space].reader
            left -= removed_units(rate.get(reader, 0.0), units) * unit_parameters(view, index, space)
    return left


def dims_parameters(view: ModelView, after: Sequence[BlockDims]) -> int:
    """All parameters of a model whose blocks are narrowed to these heads and feed-forward units."""
    left, stored = view.parameters(), set(view.source.names())
    for index, dims in enumerate(after):
        before = view.dims(index)
        for name in view.matrix_shapes(index):
            (rows, columns), (rows_after, columns_after) = before.shape(name), dims.shape(name)
            biased = f"{view.block_prefix(index)}{view.family.matrices[name]}.bias" in stored
            left -= rows * columns - rows_after * columns_after + (rows - rows_after if biased else 0)
    return left


def sliced_parameters(view: ModelView, residuals: Sequence[Residual]) -> int:
    """All parameters of a canonical model whose residual stream is narrowed so."""
    total, hidden = 0, view.config.hidden_size
    ends = dict.fromkeys(view.family.embeddings, residuals[0].attention[0]) | {view.family.head: residuals[-1].mlp[1]}
    for name in view.outer_names():
        shape, path = view.source.shape(name), name.rpartition(".")[0]
        total += math.prod(shape) // hidden * ends[path] if len(shape) == 2 else math.prod(shape)
    for index, residual in enumerate(residuals):
        dims = replace(view.dims(index), residual=residual)
        prefix = view.block_prefix(index)
        matrices = {
            path: sum(dims.shape(n)[0] * dims.shape(n)[1] for n in view.family.matrices if view.family.matrices[n] == path)
            for path in view.family.matrices.values()
        }
        total += sum(matrices.values())
        written = {view.family.matrices["o"]: residual.attention[1], view.family.matrices["down"]: residual.mlp[1]}
        for name in view.source.names():
            path, _, kind = name.removeprefix(prefix).rpartition(".")
            if name.startswith(prefix) and (kind == "bias" or path not in matrices):
                total += written.get(path, math.prod(view.source.shape(name)))
        total += sum(_skip_parameters(*end, form) for end, form in zip((residual.attention, residual.mlp), residual.skips, strict=False))
    return total


def _skip_parameters(inputs: int, outputs: int, form: int | str | None) -> int:
    if form is None:
        return 0
    if form == "dense":
        return inputs * outputs
    assert isinstance(form, int)
    return form * (inputs if inputs == outputs else inputs + outputs)


def unit_parameters(view: ModelView, index: int, space: str) -> int:
    """Weights and biases of one unit: a feed-forward unit, or a key-value head with its query heads."""
    dims = view.dims(index)
    shapes, prefix, stored = view.matrix_shapes(index), view.block_prefix(index), set(view.source.names())
    members = MEMBERS[space]
    total = shapes[members.reader][0] * shapes[members.reader][1]
    for name in members.writers:
        if name in shapes:
            rows, columns = shapes[name]
            total += rows * columns + (rows if f"{prefix}{view.family.matrices[name]}.bias" in stored else 0)
    return total // (dims.ffn if space == "ffn" else dims.groups)
