"""The gates of DISP-LLM, and the number of parameters for a choice of them (arXiv:2410.11988, section 4).

Each block has five selections: S1 `attention_in`, S2 `attention_out`, S3 `mlp_in`, S4 `ffn` (the MLP's middle), S5
`mlp_out`. S1, S2, S3 and S5 choose among the residual's features, and may differ from block to block, since the
residual itself keeps all of them. Attention keeps its heads. Separate (section 4.1): `q_in`, `k_in` and `v_in` stand in
place of S1.

Constrained (the paper's comparison): one choice serves S1, S2, S3 and S5 of every block.

Shape letters: S structures, P pairs of structures, N gates of all structures together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.models.parameters import BlockCost, block_cost, block_parameters
from secateur.models.spaces import INNER, OWN_COLUMNS
from secateur.models.view import ModelView

SELECTIONS = ("attention_in", "attention_out", "mlp_in", "ffn", "mlp_out")
SEPARATE = (*OWN_COLUMNS.values(), *SELECTIONS[1:])


@dataclass(frozen=True)
class Structures:
    """The gates of a model.

    Attributes:
        widths: the number of gates of each structure.
        uses: for each block, selection -> the structure it takes its gates from.
        costs: for each block, its number of parameters as a function of the number of open gates.
        fixed: the number of parameters that no gate removes.
        total: T_total, the number of all counted parameters.
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
        """T(s): the number of parameters left with `kept` open gates in each structure."""
        return sum(
            (
                cost.parameters({s: kept[n] for s, n in uses.items()})
                for cost, uses in zip(self.costs, self.uses, strict=True)
            ),
            float(self.fixed),
        )

    def counter(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """T(s) as a function of gates [N], with gradients, in a few operations whatever the number of blocks."""
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


def find_structures(
    view: ModelView, *, constrained: bool, form: str, whole: bool, separate: bool = False
) -> Structures:
    """The gates of a model.

    Args:
        view: a model whose blocks read and write the whole residual.
        constrained: use one choice among the residual's features for all blocks.
        form: how blocks read, see `runtime.Select`.
        whole: count all parameters; otherwise only the matrices, biases and norms of the blocks.
        separate: q, k and v have a selection each.
    """
    widths = [int(view.config.hidden_size)] if constrained else []
    uses, costs, fixed = [], [], 0
    for index in range(view.blocks):
        dims = view.dims(index).selecting(form, separate=separate)
        units, use = dims.units(), {}
        for selection in SEPARATE if separate else SELECTIONS:
            if constrained and selection not in INNER:
                use[selection] = 0
                continue
            use[selection] = len(widths)
            widths.append(units[selection])
        uses.append(use)
        cost = block_cost(view, index, dims).fixed({space: size for space, size in units.items() if space not in use})
        fixed += cost.products[()]
        costs.append(BlockCost({spaces: each for spaces, each in cost.products.items() if spaces}))
    blocks = sum(block_parameters(view, index) for index in range(view.blocks))
    total = view.parameters() if whole else blocks
    return Structures(tuple(widths), tuple(uses), tuple(costs), fixed + total - blocks, total)
