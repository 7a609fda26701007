"""Removal of single weights in shots: the cheapest of all matrices, by the curvature of the current model
(arXiv:2312.17244, section 3).

Matrices with the same requested sparsity share one threshold; those with a lower one stop earlier. With N:M, at most
M - N of every M consecutive inputs of a row are removed. Of equal costs the weight of the earlier block, matrix, row
and column goes.

A shot stores only as many of the lowest costs as it will remove, 16 bytes each.

Shape letters: O outputs, I inputs of a matrix, N candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from secateur.methods.llm_surgeon.kronecker import Factors
from secateur.methods.llm_surgeon.shots import Shots
from secateur.models.view import BlockView, ModelView
from secateur.plan.pattern import Pattern
from secateur.plan.plan import BlockPlan, Mask
from secateur.plan.run import Run

_EDGE = 1e-6  # a share times a count may fall just short of a whole number


@dataclass
class Pool:
    """The weights that compete: those of all matrices with one sparsity, numbered one matrix after another.

    Attributes:
        starts: (block, matrix) -> the number of its first weight.
        size: the number of weights.
        gone: the number of weights removed so far.
        to_go: the number of weights to remove in this shot, which is the largest number of candidates stored.
        cost_N, number_N: the candidates, float64 and int64, in no order.
    """

    starts: dict[tuple[int, str], int] = field(default_factory=dict)
    size: int = 0
    gone: int = 0
    to_go: int = 0
    cost_N: np.ndarray = field(default_factory=lambda: np.empty(0))
    number_N: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def offer(self, cost_N: np.ndarray, number_N: np.ndarray) -> None:
        """Add candidates, and store the cheapest ones."""
        cost_N, number_N = np.concatenate([self.cost_N, cost_N]), np.concatenate([self.number_N, number_N])
        lowest = _lowest(cost_N, number_N, self.to_go)
        self.cost_N, self.number_N = cost_N[lowest], number_N[lowest]

    def take(self) -> dict[tuple[int, str], np.ndarray]:
        """Remove the candidates: (block, matrix) -> their places in the matrix, row after row."""
        number_N, removed = np.sort(self.number_N), {}
        begins = [*self.starts.values(), self.size]
        for (place, begin), end in zip(self.starts.items(), begins[1:], strict=True):
            low, high = np.searchsorted(number_N, (begin, end))
            if high > low:
                removed[place] = number_N[low:high] - begin
        self.gone += len(number_N)
        self.cost_N, self.number_N = self.cost_N[:0], self.number_N[:0]
        return removed


def _lowest(cost_N: np.ndarray, number_N: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` lowest costs; of equal costs those with the lowest numbers."""
    if len(cost_N) <= count:
        return np.arange(len(cost_N))
    if not count:
        return np.empty(0, np.int64)
    threshold = np.partition(cost_N, count - 1)[count - 1]
    below, equal = np.flatnonzero(cost_N < threshold), np.flatnonzero(cost_N == threshold)
    return np.concatenate([below, equal[np.argsort(number_N[equal])[: count - len(below)]]])


class WeightShots(Shots):
    """Shots that remove single weights.

    Arguments as for `Shots`, and the `pattern`; the rates of the view give the sparsity of each matrix.
    """

    def __init__(
        self, view: ModelView, run: Run, *, curvature: str, damping: float, update: bool, pattern: Pattern
    ) -> None:
        self.pattern = pattern
        self.masks: dict[tuple[int, str], Mask] = {}
        self.pools: dict[float, Pool] = {}
        self._changes: set[tuple[int, str]] = set()
        for index, rates in enumerate(view.rates):
            for name, rate in rates.items():
                shape = view.matrix_shapes(index)[name]
                self.masks[index, name] = Mask.pack(torch.ones(shape, dtype=torch.bool))
                pool = self.pools.setdefault(rate, Pool())
                pool.starts[index, name] = pool.size
                pool.size += shape[0] * shape[1]
        super().__init__(view, run, curvature=curvature, damping=damping, update=update)

    @property
    def removed(self) -> float:
        """The removed share of the weights of the matrices that take part."""
        return sum(pool.gone for pool in self.pools.values()) / sum(pool.size for pool in self.pools.values())

    def aim(self, wanted: float) -> None:
        """Set the number of weights to remove in each pool, before the measurement."""
        for rate, pool in self.pools.items():
            pool.to_go = max(0, int(min(rate, wanted) * pool.size + _EDGE) - pool.gone)

    def shot(self, windows: Tensor, wanted: float) -> None:
        """Bring the removed share to `wanted`, as for `Shots`; a matrix with a lower rate stops at its rate."""
        self.aim(wanted)
        super().shot(windows, wanted)

    def measure(self, block: BlockView, factors: Factors) -> None:
        """Store the costs of the weights of a block."""
        for name, rate in block.rates.items():
            keep_OI = self.masks[block.index, name].unpack()
            cost_OI = factors[name].weight_costs(block.matrix(name).double().cpu()).masked_fill_(~keep_OI, torch.inf)
            cost_N = self._allowed(cost_OI, keep_OI).flatten().numpy()
            pool = self.pools[rate]
            place_N = np.flatnonzero(np.isfinite(cost_N))
            place_N = place_N[_lowest(cost_N[place_N], place_N, pool.to_go)]
            pool.offer(cost_N[place_N], place_N + pool.starts[block.index, name])

    def _allowed(self, cost_OI: Tensor, keep_OI: Tensor) -> Tensor:
        """The costs, with infinity for weights that must stay in their N:M group."""
        if self.pattern.kind != "n:m":
            return cost_OI
        cost_GM, keep_GM = (t.view(-1, self.pattern.group) for t in (cost_OI, keep_OI))
        rank_GM = cost_GM.argsort(dim=1, stable=True).argsort(dim=1)
        return cost_GM.masked_fill(rank_GM >= keep_GM.sum(1, keepdim=True) - self.pattern.keep, torch.inf).view_as(
            cost_OI
        )

    def choose(self, wanted: float) -> None:
        """Choose the cheapest weights of all blocks for removal."""
        self._changes = set()
        for pool in self.pools.values():
            for (index, name), place_N in pool.take().items():
                keep_OI = self.masks[index, name].unpack()
                keep_OI.view(-1)[torch.from_numpy(place_N)] = False
                self.masks[index, name] = Mask.pack(keep_OI)
                self._changes.add((index, name))

    def change(self, block: BlockView, factors: Factors | None) -> None:
        """Zero the removed weights, and update the others."""
        for name in block.rates:
            if (block.index, name) not in self._changes:
                continue
            weight_OI, keep_OI = block.matrix(name), self.masks[block.index, name].unpack()
            if factors is not None:
                weight_OI.copy_(factors[name].masked(weight_OI.double().cpu(), keep_OI))
            weight_OI.masked_fill_(~keep_OI.to(weight_OI.device), 0)

    def plan(self, index: int) -> BlockPlan:
        """The plan of a block after the last shot."""
        names = self.view.rates[index]
        return BlockPlan(index, {name: self.masks[index, name] for name in names}, updates=self.updates(index, names))

    def kept(self) -> dict[str, Tensor]:
        """The bits of the masks, named by block and matrix."""
        return {f"{index}.{name}": mask.bits for (index, name), mask in self.masks.items()}

    def keep(self, name: str, tensor: Tensor) -> None:
        """Load one tensor that `kept` returned."""
        index, _, matrix = name.partition(".")
        place = int(index), matrix
        mask = self.masks[place] = Mask(self.masks[place].shape, tensor)
        next(pool for pool in self.pools.values() if place in pool.starts).gone += mask.removed
