"""A model in canonical form: the same function with norms that only divide, so that its residual stream can be rotated.

The form is that of arXiv:2401.15024, section 3:

    norm_g,b(x) W^T + c  =  unit(x) (W diag(g))^T + (c + W b)

Gains and biases of a norm move into the matrices that read it. A LayerNorm also subtracts the mean; here everything
that writes to the residual stream has its mean removed instead.

A canonical model is a model of the runtime at full width. So the code that runs, saves and loads pruned models also
works for it. Its head is untied: the head takes the gain of the final norm, and the embedding does not.

Shape letters: D residual, V vocabulary, P positions, O outputs, I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.core.errors import SecateurError
from secateur.core.numbers import at_least_float32
from secateur.models.family import ROTATE, check_can
from secateur.models.load import build_skeleton
from secateur.models.pruned_config import pruned_config
from secateur.models.view import ModelView, Residual

_ROWS = 1 << 12  # rows of a matrix that are converted to float32 at a time for a sum


def canonical_view(view: ModelView, dtype: torch.dtype, *, tied: bool = False) -> ModelView:
    """Return the model in canonical form; its tensors are computed when they are read, in float32 or better.

    Args:
        view: a stock model, or a pruned model whose residual stream is whole.
        dtype: the dtype of the weights after a cut.
        tied: the head stays the embedding; a map, which is the gain of the final norm, comes before it.

    Raises:
        SecateurError: the residual stream is already rotated, or models of this family cannot be rotated.
    """
    assert not (tied and why_not_tied(view)), "the method checks it"
    check_can(view.family, ROTATE, view.name)
    hidden = int(view.config.hidden_size)
    if (residual := view.dims(0).residual) is not None:
        how = "selected from" if residual.selected else "rotated and sliced"
        raise SecateurError(
            f"{view.name}: its residual stream is already {how}; slice the original model, at a higher sparsity"
        )
    whole = Residual((hidden, hidden), (hidden, hidden), (None,) * len(view.family.norms))
    dims = [replace(view.dims(index), residual=whole) for index in range(view.blocks)]
    content = pruned_config(
        {
            **view.raw_config,
            "tie_word_embeddings": tied,
            "pruned_residual": {**_description(view), **({"tied": True} if tied else {})},
        },
        view.family,
        dims,
        stock=False,
    )
    config = CONFIG_MAPPING[content["model_type"]].from_dict(content)
    skeleton = build_skeleton(config)
    doubled = set(skeleton.all_tied_weights_keys) if tied else set()
    shapes = {name: tuple(t.shape) for name, t in skeleton.state_dict().items() if name not in doubled}
    return replace(view, config=config, raw_config=content, source=CanonicalSource(view, shapes), dtype=dtype)


def why_not_tied(view: ModelView) -> str | None:
    """Return why the head of a model cannot stay tied when its residual stream is rotated, or None."""
    if not view.config.tie_word_embeddings:
        return f"{view.name}: its head is not tied to the embedding, so it is rotated on its own"
    if view.family.norm.centred:
        return (
            f"{view.name}: the mean is taken from its embedding, not from its head, so that they cannot stay one table"
        )
    return None


def _description(view: ModelView) -> dict[str, Any]:
    """Return `pruned_residual` of config.json, without the widths at its ends."""
    family, stored = view.family, set(view.source.names())
    return {
        "embeddings": list(family.embeddings),
        "final_norm": family.final_norm,
        "head": family.head,
        "norms": list(family.norms),
        "attention": list(family.attention),
        "mlp": list(family.mlp),
        "matrices": dict(family.matrices),
        "epsilon": family.norm.epsilon_of(view.config),
        "reader_bias": f"{view.block_prefix(0)}{family.norms[0]}.bias" in stored,
        "head_bias": bool({f"{family.final_norm}.bias", f"{family.head}.bias"} & stored),
    }


@dataclass(frozen=True)
class CanonicalSource:
    """The tensors of the canonical form, computed from the tensors of a view when they are read. A `TensorSource`.

    Attributes:
        view: the original model.
        shapes: tensor name -> shape in the canonical model, in its order.
    """

    view: ModelView
    shapes: Mapping[str, tuple[int, ...]]

    def names(self) -> list[str]:
        """Return the names of all tensors of the canonical model."""
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without computing it."""
        return self.shapes[name]

    def read(self, name: str) -> Tensor:
        """Return one tensor, float32 or better. It may share memory with the original: do not write to it."""
        family = self.view.family
        path, _, kind = name.rpartition(".")
        prefix = f"{family.blocks}."
        if path.startswith(prefix):
            index, _, inside = path.removeprefix(prefix).partition(".")
            matrix = next((m for m, p in family.matrices.items() if p == inside), None)
            if matrix is None:  # a norm over the width of a head
                return self._stored(name)
            return (
                self._reader(path, kind, f"{prefix}{index}.{family.norm_of(matrix)}")
                if matrix in family.readers
                else self._writer(path, kind)
            )
        if kind == "weight" and (path == family.head or path in family.embeddings):
            return self.rows(name, slice(None))
        if path == family.tied_map:
            gain_D = self._gain(family.final_norm)
            return torch.eye(self.shapes[name][0]) if gain_D is None else gain_D.diag()
        return self._reader(path, kind, family.final_norm) if path == family.head else self._stored(name)

    def rows(self, name: str, which: slice | Tensor) -> Tensor:
        """Return some rows of embedding, table of positions or head, float32 or better; compute only these."""
        family, source = self.view.family, self.view.source
        if name != f"{family.head}.weight":
            row_ND = at_least_float32(source.rows(name, which))
            return row_ND - row_ND.mean(-1, keepdim=True) if family.norm.centred else row_ND
        row_ND = at_least_float32(source.rows(self._untied(name), which))
        gain_D = self._gain(family.final_norm)
        return row_ND if gain_D is None else row_ND * gain_D

    def _stored(self, name: str) -> Tensor:
        return at_least_float32(self.view.source.read(name))

    def _optional(self, name: str) -> Tensor | None:
        return self._stored(name) if name in self.view.source.names() else None

    def _gain(self, norm: str) -> Tensor | None:
        """Return the factors of a norm, [D]; None if it has no gain."""
        stored_D = self._optional(f"{norm}.weight")
        return None if stored_D is None else self.view.family.norm.gain(stored_D)

    def _untied(self, name: str) -> str:
        """Return the name under which a weight is stored: the embedding for a tied head."""
        return name if name in self.view.source.names() else f"{self.view.family.embeddings[0]}.weight"

    def _reader(self, path: str, kind: str, norm: str) -> Tensor:
        """Return the weight or bias of a module that reads through a norm."""
        if kind == "weight":
            weight_OI, gain_I = self._stored(f"{path}.weight"), self._gain(norm)
            return weight_OI if gain_I is None else weight_OI * gain_I
        bias_O, shift_I = self._optional(f"{path}.bias"), self._optional(f"{norm}.bias")
        if shift_I is None:
            assert bias_O is not None, "the canonical model has a bias only if the stock module or its norm has one"
            return bias_O
        weight_OI = self.view.source.read(self._untied(f"{path}.weight"))
        shift_O = torch.cat([at_least_float32(part_NI) @ shift_I for part_NI in weight_OI.split(_ROWS)])
        return shift_O if bias_O is None else bias_O + shift_O

    def _writer(self, path: str, kind: str) -> Tensor:
        """Return the weight or bias of a module that writes to the residual, without its mean over outputs (dim 0)."""
        tensor = self._stored(f"{path}.{kind}")
        return tensor - tensor.mean(0) if self.view.family.norm.centred else tensor
