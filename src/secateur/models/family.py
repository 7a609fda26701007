"""What a model family looks like, as data.

A family is one file in `models/families` that defines `FAMILY`. Two pictures serve all of them:

    sequential                         parallel
    x -> norm -> attention -> + ->     x -> norm -+-> attention -> + ->
    x -> norm -> mlp ------> + ->                 +-> mlp -------> +

Canonical names of the matrices of a block: `q k v o` (attention) and `gate up down` (MLP; no `gate` where there is none).
Matrices that share a module are fused: their rows are stacked in the order in which they are listed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from secateur.core.errors import SecateurError
from secateur.models import families

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")
CANONICAL = (*ATTENTION, *MLP)
PRUNED_PREFIX = "secateur_"


def _never(config: PreTrainedConfig) -> str | None:
    return None


@dataclass(frozen=True)
class Family:
    """Where the parts of a family's models are. Paths of matrices and norms inside a block are relative to the block.

    Attributes:
        name: the family's name.
        model_types: the `config.model_type` values it describes.
        blocks: the path of the list of blocks.
        embeddings: paths of everything that runs before the first block; the token embedding first.
        final_norm: the norm after the last block.
        head: the output projection.
        norms: the norms of a block: (attention, MLP), or one that both read where the residual is parallel.
        matrices: canonical name -> path of its module; equal paths are one fused module.
        head_norms: norms over the width of one head, shared by all heads (Qwen3).
        attention, mlp: the modules of a block that attention and MLP run through, in order; the first of attention receives the
            block's arguments and returns a tuple.
        centred: whether the norms subtract the mean (LayerNorm; otherwise RMSNorm).
        epsilon: of the norms: a configuration field, or the value.
        heads, groups, ffn: names of the configuration fields: query heads, key-value heads, feed-forward units.
        stock_heads: whether the stock configuration can say a head width other than hidden size / heads, so that
            a model with fewer heads in every block is still a stock one.
        separate: whether q, k and v select for themselves what they read: never of a stock model, see `separated`.
        refuse: why this configuration cannot be done, or None.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    embeddings: tuple[str, ...]
    final_norm: str
    head: str
    norms: tuple[str, ...]
    matrices: Mapping[str, str]
    head_norms: tuple[str, ...] = ()
    attention: tuple[str, ...] = ("self_attn",)
    mlp: tuple[str, ...] = ("mlp",)
    centred: bool = False
    epsilon: str | float = "rms_norm_eps"
    heads: str = "num_attention_heads"
    groups: str = "num_key_value_heads"
    ffn: str = "intermediate_size"
    stock_heads: bool = True
    separate: bool = False
    refuse: Callable[[PreTrainedConfig], str | None] = _never

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read the same normed residual."""
        return len(self.norms) == 1

    def fused(self, name: str) -> tuple[str, ...]:
        """The canonical names that share the module of matrix `name`, in the order of their rows."""
        return tuple(other for other, path in self.matrices.items() if path == self.matrices[name])

    @property
    def readers(self) -> tuple[str, ...]:
        """The matrices that read the (normed) residual."""
        return tuple(name for name in (*ATTENTION[:3], *MLP[:2]) if name in self.matrices)

    def norm_of(self, name: str) -> str:
        """The norm that a reader of the residual reads through."""
        return self.norms[0] if name in ATTENTION else self.norms[-1]

    def separated(self) -> Family:
        """As seen in a checkpoint whose q, k and v select for themselves what they read (see `runtime.Reader`)."""
        if self.separate:
            return self
        own = {name: f"{self.matrices[name]}{f'.{name}' * (len(self.fused(name)) > 1)}.linear" for name in ATTENTION[:3]}
        return replace(self, matrices={**self.matrices, **own}, separate=True)

    def input_of(self, name: str, *, apart: bool = False) -> str:
        """The matrix that stands for the input of `name`: the first one listed that reads the same tensor. `apart` says that attention and MLP select
        for themselves what they read, also in a parallel block (see `runtime.Select`)."""
        if name in ("o", "down") or (self.separate and name in ATTENTION[:3]):
            return name
        readers = ATTENTION[:3] + MLP[:2] if self.parallel and not apart else (ATTENTION[:3] if name in ATTENTION else MLP[:2])
        return next(other for other in self.matrices if other in readers)


@cache
def all_families() -> dict[str, Family]:
    """Every family by name: the files of `models/families`, and those that other packages add (`secateur.families`)."""
    modules = [importlib.import_module(f"{families.__name__}.{m.name}") for m in pkgutil.iter_modules(families.__path__)]
    found = [module.FAMILY for module in modules] + [entry.load() for entry in entry_points(group="secateur.families")]
    return {family.name: family for family in found}


def is_pruned(config: PreTrainedConfig) -> bool:
    """Whether a configuration is one of `runtime`'s, with widths of its own for each block."""
    return bool(type(config).model_type.startswith(PRUNED_PREFIX))


def find_family(config: PreTrainedConfig, source: str) -> Family:
    """The family of a configuration (a pruned model belongs to the family of its original).

    Raises:
        SecateurError: no family knows the model type, or the family refuses this configuration (the reason is given).
    """
    model_type = config.model_type.removeprefix(PRUNED_PREFIX)
    for family in all_families().values():
        if model_type in family.model_types:
            if reason := family.refuse(config):
                raise SecateurError(f"{source}: {reason}")
            heads, groups = getattr(config, family.heads), getattr(config, family.groups)
            sizes = {family.heads: heads, family.groups: groups, family.ffn: getattr(config, family.ffn), "num_hidden_layers": config.num_hidden_layers}
            if wrong := [name for name, size in sizes.items() if not isinstance(size, int) or size < 1]:
                raise SecateurError(f"{source}: config.json has {wrong[0]} = {sizes[wrong[0]]!r}; it is a count, at least 1")
            if heads % groups:
                raise SecateurError(f"{source}: config.json has {heads} query heads and {groups} key-value heads, which do not divide; no such model runs")
            return family.separated() if is_pruned(config) and "readers" in config.pruned_widths[0] else family
    known = sorted(t for family in all_families().values() for t in family.model_types)
    raise SecateurError(f"{source}: no family describes model type '{model_type}' (known: {', '.join(known)}); a family is one file: docs/add-a-family.md")
