"""`--params-removed`: the sparsity whose pruning ratio is the one wanted. Known from shapes alone, before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from secateur.core.errors import UsageError
from secateur.models.canonical import canonical_view
from secateur.models.view import BlockDims, ModelView, Residual
from secateur.plan.allocate import MEMBERS, removed_units
from secateur.plan.pattern import Pattern
from secateur.plan.rates import Rates, resolve_rates

_EDGE = 1e-9  # k / n times n may fall just short of k in floating point


def find_sparsity(view: ModelView, pattern: Pattern, modules: str | None, wanted: float) -> float:
    """The smallest sparsity whose pruning ratio, over all parameters, is at least `wanted`.

    Raises:
        UsageError: the pattern zeroes weights instead of removing them, or cannot remove so much.
    """
    if not 0 <= wanted < 1:
        raise UsageError(f"--params-removed {wanted:g} is outside [0, 1)")
    if not pattern.structured:
        raise UsageError(f"--params-removed: pattern {pattern} zeroes weights and removes no parameters; use --sparsity, or --pattern rows or columns")
    before = view.parameters()

    def ratio(sparsity: float) -> float:
        return 1 - parameters_left(view, resolve_rates(view, sparsity, modules, pattern)) / before

    sizes = {size for index in range(view.blocks) for size in (view.dims(index).ffn, view.dims(index).groups)}
    steps = [0.0, *(step + _EDGE for step in sorted({k / n for n in sizes for k in range(1, n)}))]
    if (most := ratio(steps[-1])) < wanted:
        raise UsageError(f"--params-removed {wanted:g}: pattern {pattern} can remove at most {most:.3f} of this model")
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ratio(steps[middle]) >= wanted else (middle + 1, high)
    return steps[low]


def find_dropped(view: ModelView, wanted: float) -> float:
    """The smallest fraction of whole blocks whose pruning ratio, over all parameters, is at least `wanted`, as if all blocks were as large as their mean.

    Raises:
        UsageError: the blocks do not hold so much.
    """
    if not 0 <= wanted < 1:
        raise UsageError(f"--params-removed {wanted:g} is outside [0, 1)")
    share = mean_block(view) / view.parameters()
    remove = math.ceil(wanted / share - _EDGE)
    if remove >= view.blocks:
        raise UsageError(f"--params-removed {wanted:g}: dropping blocks can remove at most {share * (view.blocks - 1):.3f} of this model")
    return remove / view.blocks


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


def find_heads(view: ModelView, wanted: float, dims_left: Callable[[float], Sequence[BlockDims]]) -> float:
    """The smallest sparsity of heads whose pruning ratio, over all parameters, is at least `wanted`.

    Args:
        view: a model whose blocks have heads of one size.
        wanted: the ratio.
        dims_left: sparsity -> the sizes of blocks that have lost as many heads, wherever these are.

    Raises:
        UsageError: so much cannot be removed.
    """
    if not 0 <= wanted < 1:
        raise UsageError(f"--params-removed {wanted:g} is outside [0, 1)")
    before, heads = view.parameters(), sum(view.dims(index).heads for index in range(view.blocks))
    most = 0.0
    for gone in range(heads):
        sparsity = gone / heads
        most = max(most, 1 - dims_parameters(view, dims_left(sparsity)) / before)
        if most >= wanted:
            return sparsity
    raise UsageError(f"--params-removed {wanted:g}: without heads at most {most:.3f} of this model goes")


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


def find_sliced(view: ModelView, wanted: float, residuals: Callable[[float], Sequence[Residual]]) -> float:
    """The smallest sparsity of the residual width whose pruning ratio, over all parameters and with what is added, is at least `wanted`.

    Args:
        view: the model.
        wanted: the ratio.
        residuals: sparsity -> the widths of all blocks; raises UsageError where nothing would be left.

    Raises:
        UsageError: so much cannot be removed.
    """
    if not 0 <= wanted < 1:
        raise UsageError(f"--params-removed {wanted:g} is outside [0, 1)")
    if wanted == 0:
        return 0.0
    hidden, before, most = view.config.hidden_size, view.parameters(), 0.0
    canonical = canonical_view(view, torch.float32)
    for width in range(hidden - 1, 0, -1):
        try:
            found = residuals(1 - width / hidden)
        except UsageError:  # nothing left after rounding
            break
        ratio = 1 - sliced_parameters(canonical, found) / before
        if ratio >= wanted:
            return 1.0 - found[0].attention[0] / int(hidden)
        most = max(most, ratio)
    raise UsageError(f"--params-removed {wanted:g}: narrowing the residual stream can remove at most {most:.3f} of this model")


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
