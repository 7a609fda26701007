"""Removing units in shots: each one measures the curvature of the model as it then is, takes the cheapest units, and changes what stays (arXiv:2312.17244).

Units are what the runtime removes: of a block the features of the residual that attention and MLP read (`attention_in`, `mlp_in`) and write
(`attention_out`, `mlp_out`), its feed-forward units (`ffn`), and its key-value heads with their query heads (`groups`). Zero rows and columns in the weights
of the stock model are the same function, so between shots nothing is narrowed.

Shape letters: S windows, T tokens, O outputs, I inputs of a matrix, U units of a space, N units of all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.calibrate.backward import Backward
from secateur.calibrate.kronecker import Factors
from secateur.core.errors import HopelessError
from secateur.core.memory import give_back
from secateur.core.progress import say
from secateur.models.runtime import NORM_FIRST
from secateur.models.save import disk
from secateur.models.view import BlockView, ModelView, TensorSource
from secateur.plan.plan import BlockPlan
from secateur.plan.run import Run

ROWS = {"q": "groups", "k": "groups", "v": "groups", "o": "attention_out", "gate": "ffn", "up": "ffn", "down": "mlp_out"}
COLUMNS = {"q": "attention_in", "k": "attention_in", "v": "attention_in", "o": "groups", "gate": "mlp_in", "up": "mlp_in", "down": "ffn"}
SPACES = tuple(dict.fromkeys([*ROWS.values(), *COLUMNS.values()]))

Alive = dict[str, Tensor]
"""Of one block: space -> [U], True for the units that stay."""


@dataclass(frozen=True)
class Overlay:
    """A model some of whose tensors are replaced. A `TensorSource`."""

    source: TensorSource
    changed: dict[str, Tensor]

    def names(self) -> list[str]:
        """Those of the original."""
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the original."""
        return self.source.shape(name)

    def read(self, name: str) -> Tensor:
        """One tensor, as it is now."""
        return self.changed[name] if name in self.changed else self.source.read(name)

    def rows(self, name: str, which: slice | Tensor) -> Tensor:
        """Some rows of a matrix outside the blocks, which nothing replaces."""
        return self.source.rows(name, which)


class Shots:
    """The model as it is between shots: what stays, and its weights in the checkpoint's dtype, zero where something went.

    Args:
        view: the model.
        run: the run; its checkpoint, where it is there, is what an interrupted one goes on from.
        curvature, damping: see `Factors`.
        update: whether weights that stay make up for those that go.
        rank: units compete by their cost a `parameter`, or by their `cost`.
    """

    def __init__(self, view: ModelView, run: Run, *, curvature: str, damping: float, update: bool, rank: str) -> None:
        self.run, self.curvature, self.damping, self.rank = run, curvature, damping, rank
        self.update = update and curvature == "kfac"  # without correlations nothing is made up for
        self.overlay = Overlay(view.source, {})
        self.view = replace(view, source=self.overlay)
        self.alive: list[Alive] = [{space: torch.ones(count, dtype=torch.bool) for space, count in units(view, index).items()} for index in range(view.blocks)]
        self.told: list[dict[str, float]] = []
        if run.checkpoint is not None and run.checkpoint.is_file():
            self._load()

    @property
    def done(self) -> int:
        """The number of shots."""
        return len(self.told)

    def shot(self, windows: Tensor, wanted: float) -> None:
        """Bring the share of the parameters that is removed to `wanted`, by gradients on windows [S, T].

        Raises:
            HopelessError: all gradients are zero.
            NotFiniteError: a loss or a gradient is NaN or infinite.
        """
        costs: list[dict[str, Tensor]] = [{}] * self.view.blocks
        backward = self._backward(windows)
        reacts = False
        for block in backward.blocks():
            factors = Factors(block, backward, self.curvature, self.damping)
            costs[block.index] = unit_costs(block, factors, self.alive[block.index])
            reacts |= factors.any()
            del factors
            give_back()
        if not reacts:
            raise HopelessError("all gradients are zero, so no unit costs less than another; the model does not react to its weights, or give other text")
        before = self.alive
        self.alive = choose(self.view, before, costs, wanted, self.rank)
        loss = backward.loss
        if self.update:
            backward = self._backward(windows)
            for block in backward.blocks():
                factors = Factors(block, backward, self.curvature, self.damping)
                self._change(block, before[block.index], factors)
                del factors
                give_back()
        else:
            for index in range(self.view.blocks):
                self._change(self.view.block(index), before[index], None)
        self.told.append({"loss": loss, "removed": removed_parameters(self.view, [_counts(alive) for alive in self.alive]) / self.view.parameters()})

    def _backward(self, windows: Tensor) -> Backward:
        return Backward(self.view, windows, device=self.run.device, dtype=self.run.dtype, spill=self.run.spill)

    def _change(self, block: BlockView, before: Alive, factors: Factors | None) -> None:
        """Make what goes zero, and change what stays to make up for it, where there is curvature to say how."""
        after = self.alive[block.index]
        tensors = {name: tensor.clone() for name, tensor in block.tensors.items()}
        block = replace(block, tensors=tensors)
        for name in block.names:
            weight_OI = block.matrix(name)
            (rows_O, columns_I), (stay_O, stay_I) = (_sides(name, weight_OI, alive) for alive in (before, after))
            if factors is not None and (not torch.equal(rows_O, stay_O) or not torch.equal(columns_I, stay_I)):
                part_OI = weight_OI[rows_O][:, columns_I].double().cpu()
                made_OI = factors[name].part(rows_O, columns_I).without(part_OI, stay_O[rows_O], stay_I[columns_I])
                weight_OI[rows_O.nonzero(), columns_I.nonzero().t()] = made_OI.to(weight_OI)
            weight_OI[~stay_O] = 0
            weight_OI[:, ~stay_I] = 0
            if (bias_O := block.bias(name)) is not None:
                bias_O[~stay_O] = 0
        touched = {f"{path}.{kind}" for path in block.family.matrices.values() for kind in ("weight", "bias")}
        self.overlay.changed.update({self.view.block_prefix(block.index) + name: tensor for name, tensor in tensors.items() if name in touched})

    def plan(self, index: int) -> BlockPlan:
        """What becomes of a block in the end."""
        alive = self.alive[index]
        keep = {space: alive_U.nonzero().squeeze(1).to(torch.int32) for space, alive_U in alive.items()}
        updates: Mapping[str, Tensor] = {}
        if self.update:
            block = self.view.block(index)
            updates = {name: block.matrix(name) for name in block.names}
        return BlockPlan(index, keep=keep, of={space: len(alive_U) for space, alive_U in alive.items()}, select=NORM_FIRST, updates=updates)

    def save(self) -> None:
        """Write what the next shot needs, whole or not at all.

        Raises:
            SecateurError: the disk is full, or may not be written.
        """
        if (file := self.run.checkpoint) is None:
            return
        alive = {f"alive.{index}.{space}": alive_U for index, found in enumerate(self.alive) for space, alive_U in found.items()}
        temporary = file.with_suffix(".tmp")
        with disk(file.parent):
            save_file({**alive, **{f"weights.{name}": t for name, t in self.overlay.changed.items()}}, temporary, metadata={"told": json.dumps(self.told)})
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.rename(file)

    def _load(self) -> None:
        assert self.run.checkpoint is not None
        with safe_open(self.run.checkpoint, framework="pt") as handle:
            self.told = json.loads(handle.metadata()["told"])
            for name in handle.keys():  # noqa: SIM118  # the handle has no iterator
                what, _, rest = name.partition(".")
                if what == "alive":
                    index, _, space = rest.partition(".")
                    self.alive[int(index)][space] = handle.get_tensor(name)
                else:
                    self.overlay.changed[rest] = handle.get_tensor(name)
        say(f"going on after shot {self.done}")


def units(view: ModelView, index: int) -> dict[str, int]:
    """Space -> the number of its units."""
    dims = view.dims(index)
    return {space: {"groups": dims.groups, "ffn": dims.ffn}.get(space, dims.hidden) for space in SPACES}


def block_parameters(view: ModelView, index: int, kept: Mapping[str, int]) -> int:
    """The parameters of a block's matrices, their biases and the norms they read through, with so many units of each space."""
    stored, prefix, full = set(view.source.names()), view.block_prefix(index), units(view, index)
    norm = sum(name.startswith(f"{prefix}{view.family.norms[0]}.") for name in stored)
    total = norm * (kept["attention_in"] + kept["mlp_in"])
    for name, (rows, columns) in view.matrix_shapes(index).items():
        rows = rows // full[ROWS[name]] * kept[ROWS[name]]
        total += rows * (columns // full[COLUMNS[name]] * kept[COLUMNS[name]]) + rows * (f"{prefix}{view.family.matrices[name]}.bias" in stored)
    return total


def removed_parameters(view: ModelView, kept: Sequence[Mapping[str, int]]) -> int:
    """The parameters that go where so many units stay in each block. Where attention and MLP read through one norm, the result has one for each."""
    full = [units(view, index) for index in range(view.blocks)]
    saved = sum(block_parameters(view, index, full[index]) - block_parameters(view, index, counts) for index, counts in enumerate(kept))
    prefix = f"{view.block_prefix(0)}{view.family.norms[0]}."
    shared = sum(view.source.shape(name)[0] for name in view.source.names() if name.startswith(prefix)) if view.family.parallel else 0
    return saved - shared * view.blocks


def unit_costs(block: BlockView, factors: Factors, alive: Alive) -> dict[str, Tensor]:
    """What each unit costs, [U] float64 for each space; infinite for those that are gone."""
    costs = {space: torch.zeros(len(alive_U), dtype=torch.float64).masked_fill(~alive_U, torch.inf) for space, alive_U in alive.items()}
    for name in block.names:
        weight_OI = block.matrix(name)
        rows_O, columns_I = _sides(name, weight_OI, alive)
        part_OI, curvature = weight_OI[rows_O][:, columns_I].double().cpu(), factors[name].part(rows_O, columns_I)
        for space, cost in ((ROWS[name], curvature.row_costs(part_OI)), (COLUMNS[name], curvature.column_costs(part_OI))):
            costs[space][alive[space]] += cost.view(int(alive[space].sum()), -1).sum(1)
    return costs


def choose(view: ModelView, alive: list[Alive], costs: list[dict[str, Tensor]], wanted: float, rank: str) -> list[Alive]:
    """The units that stay when the cheapest go, as many as bring the share of removed parameters to `wanted`; one of each space of a block stays."""
    places = [(index, space) for index in range(view.blocks) for space in SPACES]
    values, where = [], []
    for number, (index, space) in enumerate(places):
        cost_U = costs[index][space].clone()
        cost_U[cost_U.masked_fill(cost_U.isinf(), -1).argmax()] = torch.inf  # the dearest stays
        counts = _counts(alive[index])
        here = block_parameters(view, index, counts) - block_parameters(view, index, {**counts, space: counts[space] - 1})
        values.append(cost_U / (max(1, here) if rank == "parameter" else 1))
        where.append(torch.full((len(cost_U),), number))
    value_N, place_N = torch.cat(values), torch.cat(where)
    order_N = value_N.sort(stable=True).indices[: int(value_N.isfinite().sum())]
    start = [_counts(found) for found in alive]

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
    """Which rows [O] and columns [I] of a matrix stay."""
    rows_U, columns_U = alive[ROWS[name]], alive[COLUMNS[name]]
    return rows_U.repeat_interleave(weight_OI.shape[0] // len(rows_U)), columns_U.repeat_interleave(weight_OI.shape[1] // len(columns_U))
