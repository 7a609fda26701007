"""Read a GGUF file: its metadata, and some rows of a tensor at a time.

The format is in ggml's docs/gguf.md. The reader of the package `gguf` makes several arrays of each word of a
vocabulary, hundreds of megabytes for a current one, so the header is read here. Types, sizes and the arithmetic of the
quantised types are those of the package.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from secateur.core.errors import SecateurError, UsageError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32 = 6
_NOT_KEPT = ("tokenizer.ggml.",)  # arrays as long as the vocabulary; the tokenizer is read by transformers
_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        name: its name in the file.
        shape: the outermost dimension first, as in torch.
        kind: how its numbers are stored, such as Q4_1.
        offset: its place in the file, in bytes.
        row_bytes: the bytes of a row, the last dimension.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """The number of rows; 1 for a vector."""
        return prod(self.shape[:-1])

    @property
    def end(self) -> int:
        """The place of the byte behind it."""
        return self.offset + self.rows * self.row_bytes


@dataclass(frozen=True)
class GgufFile:
    """An open file.

    Attributes:
        path: the file.
        metadata: key -> text, number, or list of them. Arrays of the vocabulary are left out. A number that was stored
            as float32 is the shortest decimal fraction that gives it: 1e-05, not 9.999999747378752e-06.
        tensors: name -> tensor, in the order of the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @cached_property
    def architecture(self) -> str:
        """The name of the architecture."""
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key of the architecture, such as `block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def kinds(self) -> dict[str, int]:
        """Return the name of a type -> how many tensors have it, the one that stores the most numbers first."""
        tensors, numbers = Counter[str](), Counter[str]()
        for tensor in self.tensors.values():
            tensors[tensor.kind.name] += 1
            numbers[tensor.kind.name] += prod(tensor.shape)
        return {name: tensors[name] for name, _ in numbers.most_common()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        """Return rows of a tensor as float32.

        Args:
            name: the tensor.
            start, stop: the first row, and the one behind the last; None is the end.

        Returns:
            The whole tensor in its shape, or float32 [stop - start, last dimension].
        """
        from gguf import quants

        tensor = self.tensors[name]
        count = (tensor.rows if stop is None else min(stop, tensor.rows)) - start
        with self.path.open("rb") as handle:
            handle.seek(tensor.offset + start * tensor.row_bytes)
            stored = np.fromfile(handle, np.uint8, count * tensor.row_bytes)
        numbers = quants.dequantize(stored.reshape(count, tensor.row_bytes), tensor.kind).astype(np.float32, copy=False)
        return numbers.reshape(tensor.shape if (start, count) == (0, tensor.rows) else (count, tensor.shape[-1]))


def open_gguf(path: Path) -> GgufFile:
    """Read the header of a file and check that all tensors are there and can be read.

    Raises:
        UsageError: there is no such file, or the package `gguf` is missing.
        SecateurError: it is no GGUF file, a part of one, truncated, or stored in a way that cannot be read.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UsageError("reading a GGUF file needs the package gguf: python -m pip install 'secateur[gguf]'") from None
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.gguf"))
        found = f"; it holds {', '.join(inside)}" if inside else ", and it holds none"
        raise UsageError(f"'{path}' is a folder: give one GGUF file{found}")
    if not path.is_file():
        raise UsageError(f"no file '{path}': give the path of a GGUF file")
    with path.open("rb") as handle:
        header = _Header(handle, path)
        try:
            metadata, tensors = header.read()
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError):
            raise header.truncated() from None
    _refuse_parts(path, metadata)
    size = path.stat().st_size
    if (end := max((tensor.end for tensor in tensors.values()), default=0)) > size:
        raise SecateurError(
            f"{path}: truncated: it has {size:,} bytes, and its tensors need {end:,}; download it again, or, if it is "
            "one of several parts that a program cut, join all of them first: cat PART... > WHOLE.gguf"
        )
    file = GgufFile(path, metadata, tensors)
    _refuse_unreadable(file)
    return file


def _refuse_parts(path: Path, metadata: Mapping[str, Any]) -> None:
    if int(metadata.get("split.count", 0)) > 1:
        raise SecateurError(
            f"{path}: part {int(metadata.get('split.no', 0)) + 1} of {metadata['split.count']} of a split model; join "
            "them first, with llama.cpp's program: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    if "general.architecture" not in metadata:
        raise SecateurError(f"{path}: its metadata names no general.architecture; it holds no model")
    if metadata.get("general.type", "model") != "model":
        raise SecateurError(
            f"{path}: holds {metadata['general.type']!r}, not a model; give the GGUF file of the language model itself"
        )


def _refuse_unreadable(file: GgufFile) -> None:
    """Refuse types that the package knows by name, but cannot turn into numbers."""
    from gguf import quants

    for kind in {tensor.kind for tensor in file.tensors.values()}:
        tensor = next(tensor for tensor in file.tensors.values() if tensor.kind == kind)
        try:
            quants.dequantize(np.zeros((1, tensor.row_bytes), np.uint8), kind)
        except NotImplementedError:
            raise SecateurError(
                f"{file.path}: {tensor.name} is stored as {kind.name}, which the package gguf cannot turn into "
                "numbers; give a file with another quantisation"
            ) from None


class _Header:
    """The header of a file that is being read from its beginning."""

    def __init__(self, handle: BinaryIO, path: Path) -> None:
        self._handle, self._path = handle, path
        self._size = path.stat().st_size

    def truncated(self) -> SecateurError:
        return SecateurError(f"{self._path}: truncated or damaged inside its header; download it again")

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if (magic := self._handle.read(4)) != _MAGIC:
            raise SecateurError(
                f"{self._path}: no GGUF file: it begins with {magic!r}, not with {_MAGIC!r}"
                + ("; it is the second or a later part of one, maybe: join the parts first" if magic else "")
            )
        version = self._number("I")
        if version not in _VERSIONS:
            raise SecateurError(
                f"{self._path}: GGUF version {version}, and only 2 and 3 (little-endian) can be read; convert the "
                "model again with a current llama.cpp"
            )
        count, keys = self._number("Q"), self._number("Q")
        metadata = {}
        for _ in range(keys):
            name = self._text()
            metadata[name] = self._value(self._number("I"), keep=not name.startswith(_NOT_KEPT))
        tensors = [self._tensor() for _ in range(count)]
        step = metadata.get("general.alignment", 32)
        if not isinstance(step, int) or step < 1:
            raise self.truncated()
        start = -(-self._handle.tell() // step) * step
        return metadata, {
            name: self._placed(name, shape, kind, start + offset) for name, shape, kind, offset in tensors
        }

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, count: int) -> bytes:
        if count > self._size - self._handle.tell():
            raise self.truncated()
        return self._handle.read(count)

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8")

    def _value(self, kind: int, *, keep: bool) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array(keep)
        if kind not in _SCALARS:
            raise self.truncated()
        value = self._number(_SCALARS[kind])
        return _shortest(value) if kind == _FLOAT32 else value

    def _array(self, keep: bool) -> list[Any] | None:
        kind, count = self._number("I"), self._number("Q")
        if kind in _SCALARS:
            code = _SCALARS[kind]
            stored = self._take(count * struct.calcsize(f"<{code}"))
            if not keep:
                return None
            values = struct.unpack(f"<{count}{code}", stored)
            return list(map(_shortest, values) if kind == _FLOAT32 else values)
        if keep:
            return [self._value(kind, keep=True) for _ in range(count)]
        for _ in range(count):
            self._value(kind, keep=False)
        return None

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._text(), self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.truncated()
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return name, shape[::-1], self._number("I"), self._number("Q")

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            stored = GGMLQuantizationType(kind)
        except ValueError:
            raise SecateurError(
                f"{self._path}: {name} is stored as type {kind}, which the installed gguf does not know; "
                "python -m pip install --upgrade gguf, or give a file with another quantisation"
            ) from None
        group, group_bytes = GGML_QUANT_SIZES[stored]
        if shape[-1] % group:
            raise SecateurError(f"{self._path}: {name} has rows of {shape[-1]}, which {stored.name} cannot hold")
        return GgufTensor(name, shape, stored, offset, shape[-1] // group * group_bytes)


def _shortest(number: float) -> float:
    """Return the shortest decimal fraction with the same float32."""
    return float(str(np.float32(number)))
