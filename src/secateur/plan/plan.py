"""A plan: what to keep and what to change, as data that can be saved, read, compared and merged.

Making one changes no model; `secateur.cut` applies it. On disk a plan is `plan.json` (settings and a summary of every block) and
`plan.safetensors` (bit-packed masks, kept indices).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from secateur.core.errors import SecateurError

FORMAT = 1


@dataclass(frozen=True)
class Mask:
    """A mask over a matrix, eight entries a byte, row after row; a set bit is a kept weight."""

    shape: tuple[int, int]
    bits: Tensor

    @staticmethod
    def pack(keep_OI: Tensor) -> Mask:
        """From a boolean mask, True where kept."""
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
class BlockPlan:
    """What happens to one block.

    Attributes:
        index: the block.
        masks: canonical matrix name -> its mask.
        keep: space -> the kept indices, ascending: `ffn` (feed-forward units), `groups` (key-value heads with their query heads).
        of: space -> how many there were.
    """

    index: int
    masks: Mapping[str, Mask] = field(default_factory=dict)
    keep: Mapping[str, Tensor] = field(default_factory=dict)
    of: Mapping[str, int] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """What goes into plan.safetensors."""
        prefix = f"blocks.{self.index}."
        masks = {f"{prefix}{name}.mask": mask.bits for name, mask in self.masks.items()}
        return masks | {f"{prefix}{space}.keep": indices for space, indices in self.keep.items()}

    def summary(self) -> dict[str, Any]:
        """What goes into plan.json."""
        masks = {name: {"shape": list(mask.shape), "removed": mask.removed} for name, mask in self.masks.items()}
        keep = {space: {"kept": len(indices), "of": self.of[space]} for space, indices in self.keep.items()}
        return {"index": self.index, "masks": masks, "keep": keep}

    @staticmethod
    def read(summary: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BlockPlan:
        """The inverse of `summary` and `tensors`."""
        prefix = f"blocks.{summary['index']}."
        masks = {name: Mask((m["shape"][0], m["shape"][1]), tensors[f"{prefix}{name}.mask"]) for name, m in summary["masks"].items()}
        keep = {space: tensors[f"{prefix}{space}.keep"] for space in summary["keep"]}
        return BlockPlan(summary["index"], masks, keep, {space: k["of"] for space, k in summary["keep"].items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockPlan) or self.summary() != other.summary():
            return False
        mine, theirs = self.tensors(), other.tensors()
        return all(torch.equal(mine[name], theirs[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]

    def merge(self, other: BlockPlan) -> BlockPlan:
        """What both keep.

        Raises:
            SecateurError: nothing of a space would be left.
        """
        masks = dict(self.masks)
        for name, mask in other.masks.items():
            masks[name] = Mask(mask.shape, mask.bits & masks[name].bits) if name in masks else mask
        keep = dict(self.keep)
        for space, indices in other.keep.items():
            keep[space] = indices[torch.isin(indices, keep[space])] if space in keep else indices
            if not len(keep[space]):
                raise SecateurError(f"block {self.index}: the two plans keep no common {space}, so merging them would leave nothing")
        return replace(self, masks=masks, keep=keep, of={**self.of, **other.of})


@dataclass(frozen=True)
class Plan:
    """A plan for a model: the settings that made it and one entry a block.

    `settings` holds what the record repeats: method, options, seed, sparsity, modules, pattern, model, calibration.
    """

    settings: Mapping[str, Any]
    blocks: tuple[BlockPlan, ...]

    def merge(self, other: Plan) -> Plan:
        """The plan that keeps what both keep.

        Raises:
            SecateurError: the two are for models of different depth.
        """
        if len(self.blocks) != len(other.blocks):
            raise SecateurError(f"plans for models of {len(self.blocks)} and {len(other.blocks)} blocks cannot be merged")
        both = {**self.settings, "merged_with": dict(other.settings)}
        return Plan(both, tuple(a.merge(b) for a, b in zip(self.blocks, other.blocks, strict=True)))

    def save(self, folder: Path) -> None:
        """Write `plan.json` and, where there are tensors, `plan.safetensors`."""
        (folder / "plan.json").write_text(plan_json(self.settings, [b.summary() for b in self.blocks]), "utf-8")
        tensors = {name: t.contiguous() for block in self.blocks for name, t in block.tensors().items()}
        if tensors:
            (folder / "plan.safetensors").write_bytes(save(tensors))


def plan_json(settings: Mapping[str, Any], summaries: Sequence[Mapping[str, Any]]) -> str:
    """The content of plan.json."""
    return json.dumps({"format": FORMAT, **settings, "blocks": list(summaries)}, indent=1) + "\n"


def read_plan(folder: Path) -> Plan:
    """Read what `Plan.save` wrote.

    Raises:
        SecateurError: there is no plan, or its format is a later one.
    """
    content = read_plan_json(folder)
    if content is None:
        raise SecateurError(f"'{folder}' has no plan.json: it was not written by secateur")
    if content["format"] > FORMAT:
        raise SecateurError(f"{folder}/plan.json has format {content['format']}, this secateur knows {FORMAT}; use a newer one")
    file = folder / "plan.safetensors"
    tensors = load_file(file) if file.is_file() else {}
    blocks = tuple(BlockPlan.read(summary, tensors) for summary in content.pop("blocks"))
    return Plan({k: v for k, v in content.items() if k != "format"}, blocks)


def read_plan_json(folder: Path) -> dict[str, Any] | None:
    """The JSON part alone; None where the folder was not written by secateur."""
    file = folder / "plan.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else None
