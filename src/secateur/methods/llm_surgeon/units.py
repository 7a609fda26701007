"""Removal of units in shots: the cheapest rows and columns of all matrices, by the curvature of the current model
(arXiv:2312.17244, section 3).

Units are what the runtime removes: of a block the features of the residual that attention and MLP read (`attention_in`,
`mlp_in`) and write (`attention_out`, `mlp_out`), its feed-forward units (`ffn`), and its key-value heads with their
query heads (`groups`). Zero rows and columns in the weights of the stock model are the same function, so between shots
nothing is narrowed.

A feed-forward unit or a head is computed by rows of some matrices and read by columns of another. Cost and update are
those of the columns that read it, all columns of a head together. Nothing then reads the rows that computed it, so they
go at no cost: an update for them too would compensate for one loss twice.

Shape letters: O outputs, I inputs of a matrix, U units of a space, N units of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secateur.methods.llm_surgeon.kronecker import Factors
from secateur.methods.llm_surgeon.shots import Shots
from secateur.models.parameters import BlockCost, block_cost, block_parameters
from secateur.models.runtime import NORM_FIRST
from secateur.models.spaces import COLUMNS, INNER, ROWS, SPACES
from secateur.models.view import BlockView, ModelView
from secateur.plan.plan import BlockPlan
from secateur.plan.run import Run

Alive = dict[str, Tensor]
"""The units of one block: space -> [U], True for the units that stay."""


class UnitShots(Shots):
    """Shots that remove units. Arguments as for `Shots`, and `rank`: compare units by their cost for each `parameter`,
    or by their whole `cost`.
    """

    def __init__(self, view: ModelView, run: Run, *, curvature: str, damping: float, update: bool, rank: str) -> None:
        self.rank = rank
        self.alive: list[Alive] = [
            {space: torch.ones(count, dtype=torch.bool) for space, count in units(view, index).items()}
            for index in range(view.blocks)
        ]
        self._before = self.alive
        self._costs: list[dict[str, Tensor]] = [{}] * view.blocks
        super().__init__(view, run, curvature=curvature, damping=damping, update=update)

    @property
    def removed(self) -> float:
        """The share of the parameters that is removed."""
        return removed_parameters(self.view, [_counts(alive) for alive in self.alive]) / self.view.parameters()

    def measure(self, block: BlockView, factors: Factors) -> None:
        """Store the costs of the units of a block."""
        self._costs[block.index] = unit_costs(block, factors, self.alive[block.index])

    def choose(self, wanted: float) -> None:
        """Choose the cheapest units of all blocks for removal."""
        self._before = self.alive
        self.alive = choose(self.view, self._before, self._costs, wanted, self.rank)

    def change(self, block: BlockView, factors: Factors | None) -> None:
        """Zero the rows and columns of removed units, and update the others."""
        before, after = self._before[block.index], self.alive[block.index]
        for name in block.names:
            weight_OI = block.matrix(name)
            (rows_O, columns_I), (stay_O, stay_I) = (_sides(name, weight_OI, alive) for alive in (before, after))
            # rows that nothing reads any more need no compensation
            felt_O = rows_O if ROWS[name] in INNER else stay_O
            if factors is not None and (not torch.equal(rows_O, felt_O) or not torch.equal(columns_I, stay_I)):
                part_OI = weight_OI[rows_O][:, columns_I].double().cpu()
                made_OI = factors[name].part(rows_O, columns_I).without(part_OI, felt_O[rows_O], stay_I[columns_I])
                weight_OI[rows_O.nonzero(), columns_I.nonzero().t()] = made_OI.to(weight_OI)
            weight_OI[~stay_O] = 0
            weight_OI[:, ~stay_I] = 0
            if (bias_O := block.bias(name)) is not None:
                bias_O[~stay_O] = 0

    def plan(self, index: int) -> BlockPlan:
        """The plan of a block after the last shot."""
        alive = self.alive[index]
        keep = {space: alive_U.nonzero().squeeze(1).to(torch.int32) for space, alive_U in alive.items()}
        of = {space: len(alive_U) for space, alive_U in alive.items()}
        return BlockPlan(
            index, keep=keep, of=of, select=NORM_FIRST, updates=self.updates(index, self.view.matrix_shapes(index))
        )

    def kept(self) -> dict[str, Tensor]:
        """The masks of the units that stay, named by block and space."""
        return {
            f"{index}.{space}": alive_U for index, alive in enumerate(self.alive) for space, alive_U in alive.items()
        }

    def keep(self, name: str, tensor: Tensor) -> None:
        """Load one tensor that `kept` returned."""
        index, _, space = name.partition(".")
        self.alive[int(index)][space] = tensor


def units(view: ModelView, index: int) -> dict[str, int]:
    """The number of units of each space."""
    sizes = view.dims(index).units()
    return {space: sizes[space] for space in SPACES}


def unit_block_cost(view: ModelView, index: int) -> BlockCost:
    """The parameters of a block as a function of the units that stay; attention and MLP have a norm each."""
    return block_cost(view, index, view.dims(index).selecting(NORM_FIRST))


def removed_parameters(view: ModelView, kept: Sequence[Mapping[str, int]]) -> int:
    """The number of parameters removed if `kept` units stay in each space of each block."""
    before = sum(block_parameters(view, index) for index in range(view.blocks))
    return before - int(sum(unit_block_cost(view, index).parameters(counts) for index, counts in enumerate(kept)))


def unit_costs(block: BlockView, factors: Factors, alive: Alive) -> dict[str, Tensor]:
    """The cost of each unit, [U] float64 for each space; infinite for units that are removed already."""
    costs = {
        space: torch.zeros(len(alive_U), dtype=torch.float64).masked_fill(~alive_U, torch.inf)
        for space, alive_U in alive.items()
    }
    for name in block.names:
        weight_OI = block.matrix(name)
        rows_O, columns_I = _sides(name, weight_OI, alive)
        part_OI, curvature = weight_OI[rows_O][:, columns_I].double().cpu(), factors[name].part(rows_O, columns_I)
        given, read = ROWS[name], COLUMNS[name]
        if given not in INNER:
            costs[given][alive[given]] += curvature.row_costs(part_OI)
        costs[read][alive[read]] += curvature.column_costs(part_OI, part_OI.shape[1] // int(alive[read].sum()))
    return costs


def choose(
    view: ModelView, alive: list[Alive], costs: list[dict[str, Tensor]], wanted: float, rank: str
) -> list[Alive]:
    """The units that stay after removing the cheapest ones, until the share of removed parameters reaches `wanted`. In
    each space of a block at least one unit stays.
    """
    places = [(index, space) for index in range(view.blocks) for space in SPACES]
    values, where = [], []
    block_costs = [unit_block_cost(view, index) for index in range(view.blocks)]
    for number, (index, space) in enumerate(places):
        cost_U = costs[index][space].clone()
        cost_U[cost_U.masked_fill(cost_U.isinf(), -1).argmax()] = torch.inf  # the unit with the highest cost stays
        here = block_costs[index].unit_parameters(space, _counts(alive[index]))
        values.append(cost_U / (max(1, here) if rank == "parameter" else 1))
        where.append(torch.full((len(cost_U),), number))
    value_N, place_N = torch.cat(values), torch.cat(where)
    order_N = value_N.sort(stable=True).indices[: int(value_N.isfinite().sum())]
    start = [_counts(units_alive) for units_alive in alive]

    def removed(count: int) -> int:
        gone = torch.bincount(place_N[order_N[:count]], minlength=len(places)).tolist()
        kept = [dict(counts) for counts in start]
        for (index, space), number in zip(places, gone, strict=True):
            kept[index][space] -= number
        return removed_parameters(view, kept)

    low, high = 0, len(order_N)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if removed(middle) >= wanted * view.parameters() else (middle + 1, high)
    stays_N = torch.cat([alive[index][space] for index, space in places]).index_fill(0, order_N[:low], False)
    after: list[Alive] = [{} for _ in alive]
    for (index, space), stays_U in zip(places, stays_N.split([len(value) for value in values]), strict=True):
        after[index][space] = stays_U.clone()
    return after


def _counts(alive: Alive) -> dict[str, int]:
    return {space: int(alive_U.sum()) for space, alive_U in alive.items()}


def _sides(name: str, weight_OI: Tensor, alive: Alive) -> tuple[Tensor, Tensor]:
    """The rows [O] and columns [I] of a matrix that stay, as masks."""
    rows_U, columns_U = alive[ROWS[name]], alive[COLUMNS[name]]
    return rows_U.repeat_interleave(weight_OI.shape[0] // len(rows_U)), columns_U.repeat_interleave(
        weight_OI.shape[1] // len(columns_U)
    )
