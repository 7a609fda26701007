"""Which tensor of a GGUF file is which of transformers, and its numbers, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.core.errors import SecateurError
from secateur.models.gguf.config import Architecture, architecture_of
from secateur.models.gguf.file import GgufFile

_PIECE_NUMBERS = 1 << 21  # in memory at a time, in float32
_QUERY, _KEY = ".attn_q.", ".attn_k."
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def matching(skeleton: PreTrainedModel, file: GgufFile) -> dict[str, str]:
    """Return the name of each tensor of the model -> its name in the file, without a tied head.

    Raises:
        SecateurError: the file lacks one, has one of another shape, or has one that the model does not have.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    arch: MODEL_ARCH = next(key for key, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = get_tensor_name_map(arch, skeleton.config.num_hidden_layers)
    tied = set(skeleton.all_tied_weights_keys) if skeleton.config.tie_word_embeddings else set()
    found = {}
    for name, tensor in skeleton.state_dict().items():
        if name in tied:
            continue
        stem, _, suffix = name.rpartition(".")
        stored = f"{names.get_name(stem)}.{suffix}"
        if stored not in file.tensors:
            raise SecateurError(f"{file.path}: has no {stored} ({name} of transformers); convert the model again")
        if prod(file.tensors[stored].shape) != tensor.numel() or file.tensors[stored].shape[-1] != tensor.shape[-1]:
            raise SecateurError(
                f"{file.path}: {stored} is {list(file.tensors[stored].shape)}, and its metadata asks for "
                f"{list(tensor.shape)}; convert the model again"
            )
        found[name] = stored
    if unused := [name for name in file.tensors if name not in {*found.values(), *architecture_of(file).tensors}]:
        raise SecateurError(
            f"{file.path}: has {len(unused)} tensors that a {skeleton.config.model_type} model of transformers does "
            f"not have, first {unused[0]}; the imported model would compute something else"
        )
    return found


def pieces(
    file: GgufFile, stored: str, known: Architecture, heads: tuple[int, int], dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield the numbers of a tensor in the order of transformers, some rows at a time.

    Args:
        file: the file.
        stored: the name in the file.
        known: its architecture.
        heads: the numbers of query and of key-value heads.
        dtype: the dtype of the pieces.
    """
    tensor = file.tensors[stored]
    counts = zip((_QUERY, _KEY), heads, strict=True)
    permuted = next((count for kind, count in counts if kind in stored), 0) if known.permuted else 0
    if permuted and len(tensor.shape) == 1:
        yield torch.from_numpy(in_halves(file.read(stored), permuted)).to(dtype)
        return
    step = max(1, _PIECE_NUMBERS // tensor.shape[-1])
    if permuted:
        width = tensor.rows // permuted
        step = max(1, step // width) * width  # whole heads
    for start in range(0, tensor.rows, step):
        if permuted:
            rows = file.read(stored, start, start + step)
            yield torch.from_numpy(in_halves(rows, len(rows) // width)).to(dtype)
            continue
        numbers = torch.from_numpy(file.read(stored, start, start + step))
        if known.norms_plus_one and stored.endswith("norm.weight"):
            numbers = numbers - 1
        yield numbers.to(dtype)


def in_halves(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Bring the rows of q or k from llama.cpp's order to that of transformers.

    llama.cpp turns rows 2i and 2i + 1 of a head together, transformers rows i and i + width / 2.

    Args:
        rows: the weight [heads x width, in] or the bias [heads x width].
        heads: how many heads the rows belong to.
    """
    return np.ascontiguousarray(rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape))


def natural_dtype(file: GgufFile, stored: Sequence[str]) -> torch.dtype:
    """Return the dtype of the matrices, float32 if they have several, and bfloat16 if any of them is quantised."""
    kinds = {file.tensors[name].kind.name for name in stored if len(file.tensors[name].shape) > 1}
    if not kinds <= _PLAIN.keys():
        return torch.bfloat16
    return _PLAIN[kinds.pop()] if len(kinds) == 1 else torch.float32


def is_quantised(file: GgufFile) -> bool:
    """Whether any tensor of a file is stored in another way than as floating-point numbers."""
    return not file.kinds().keys() <= _PLAIN.keys()
