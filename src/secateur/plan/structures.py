"""Where gates are, and what a choice of them costs in parameters (arXiv:2410.11988, section 4).

Five selections a block: S1 `attention_in`, S2 `attention_out`, S3 `mlp_in`, S4 `ffn` (the MLP's middle), S5 `mlp_out`. S1, S2, S3 and S5 choose among the
residual's features, and may differ from block to block, since the residual itself keeps all of them. Attention keeps its heads. Separate (its section 4.1):
`q_in`, `k_in` and `v_in` stand in place of S1.

Constrained (the paper's comparison): one choice serves S1, S2, S3 and S5 of every block.

Shape letters: S structures, P pairs of structures, N gates of all structures together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.models.runtime import SELECT_FIRST, is_index_map
from secateur.models.view import ModelView

SELECTIONS = ("attention_in", "attention_out", "mlp_in", "ffn", "mlp_out")
SEPARATE = ("q_in", "k_in", "v_in", *SELECTIONS[1:])


@dataclass(frozen=True)
class Structures:
    """The gates of a model.

    Attributes:
        widths: the number of gates of each structure.
        uses: for each block, selection -> the structure it takes its gates from.
        costs: for each block, how its parameters follow from how many gates are open.
        fixed: the parameters no gate removes.
        total: T_total, all parameters counted.
    """

    widths: tuple[int, ...]
    uses: tuple[Mapping[str, int], ...]
    costs: tuple[BlockCost, ...]
    fixed: int
    total: int

    def split(self, gate_N: Tensor) -> list[Tensor]:
        """The gates of each structure."""
        return list(gate_N.split(self.widths))

    def parameters(self, kept: Sequence[float]) -> float:
        """T(s): the parameters left with so many open gates in each structure."""
        return sum((cost.parameters({s: kept[n] for s, n in uses.items()}) for cost, uses in zip(self.costs, self.uses, strict=True)), float(self.fixed))

    def counter(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """T(s) as a function of gates [N], with gradients, in a handful of operations however many blocks there are."""
        alone, pairs = [0.0] * len(self.widths), []
        for cost, uses in zip(self.costs, self.uses, strict=True):
            for selections, each in cost.products.items():
                numbers = [uses[selection] for selection in selections]
                if len(numbers) == 1:
                    alone[numbers[0]] += each
                else:
                    pairs.append((*numbers, each))
        widths_S, alone_S = torch.tensor(self.widths, device=device), torch.tensor(alone, device=device)
        first_P, second_P, both_P = (torch.tensor(column, device=device) for column in zip(*pairs, strict=True))

        def left(gate_N: Tensor) -> Tensor:
            open_S = torch.segment_reduce(gate_N, "sum", lengths=widths_S, unsafe=True)
            return self.fixed + (alone_S * open_S).sum() + (both_P * open_S[first_P] * open_S[second_P]).sum()

        return left


@dataclass(frozen=True)
class BlockCost:
    """How the parameters of a block follow from its five widths.

    Attributes:
        products: (selection, selection) or (selection,) -> parameters for each pair, or each one, of them.
    """

    products: Mapping[tuple[str, ...], int]

    def parameters(self, kept: Mapping[str, float]) -> float:
        """The parameters that selections of these sizes leave."""
        return sum(each * math.prod(kept[selection] for selection in selections) for selections, each in self.products.items())


def find_structures(view: ModelView, *, constrained: bool, form: str, whole: bool, separate: bool = False) -> Structures:
    """The gates of a model.

    Args:
        view: a model whose blocks read and write all of the residual.
        constrained: one choice among the residual's features for all blocks.
        form: how blocks read, see `runtime.Select`.
        whole: count all parameters; otherwise the matrices, biases and norms of the blocks alone.
        separate: q, k and v choose for themselves.
    """
    hidden = int(view.config.hidden_size)
    widths = [hidden] if constrained else []
    uses, costs = [], []
    for index in range(view.blocks):
        use = {}
        for selection in SEPARATE if separate else SELECTIONS:
            if constrained and selection != "ffn":
                use[selection] = 0
                continue
            use[selection] = len(widths)
            widths.append(view.dims(index).ffn if selection == "ffn" else hidden)
        uses.append(use)
        costs.append(_block_cost(view, index, form, separate))
    full = sum(float(cost.parameters({s: float(widths[n]) for s, n in use.items()})) for cost, use in zip(costs, uses, strict=True))
    norms = 4 if separate and form == SELECT_FIRST else 2  # of a block that selects: a norm that several read becomes several
    added = hidden * _norm_tensors(view, 0) * view.blocks * (norms - len(view.family.norms))
    total = view.parameters() if whole else sum(_size(view, n) for n in view.source.names() if n.startswith(view.family.blocks + "."))
    return Structures(tuple(widths), tuple(uses), tuple(costs), total + added - round(full), total)


def _size(view: ModelView, name: str) -> int:
    return 0 if is_index_map(name) else math.prod(view.source.shape(name))


def _norm_tensors(view: ModelView, index: int) -> int:
    """How many vectors a norm has: gain, perhaps bias."""
    prefix = f"{view.block_prefix(index)}{view.family.norms[0]}."
    return sum(name.startswith(prefix) for name in view.source.names())


def _block_cost(view: ModelView, index: int, form: str, separate: bool) -> BlockCost:
    dims, family, stored = view.dims(index), view.family, set(view.source.names())

    def bias(name: str) -> int:
        return int(f"{view.block_prefix(index)}{family.matrices[name]}.bias" in stored)

    inner, keys, norm = dims.heads * dims.head_width, dims.groups * dims.head_width, _norm_tensors(view, index)
    own = norm if form == SELECT_FIRST else 0  # where all features are normed first, one norm serves q, k and v, and keeps all of its gains
    reads = {"q_in": inner + own, "k_in": keys + own, "v_in": keys + own} if separate else {"attention_in": inner + 2 * keys + norm}
    wide = [name for name in ("gate", "up") if name in family.matrices]
    return BlockCost(
        {(selection,): each for selection, each in reads.items()}
        | {
            ("attention_out",): inner + bias("o"),
            ("mlp_in", "ffn"): len(wide),
            ("mlp_in",): norm,
            ("ffn",): sum(bias(name) for name in wide),
            ("ffn", "mlp_out"): 1,
            ("mlp_out",): bias("down"),
        }
    )
