"""Packed checkpoints: a zero takes a bit or less. Unpacking restores every file byte for byte.

A packed checkpoint has one `packed*.safetensors` for each `model*.safetensors`. It is in the folder `secateur/`, where
no engine looks for weights. All other files stay the same. In a packed file each tensor NAME has one of these forms:

    NAME                           The tensor itself: a third of it or less is zero, or it is not a matrix, or its
                                   numbers take less than two bytes.
    NAME.mask and NAME.values      U8, a bit for each entry, row after row, eight per byte, the first one highest; a bit
                                   is set if the entry is not zero. The values are the entries that are not zero, in
                                   that order, in their own dtype.
    NAME.2of4 (or .1of4), .values  If at most 2 (or 1) of every 4 consecutive entries are not zero: U8, three (or four)
                                   groups per byte, the first one lowest, as digits in base 6 (or 4). A digit gives the
                                   entries of a group that have values: one of the pairs 01 02 03 12 13 23 (or of
                                   0 1 2 3). Every group has 2 (or 1) values; some of them may be zero.

Zero means that all bits are zero: a minus zero is a value. The metadata has `format` (`secateur-packed`), `version`,
and two facts about the original file: its `header` (the JSON text of safetensors with its padding, which gives names,
dtypes, shapes and places) and its `sha256`, which unpacking checks. Tensors with wider items come first, so that all
are aligned.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.core.progress import track
from secateur.models.companions import TEMPLATES
from secateur.models.load import open_checkpoint, packed_files, weight_files
from secateur.models.save import DTYPES, OWN_FOLDER, dtype_name, header_bytes, refuse_inside, written_folder

FORMAT, VERSION = "secateur-packed", 1
_MODEL, _PACKED = "model", "packed"
_KEPT = ("2of4", "1of4")  # the forms that take less than a bit per entry
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WHOLE: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32, 8: np.uint64}
Facts = dict[str, Any]


def pack(model: str, out: Path, *, overwrite: bool = False) -> Facts:
    """Write a checkpoint with packed zeros.

    Returns:
        `bytes_before` and `bytes_after` of the weight files, `packed_ratio`, and `stored`: form -> number of tensors.

    Raises:
        UsageError: `out` exists, or holds the model.
        SecateurError: `model` is no checkpoint, or the disk is full.
    """
    folder = open_checkpoint(model).folder
    refuse_inside(out, {"the model": folder})
    files = weight_files(folder, model)
    stored: Counter[str] = Counter()
    with written_folder(out, overwrite, sum(file.stat().st_size for file in files)) as partial:
        own = partial / OWN_FOLDER
        own.mkdir()
        for file in files:
            stored += _pack_file(file, own / file.name.replace(_MODEL, _PACKED, 1))
        _copy_others(folder, partial, files)
        after = sum(file.stat().st_size for file in own.glob(f"{_PACKED}*.safetensors"))
    before = sum(file.stat().st_size for file in files)
    return {"bytes_before": before, "bytes_after": after, "packed_ratio": after / before, "stored": dict(stored)}


def unpack(folder: Path, out: Path, *, overwrite: bool = False) -> Facts:
    """Restore the checkpoint that was packed; return `bytes_before` and `bytes_after` of the weight files.

    Raises:
        UsageError: `out` exists, or holds the packed checkpoint.
        SecateurError: the folder is not packed, or damaged.
    """
    files = packed_files(folder)
    if not files:
        raise SecateurError(
            f"'{folder}' is not packed: it has no {_PACKED}*.safetensors; give a folder that 'secateur pack' wrote"
        )
    refuse_inside(out, {"the packed checkpoint": folder})
    with written_folder(out, overwrite, sum(file.stat().st_size for file in files)) as partial:
        for file in files:
            try:
                _unpack_file(file, partial / file.name.replace(_PACKED, _MODEL, 1))
            except (SafetensorError, ValueError, KeyError, IndexError) as error:
                raise SecateurError(
                    f"{file}: truncated or damaged ({str(error).splitlines()[0]}); pack the checkpoint again"
                ) from None
        _copy_others(folder, partial, files)
        after = sum(file.stat().st_size for file in partial.glob(f"{_MODEL}*.safetensors"))
    return {"bytes_before": sum(file.stat().st_size for file in files), "bytes_after": after}


def encode(tensor: Tensor) -> dict[str, Tensor]:
    """Return suffix of the name -> part of a tensor: only "", or places and values."""
    if tensor.dim() < 2 or tensor.element_size() not in _WHOLE or tensor.is_complex():
        return {"": tensor}
    flat = tensor.contiguous().view(-1)
    nonzero = flat.view(torch.uint8).numpy().view(_WHOLE[tensor.element_size()]) != 0
    smallest: dict[str, Tensor] = {"": tensor}
    for parts in (_mask(flat, nonzero), *(_groups(flat, nonzero, form) for form in _KEPT)):
        if parts and _bytes(parts) < _bytes(smallest):
            smallest = parts
    return smallest


def decode(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of these parts: the inverse of `encode`.

    Raises:
        ValueError: the parts do not belong together.
    """
    if "" in parts:
        return parts[""]
    values = parts["values"]
    kind = next(name for name in parts if name != "values")
    count, code = math.prod(shape), parts[kind].numpy()
    nonzero = np.unpackbits(code, count=count).view(np.bool_) if kind == "mask" else _ungrouped(code, kind)[:count]
    if len(nonzero) != count or int(np.count_nonzero(nonzero)) != len(values):
        raise ValueError(f"{len(values)} values for {int(np.count_nonzero(nonzero))} places")
    flat = torch.zeros(count, dtype=values.dtype)
    flat[torch.from_numpy(nonzero)] = values
    return flat.view(shape)


def _bytes(parts: Mapping[str, Tensor]) -> int:
    return sum(part.nbytes for part in parts.values())


def _mask(flat: Tensor, nonzero: np.ndarray) -> dict[str, Tensor]:
    return {"mask": torch.from_numpy(np.packbits(nonzero)), "values": flat[torch.from_numpy(nonzero)]}


def _digits(form: str) -> tuple[list[tuple[int, ...]], int]:
    """Return digit -> the entries of a group that have values, and the number of digits per byte."""
    choices = list(itertools.combinations(range(4), int(form[0])))
    return choices, int(math.log(256.5, len(choices)))


def _groups(flat: Tensor, nonzero: np.ndarray, form: str) -> dict[str, Tensor] | None:
    """Return places (base 6 or 4) and values; None if a group has too many values."""
    choices, per_byte = _digits(form)
    if len(nonzero) % 4 or int(nonzero.view(np.uint8).reshape(-1, 4).sum(1, dtype=np.uint8).max(initial=0)) > len(
        choices[0]
    ):
        return None
    masks = nonzero.view(np.uint8).reshape(-1, 4) @ np.array([1, 2, 4, 8], np.uint8)
    # each group as four bits; its digit is the first choice that covers all of them
    own = [sum(1 << entry for entry in choice) for choice in choices]
    digit_of = np.array(
        [next((d for d, mask in enumerate(own) if mask & bits == bits), 0) for bits in range(16)], np.uint8
    )
    digits = digit_of[masks]
    padded = np.zeros(-(-len(digits) // per_byte) * per_byte, np.uint8)
    padded[: len(digits)] = digits
    code = padded.reshape(-1, per_byte) @ (len(choices) ** np.arange(per_byte)).astype(np.uint8)
    filled = torch.from_numpy(_places(choices)[digits].reshape(-1))
    return {form: torch.from_numpy(code), "values": flat[filled]}


def _ungrouped(code: np.ndarray, form: str) -> np.ndarray:
    choices, per_byte = _digits(form)
    digits = (code[:, None] // (len(choices) ** np.arange(per_byte))) % len(choices)
    return _places(choices)[digits.reshape(-1)].reshape(-1)


def _places(choices: list[tuple[int, ...]]) -> np.ndarray:
    """Return digit -> which of the four entries have values, bool [digits, 4]."""
    return np.array([[entry in choice for entry in range(4)] for choice in choices])


@dataclass
class _Spool:
    """Tensors that are collected for one file, in one temporary file for each item size."""

    folder: Path
    entries: dict[int, dict[str, tuple[str, list[int], int]]] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""
        size = tensor.element_size()
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        with (self.folder / f"spool-{size}.tmp").open("ab") as file:
            file.write(data.data)
        self.entries.setdefault(size, {})[name] = (dtype_name(tensor.dtype), list(tensor.shape), len(data))

    def write(self, target: Path, metadata: Mapping[str, str]) -> None:
        """Write all tensors into one safetensors file, wider items first."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        offset = 0
        for size in sorted(self.entries, reverse=True):
            for name, (dtype, shape, length) in self.entries[size].items():
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + length]}
                offset += length
        with target.open("wb") as out:
            out.write(header_bytes(header))
            for size in sorted(self.entries, reverse=True):
                spool = self.folder / f"spool-{size}.tmp"
                with spool.open("rb") as file:
                    shutil.copyfileobj(file, out, 1 << 22)
                spool.unlink()


def _pack_file(file: Path, target: Path) -> Counter[str]:
    """Pack one file; return form -> number of tensors."""
    spool, stored = _Spool(target.parent), Counter[str]()
    with safe_open(file, framework="pt") as handle:
        for name in track(handle.keys(), f"pack {file.name}"):
            parts = encode(handle.get_tensor(name))
            stored[next((kind for kind in parts if kind not in ("", "values")), "dense")] += 1
            for suffix, part in parts.items():
                spool.add(f"{name}.{suffix}" if suffix else name, part)
    spool.write(
        target, {"format": FORMAT, "version": str(VERSION), "header": _header_text(file), "sha256": _sha256(file)}
    )
    return stored


def _unpack_file(file: Path, target: Path) -> None:
    with safe_open(file, framework="pt") as handle, target.open("w+b") as out:
        about = handle.metadata() or {}
        if about.get("format") != FORMAT:
            raise SecateurError(
                f"{file}: not packed by secateur (format '{about.get('format')}'); "
                "give a folder that 'secateur pack' wrote"
            )
        if int(about["version"]) > VERSION:
            raise SecateurError(
                f"{file}: packed in version {about['version']} of the layout, this secateur knows {VERSION}; "
                "use a newer one"
            )
        text = about["header"].encode()
        out.write(struct.pack("<Q", len(text)) + text)
        header = json.loads(text)
        header.pop("__metadata__", None)
        names, begin = set(handle.keys()), 8 + len(text)
        for name, entry in track(
            sorted(header.items(), key=lambda item: item[1]["data_offsets"]), f"unpack {file.name}"
        ):
            suffixes = ("", "mask", *_KEPT, "values")
            parts = {s: handle.get_tensor(own) for s in suffixes if (own := f"{name}.{s}" if s else name) in names}
            tensor = decode(parts, tuple(entry["shape"]))
            if tensor.dtype != DTYPES.get(entry["dtype"]):
                raise ValueError(f"{name} is {tensor.dtype} and should be {entry['dtype']}")
            out.seek(begin + entry["data_offsets"][0])
            out.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        out.flush()
        if _sha256(target) != about["sha256"]:
            raise ValueError("the unpacked file is not the file that was packed")


def _header_text(file: Path) -> str:
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        return handle.read(length).decode()


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _copy_others(source: Path, target: Path, but: Sequence[Path]) -> None:
    """Copy all other files of a checkpoint, also from its own subfolders, but no pickles."""
    for file in sorted(file for pattern in ("*", f"{TEMPLATES}/*", f"{OWN_FOLDER}/*") for file in source.glob(pattern)):
        if file.is_file() and file not in but and file.suffix not in _PICKLES:
            place = target / file.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)
