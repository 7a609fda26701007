"""A plan: what to keep and what to change, as data that can be saved, read, compared and merged.

A plan changes no model; `secateur.cut` applies it. On disk a plan is `plan.json` (settings and a summary of every
block) and `plan.safetensors` (bit-packed masks, kept indices, spectra; a plan saved without a checkpoint also holds the
bases of the residual). Neither file has new weights. A checkpoint has both files in its folder `secateur/`, where no
engine looks for weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.core.names import without_paths
from secateur.core.paths import to_path
from secateur.models.save import PLAN, PLAN_TENSORS, plan_file

FORMAT = 1
# The fields of plan.json with their types. A plan in a checkpoint has all of them, a plan on its own may lack some.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "method": str,
    "options": dict,
    "seed": int,
    "sparsity": (int, float, NoneType),
    "modules": (str, NoneType),
    "pattern": (str, NoneType),
    "calibration": (dict, NoneType),
    "sparsity_measured": (int, float),
    "pruning_ratio": (int, float),
    "params_before": int,
    "params_after": int,
    "nonzero_after": int,
    "blocks": list,
}
_AGAIN = "prune the original again, or copy the folder again"


def sha256_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, which names weights that are stored elsewhere."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


@dataclass(frozen=True)
class Mask:
    """A mask over a matrix, eight entries a byte, row after row; a set bit is a kept weight."""

    shape: tuple[int, int]
    bits: Tensor

    @staticmethod
    def pack(keep_OI: Tensor) -> Mask:
        """Pack a boolean mask, True where kept."""
        packed = np.packbits(keep_OI.cpu().numpy().reshape(-1))
        return Mask((keep_OI.shape[0], keep_OI.shape[1]), torch.from_numpy(packed))

    def unpack(self) -> Tensor:
        """The boolean mask [O, I], True where kept."""
        count = self.shape[0] * self.shape[1]
        flat = np.unpackbits(self.bits.numpy(), count=count)
        return torch.from_numpy(flat.view(np.bool_)).view(self.shape)

    @property
    def removed(self) -> int:
        """The number of removed weights."""
        return self.shape[0] * self.shape[1] - int(np.bitwise_count(self.bits.numpy()).sum())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.shape == other.shape and torch.equal(self.bits, other.bits)

    __hash__ = None  # type: ignore[assignment]  # compared by content, which is mutable


@dataclass(frozen=True, eq=False)
class Place:
    """A place of the residual stream after slicing (arXiv:2401.15024): D directions before, W after.

    Attributes:
        basis_DW: the kept directions, orthonormal columns in the coordinates of the canonical model, float64; None if
            the plan was read from a checkpoint, which has its bases only inside its weights.
        spectrum_D: the mean square of the residual along its principal directions, largest first, float64; None if no
            direction is removed.
        width, of: W and D.
        form: the form of the residual connection that leads to this place, see `runtime.Skip`.
        skip: the parameters of that connection, by their names in `runtime.Skip`.
    """

    basis_DW: Tensor | None
    spectrum_D: Tensor | None
    width: int
    of: int
    form: int | str | None = None
    skip: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def kept_energy(self) -> float:
        """The share of the mean square that the kept directions hold."""
        return 1.0 if self.spectrum_D is None else float(self.spectrum_D[: self.width].sum() / self.spectrum_D.sum())

    @cached_property
    def sha256(self) -> str | None:
        """SHA-256 of the basis, which names the weights that are computed from it."""
        return None if self.basis_DW is None else sha256_of(self.basis_DW)

    def summary(self) -> dict[str, Any]:
        """What goes into plan.json."""
        return {
            "width": self.width,
            "of": self.of,
            "skip": self.form,
            "kept_energy": self.kept_energy,
            "sha256": self.sha256,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that only a plan on its own stores, beside the spectrum."""
        tensors = {f"skip.{name}": tensor.contiguous() for name, tensor in self.skip.items()}
        return tensors if self.basis_DW is None else {**tensors, "basis": self.basis_DW.contiguous()}

    @staticmethod
    def read(summary: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Place:
        """The inverse of `summary` and `tensors`."""
        skip = {name.removeprefix("skip."): tensor for name, tensor in tensors.items() if name.startswith("skip.")}
        return Place(
            tensors.get("basis"), tensors.get("spectrum"), summary["width"], summary["of"], summary["skip"], skip
        )


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The plan of one block.

    Attributes:
        index: the number of the block.
        masks: canonical matrix name -> its mask.
        keep: space -> the kept indices, ascending: `ffn` (feed-forward units), `groups` (key-value heads with their
            query heads), `heads` (query heads, the same number in every group); and with `select` the features of the
            residual that are read and written: `attention_in` (or `q_in`, `k_in`, `v_in`, if each has its own
            selection), `attention_out`, `mlp_in`, `mlp_out`.
        of: space -> the number of its indices before pruning.
        select: how the selected features are read, see `runtime.Select`; None if blocks read all features.
        places: the residual stream where it `enter`s the block, `between` attention and MLP (not of a parallel block),
            and where it `leave`s. What leaves one block enters the next.
        updates: canonical matrix name -> its new weight [O, I], with the shape from before the cut, in the dtype of the
            computation or of the checkpoint; masks and kept units apply to it. Only the written checkpoint stores new
            weights: a plan on disk names them by hash.
        dropped: True if the whole block is removed.
        influence: how much the block changes the residual stream (arXiv:2403.03853, equation 1); None if not measured.
        hashes: canonical matrix name -> SHA-256 of its new weight, for a plan that was read from disk without the
            weight.
    """

    index: int
    masks: Mapping[str, Mask] = field(default_factory=dict)
    keep: Mapping[str, Tensor] = field(default_factory=dict)
    of: Mapping[str, int] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)
    select: str | None = None
    updates: Mapping[str, Tensor] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    dropped: bool = False
    influence: float | None = None

    @cached_property
    def updated(self) -> dict[str, str]:
        """Canonical matrix name -> SHA-256 of its new weight, for every matrix that has one."""
        return {**self.hashes, **{name: sha256_of(weight_OI) for name, weight_OI in self.updates.items()}}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of this block in the plan.safetensors of a checkpoint."""
        prefix = f"blocks.{self.index}."
        masks = {f"{prefix}{name}.mask": mask.bits for name, mask in self.masks.items()}
        keep = {f"{prefix}{space}.keep": indices for space, indices in self.keep.items()}
        return (
            masks
            | keep
            | {
                f"{prefix}{name}.spectrum": place.spectrum_D
                for name, place in self._own_places()
                if place.spectrum_D is not None
            }
        )

    def bases(self) -> dict[str, Tensor]:
        """The tensors that only a plan on its own stores: large, and in a checkpoint already part of the weights."""
        return {
            f"blocks.{self.index}.{name}.{key}": tensor
            for name, place in self._own_places()
            for key, tensor in place.tensors().items()
        }

    def _own_places(self) -> list[tuple[str, Place]]:
        return [(name, place) for name, place in self.places.items() if name != "enter" or self.index == 0]

    def summary(self) -> dict[str, Any]:
        """What goes into plan.json."""
        masks = {name: {"shape": list(mask.shape), "removed": mask.removed} for name, mask in self.masks.items()}
        keep = {space: {"kept": len(indices), "of": self.of[space]} for space, indices in self.keep.items()}
        places = {name: place.summary() for name, place in self.places.items()}
        sometimes = {"places": places, "select": self.select, "updates": self.updated, "dropped": self.dropped}
        measured = {} if self.influence is None else {"influence": self.influence}
        return (
            {"index": self.index, "masks": masks, "keep": keep}
            | {name: content for name, content in sometimes.items() if content}
            | measured
        )

    @staticmethod
    def read(summary: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BlockPlan:
        """The inverse of `summary`, `tensors` and, if they are included, `bases`. `tensors` must also hold those of the
        block before. New weights come back only as hashes.
        """
        index: int = summary["index"]
        prefix = f"blocks.{index}."
        masks = {
            name: Mask((m["shape"][0], m["shape"][1]), tensors[f"{prefix}{name}.mask"])
            for name, m in summary["masks"].items()
        }
        keep = {space: tensors[f"{prefix}{space}.keep"] for space in summary["keep"]}
        places = {}
        for name, content in summary.get("places", {}).items():
            start = f"blocks.{index - 1}.leave." if name == "enter" and index else f"{prefix}{name}."
            own = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
            places[name] = Place.read(
                content, own if start.startswith(prefix) else {k: own[k] for k in ("basis", "spectrum") if k in own}
            )
        of = {space: k["of"] for space, k in summary["keep"].items()}
        return BlockPlan(
            index,
            masks,
            keep,
            of,
            places,
            summary.get("select"),
            hashes=summary.get("updates", {}),
            dropped="dropped" in summary,
            influence=summary.get("influence"),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockPlan) or self.summary() != other.summary():
            return False
        mine, theirs = self.tensors() | self.bases(), other.tensors() | other.bases()
        return all(torch.equal(mine[name], theirs[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]

    def merge(self, other: BlockPlan) -> BlockPlan:
        """The plan that keeps what both plans keep.

        Raises:
            SecateurError: a space would be empty, one plan rotates the residual stream, the two read it in different
                ways, both choose among query heads, or both have a new weight for the same matrix.
        """
        if both := sorted(self.updated.keys() & other.updated.keys()):
            raise SecateurError(
                f"block {self.index}: both plans have new weights for {', '.join(both)}, so they cannot be merged: "
                "prune with one method, then prune the result with the other"
            )
        if self.select and other.select and self.select != other.select:
            raise SecateurError(
                f"block {self.index}: one plan reads the residual with norm '{self.select}', the other with "
                f"'{other.select}': make both plans with the same norm"
            )
        if self.places or other.places:
            raise SecateurError(
                "a plan that rotates the residual stream cannot be merged: prune with it, then prune the result with "
                "the other method"
            )
        if "heads" in self.keep and "heads" in other.keep:
            raise SecateurError(
                f"block {self.index}: both plans choose among the query heads, and the groups might then keep "
                "different numbers of them: make one plan instead"
            )
        masks = dict(self.masks)
        for name, mask in other.masks.items():
            masks[name] = Mask(mask.shape, mask.bits & masks[name].bits) if name in masks else mask
        keep = dict(self.keep)
        for space, indices in other.keep.items():
            keep[space] = indices[torch.isin(indices, keep[space])] if space in keep else indices
            if not len(keep[space]):
                raise SecateurError(
                    f"block {self.index}: the two plans keep no common {space}, so merging them would leave nothing"
                )
        updates, hashes = {**self.updates, **other.updates}, {**self.hashes, **other.hashes}
        dropped, influence = (
            self.dropped or other.dropped,
            other.influence if self.influence is None else self.influence,
        )
        return replace(
            self,
            masks=masks,
            keep=keep,
            of={**self.of, **other.of},
            select=self.select or other.select,
            updates=updates,
            hashes=hashes,
            dropped=dropped,
            influence=influence,
        )


@dataclass(frozen=True)
class Plan:
    """A plan for a model: its settings and one entry for each block.

    The record repeats the `settings`: method, options, seed, sparsity, modules, pattern, model, calibration.
    """

    settings: Mapping[str, Any]
    blocks: tuple[BlockPlan, ...]

    @property
    def rotates(self) -> bool:
        """True if the plan rotates the residual stream."""
        return any(block.places for block in self.blocks)

    def merge(self, other: Plan) -> Plan:
        """The plan that keeps what both plans keep.

        Raises:
            SecateurError: the two plans are for models of different depth, or no block would be left.
        """
        if len(self.blocks) != len(other.blocks):
            raise SecateurError(
                f"plans for models of {len(self.blocks)} and {len(other.blocks)} blocks cannot be merged"
            )
        both = {**self.settings, "merged_with": dict(other.settings)}
        blocks = tuple(a.merge(b) for a, b in zip(self.blocks, other.blocks, strict=True))
        if all(block.dropped for block in blocks):
            raise SecateurError("the two plans keep no common block, so merging them would leave nothing")
        return Plan(both, blocks)

    def save(self, folder: str | Path) -> None:
        """Write `plan.json` and, if the plan has tensors, `plan.safetensors`."""
        folder = to_path(folder)
        (folder / PLAN).write_text(plan_json(self.settings, [b.summary() for b in self.blocks]), "utf-8")
        tensors = {
            name: t.contiguous() for block in self.blocks for name, t in (block.tensors() | block.bases()).items()
        }
        if tensors:
            (folder / PLAN_TENSORS).write_bytes(save(tensors))


class LaterPlans(Sequence[BlockPlan]):
    """The plans of all blocks, whose new weights are made when a plan is asked for, so that memory holds those of one.

    Attributes:
        outlines: the plans without new weights.
    """

    def __init__(self, outlines: Sequence[BlockPlan], fill: Callable[[int], BlockPlan]) -> None:
        """`fill` returns the whole plan of a block; it is quickest in order."""
        self.outlines, self._fill = outlines, fill

    def __len__(self) -> int:
        return len(self.outlines)

    def __iter__(self) -> Iterator[BlockPlan]:
        return map(self._fill, range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        return self._fill(range(len(self))[index])


def plan_json(settings: Mapping[str, Any], summaries: Sequence[Mapping[str, Any]]) -> str:
    """The content of plan.json. It travels with the checkpoint, so it names files without their folders."""
    return json.dumps({"format": FORMAT, **without_paths(settings), "blocks": list(summaries)}, indent=1) + "\n"


def read_plan(folder: str | Path) -> Plan:
    """Read what `Plan.save` wrote, or the plan of a checkpoint.

    Raises:
        SecateurError: the folder has no plan, or the plan is damaged or has a later format.
    """
    folder = to_path(folder)
    content = read_plan_json(folder)
    if content is None:
        raise SecateurError(f"'{folder}' has no plan.json: it was not written by secateur")
    file = plan_file(folder, PLAN_TENSORS)
    try:
        tensors = load_file(file) if file is not None else {}
        blocks = tuple(BlockPlan.read(summary, tensors) for summary in content.pop("blocks"))
    except (SafetensorError, KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise damaged(file or plan_file(folder), error) from error
    return Plan({k: v for k, v in content.items() if k != "format"}, blocks)


def damaged(file: Path | None, error: Exception) -> SecateurError:
    """Return the error for a plan whose content cannot be read."""
    return SecateurError(f"{file}: a damaged plan ({type(error).__name__}: {error}); {_AGAIN}")


def read_plan_json(folder: Path) -> dict[str, Any] | None:
    """Read the JSON part alone; None if the folder was not written by secateur.

    Raises:
        SecateurError: the file is damaged or has a later format.
    """
    if (file := plan_file(folder)) is None:
        return None
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise SecateurError(f"{file}: not JSON ({error}); {_AGAIN}") from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        if file.parent == folder:
            return None  # the file of another tool with the same name
        raise SecateurError(f"{file}: not a plan of secateur (it has no whole number as 'format'); {_AGAIN}")
    if content["format"] > FORMAT:
        raise SecateurError(f"{file} has format {content['format']}, this secateur knows {FORMAT}; use a newer one")
    for name, allowed in _FIELDS.items():
        if name in content and not isinstance(content[name], allowed):
            raise SecateurError(f"{file}: '{name}' is a {type(content[name]).__name__}; {_AGAIN}")
        if name not in content and file.parent != folder:
            raise SecateurError(f"{file}: a plan without '{name}'; {_AGAIN}")
    return content
