"""Removing in shots: each one measures the curvature of the model as it then is, takes the cheapest, and changes what
stays (arXiv:2312.17244).

`UnitShots` (`unit_shots.py`) takes whole units, `WeightShots` (`weight_shots.py`) single weights. What the two share is
here: the model as it is between shots, the two passes over its blocks that a shot has, and the file that an interrupted
run goes on from.

Shape letters: S windows, T tokens.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from secateur.calibrate.backward import Backward
from secateur.core.errors import HopelessError
from secateur.core.memory import give_back
from secateur.core.progress import say
from secateur.methods.llm_surgeon.kronecker import Factors
from secateur.models.save import disk, save_whole
from secateur.models.view import BlockView, ModelView, TensorSource
from secateur.plan.plan import BlockPlan
from secateur.plan.run import Run


@dataclass(frozen=True)
class Overlay:
    """A model some of whose tensors are replaced, by others in memory or in safetensors files. A `TensorSource`."""

    source: TensorSource
    changed: dict[str, Tensor | Path]

    def names(self) -> list[str]:
        """Those of the original."""
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the original."""
        return self.source.shape(name)

    def read(self, name: str) -> Tensor:
        """One tensor, as it is now."""
        now = self.changed.get(name)
        if now is None:
            return self.source.read(name)
        if isinstance(now, Tensor):
            return now
        with safe_open(now, framework="pt") as handle:
            found: Tensor = handle.get_tensor(name)
        return found

    def rows(self, name: str, which: slice | Tensor) -> Tensor:
        """Some rows of a matrix outside the blocks, which nothing replaces."""
        return self.source.rows(name, which)


class Shots(ABC):
    """The model as it is between shots: its weights in the checkpoint's dtype, zero where something went.

    Changed weights are written beside the run's checkpoint, a file for each block, and are in memory one block at a
    time; where it has none, they stay there.

    Args:
        view: the model.
        run: the run; `save` writes its checkpoint, and `load` goes on from it.
        curvature, damping: see `Factors`.
        update: whether weights that stay make up for those that go.

    Attributes:
        told: of each shot how much was `wanted`, the `loss` before, and what share is `removed` after.
    """

    def __init__(self, view: ModelView, run: Run, *, curvature: str, damping: float, update: bool) -> None:
        self.run = run
        self.update = update and curvature == "kfac"  # without correlations nothing is made up for
        self.overlay = Overlay(view.source, {})
        self.view = replace(view, source=self.overlay)
        self.told: list[dict[str, float]] = []
        self._factors = partial(Factors, kind=curvature, damping=damping)

    @property
    def done(self) -> list[float]:
        """What was wanted of each shot so far."""
        return [told["wanted"] for told in self.told]

    @property
    @abstractmethod
    def removed(self) -> float:
        """The share that is removed, of what `wanted` is a share of."""

    @abstractmethod
    def measure(self, block: BlockView, factors: Factors) -> None:
        """Note what can go of a block, and what that costs."""

    @abstractmethod
    def choose(self, wanted: float) -> None:
        """Let the cheapest go, until the share `wanted` is removed."""

    @abstractmethod
    def change(self, block: BlockView, factors: Factors | None) -> None:
        """Make zero what has gone of a block, and change what stays, in place; `factors` is None where nothing is made
        up for.
        """

    @abstractmethod
    def plan(self, index: int) -> BlockPlan:
        """What becomes of a block in the end."""

    @abstractmethod
    def kept(self) -> dict[str, Tensor]:
        """What stays, as tensors to be saved."""

    @abstractmethod
    def keep(self, name: str, tensor: Tensor) -> None:
        """The inverse of `kept`, one tensor at a time."""

    def shot(self, windows: Tensor, wanted: float) -> None:
        """Bring the share that is removed to `wanted`, by gradients on windows [S, T].

        Raises:
            HopelessError: all gradients are zero.
            NotFiniteError: a loss or a gradient is NaN or infinite.
        """
        backward = self._backward(windows)
        reacts = False
        for block in backward.blocks():
            factors = self._factors(block, backward)
            self.measure(block, factors)
            reacts |= factors.any()
            del factors
            give_back()
        if not reacts:
            raise HopelessError(
                "all gradients are zero, so nothing costs less than anything else; the model does not react to its "
                "weights, or give other text"
            )
        self.choose(wanted)
        loss = backward.loss
        del backward
        if self.update:
            backward = self._backward(windows)
            for block in backward.blocks():
                factors = self._factors(block, backward)
                self._changed(block, factors)
                del factors
                give_back()
        else:
            for block in self.view.iterate():
                self._changed(block, None)
        self.told.append({"wanted": wanted, "loss": loss, "removed": self.removed})

    def _backward(self, windows: Tensor) -> Backward:
        return Backward(self.view, windows, device=self.run.device, dtype=self.run.dtype, spill=self.run.spill)

    def _changed(self, block: BlockView, factors: Factors | None) -> None:
        touched = {f"{path}.{kind}" for path in block.family.matrices.values() for kind in ("weight", "bias")}
        tensors = {name: tensor.clone() if name in touched else tensor for name, tensor in block.tensors.items()}
        self.change(replace(block, tensors=tensors), factors)
        changed = {
            self.view.block_prefix(block.index) + name: tensor for name, tensor in tensors.items() if name in touched
        }
        if self.run.checkpoint is None:
            self.overlay.changed.update(changed)
            return
        file = self.run.checkpoint.with_name(
            f"{self.run.checkpoint.stem}-{len(self.told) + 1:03}-{block.index:05}.safetensors"
        )
        with disk(file.parent):
            save_whole(file, changed)
        self.overlay.changed.update(dict.fromkeys(changed, file))

    def status(self) -> str:
        """Where it is, for who waits."""
        return f"loss before {self.told[-1]['loss']:.4f}, {self.told[-1]['removed']:.4f} removed"

    def updates(self, index: int, names: Iterable[str]) -> dict[str, Tensor]:
        """The weights that some matrices of a block have now; none where they are those of the original."""
        block = self.view.block(index)
        return {name: block.matrix(name) for name in names} if self.update else {}

    def save(self) -> None:
        """Write what the next shot needs, whole or not at all.

        Raises:
            SecateurError: the disk is full, or may not be written.
        """
        if (file := self.run.checkpoint) is None:
            return
        weights = {name: place.name for name, place in self.overlay.changed.items() if isinstance(place, Path)}
        with disk(file.parent):
            save_whole(file, self.kept(), {"told": json.dumps(self.told), "weights": json.dumps(weights)})
        for other in set(file.parent.glob(f"{file.stem}-*.safetensors")) - {
            file.with_name(name) for name in weights.values()
        }:
            other.unlink()

    def load(self, fits: Callable[[list[float]], bool]) -> None:
        """Go on from the run's checkpoint, where it is there.

        Args:
            fits: given what was wanted of each shot so far, whether they are the first of this run.
        """
        if (file := self.run.checkpoint) is None or not file.is_file():
            return
        with safe_open(file, framework="pt") as handle:
            told: list[dict[str, float]] = json.loads(handle.metadata()["told"])
            if not fits([shot["wanted"] for shot in told]):
                say(
                    f"'{file}' is after a shot to {told[-1]['wanted']:g}, which is not on the way to what is asked: "
                    "starting from the original model"
                )
                return
            self.told = told
            for name in handle.keys():  # noqa: SIM118  # the handle has no iterator
                self.keep(name, handle.get_tensor(name))
            self.overlay.changed.update(
                {name: file.with_name(place) for name, place in json.loads(handle.metadata()["weights"]).items()}
            )
        say(f"going on after shot {len(self.told)}")
