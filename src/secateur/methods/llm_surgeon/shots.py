"""Removal in shots: each shot measures the curvature of the current model, removes the cheapest units or weights, and
updates those that stay (arXiv:2312.17244).

`UnitShots` (`units.py`) removes whole units, `WeightShots` (`weights.py`) single weights. This file has what both use:
the model between two shots, the two passes over its blocks in a shot, and the checkpoint of an interrupted run.

Shape letters: S windows, T tokens.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
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

_IN_MEMORY = 2**30  # bytes


@dataclass(frozen=True)
class Overlay:
    """A `TensorSource` with some tensors replaced by others, in memory or in safetensors files."""

    source: TensorSource
    changed: dict[str, Tensor | Path]

    def names(self) -> list[str]:
        """The names of the original."""
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the original."""
        return self.source.shape(name)

    def read(self, name: str) -> Tensor:
        """One tensor in its current state."""
        changed = self.changed.get(name)
        if changed is None:
            return self.source.read(name)
        if isinstance(changed, Tensor):
            return changed
        with safe_open(changed, framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    def rows(self, name: str, which: slice | Tensor) -> Tensor:
        """Some rows of a matrix outside the blocks; such matrices are never replaced."""
        return self.source.rows(name, which)


class Kept:
    """The factors of all blocks from the measurement of a shot to its changes, where there is room for them.

    They lie beside the checkpoint of the run, a file for each block, and take at most half of the free disk; or in
    memory if the run has no checkpoint, and take at most 1 GiB. Without room they are measured again.

    Args:
        file: the checkpoint of the run.
        blocks: the number of blocks.
    """

    def __init__(self, file: Path | None, blocks: int) -> None:
        self._file, self._blocks = file, blocks
        self._factors: dict[int, Factors] = {}
        self._fits: bool | None = None

    @property
    def all(self) -> bool:
        """True if the factors of all blocks are here."""
        return len(self._factors) == self._blocks

    def put(self, index: int, factors: Factors) -> None:
        """Keep the factors of a block. The first block tells whether all of them have room."""
        if self._fits is None:
            self._fits = factors.size * self._blocks <= _room(self._file)
        if not self._fits:
            return
        if self._file is not None:
            with disk(self._file.parent):
                save_file(dict(factors.sums), self._place(index))  # of this run alone, so it needs no digest
            factors = replace(factors, sums={})
        self._factors[index] = factors

    def take(self, index: int) -> Factors:
        """Return the factors of a block, which are then here no more."""
        factors = self._factors.pop(index)
        if self._file is None:
            return factors
        place = self._place(index)
        sums = load_file(place)
        place.unlink()
        return replace(factors, sums=sums)

    def _place(self, index: int) -> Path:
        assert self._file is not None
        return self._file.with_name(f"{self._file.stem}-factors-{index:05}.safetensors")


def _room(file: Path | None) -> int:
    return _IN_MEMORY if file is None else shutil.disk_usage(file.parent).free // 2


class Shots(ABC):
    """The model between two shots: its weights in the checkpoint's dtype, with removed ones at zero.

    Changed weights are written beside the run's checkpoint, a file for each block, and are in memory one block at a
    time. Without a checkpoint they stay in memory.

    Args:
        view: the model.
        run: the run; `save` writes its checkpoint, and `load` continues from it.
        curvature, damping: see `Factors`.
        update: update the weights that stay, to compensate for those that are removed.

    Attributes:
        told: one entry a shot: the share to remove (`wanted`), the `loss` before, and the share `removed` after.
    """

    def __init__(self, view: ModelView, run: Run, *, curvature: str, damping: float, update: bool) -> None:
        self.run = run
        self.update = update and curvature == "kfac"  # without correlations an update changes nothing
        self.overlay = Overlay(view.source, {})
        self.view = replace(view, source=self.overlay)
        self.told: list[dict[str, float]] = []
        self._measured = partial(Factors.measured, kind=curvature, damping=damping)

    @property
    def done(self) -> list[float]:
        """The share to remove of each shot that is done."""
        return [shot["wanted"] for shot in self.told]

    @property
    @abstractmethod
    def removed(self) -> float:
        """The share that is removed so far, of the same whole as `wanted`."""

    @abstractmethod
    def measure(self, block: BlockView, factors: Factors) -> None:
        """Store the cost of removing each unit or weight of a block."""

    @abstractmethod
    def choose(self, wanted: float) -> None:
        """Choose the cheapest for removal, until the share `wanted` is removed."""

    @abstractmethod
    def change(self, block: BlockView, factors: Factors | None) -> None:
        """Zero the removed weights of a block and update those that stay, in place; with `factors` None only zero."""

    @abstractmethod
    def plan(self, index: int) -> BlockPlan:
        """The plan of a block after the last shot."""

    @abstractmethod
    def kept(self) -> dict[str, Tensor]:
        """The current choice, as named tensors to save."""

    @abstractmethod
    def keep(self, name: str, tensor: Tensor) -> None:
        """Load one tensor that `kept` returned."""

    def shot(self, windows: Tensor, wanted: float) -> None:
        """Bring the share that is removed to `wanted`, by gradients on windows [S, T].

        Raises:
            HopelessError: all gradients are zero.
            NotFiniteError: a loss or a gradient is NaN or infinite.
        """
        backward = self._backward(windows)
        reacts, kept = False, Kept(self.run.state_file, self.view.blocks)
        for block in backward.blocks():
            factors = self._measured(block, backward)
            self.measure(block, factors)
            reacts |= factors.any()
            if self.update:
                kept.put(block.index, factors)
            del factors
            give_back()
        if not reacts:
            raise HopelessError(
                "all gradients are zero, so all costs are equal: the loss of this model does not depend on its "
                "weights, or the text does not suit it; check the model, or give another --calibration text"
            )
        self.choose(wanted)
        loss = backward.loss
        del backward
        for block, again in self._blocks_with_factors(windows, kept):
            self._changed(block, again)
            del again
            give_back()
        self.told.append({"wanted": wanted, "loss": loss, "removed": self.removed})

    def _blocks_with_factors(self, windows: Tensor, kept: Kept) -> Iterator[tuple[BlockView, Factors | None]]:
        """Yield each block with its factors, as they were measured; None if weights are not updated."""
        if not self.update or kept.all:
            for block in self.view.iterate():
                yield block, kept.take(block.index) if self.update else None
            return
        backward = self._backward(windows)
        for block in backward.blocks():
            yield block, self._measured(block, backward)

    def _backward(self, windows: Tensor) -> Backward:
        return Backward(self.view, windows, device=self.run.device, dtype=self.run.dtype, spill=self.run.spill)

    def _changed(self, block: BlockView, factors: Factors | None) -> None:
        touched = {f"{path}.{kind}" for path in block.family.matrices.values() for kind in ("weight", "bias")}
        tensors = {name: tensor.clone() if name in touched else tensor for name, tensor in block.tensors.items()}
        self.change(replace(block, tensors=tensors), factors)
        changed = {
            self.view.block_prefix(block.index) + name: tensor for name, tensor in tensors.items() if name in touched
        }
        if self.run.state_file is None:
            self.overlay.changed.update(changed)
            return
        file = self.run.state_file.with_name(
            f"{self.run.state_file.stem}-{len(self.told) + 1:03}-{block.index:05}.safetensors"
        )
        with disk(file.parent):
            save_whole(file, changed)
        self.overlay.changed.update(dict.fromkeys(changed, file))

    def status(self) -> str:
        """The text of the progress line."""
        return f"loss before {self.told[-1]['loss']:.4f}, {self.told[-1]['removed']:.4f} removed"

    def updates(self, index: int, names: Iterable[str]) -> dict[str, Tensor]:
        """The current weights of some matrices of a block; empty if this run does not update weights."""
        block = self.view.block(index)
        return {name: block.matrix(name) for name in names} if self.update else {}

    def save(self) -> None:
        """Write the checkpoint for the next shot, as a whole or not at all.

        Raises:
            SecateurError: the disk is full or not writable.
        """
        if (file := self.run.state_file) is None:
            return
        weights = {name: place.name for name, place in self.overlay.changed.items() if isinstance(place, Path)}
        with disk(file.parent):
            save_whole(file, self.kept(), {"told": json.dumps(self.told), "weights": json.dumps(weights)})
        current = {file.with_name(name) for name in weights.values()}
        for outdated in set(file.parent.glob(f"{file.stem}-*.safetensors")) - current:
            outdated.unlink()

    def load(self, fits: Callable[[list[float]], bool]) -> None:
        """Continue from the run's checkpoint, if it exists.

        Args:
            fits: tells from the shares that the finished shots were to remove whether this run can continue from them.
        """
        if (file := self.run.state_file) is None or not file.is_file():
            return
        with safe_open(file, framework="pt") as handle:
            shots: list[dict[str, float]] = json.loads(handle.metadata()["told"])
            if not fits([shot["wanted"] for shot in shots]):
                say(
                    f"'{file}' was saved at sparsity {shots[-1]['wanted']:g}, which is not a step of the schedule of "
                    "this run: starting from the original model"
                )
                return
            self.told = shots
            for name in handle.keys():  # noqa: SIM118  # the handle has no iterator
                self.keep(name, handle.get_tensor(name))
            self.overlay.changed.update(
                {name: file.with_name(place) for name, place in json.loads(handle.metadata()["weights"]).items()}
            )
        say(f"continuing after shot {len(self.told)}")
