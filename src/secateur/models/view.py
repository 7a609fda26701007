"""A model seen through its family: blocks, matrices, and the spaces that matrices share. The only place that knows of fused weights.

Shape letters: D residual, H query heads, G key-value heads, K head width, F feed-forward units, O outputs, I inputs of a matrix.
Weights are `weight_OI` as in torch.nn.Linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from secateur.models.family import CANONICAL, Family, is_pruned
from secateur.models.runtime import SELECT_FORMS, is_index_map
from secateur.models.spaces import COLUMNS, HEADS, OWN_COLUMNS, ROWS, SEPARATE_COLUMNS


class TensorSource(Protocol):
    """Where weights come from: files read lazily, or a model in memory. Names are those of the stock model's state dict."""

    def names(self) -> list[str]:
        """Every tensor once, in the order of the model."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype it is stored in."""

    def rows(self, name: str, which: slice | Tensor) -> Tensor:
        """Some rows of a matrix outside the blocks: those of a large vocabulary are never all needed at once."""


@dataclass(frozen=True)
class Residual:
    """The widths of the residual stream as one block sees it, where they are not the hidden size (SliceGPT), or of the parts of it that
    the block reads and writes (DISP-LLM).

    Attributes:
        attention, mlp: what attention and MLP read and write: (in, out).
        skips: the form of the residual connections: see `runtime.Skip`, one of a parallel block, two otherwise; or `runtime.Select`, two.
        readers: what q, k and v read, where each selects for itself; attention then reads all of the residual.
    """

    attention: tuple[int, int]
    mlp: tuple[int, int]
    skips: tuple[int | str | None, ...]
    readers: tuple[int, int, int] | None = None

    @property
    def selected(self) -> bool:
        """Whether the residual itself stays whole."""
        return self.skips[0] in SELECT_FORMS


@dataclass(frozen=True)
class BlockDims:
    """The sizes of one block: D, H, G, K, F. `residual` is None where attention and MLP read and write all of D."""

    hidden: int
    heads: int
    groups: int
    head_width: int
    ffn: int
    residual: Residual | None = None

    @property
    def queries(self) -> int:
        """Query heads that share one key-value head; head h belongs to group h // queries."""
        return self.heads // self.groups

    @property
    def columns(self) -> Mapping[str, str]:
        """Canonical matrix name -> the space that its columns read."""
        return SEPARATE_COLUMNS if self.residual and self.residual.readers else COLUMNS

    def units(self) -> dict[str, int]:
        """Space -> the number of its units."""
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
        """How many rows or columns of a matrix are one unit of a space."""
        if space != "groups":
            return 1
        return self.head_width * (self.queries if name in HEADS else 1)

    def shape(self, name: str) -> tuple[int, int]:
        """(O, I) of a matrix by its canonical name."""
        units, rows, columns = self.units(), ROWS[name], self.columns[name]
        return units[rows] * self.unit_width(name, rows), units[columns] * self.unit_width(name, columns)

    @property
    def enters(self) -> int:
        """The width of the residual where it enters the block."""
        return self.residual.attention[0] if self.residual and not self.residual.selected else self.hidden

    @property
    def leaves(self) -> int:
        """The width of the residual where it leaves the block."""
        return self.residual.mlp[1] if self.residual and not self.residual.selected else self.hidden

    def with_units(self, groups: int, ffn: int, queries: int | None = None) -> BlockDims:
        """The sizes with so many key-value heads, each with its query heads (or with `queries` of them), and feed-forward units."""
        return replace(self, groups=groups, heads=groups * (queries or self.queries), ffn=ffn)

    def selecting(self, form: str, *, separate: bool = False) -> BlockDims:
        """The sizes of a block that reads the residual by `form` (see `runtime.Select`), and selects all its features.

        `separate` says that q, k and v select for themselves.
        """
        whole = (self.hidden, self.hidden)
        return replace(self, residual=Residual(whole, whole, (form, form), (self.hidden,) * 3 if separate else None))

    def widths(self) -> dict[str, Any]:
        """What a pruned configuration keeps of them (`pruned_widths`)."""
        widths: dict[str, Any] = {"heads": self.heads, "groups": self.groups, "ffn": self.ffn}
        if self.residual is not None:
            widths |= {name: list(getattr(self.residual, name)) for name in ("attention", "mlp", "skips")}
            widths |= {"readers": list(self.residual.readers)} if self.residual.readers else {}
        return widths


def dims_of(family: Family, config: PreTrainedConfig, index: int) -> BlockDims:
    """The sizes of block `index`, also of an already pruned model."""
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

    `rates` says what is asked of each matrix: the sparsity, or no entry for a matrix that must stay as it is. `dtype` is that of
    the weights after a cut, None where it is that of the tensors.
    """

    family: Family
    dims: BlockDims
    index: int
    tensors: Mapping[str, Tensor]
    rates: Mapping[str, float] = field(default_factory=dict)
    dtype: torch.dtype | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices this block has, in canonical order."""
        return tuple(name for name in CANONICAL if name in self.family.matrices)

    def matrix(self, name: str) -> Tensor:
        """The weight of a matrix, [O, I]: a view, so that writing to it writes the (perhaps fused) tensor."""
        return self._rows(name, "weight")

    def bias(self, name: str) -> Tensor | None:
        """The bias of a matrix, [O], as a view; None where it has none."""
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
        """The number of weights in the matrices (no biases, no norms)."""
        return sum(self.matrix(name).numel() for name in self.names)

    def zero_rows(self) -> int:
        """How many rows of the matrices are all zero."""
        return sum(zero_rows(self.matrix(name)) for name in self.names)


def zero_rows(weight_OI: Tensor) -> int:
    """How many rows of a matrix are all zero."""
    return len(weight_OI) - int(weight_OI.any(1).sum())


@dataclass(frozen=True)
class ModelView:
    """A whole model: its configuration, its family, and a source of tensors that is read a block at a time.

    `raw_config` is the content of its config.json. `rates`, where it is not empty, has what is asked of the matrices of each
    block. `dtype`: see `BlockView`.
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

    def dims(self, index: int) -> BlockDims:
        """The sizes of a block."""
        return dims_of(self.family, self.config, index)

    def block_prefix(self, index: int) -> str:
        """What the names of a block's tensors begin with."""
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
        """The tensors outside the blocks: embeddings, final norm, head."""
        return [name for name in self.source.names() if not name.startswith(self.family.blocks + ".")]

    def read_module(self, path: str) -> dict[str, Tensor]:
        """The tensors of a module outside the blocks, by their names inside it."""
        prefix = path + "."
        return {
            name.removeprefix(prefix): self.source.read(name) for name in self.outer_names() if name.startswith(prefix)
        }

    def parameters(self) -> int:
        """All parameters, a tied tensor once."""
        return sum(
            torch.Size(self.source.shape(name)).numel() for name in self.source.names() if not is_index_map(name)
        )

    def matrix_parameters(self) -> int:
        """The weights of the block matrices alone."""
        return sum(o * i for index in range(self.blocks) for o, i in self.matrix_shapes(index).values())

    def matrix_shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """Canonical name -> (O, I) for the matrices of a block."""
        dims = self.dims(index)
        return {name: dims.shape(name) for name in CANONICAL if name in self.family.matrices}

    def iterate(self) -> Iterator[BlockView]:
        """The blocks, one in memory at a time."""
        for index in range(self.blocks):
            yield self.block(index)
