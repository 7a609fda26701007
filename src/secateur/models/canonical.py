"""A model in canonical form: the same function with norms that only divide, so that its residual stream may be rotated (arXiv:2401.15024, section 3).

    norm_g,b(x) W^T + c  =  unit(x) (W diag(g))^T + (c + W b)        gains and biases go into what reads the norm
    unit(x - mean(x))    with the mean taken off everything that writes to the residual, where the norm is a LayerNorm

A canonical model is a model of the runtime at full width, so that whatever runs, saves or loads pruned models does so with this one.
The head is untied: it takes up the gain of the final norm, the embedding does not.

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

_ROWS = 1 << 12  # of a matrix in float32 at a time, where a sum is all that is wanted


def canonical_view(view: ModelView, dtype: torch.dtype) -> ModelView:
    """The model in canonical form: tensors are computed when they are read, in float32 or better.

    Args:
        view: a stock model, or a pruned one whose residual stream is whole.
        dtype: of the weights that a cut of it gives.

    Raises:
        SecateurError: the residual stream is already rotated, or the family's cannot be.
    """
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
        {**view.raw_config, "tie_word_embeddings": False, "pruned_residual": _description(view)},
        view.family,
        dims,
        stock=False,
    )
    config = CONFIG_MAPPING[content["model_type"]].from_dict(content)
    shapes = {name: tuple(tensor.shape) for name, tensor in build_skeleton(config).state_dict().items()}
    return replace(view, config=config, raw_config=content, source=CanonicalSource(view, shapes), dtype=dtype)


def _description(view: ModelView) -> dict[str, Any]:
    """`pruned_residual` of config.json, but for the widths at its ends."""
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
    """The tensors of the canonical form, computed from those of a view when they are read. A `TensorSource`.

    Attributes:
        view: the model as it is.
        shapes: the tensors of the canonical model, in its order.
    """

    view: ModelView
    shapes: Mapping[str, tuple[int, ...]]

    def names(self) -> list[str]:
        """Every tensor of the canonical model."""
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without computing it."""
        return self.shapes[name]

    def read(self, name: str) -> Tensor:
        """One tensor, float32 or better. It may share memory with the original and is not to be written to."""
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
        return self._reader(path, kind, family.final_norm) if path == family.head else self._stored(name)

    def rows(self, name: str, which: slice | Tensor) -> Tensor:
        """Some rows of the embedding, of the table of positions, or of the head, float32 or better; the others are not computed."""
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
        """What a norm multiplies with, None where it has no gain."""
        stored_D = self._optional(f"{norm}.weight")
        return None if stored_D is None else self.view.family.norm.gain(stored_D)

    def _untied(self, name: str) -> str:
        """Where a weight is stored: that of a tied head is the embedding."""
        return name if name in self.view.source.names() else f"{self.view.family.embeddings[0]}.weight"

    def _reader(self, path: str, kind: str, norm: str) -> Tensor:
        """The weight or bias of something that reads through a norm."""
        if kind == "weight":
            weight_OI, gain_I = self._stored(f"{path}.weight"), self._gain(norm)
            return weight_OI if gain_I is None else weight_OI * gain_I
        bias_O, shift_I = self._optional(f"{path}.bias"), self._optional(f"{norm}.bias")
        if shift_I is None:
            assert bias_O is not None, "the canonical model has a bias because the stock one has it, or its norm"
            return bias_O
        weight_OI = self.view.source.read(self._untied(f"{path}.weight"))
        shift_O = torch.cat([at_least_float32(part_NI) @ shift_I for part_NI in weight_OI.split(_ROWS)])
        return shift_O if bias_O is None else bias_O + shift_O

    def _writer(self, path: str, kind: str) -> Tensor:
        """The weight or bias of something that writes to the residual: along the outputs, which come first, the mean goes."""
        tensor = self._stored(f"{path}.{kind}")
        return tensor - tensor.mean(0) if self.view.family.norm.centred else tensor
