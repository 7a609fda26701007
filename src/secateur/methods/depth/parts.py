"""The attention and the MLP of every block: what is gone, what may still go, and what it would cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass

import torch
from safetensors import safe_open

from secateur.core.progress import say
from secateur.cut.block import dims_after
from secateur.models.parameters import block_parameters
from secateur.models.save import disk, save_whole
from secateur.models.spaces import PARTS
from secateur.models.view import ModelView
from secateur.plan.plan import BlockPlan
from secateur.plan.run import Run

MAY_GO = {"submodules": tuple(PARTS), "attention": ("attention",), "blocks": ("block",)}
"""Values of the option `part` -> what may go."""


@dataclass(frozen=True, order=True)
class Candidate:
    """What may go: a part of a block, `attention`, `mlp` or `block`."""

    index: int
    part: str

    def __str__(self) -> str:
        return f"block {self.index}" if self.part == "block" else f"{self.part} of block {self.index}"


class Parts:
    """The parts that are gone, in the order of their removal, and what is known of the others.

    Args:
        view: the model.
        part: what may go, a name of `MAY_GO`.

    Attributes:
        order: the candidates that were removed.
        losses: the loss of the model, and then after each removal, in nats a token.
        rises: candidate -> by how much its removal would raise the loss, as last measured.
    """

    def __init__(self, view: ModelView, part: str) -> None:
        self.view, self._kinds = view, MAY_GO[part]
        self.order: list[Candidate] = []
        self.losses: list[float] = []
        self.rises: dict[Candidate, float] = {}
        self._before = [block_parameters(view, index) for index in range(view.blocks)]

    @property
    def removed(self) -> int:
        """The parameters that are gone."""
        return sum(self._before) - sum(self._left(index) for index in range(self.view.blocks))

    def candidates(self) -> list[Candidate]:
        """Return what may still go, by block. One block stays."""
        left = [index for index in range(self.view.blocks) if not self.plan(index).dropped]
        found = []
        for index in left:
            dims = dims_after(self.view.dims(index), self.plan(index))
            for part in self._kinds:
                candidate = Candidate(index, part)
                there = part == "block" or dims.units()[PARTS[part]]
                if there and (len(left) > 1 or not self.plan(index, candidate).dropped):
                    found.append(candidate)
        return found

    def promising(self, number: int) -> list[Candidate]:
        """Return the candidates to measure now: all at first, then the `number` that were cheapest; 0 for all."""
        free = self.candidates()
        if not self.order or not number:
            return free
        return sorted(sorted(free, key=self._price)[:number])

    def remove(self, losses: Mapping[Candidate, float]) -> None:
        """Remove the cheapest of the candidates without which the loss was measured."""
        self.rises |= {candidate: loss - self.losses[-1] for candidate, loss in losses.items()}
        cheapest = min(losses, key=self._price)
        self.order.append(cheapest)
        self.losses.append(losses[cheapest])

    def removals_to(self, wanted: float) -> int:
        """Return about how many removals lead to `wanted` parameters, if all are of the mean size; at least one."""
        sizes = [self.parameters(candidate) for candidate in self.candidates()]
        return max(1, round((wanted - self.removed) * len(sizes) / sum(sizes)))

    def told(self) -> str:
        """Return what the last removal was, and where it leads."""
        share = self.removed / self.view.parameters()
        return f"{self.order[-1]} removed: loss {self.losses[-1]:.4f}, {share:.2%} of the parameters gone"

    def most(self) -> int:
        """Return the parameters that can go from the model as it was. One block stays."""
        missing = [self.view.dims(index).missing for index in range(self.view.blocks)]
        if "block" in self._kinds or all(part in (*self._kinds, *absent) for absent in missing for part in PARTS):
            return sum(self._before) - max(self._before)
        return sum(self.parameters(candidate) for candidate in self.candidates())

    def stop_at(self, wanted: float, *, at_least: bool) -> None:
        """Undo removals beyond the number of parameters that is nearest to `wanted`.

        The first removal stays, and with `at_least` all that are needed to reach it.
        """
        order, losses = self.order, self.losses
        for count in range(1, len(order) + 1):
            below, (self.order, self.losses) = self.removed, (order[:count], losses[: count + 1])
            if (beyond := self.removed - wanted) >= 0:
                if count > 1 and not at_least and wanted - below < beyond:
                    self.order, self.losses = order[: count - 1], losses[:count]
                return

    def plan(self, index: int, also: Candidate | None = None) -> BlockPlan:
        """Return the plan of a block, `also` without a candidate. Without attention and MLP it is dropped."""
        gone = {one.part for one in (*self.order, also) if one is not None and one.index == index}
        units = self.view.dims(index).units()
        nothing = torch.empty(0, dtype=torch.int32)
        if "block" in gone or (gone and all(part in gone or not units[space] for part, space in PARTS.items())):
            return BlockPlan(index, dropped=True)
        spaces = [space for part, space in PARTS.items() if part in gone]
        return BlockPlan(index, keep=dict.fromkeys(spaces, nothing), of={space: units[space] for space in spaces})

    def save(self, run: Run) -> None:
        """Write what is known, for a run that goes on."""
        if run.state_file is not None:
            state = {"order": self.order, "losses": self.losses, "rises": list(self.rises.items())}
            with disk(run.state_file.parent):
                save_whole(run.state_file, {}, {"state": json.dumps(state, default=astuple)})

    def load(self, run: Run) -> None:
        """Go on from what an earlier run knew, if there was one."""
        if run.state_file is None or not run.state_file.is_file():
            return
        with safe_open(run.state_file, framework="pt") as handle:
            state = json.loads(handle.metadata()["state"])
        self.order, self.losses = [Candidate(*one) for one in state["order"]], state["losses"]
        self.rises = {Candidate(*one): rise for one, rise in state["rises"]}
        say(f"depth: continuing after {len(self.order)} removals")

    def parameters(self, candidate: Candidate) -> int:
        """Return the parameters that a removal takes now."""
        return self._left(candidate.index) - self._left(candidate.index, candidate)

    def _price(self, candidate: Candidate) -> tuple[float, Candidate]:
        """Return the rise of the loss for each parameter that goes; of equal ones the first is taken."""
        return self.rises[candidate] / self.parameters(candidate), candidate

    def _left(self, index: int, also: Candidate | None = None) -> int:
        plan = self.plan(index, also)
        return 0 if plan.dropped else block_parameters(self.view, index, dims_after(self.view.dims(index), plan))
