"""The linear maps of a model, from shapes alone, in letters and in numbers, in the order in which a token meets them.

Source: arXiv:2503.04377, appendix A.1 and table 2. Letters: d residual width, h query heads, g key-value heads (the
paper's v), k head width, m feed-forward width, V vocabulary, P learned positions, r rank of a residual adapter. Sizes
are inputs x outputs as in the paper's table 2; torch stores the transpose. Unlike in the paper, h·k need not equal d
(it does not after a cut, nor in every model), and biases and tied heads are counted. A sliced model has a different d
at each place, and extra maps on its residual connections.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from secateur.core.records import Record
from secateur.models.family import MLP
from secateur.models.runtime import is_index_map
from secateur.models.spaces import COLUMNS, QUERY_HEADS, ROWS
from secateur.models.view import ModelView

TIMES = "\N{MULTIPLICATION SIGN}"
_EDGE = 1e-9  # (1 - s) d may fall just short of a whole number in floating point


def _letters(name: str, space: str) -> str:
    """Return the letters of one side of a matrix, as in table 2 of the paper."""
    if space == "groups":
        return "h·k" if name in QUERY_HEADS else "g·k"
    return "m" if space == "ffn" else "d"


@dataclass(frozen=True)
class Axis:
    """One side of a map: its letters, and its size."""

    symbol: str
    size: int

    def at(self, sparsity: float) -> int:
        """Return the size with d narrowed to (1 - s)d, rounded down to a whole width."""
        return math.floor((1 - sparsity) * self.size + _EDGE) if self.symbol == "d" else self.size


@dataclass(frozen=True)
class Map:
    """A linear map, or the same map of several blocks where their sizes are equal.

    Attributes:
        name: canonical: `embed`, `norm_attention`, `q` ... `down`, `norm_final`, `head`; else the last part of the
            module's name. The adapters of a sliced model are `skip_attention` and `skip_mlp`, or `skip` in a parallel
            block, and `skip_head` before a tied head.
        module: its path in the model, or in the block for maps of blocks; for adapters the path of the tensor.
        kind: `product`, `lookup` (an embedding), `scale` (the gain of a norm), or `other` (a tensor the family does not
            describe).
        axes: (inputs, outputs); a norm has one.
        bias: the axis of its bias, None where it has none.
        blocks: the blocks it is in; empty outside the blocks.
        rows: the rows of a fused weight that belong to this map, [from, to).
        tied: whether its weight belongs to another map and is counted there: the weight of a head to the embedding, the
            second factor of an adapter between equal widths to the first.
    """

    name: str
    module: str
    kind: str
    axes: tuple[Axis, ...]
    bias: Axis | None = None
    blocks: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None
    tied: bool = False

    @property
    def count(self) -> int:
        """The number of equal maps."""
        return len(self.blocks) or 1

    @property
    def touched(self) -> bool:
        """True if d is one of its axes. Then its weights scale by 1 - s."""
        return any(axis.symbol == "d" for axis in self.axes)

    @property
    def shape(self) -> str:
        """The axes in letters, and that of the bias: `d × h·k + h·k`."""
        return f" {TIMES} ".join(axis.symbol for axis in self.axes) + (f" + {self.bias.symbol}" if self.bias else "")

    def parameters(self, sparsity: float = 0.0) -> int:
        """Return the number of parameters of all blocks together, biases included."""
        bias = self.bias.at(sparsity) if self.bias else 0
        return self.count * ((0 if self.tied else self._weights(sparsity)) + bias)

    def touched_parameters(self) -> int:
        """Count the parameters that shrink with d: weights with d as an axis, and a bias added to the residual."""
        weights = self._weights(0.0) if self.touched and not self.tied else 0
        return self.count * (weights + (self.bias.size if self.bias and self.bias.symbol == "d" else 0))

    def flops(self, sparsity: float = 0.0) -> int:
        """Return the FLOPs per token of all blocks together."""
        return 2 * self.count * self._weights(sparsity) if self.kind == "product" else 0

    def _weights(self, sparsity: float) -> int:
        return math.prod(axis.at(sparsity) for axis in self.axes)

    def record(self) -> Record:
        """Return the record. `size` is [inputs, outputs]; `parameters` and `flops_per_token` sum over all blocks."""
        return {
            "name": self.name,
            "module": self.module,
            "kind": self.kind,
            "shape": self.shape,
            "size": [axis.size for axis in self.axes],
            "bias": self.bias.size if self.bias else 0,
            "rows": list(self.rows) if self.rows else None,
            "blocks": list(self.blocks),
            "count": self.count,
            "tied": self.tied,
            "parameters": self.parameters(),
            "parameters_touched": self.touched_parameters(),
            "flops_per_token": self.flops(),
            "scales": ("1", "1 - s", "(1 - s)^2")[sum(axis.symbol == "d" for axis in self.axes)],
        }


@dataclass(frozen=True)
class Attention:
    """The two products of attention that have no weights: queries by keys, and scores by values.

    Equal products of several blocks are one entry.

    Attributes:
        width: h·k: every query head has keys, shared or not.
        keys: how many positions a token looks at: the context, or the sliding window where that is shorter.
        blocks: the blocks they are in.
    """

    width: int
    keys: int
    blocks: tuple[int, ...]

    def flops(self) -> int:
        """Return the FLOPs per token of all blocks together."""
        return 2 * 2 * self.width * self.keys * len(self.blocks)

    def record(self) -> Record:
        """Return the record."""
        return {
            "shape": f"2 {TIMES} h·k {TIMES} keys",
            "width": self.width,
            "keys": self.keys,
            "blocks": list(self.blocks),
            "flops_per_token": self.flops(),
        }


def linear_maps(view: ModelView) -> list[Map]:
    """Return every map of the model. Each tensor is in exactly one; equal maps of several blocks are one entry."""
    shapes = _Shapes(view)
    blocks = [linear_map for index in range(view.blocks) for linear_map in shapes.block(index)]
    return _grouped([*shapes.embeddings(), *blocks, *shapes.end(), *shapes.others()])


def attention_products(view: ModelView, context: int) -> list[Attention]:
    """Return the products without weights, for a token that sees `context` positions, itself included."""
    blocks_of: dict[tuple[int, int], list[int]] = {}
    for index in range(view.blocks):
        dims = view.dims(index)
        width, keys = dims.heads * dims.head_width, min(context, _window(view, index) or context)
        blocks_of.setdefault((width, keys), []).append(index)
    return [Attention(width, keys, tuple(blocks)) for (width, keys), blocks in blocks_of.items()]


class _Shapes:
    """The shapes of a model. One map claims each shape, so that nothing is counted twice or forgotten."""

    def __init__(self, view: ModelView) -> None:
        self.view, self.family = view, view.family
        self.unclaimed = {name: view.source.shape(name) for name in view.source.names() if not is_index_map(name)}

    def embeddings(self) -> list[Map]:
        """Return the maps before the first block."""
        token, *others = self.family.embeddings
        return [self._map("embed", token, "lookup", ("V", "d")), *(self._embedding(path) for path in others)]

    def _embedding(self, path: str) -> Map:
        learned = len(self.unclaimed[f"{path}.weight"]) == 2
        return self._map(_last(path), path, "lookup" if learned else "scale", ("P", "d") if learned else ("d",))

    def block(self, index: int) -> list[Map]:
        """The maps of one block, in the order in which a token meets them."""
        family = self.family
        names = ("norm",) if family.one_norm else ("norm_attention", "norm_mlp")
        norm_attention, norm_mlp = self._pair(names, family.norms, index)
        after_attention, after_mlp = self._pair(("norm_after_attention", "norm_after_mlp"), family.post_norms, index)
        heads = [found for path in self.family.head_norms for found in self._norm(_last(path), path, "k", index)]
        for path, symbol in zip(family.joint_head_norms, ("h·k", "g·k"), strict=False):
            heads += self._norm(_last(path), path, symbol, index)
        matrices = {
            part.name: part
            for path in dict.fromkeys(self.family.matrices.values())
            for part in self._parts(path, index)
        }
        mlp = [matrices[name] for name in MLP if name in matrices]
        reads = [matrices[name] for name in ("q", "k", "v")]
        attention = [*norm_attention, *reads, *heads, matrices["o"], *after_attention]
        if self.family.parallel:
            return [*attention, *norm_mlp, *mlp, *after_mlp, *self._skip("skip", 0, index)]
        skips = self._skip("skip_attention", 0, index), self._skip("skip_mlp", 1, index)
        return [*attention, *skips[0], *norm_mlp, *mlp, *after_mlp, *skips[1]]

    def _pair(self, names: Sequence[str], paths: Sequence[str], index: int) -> tuple[list[Map], list[Map]]:
        """The norms of attention and of the MLP: two, one that both read through, or none."""
        maps = [self._norm(name, path, "d", index) for name, path in zip(names, paths, strict=False)]
        return (maps[0] if maps else []), (maps[1] if len(maps) > 1 else [])

    def _skip(self, name: str, number: int, index: int) -> list[Map]:
        """Return the adapter on a residual connection of a sliced model (see `runtime.Skip`).

        It is one product, two products with a rank between, or none.
        """
        residual = self.view.dims(index).residual
        form = None if residual is None else residual.skips[number]
        if residual is None or form is None or residual.selected:
            return []
        inputs, outputs = (Axis("d", width) for width in (residual.attention, residual.mlp)[number])
        path = f"skips.{number}."
        if form == "dense":
            self._claim(index, path + "weight", (outputs.size, inputs.size))
            return [Map(name, path + "weight", "product", (inputs, outputs), blocks=(index,))]
        assert isinstance(form, int)
        rank = Axis("r", form)
        self._claim(index, path + "left", (inputs.size, form))
        tied = inputs == outputs
        if not tied:
            self._claim(index, path + "right", (outputs.size, form))
        left = Map(name, path + "left", "product", (inputs, rank), blocks=(index,))
        return [
            left,
            Map(name, path + ("left" if tied else "right"), "product", (rank, outputs), blocks=(index,), tied=tied),
        ]

    def _claim(self, index: int, name: str, shape: tuple[int, int]) -> None:
        stored = self.unclaimed.pop(self.view.block_prefix(index) + name)
        assert stored == shape, f"block {index}: {name} is {stored}, the configuration says {shape}"

    def end(self) -> list[Map]:
        """Return the final norm and the head."""
        head = self.family.head
        if f"{head}.weight" in self.unclaimed:
            last = self._map("head", head, "product", ("d", "V"))
        else:
            vocabulary, width = self.view.source.shape(f"{self.family.embeddings[0]}.weight")
            last = Map(
                "head", head, "product", (Axis("d", width), Axis("V", vocabulary)), self._bias(head, "V"), tied=True
            )
        norm = (
            [self._map("norm_final", self.family.final_norm, "scale", ("d",))]
            if f"{self.family.final_norm}.weight" in self.unclaimed
            else []
        )
        joined = self.family.tied_map
        to_table = (
            [self._map("skip_head", joined, "product", ("d", "d"))] if f"{joined}.weight" in self.unclaimed else []
        )
        return [*norm, *to_table, last]

    def others(self) -> list[Map]:
        """Return the tensors that the family does not describe. They count in their own sizes, as not touched by d."""
        return [
            Map("other", name, "other", tuple(Axis(str(size), size) for size in shape))
            for name, shape in self.unclaimed.items()
        ]

    def _norm(self, name: str, path: str, symbol: str, index: int) -> list[Map]:
        """Return one map, or none: not every model has norms inside heads, and a norm need not have a gain."""
        module = self.view.block_prefix(index) + path
        if f"{module}.weight" not in self.unclaimed:
            return []
        return [replace(self._map(name, module, "scale", (symbol,)), module=path, blocks=(index,))]

    def _parts(self, path: str, index: int) -> list[Map]:
        """Return the matrices of one module of a block: several where it is fused, their rows stacked."""
        module, dims = self.view.block_prefix(index) + path, self.view.dims(index)
        rows, inputs = self.unclaimed.pop(f"{module}.weight")
        biased = self.unclaimed.pop(f"{module}.bias", None) is not None
        names = [name for name, module_path in self.family.matrices.items() if module_path == path]
        sizes = [dims.shape(name)[0] for name in names]
        assert sum(sizes) == rows, f"{module} has {rows} rows, its parts {sizes}"
        maps, start = [], 0
        for name, size in zip(names, sizes, strict=True):
            reads, writes = _letters(name, COLUMNS[name]), _letters(name, ROWS[name])
            out = Axis(writes, size)
            part = (start, start + size) if len(names) > 1 else None
            maps.append(Map(name, path, "product", (Axis(reads, inputs), out), out if biased else None, (index,), part))
            start += size
        return maps

    def _map(self, name: str, module: str, kind: str, symbols: tuple[str, ...]) -> Map:
        """Return the map of a module that is not fused.

        A product is stored as outputs x inputs, a look-up as applied.
        """
        shape = self.unclaimed.pop(f"{module}.weight")
        sizes = reversed(shape) if kind == "product" else shape
        axes = tuple(Axis(symbol, size) for symbol, size in zip(symbols, sizes, strict=True))
        return Map(name, module, kind, axes, self._bias(module, symbols[-1]))

    def _bias(self, module: str, symbol: str) -> Axis | None:
        shape = self.unclaimed.pop(f"{module}.bias", None)
        return Axis(symbol, shape[0]) if shape else None


def _window(view: ModelView, index: int) -> int | None:
    """Return the sliding window of a block's attention, or None where it sees all earlier positions."""
    kinds = getattr(view.config, "layer_types", None)
    if kinds and kinds[index] != "sliding_attention":
        return None
    window: int | None = getattr(view.config, "sliding_window", None)
    return window


def _grouped(maps: Iterable[Map]) -> list[Map]:
    """Join equal maps of several blocks. Maps of one name stay together, in the order of their first block."""
    blocks_of: dict[Map, list[int]] = {}
    for linear_map in maps:
        blocks_of.setdefault(replace(linear_map, blocks=()), []).extend(linear_map.blocks)
    order = list(dict.fromkeys((linear_map.name, linear_map.module) for linear_map in blocks_of))
    joined = [replace(linear_map, blocks=tuple(blocks)) for linear_map, blocks in blocks_of.items()]
    return sorted(joined, key=lambda linear_map: order.index((linear_map.name, linear_map.module)))


def _last(path: str) -> str:
    return path.rpartition(".")[2]
