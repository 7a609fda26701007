"""The modules of each family's tiny models, written down by hand from the stock classes: one file a family.

Tiny models (`tests/tiny.py`) have 4 query heads of width 8 on 2 key-value heads, 48 feed-forward units and 32 features.
The files are found by the names of the families: a new family adds its file, and no list is edited.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from secateur.models.family import all_families


@dataclass(frozen=True)
class Layout:
    """A family's tiny models.

    Attributes:
        blocks: the path of the list of blocks.
        matrices: canonical name -> (module in the block, its rows there); a fused module holds several matrices, one
            above the other.
        fields: of the configurations of tiny models, beyond their sizes.
        smooth: what to change in them so that the loss has no kinks.
        skips: the residual connections of a block: two, or one where attention and MLP read the same residual.
        gain_offset: what its RMSNorms add to their weights.
        refuses: a method, or a method with an option, that the family cannot do -> words of the reason.
    """

    blocks: str
    matrices: Mapping[str, tuple[str, slice]]
    fields: Mapping[str, Any] = field(default_factory=dict)
    smooth: Mapping[str, Any] = field(default_factory=dict)
    skips: int = 2
    gain_offset: float = 0.0
    refuses: Mapping[str, str] = field(default_factory=dict)

    def refusal(self, method: str, **options: Any) -> str | None:
        """Words of the reason why the family cannot do a method with these options; None if it can."""
        asked = [method, *(f"{method} {name}={value}" for name, value in options.items())]
        return next((self.refuses[what] for what in asked if what in self.refuses), None)


@cache
def layout_of(model_type: str) -> Layout:
    """The layout of a model type's family."""
    name = next(family.name for family in all_families().values() if model_type in family.model_types)
    found: Layout = importlib.import_module(f"{__name__}.{name}").LAYOUT
    return found
