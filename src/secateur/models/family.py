"""What a model family looks like, as data.

A family is one file in `models/families` that defines `FAMILY`. Three pictures serve all of them:

    sequential                         parallel                               norms after, too
    x -> norm -> attention -> + ->     x -> norm -+-> attention -> + ->       x -> norm -> attention -> norm -> + ->
    x -> norm -> mlp ------> + ->                 +-> mlp -------> +          x -> norm -> mlp ------> norm -> + ->

Canonical names of the matrices of a block: `q k v o` (attention) and `gate up down` (MLP; no `gate` where there is
none). Matrices that share a module are fused: their rows are stacked in the order in which they are listed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from secateur.core.errors import SecateurError
from secateur.models import families

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")
CANONICAL = (*ATTENTION, *MLP)
PRUNED_PREFIX = "secateur_"

ROTATE, SELECT, HEADS = "rotate", "select", "heads"
"""What a family may be unable to do: see `Family.cannot`."""
_WORDS = {
    ROTATE: "the residual stream of {} models cannot be rotated",
    SELECT: "the blocks of {} models cannot read and write parts of the residual stream",
    HEADS: "attention heads of {} models cannot be removed",
}
_ZERO = "use a method that zeroes weights (wanda, sparsegpt)"
_INSTEAD = {
    ROTATE: f"{_ZERO}, or one that removes blocks (shortgpt), heads, or units (wanda --pattern rows)",
    SELECT: f"{_ZERO}, or one that removes blocks (shortgpt), heads, or units (wanda --pattern rows)",
    HEADS: f"{_ZERO}, or remove blocks (shortgpt) or feed-forward units (--modules mlp=S)",
}


def _never(config: PreTrainedConfig) -> str | None:
    return None


@dataclass(frozen=True)
class Norm:
    """How the norms of a family compute: unit(x) * (gain + gain_offset), and plus a bias where one is stored.

    Attributes:
        centred: whether they subtract the mean (LayerNorm; otherwise RMSNorm).
        epsilon: a configuration field, or the value.
        gain_offset: 1 where the stored gain w stands for 1 + w (Gemma).
    """

    centred: bool = False
    epsilon: str | float = "rms_norm_eps"
    gain_offset: float = 0.0

    def epsilon_of(self, config: PreTrainedConfig) -> float:
        """The epsilon of a model."""
        return float(getattr(config, self.epsilon) if isinstance(self.epsilon, str) else self.epsilon)

    def gain(self, stored_D: Tensor) -> Tensor:
        """What a norm multiplies with, from the gain as it is stored. All that folds or applies a gain asks here."""
        return stored_D + self.gain_offset if self.gain_offset else stored_D


@dataclass(frozen=True)
class Family:
    """Where the parts of a family's models are. Paths of matrices and norms inside a block are relative to the block.

    A scale of the embedding needs no field: the embedding module is asked, and scales by itself (Gemma).

    Attributes:
        name: the family's name.
        model_types: the `config.model_type` values it describes.
        blocks: the path of the list of blocks.
        embeddings: paths of everything that runs before the first block; the token embedding first.
        final_norm: the norm after the last block.
        head: the output projection.
        norms: the norms before attention and MLP: two; one that both read through, where the residual is parallel
            (Phi); or none (OLMo 2).
        matrices: canonical name -> path of its module; equal paths are one fused module.
        post_norms: the norms between attention or MLP and the residual: two (Gemma, OLMo 2), or none.
        head_norms: norms over the width of one head, shared by all heads (Qwen3).
        joint_head_norms: norms over all heads of q or of k together (OLMo 2).
        parallel: whether attention and MLP read the same residual: through one norm (Phi), or through two (GPT-NeoX).
        attention, mlp: the modules of a block that attention and MLP run through, in order; the first of attention
            receives the block's arguments and returns a tuple.
        norm: how all these norms compute.
        logit_cap: the configuration field that holds the c of c tanh(logits / c), the soft-cap behind the head; empty
            where there is none.
        kinds: the kinds of block (`layer_types` of the configuration) that this description holds for. A model that has
            others, such as blocks without attention, is refused.
        heads, groups, ffn: names of the configuration fields: query heads, key-value heads, feed-forward units.
        stock_heads: whether the stock configuration can say a head width other than hidden size / heads, so that
            a model with fewer heads in every block is still a stock one.
        separate: whether q, k and v select for themselves what they read: never of a stock model, see `separated`.
        cannot: what cannot be done with any model of the family (`rotate`, `select`, `heads`) -> why, beyond what the
            fields above imply: see `why_not`.
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
    post_norms: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    joint_head_norms: tuple[str, ...] = ()
    parallel: bool = False
    attention: tuple[str, ...] = ("self_attn",)
    mlp: tuple[str, ...] = ("mlp",)
    norm: Norm = Norm()
    logit_cap: str = ""
    kinds: tuple[str, ...] = ("full_attention", "sliding_attention")
    heads: str = "num_attention_heads"
    groups: str = "num_key_value_heads"
    ffn: str = "intermediate_size"
    stock_heads: bool = True
    separate: bool = False
    cannot: Mapping[str, str] = field(default_factory=dict)
    refuse: Callable[[PreTrainedConfig], str | None] = _never

    def __post_init__(self) -> None:
        if len(self.norms) not in ((1, 2) if self.parallel else (0, 2)):
            raise ValueError(
                f"family {self.name}: norms has {len(self.norms)} entries, and parallel is {self.parallel}; "
                "a parallel block has one norm or two, a sequential one has two or none"
            )
        if len(self.post_norms) not in (0, 2):
            raise ValueError(f"family {self.name}: post_norms has {len(self.post_norms)} entries; it has two, or none")
        if unknown := self.cannot.keys() - _WORDS.keys():
            raise ValueError(f"family {self.name}: cannot names {sorted(unknown)[0]!r}; it knows {', '.join(_WORDS)}")

    @property
    def tied_map(self) -> str:
        """The path of the map before a tied head, in a model whose residual stream is rotated."""
        return f"{self.final_norm}.map"

    @property
    def one_norm(self) -> bool:
        """Whether attention and MLP read the same normed residual."""
        return len(self.norms) == 1

    def why_not(self, what: str) -> str | None:
        """Why `rotate`, `select` or `heads` cannot be done with models of this family; None where it can."""
        if what in self.cannot:
            return self.cannot[what]
        if what == HEADS:
            if self.joint_head_norms:
                norm = self.joint_head_norms[0]
                return f"a norm ({norm}) divides by the mean square of all heads, which changes when one goes"
            return None
        if self.post_norms:
            return f"a norm ({self.post_norms[0]}) stands between what attention and MLP write and the residual stream"
        if self.parallel and not self.one_norm:
            return "attention and MLP read the residual side by side through two norms, and the pruned block has one"
        return None

    def cap_of(self, config: PreTrainedConfig) -> float | None:
        """The soft-cap of a model's logits, None where it has none."""
        return getattr(config, self.logit_cap) if self.logit_cap else None

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
        own = {
            name: f"{self.matrices[name]}{f'.{name}' * (len(self.fused(name)) > 1)}.linear" for name in ATTENTION[:3]
        }
        return replace(self, matrices={**self.matrices, **own}, separate=True)

    def input_of(self, name: str, *, apart: bool = False) -> str:
        """The matrix that stands for the input of `name`: the first one listed that reads the same tensor. `apart` says
        that attention and MLP select for themselves what they read, also in a parallel block (see `runtime.Select`)."""
        if name in ("o", "down") or (self.separate and name in ATTENTION[:3]):
            return name
        readers: tuple[str, ...] = ATTENTION[:3] if name in ATTENTION else MLP[:2]
        if self.one_norm and not apart:
            readers = ATTENTION[:3] + MLP[:2]
        return next(other for other in self.matrices if other in readers)


@cache
def all_families() -> dict[str, Family]:
    """Every family by name: the files of `models/families`, and those that other packages add (`secateur.families`)."""
    modules = [
        importlib.import_module(f"{families.__name__}.{m.name}") for m in pkgutil.iter_modules(families.__path__)
    ]
    found = [module.FAMILY for module in modules] + [entry.load() for entry in entry_points(group="secateur.families")]
    return {family.name: family for family in found}


def is_pruned(config: PreTrainedConfig) -> bool:
    """Whether a configuration is one of `runtime`'s, with widths of its own for each block."""
    return bool(type(config).model_type.startswith(PRUNED_PREFIX))


def check_can(family: Family, what: str, source: str) -> None:
    """Refuse before the work what no model of the family can have done to it.

    Args:
        family: the family of the model.
        what: `ROTATE`, `SELECT` or `HEADS`.
        source: the model, for the message.

    Raises:
        SecateurError: the family cannot do it; the reason is given.
    """
    if reason := family.why_not(what):
        raise SecateurError(f"{source}: {_WORDS[what].format(family.name)}, because {reason}; {_INSTEAD[what]}")


def _other_kind(family: Family, config: PreTrainedConfig) -> str | None:
    """Why the kinds of a model's blocks are not those that its family describes, or None."""
    for index, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in family.kinds:
            known = f"family {family.name} describes {', '.join(family.kinds)} alone"
            return f"block {index} is of kind '{kind}', and {known}; use another model"
    return None


def find_family(config: PreTrainedConfig, source: str) -> Family:
    """The family of a configuration (a pruned model belongs to the family of its original).

    Raises:
        SecateurError: no family knows the model type, or the family refuses this configuration (the reason is given).
    """
    model_type = config.model_type.removeprefix(PRUNED_PREFIX)
    for family in all_families().values():
        if model_type in family.model_types:
            if reason := family.refuse(config) or _other_kind(family, config):
                raise SecateurError(f"{source}: {reason}")
            heads, groups = getattr(config, family.heads), getattr(config, family.groups)
            sizes = {
                family.heads: heads,
                family.groups: groups,
                family.ffn: getattr(config, family.ffn),
                "num_hidden_layers": config.num_hidden_layers,
            }
            if wrong := [name for name, size in sizes.items() if not isinstance(size, int) or size < 1]:
                raise SecateurError(
                    f"{source}: config.json has {wrong[0]} = {sizes[wrong[0]]!r}; it is a count, at least 1"
                )
            if heads % groups:
                raise SecateurError(
                    f"{source}: config.json has {heads} query heads and {groups} key-value heads, "
                    "which do not divide; no such model runs"
                )
            return family.separated() if is_pruned(config) and "readers" in config.pruned_widths[0] else family
    known = sorted(t for family in all_families().values() for t in family.model_types)
    raise SecateurError(
        f"{source}: no family describes model type '{model_type}' (known: {', '.join(known)}); "
        "a family is one file: docs/add-a-family.md"
    )
