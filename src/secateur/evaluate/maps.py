"""The linear maps of a model, from shapes alone: which there are, in letters and in numbers, in the order in which a token meets them.

Source: arXiv:2503.04377, appendix A.1 and table 2. Letters: d residual width, h query heads, g key-value heads (the paper's v), k head
width, m feed-forward width, V vocabulary, P learned positions, r rank of a residual adapter. Sizes are inputs x outputs as in its table 2;
torch stores the transpose. Unlike there, h·k need not equal d (it does not after a cut, nor in every model), and biases and tied heads are
counted. A sliced model has another d in each place, and maps of its own on its residual connections.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from secateur.core.records import Record
from secateur.models.family import MLP
from secateur.models.runtime import is_index_map
from secateur.models.spaces import COLUMNS, HEADS, ROWS
from secateur.models.view import ModelView

TIMES = "\N{MULTIPLICATION SIGN}"
_EDGE = 1e-9  # (1 - s) d may fall just short of a whole number in floating point


def _letters(name: str, space: str) -> str:
    """One side of a matrix in letters, as in table 2 of the paper."""
    if space == "groups":
        return "h·k" if name in HEADS else "g·k"
    return "m" if space == "ffn" else "d"


@dataclass(frozen=True)
class Axis:
    """One side of a map: its letters, and its size."""

    symbol: str
    size: int

    def at(self, sparsity: float) -> int:
        """The size where d is (1 - s)d, rounded down to a whole width."""
        return math.floor((1 - sparsity) * self.size + _EDGE) if self.symbol == "d" else self.size


@dataclass(frozen=True)
class Map:
    """A linear map, or the same one of several blocks where their sizes are equal.

    Attributes:
        name: canonical: `embed`, `norm_attention`, `q` ... `down`, `norm_final`, `head`; else the last part of the module's own. The adapters of
            a sliced model are `skip_attention` and `skip_mlp`, or `skip` of a parallel block.
        module: its path in the model; inside the block for maps of blocks. Of adapters, that of the tensor.
        kind: `product`, `lookup` (an embedding), `scale` (the gain of a norm), or `other` (a tensor the family does not describe).
        axes: (inputs, outputs); a norm has one.
        bias: the axis of its bias, None where it has none.
        blocks: the blocks it is in; empty outside the blocks.
        rows: the rows of a fused weight that are this map, [from, to).
        tied: whether its weight is that of another map, and so counted there: of a head, the embedding; of the second factor of an adapter
            between equal widths, the first.
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
        """How many there are."""
        return len(self.blocks) or 1

    @property
    def touched(self) -> bool:
        """Whether d is one of its axes: then its weights scale by 1 - s."""
        return any(axis.symbol == "d" for axis in self.axes)

    @property
    def shape(self) -> str:
        """The axes in letters, and that of the bias: `d × h·k + h·k`."""
        return f" {TIMES} ".join(axis.symbol for axis in self.axes) + (f" + {self.bias.symbol}" if self.bias else "")

    def parameters(self, sparsity: float = 0.0) -> int:
        """Of all of them together, biases included."""
        bias = self.bias.at(sparsity) if self.bias else 0
        return self.count * ((0 if self.tied else self._weights(sparsity)) + bias)

    def touched_parameters(self) -> int:
        """The parameters that go with d: the weights where d is an axis, the bias where it is added to the residual."""
        weights = self._weights(0.0) if self.touched and not self.tied else 0
        return self.count * (weights + (self.bias.size if self.bias and self.bias.symbol == "d" else 0))

    def flops(self, sparsity: float = 0.0) -> int:
        """Per token, of all of them together."""
        return 2 * self.count * self._weights(sparsity) if self.kind == "product" else 0

    def _weights(self, sparsity: float) -> int:
        return math.prod(axis.at(sparsity) for axis in self.axes)

    def record(self) -> Record:
        """As data: `size` is [inputs, outputs]; `parameters` and `flops_per_token` are of all blocks together."""
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
    """The two products of attention without weights, queries by keys and scores by values, of blocks where they are equal.

    Attributes:
        width: h·k: every query head has keys, shared or not.
        keys: how many positions a token looks at: the context, or the sliding window where that is shorter.
        blocks: the blocks they are in.
    """

    width: int
    keys: int
    blocks: tuple[int, ...]

    def flops(self) -> int:
        """Per token, of all blocks together."""
        return 2 * 2 * self.width * self.keys * len(self.blocks)

    def record(self) -> Record:
        """As data."""
        return {
            "shape": f"2 {TIMES} h·k {TIMES} keys",
            "width": self.width,
            "keys": self.keys,
            "blocks": list(self.blocks),
            "flops_per_token": self.flops(),
        }


def linear_maps(view: ModelView) -> list[Map]:
    """Every map of the model, every tensor in exactly one; equal maps of several blocks are one entry."""
    shapes = _Shapes(view)
    blocks = [found for index in range(view.blocks) for found in shapes.block(index)]
    return _grouped([*shapes.embeddings(), *blocks, *shapes.end(), *shapes.others()])


def attention_products(view: ModelView, context: int) -> list[Attention]:
    """The products without weights, for a token that sees `context` positions, itself included."""
    found: dict[tuple[int, int], list[int]] = {}
    for index in range(view.blocks):
        dims = view.dims(index)
        found.setdefault((dims.heads * dims.head_width, min(context, _window(view, index) or context)), []).append(
            index
        )
    return [Attention(width, keys, tuple(blocks)) for (width, keys), blocks in found.items()]


class _Shapes:
    """The shapes of a model; each is claimed by one map, so that nothing is counted twice or forgotten."""

    def __init__(self, view: ModelView) -> None:
        self.view, self.family = view, view.family
        self.unclaimed = {name: view.source.shape(name) for name in view.source.names() if not is_index_map(name)}

    def embeddings(self) -> list[Map]:
        """What runs before the first block."""
        token, *others = self.family.embeddings
        return [self._map("embed", token, "lookup", ("V", "d")), *(self._embedding(path) for path in others)]

    def _embedding(self, path: str) -> Map:
        learned = len(self.unclaimed[f"{path}.weight"]) == 2
        return self._map(_last(path), path, "lookup" if learned else "scale", ("P", "d") if learned else ("d",))

    def block(self, index: int) -> list[Map]:
        """The maps of one block, in the order in which a token meets them."""
        names = ("norm",) if self.family.parallel else ("norm_attention", "norm_mlp")
        norms = [self._norm(name, path, "d", index) for name, path in zip(names, self.family.norms, strict=True)]
        heads = [found for path in self.family.head_norms for found in self._norm(_last(path), path, "k", index)]
        matrices = {
            found.name: found
            for path in dict.fromkeys(self.family.matrices.values())
            for found in self._parts(path, index)
        }
        mlp = [matrices[name] for name in MLP if name in matrices]
        attention = [*norms[0], matrices["q"], matrices["k"], matrices["v"], *heads, matrices["o"]]
        if self.family.parallel:
            return [*attention, *mlp, *self._skip("skip", 0, index)]
        return [*attention, *self._skip("skip_attention", 0, index), *norms[1], *mlp, *self._skip("skip_mlp", 1, index)]

    def _skip(self, name: str, number: int, index: int) -> list[Map]:
        """The adapter on a residual connection of a sliced model: one product, two with a rank between, or none (see `runtime.Skip`)."""
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
        found = self.unclaimed.pop(self.view.block_prefix(index) + name)
        assert found == shape, f"block {index}: {name} is {found}, the configuration says {shape}"

    def end(self) -> list[Map]:
        """The final norm and the head."""
        head = self.family.head
        if f"{head}.weight" in self.unclaimed:
            found = self._map("head", head, "product", ("d", "V"))
        else:
            vocabulary, width = self.view.source.shape(f"{self.family.embeddings[0]}.weight")
            found = Map(
                "head", head, "product", (Axis("d", width), Axis("V", vocabulary)), self._bias(head, "V"), tied=True
            )
        norm = (
            [self._map("norm_final", self.family.final_norm, "scale", ("d",))]
            if f"{self.family.final_norm}.weight" in self.unclaimed
            else []
        )
        return [*norm, found]

    def others(self) -> list[Map]:
        """Tensors that the family does not describe: counted, in their own sizes, as not touched by d."""
        return [
            Map("other", name, "other", tuple(Axis(str(size), size) for size in shape))
            for name, shape in self.unclaimed.items()
        ]

    def _norm(self, name: str, path: str, symbol: str, index: int) -> list[Map]:
        """One map, or none: not every model has norms inside heads, and a norm need not have a gain."""
        module = self.view.block_prefix(index) + path
        if f"{module}.weight" not in self.unclaimed:
            return []
        return [replace(self._map(name, module, "scale", (symbol,)), module=path, blocks=(index,))]

    def _parts(self, path: str, index: int) -> list[Map]:
        """The matrices of one module of a block: several where it is fused, their rows stacked."""
        module, dims = self.view.block_prefix(index) + path, self.view.dims(index)
        rows, inputs = self.unclaimed.pop(f"{module}.weight")
        biased = self.unclaimed.pop(f"{module}.bias", None) is not None
        names = [name for name, other in self.family.matrices.items() if other == path]
        sizes = [dims.shape(name)[0] for name in names]
        assert sum(sizes) == rows, f"{module} has {rows} rows, its parts {sizes}"
        found, start = [], 0
        for name, size in zip(names, sizes, strict=True):
            out = Axis(_letters(name, ROWS[name]), size)
            part = (start, start + size) if len(names) > 1 else None
            found.append(
                Map(
                    name,
                    path,
                    "product",
                    (Axis(_letters(name, COLUMNS[name]), inputs), out),
                    out if biased else None,
                    (index,),
                    part,
                )
            )
            start += size
        return found

    def _map(self, name: str, module: str, kind: str, symbols: tuple[str, ...]) -> Map:
        """A module that is not fused; the weight of a product is stored as outputs x inputs, that of a look-up as it is applied."""
        shape = self.unclaimed.pop(f"{module}.weight")
        sizes = reversed(shape) if kind == "product" else shape
        axes = tuple(Axis(symbol, size) for symbol, size in zip(symbols, sizes, strict=True))
        return Map(name, module, kind, axes, self._bias(module, symbols[-1]))

    def _bias(self, module: str, symbol: str) -> Axis | None:
        shape = self.unclaimed.pop(f"{module}.bias", None)
        return Axis(symbol, shape[0]) if shape else None


def _window(view: ModelView, index: int) -> int | None:
    """The sliding window of a block's attention, None where it sees everything before."""
    kinds = getattr(view.config, "layer_types", None)
    if kinds and kinds[index] != "sliding_attention":
        return None
    window: int | None = getattr(view.config, "sliding_window", None)
    return window


def _grouped(maps: Iterable[Map]) -> list[Map]:
    """Equal maps of several blocks as one; those of one name stay together, in the order of their first block."""
    found: dict[Map, list[int]] = {}
    for one in maps:
        found.setdefault(replace(one, blocks=()), []).extend(one.blocks)
    order = list(dict.fromkeys((one.name, one.module) for one in found))
    together = [replace(one, blocks=tuple(blocks)) for one, blocks in found.items()]
    return sorted(together, key=lambda one: order.index((one.name, one.module)))


def _last(path: str) -> str:
    return path.rpartition(".")[2]
