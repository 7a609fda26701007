"""The number of parameters of a model with given block sizes. No other module counts them.

The parameters of one block (for its spaces see `models/spaces.py`):

    a matrix     units that it reads x units that it writes x the columns and rows of one unit
    its bias     units that it writes x the rows of one unit, if the checkpoint stores a bias
    a norm       features that are read through it, once for its gain and once for its bias, if it has them
    a skip       see `runtime.Skip`
    the rest     as stored: norms over the width of a head

The rows of a fused module count in the same way. Index maps are not parameters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secateur.models.family import Family
from secateur.models.runtime import SECOND_NORM, SELECT_FIRST
from secateur.models.spaces import OWN_COLUMNS, ROWS
from secateur.models.view import BlockDims, ModelView


@dataclass(frozen=True)
class BlockCost:
    """The parameters of a block as a function of the units of its spaces.

    Attributes:
        products: spaces -> parameters for each combination of their units, for example `("mlp_in", "ffn"): 2`. The
            empty key, which is always present, has the parameters that belong to no unit.
    """

    products: Mapping[tuple[str, ...], int]

    def parameters(self, units: Mapping[str, float]) -> float:
        """Return the number of parameters for given numbers of units, space -> units."""
        return sum(each * math.prod(units[space] for space in spaces) for spaces, each in self.products.items())

    def unit_parameters(self, space: str, units: Mapping[str, int]) -> int:
        """Return the parameters that one unit of `space` takes; `units` are the numbers of the other spaces."""
        single = {**units, space: 1}
        products = {spaces: each for spaces, each in self.products.items() if space in spaces}
        return sum(each * math.prod(single[name] for name in spaces) for spaces, each in products.items())

    def fixed(self, units: Mapping[str, int]) -> BlockCost:
        """Return the cost as a function of the other spaces, with the numbers of units of some spaces fixed."""
        products: Counter[tuple[str, ...]] = Counter()
        for spaces, each in self.products.items():
            left = tuple(space for space in spaces if space not in units)
            products[left] += each * math.prod(units[space] for space in spaces if space in units)
        return BlockCost(products)


def block_cost(view: ModelView, index: int, dims: BlockDims | None = None) -> BlockCost:
    """Return the cost of a block.

    Args:
        view: the model; in canonical form if `dims` are the sizes of a sliced block.
        index: the index of the block.
        dims: the sizes of the block after a cut; None if it does not change. The cost depends on their skips, their
            form of reading and their query heads per group.
    """
    dims, stored = dims or view.dims(index), view.block_shapes[index]
    products: Counter[tuple[str, ...]] = Counter({(): _rest(view.family, stored) + _skips(dims)})
    for name in view.matrix_shapes(index):
        written, read = ROWS[name], dims.columns[name]
        rows = dims.unit_width(name, written)
        products[read, written] += rows * dims.unit_width(name, read)
        products[(written,)] += rows * (f"{view.family.matrices[name]}.bias" in stored)
    for space in _normed(view.family, dims):
        products[(space,)] += _norm_vectors(view.family, stored)
    return BlockCost(products)


def block_parameters(view: ModelView, index: int, dims: BlockDims | None = None) -> int:
    """Return the number of parameters of a block; arguments as for `block_cost`."""
    return int(block_cost(view, index, dims).parameters((dims or view.dims(index)).units()))


def count_parameters(view: ModelView, after: Sequence[BlockDims | None]) -> int:
    """Return the number of parameters of a model after a cut; a tied tensor counts once.

    Args:
        view: the model before the cut; in canonical form if it is sliced.
        after: the sizes of each block; None for a removed block.
    """
    kept = [(index, dims) for index, dims in enumerate(after) if dims is not None]
    enters, leaves = kept[0][1].enters, kept[-1][1].leaves
    ends = dict.fromkeys(view.family.embeddings, enters) | {view.family.head: leaves}
    total = sum(block_parameters(view, index, dims) for index, dims in kept)
    for name in view.outer_names():
        shape, path = view.source.shape(name), name.rpartition(".")[0]
        if path == view.family.tied_map:
            total += enters * leaves
            continue
        total += shape[0] * ends[path] if path in ends and len(shape) == 2 else math.prod(shape)
    return total


def unit_parameters(view: ModelView, index: int, space: str) -> int:
    """The number of weights and biases of one unit: a feed-forward unit, or a key-value head with its query heads."""
    return block_cost(view, index).unit_parameters(space, view.dims(index).units())


def mean_block(view: ModelView) -> float:
    """The mean number of parameters of a block."""
    return sum(block_parameters(view, index) for index in range(view.blocks)) / view.blocks


def _norm_paths(family: Family) -> tuple[str, ...]:
    """Return the paths of all norms over the residual that a block, stock or pruned, may have."""
    readers = (family.separated().matrices[name].rpartition(".")[0] for name in OWN_COLUMNS)
    return (*family.norms, SECOND_NORM, *(f"{reader}.norm" for reader in readers))


def _norm_vectors(family: Family, stored: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of vectors (gain, bias) of a norm over the residual. All norms of a block have the same."""
    return max(sum(f"{path}.{kind}" in stored for kind in ("weight", "bias")) for path in _norm_paths(family))


def _normed(family: Family, dims: BlockDims) -> tuple[str, ...]:
    """Return the spaces whose features are read through a norm, one entry per norm."""
    residual = dims.residual
    if residual is None or not residual.selected:
        return ("attention_in", "mlp_in")[: len(family.norms)]  # a parallel block of Phi has one norm for both
    if residual.readers and residual.skips[0] == SELECT_FIRST:
        return (*OWN_COLUMNS.values(), "mlp_in")
    return ("attention_in", "mlp_in")  # if q, k and v select after the norm, `attention_in` is the whole residual


def _rest(family: Family, stored: Mapping[str, tuple[int, ...]]) -> int:
    counted = {*family.matrices.values(), *_norm_paths(family)}
    rest = [name for name in stored if name.rpartition(".")[0] not in counted and not name.startswith("skips.")]
    return sum(math.prod(stored[name]) for name in rest)


def _skips(dims: BlockDims) -> int:
    """Return the number of parameters on the residual connections."""
    if dims.residual is None or dims.residual.selected:
        return 0
    ends = (dims.residual.attention, dims.residual.mlp)  # a parallel block has one skip
    return sum(_skip(*end, form) for end, form in zip(ends, dims.residual.skips, strict=False))


def _skip(inputs: int, outputs: int, form: int | str | None) -> int:
    if form is None:
        return 0
    if form == "dense":
        return inputs * outputs
    assert isinstance(form, int)
    return form * (inputs if inputs == outputs else inputs + outputs)
