"""The view of a model through its family: blocks, matrices, and the spaces that matrices share.

Whoever asks for a canonical matrix (`block.matrix("q")`) gets it, fused in the file or not. Only code that hooks or
rebuilds whole modules asks `Family.fused` which matrices a module holds.

Shape letters: D residual, H query heads, G key-value heads, K head width, F feed-forward units, O outputs, I inputs of
a matrix. Weights are `weight_OI` as in torch.nn.Linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from secateur.models.family import CANONICAL, Family, is_pruned
from secateur.models.runtime import SELECT_FORMS, is_index_map
from secateur.models.spaces import COLUMNS, OWN_COLUMNS, PARTS, QUERY_HEADS, ROWS, SEPARATE_COLUMNS


class TensorSource(Protocol):
    """A source of weights: lazily read files, or a model in memory. Names are as in the state dict of the model."""

    def names(self) -> list[str]:
        """Return the name of every tensor once, in the order of the model."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""

    def read(self, name: str) -> Tensor:
        """Return one tensor, in the dtype in which it is stored."""

    def rows(self, name: str, which: slice | Tensor) -> Tensor:
        """Return some rows of a matrix outside the blocks: a large vocabulary is never needed all at once."""


@dataclass(frozen=True)
class Residual:
    """The widths of the residual stream in one block.

    Either the stream is narrower than the hidden size (SliceGPT), or the block reads and writes parts of it (DISP-LLM).

    Attributes:
        attention, mlp: the widths that attention and MLP read and write: (in, out).
        skips: the forms of the residual connections. With `runtime.Skip`: one entry in a parallel block, two otherwise.
            With `runtime.Select`: two.
        readers: the widths that q, k and v read if each selects for itself; attention then reads the whole residual.
    """

    attention: tuple[int, int]
    mlp: tuple[int, int]
    skips: tuple[int | str | None, ...]
    readers: tuple[int, int, int] | None = None

    @property
    def selected(self) -> bool:
        """Whether the block selects parts of a residual stream that stays whole."""
        return self.skips[0] in SELECT_FORMS


@dataclass(frozen=True)
class BlockDims:
    """The sizes of one block: D, H, G, K, F. `residual` is None if attention and MLP read and write all of D."""

    hidden: int
    heads: int
    groups: int
    head_width: int
    ffn: int
    residual: Residual | None = None

    @property
    def queries(self) -> int:
        """Query heads that share one key-value head; head h belongs to group h // queries. 0 without attention."""
        return self.heads // self.groups if self.groups else 0

    @property
    def missing(self) -> tuple[str, ...]:
        """The parts that the block does not have: `attention`, `mlp`."""
        units = self.units()
        return tuple(part for part, space in PARTS.items() if not units[space])

    @property
    def apart(self) -> bool:
        """Whether the MLP reads nothing that attention reads too: each selects for itself, or there is no attention."""
        return not self.groups or (self.residual is not None and self.residual.selected)

    @property
    def columns(self) -> Mapping[str, str]:
        """Canonical matrix name -> the space that its columns read."""
        return SEPARATE_COLUMNS if self.residual and self.residual.readers else COLUMNS

    def units(self) -> dict[str, int]:
        """Return space -> the number of its units."""
        whole = (self.hidden, self.hidden)
        attention, mlp = (self.residual.attention, self.residual.mlp) if self.residual else (whole, whole)
        sizes = {
            "groups": self.groups,
            "ffn": self.ffn,
            "attention_in": attention[0],
            "attention_out": attention[1],
            "mlp_in": mlp[0],
            "mlp_out": mlp[1],
        }
        if self.residual and self.residual.readers:
            sizes |= zip(OWN_COLUMNS.values(), self.residual.readers, strict=True)
        return sizes

    def unit_width(self, name: str, space: str) -> int:
        """Return the number of rows or columns of a matrix that belong to one unit of a space."""
        if space != "groups":
            return 1
        return self.head_width * (self.queries if name in QUERY_HEADS else 1)

    def shape(self, name: str) -> tuple[int, int]:
        """Return the shape (O, I) of a matrix by its canonical name."""
        units, rows, columns = self.units(), ROWS[name], self.columns[name]
        return units[rows] * self.unit_width(name, rows), units[columns] * self.unit_width(name, columns)

    @property
    def enters(self) -> int:
        """The width of the residual at the start of the block."""
        return self.residual.attention[0] if self.residual and not self.residual.selected else self.hidden

    @property
    def leaves(self) -> int:
        """The width of the residual at the end of the block."""
        return self.residual.mlp[1] if self.residual and not self.residual.selected else self.hidden

    def with_units(self, groups: int, ffn: int, queries: int | None = None) -> BlockDims:
        """Return the sizes with other numbers of key-value heads and feed-forward units.

        `queries` is the number of query heads per key-value head; None does not change it.
        """
        return replace(self, groups=groups, heads=groups * (queries or self.queries), ffn=ffn)

    def selecting(self, form: str, *, separate: bool = False) -> BlockDims:
        """Return the sizes of a block that reads by `form` (see `runtime.Select`) and selects all features.

        If `separate` is true, q, k and v select for themselves.
        """
        whole = (self.hidden, self.hidden)
        return replace(self, residual=Residual(whole, whole, (form, form), (self.hidden,) * 3 if separate else None))

    def widths(self) -> dict[str, Any]:
        """Return the entry of a pruned configuration for the block (`pruned_widths`)."""
        widths: dict[str, Any] = {"heads": self.heads, "groups": self.groups, "ffn": self.ffn}
        if self.residual is not None:
            widths |= {name: list(getattr(self.residual, name)) for name in ("attention", "mlp", "skips")}
            widths |= {"readers": list(self.residual.readers)} if self.residual.readers else {}
        return widths


def dims_of(family: Family, config: PreTrainedConfig, index: int) -> BlockDims:
    """Return the sizes of block `index` of a stock or pruned model."""
    dense = getattr(config, family.heads)
    hidden = config.hidden_size
    head_width = (getattr(config, "head_dim", None) if family.stock_heads else None) or hidden // dense
    if is_pruned(config):
        widths = config.pruned_widths[index]
        residual = (
            Residual(*(tuple(widths[name]) for name in ("attention", "mlp", "skips", "readers") if name in widths))
            if "attention" in widths
            else None
        )
        return BlockDims(hidden, widths["heads"], widths["groups"], head_width, widths["ffn"], residual)
    return BlockDims(hidden, dense, getattr(config, family.groups), head_width, getattr(config, family.ffn))


@dataclass(frozen=True)
class BlockView:
    """One block: its tensors by their names inside the block, and the matrices in them by canonical name.

    `rates` has the requested sparsity of each matrix; a matrix without an entry must not change. `dtype` is the dtype
    of the weights after a cut; None takes the dtype of the tensors.
    """

    family: Family
    dims: BlockDims
    index: int
    tensors: Mapping[str, Tensor]
    rates: Mapping[str, float] = field(default_factory=dict)
    dtype: torch.dtype | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The canonical names of the matrices of this block, in canonical order."""
        return tuple(name for name in CANONICAL if name in self.family.matrices)

    def matrix(self, name: str) -> Tensor:
        """Return the weight of a matrix, [O, I], as a view: writing to it changes the (perhaps fused) tensor."""
        return self._rows(name, "weight")

    def bias(self, name: str) -> Tensor | None:
        """Return the bias of a matrix, [O], as a view; None if it has no bias."""
        return self._rows(name, "bias") if f"{self.family.matrices[name]}.bias" in self.tensors else None

    def _rows(self, name: str, kind: str) -> Tensor:
        tensor = self.tensors[f"{self.family.matrices[name]}.{kind}"]
        start = 0
        for other in self.family.fused(name):
            rows = self.dims.shape(other)[0]
            if other == name:
                return tensor[start : start + rows]
            start += rows
        raise AssertionError(name)

    def matrix_parameters(self) -> int:
        """Return the number of weights in the matrices (no biases, no norms)."""
        return sum(self.matrix(name).numel() for name in self.names)

    def zero_rows(self) -> int:
        """Return the number of rows of the matrices that are all zero."""
        return sum(zero_rows(self.matrix(name)) for name in self.names)


def block_modules(model: nn.Module, family: Family) -> nn.ModuleList:
    """Return the blocks of a model in memory."""
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList), "every family has its blocks in a list"
    return blocks


@contextmanager
def other_forwards(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
    """Give blocks other forwards for a while. The blocks stay in place: a decoder may ask them what kind they are."""
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # that of its class is behind it


def zero_rows(weight_OI: Tensor) -> int:
    """Return the number of rows of a matrix that are all zero; a matrix without columns has none."""
    return 0 if not weight_OI.numel() else len(weight_OI) - int(weight_OI.any(1).sum())


@dataclass(frozen=True)
class ModelView:
    """A whole model: its configuration, its family, and a source of tensors that is read a block at a time.

    `raw_config` is the content of its config.json. `rates`, if it is not empty, has the requested sparsities of the
    matrices of each block. For `dtype` see `BlockView`.
    """

    name: str
    config: PreTrainedConfig
    raw_config: Mapping[str, Any]
    family: Family
    source: TensorSource
    rates: tuple[Mapping[str, float], ...] = ()
    dtype: torch.dtype | None = None

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def widest_ffn(self) -> int:
        """The most feed-forward units that a block has."""
        return max(self.dims(index).ffn for index in range(self.blocks))

    def dims(self, index: int) -> BlockDims:
        """Return the sizes of a block."""
        return dims_of(self.family, self.config, index)

    def block_prefix(self, index: int) -> str:
        """Return the prefix of the names of the tensors of a block."""
        return f"{self.family.blocks}.{index}."

    def block(self, index: int, rates: Mapping[str, float] | None = None) -> BlockView:
        """Read one block."""
        prefix = self.block_prefix(index)
        tensors = {
            name.removeprefix(prefix): self.source.read(name) for name in self.source.names() if name.startswith(prefix)
        }
        return BlockView(
            self.family,
            self.dims(index),
            index,
            tensors,
            rates or (self.rates[index] if self.rates else {}),
            self.dtype,
        )

    @cached_property
    def block_shapes(self) -> tuple[Mapping[str, tuple[int, ...]], ...]:
        """For each block, the shapes of its parameters by their names inside it."""
        shapes: tuple[dict[str, tuple[int, ...]], ...] = tuple({} for _ in range(self.blocks))
        for name in self.source.names():
            index, _, inside = name.removeprefix(f"{self.family.blocks}.").partition(".")
            if name.startswith(f"{self.family.blocks}.") and not is_index_map(name):
                shapes[int(index)][inside] = self.source.shape(name)
        return shapes

    def outer_names(self) -> list[str]:
        """Return the names of the tensors outside the blocks: embeddings, final norm, head."""
        return [name for name in self.source.names() if not name.startswith(self.family.blocks + ".")]

    def read_module(self, path: str) -> dict[str, Tensor]:
        """Read the tensors of a module outside the blocks, by their names inside the module."""
        prefix = path + "."
        return {
            name.removeprefix(prefix): self.source.read(name) for name in self.outer_names() if name.startswith(prefix)
        }

    def parameters(self) -> int:
        """Return the number of all parameters; a tied tensor counts once."""
        return sum(
            torch.Size(self.source.shape(name)).numel() for name in self.source.names() if not is_index_map(name)
        )

    def matrix_parameters(self) -> int:
        """Return the number of weights in the matrices of all blocks."""
        return sum(o * i for index in range(self.blocks) for o, i in self.matrix_shapes(index).values())

    def matrix_shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """Return canonical name -> (O, I) for the matrices of a block."""
        dims = self.dims(index)
        return {name: dims.shape(name) for name in CANONICAL if name in self.family.matrices}

    def iterate(self) -> Iterator[BlockView]:
        """Yield the blocks, read one at a time."""
        for index in range(self.blocks):
            yield self.block(index)
