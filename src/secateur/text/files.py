"""Read files of text, of rows, and of token ids, compressed or not."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.core.memory import is_out_of_memory
from secateur.text.instructions import Instruction, instruction_of, is_instruction, plain_text

ID_FILES = (".npy", ".safetensors")
JSON_FILES = (".json", ".jsonl", ".ndjson")
_COMPRESSED: dict[str, Callable[[Path], IO[bytes]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # type: ignore[dict-item]  # read as bytes
_NOT_UNPACKED = (".zst", ".zip", ".7z", ".tar", ".tgz", ".lz4", ".br")
_NEVER_PACKED = (*ID_FILES, ".parquet", *_NOT_UNPACKED)


def file_hash(spec: str) -> str | None:
    """SHA-256 of the file that a SPEC names; None if it names no file."""
    file = Path(spec).expanduser()
    if not file.is_file():
        return None
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def token_ids(path: Path) -> Tensor:
    """Read token ids [samples, seqlen], int64, from a `.npy` or `.safetensors` file."""
    try:
        ids = (
            torch.from_numpy(np.load(path, allow_pickle=False))
            if path.suffix == ".npy"
            else next(iter(load_file(path).values()))
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SecateurError(f"{path}: cannot be read as token ids ({error})") from error
    if ids.dim() != 2 or ids.is_floating_point() or 0 in ids.shape or ids.shape[1] < 2:
        raise SecateurError(
            f"{path}: token ids are an int array [samples, seqlen], this is {ids.dtype} {list(ids.shape)}"
        )
    return ids.to(torch.int64)


def rows_of(path: Path, field: str) -> Sequence[str]:
    """The texts of a file: one per row, or the whole file as one text. Instructions are in the plain form."""
    if holds_rows(path):
        return [_row_text(row, field, where) for where, row in read_rows(path, field)]
    return ["".join(_lines(path))]


def holds_rows(path: Path) -> bool:
    """Whether a file holds rows with fields, by its suffix."""
    return suffix_of(path) in JSON_FILES or path.suffix == ".parquet"


def starts_with_instruction(path: Path, field: str | None) -> bool:
    """Whether the first row of a file is an instruction, and has no text in `field`."""
    if not holds_rows(path):
        return False
    first = next((row for _, row in read_rows(path, field)), None)
    return isinstance(first, dict) and (field is None or field not in first) and is_instruction(first)


def read_rows(path: Path, field: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a JSON or parquet file, each with its file and line.

    Args:
        path: the file.
        field: read only this column of a parquet file, if it has it.
    """
    if path.suffix != ".parquet":
        yield from _placed_objects(path)
        return
    table = read_parquet(path)
    names = table.column_names
    if field in names:
        table = table.select([field])
    elif field is not None and not is_instruction(dict.fromkeys(names)):
        raise SecateurError(f"{path}: has no field '{field}' (it has {', '.join(names)}); name it with --text-field")
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path}, row {number}", row


def instructions_of(path: Path) -> list[Instruction]:
    """The rows of a JSON or parquet file as instructions.

    Raises:
        SecateurError: there is none, or a row is not one; the message names file, line and field.
    """
    found = [instruction_of(row, where) for where, row in read_rows(path)]
    if not found:
        raise SecateurError(f"{path}: holds no rows")
    return found


def suffix_of(path: Path) -> str:
    """The suffix of a file without that of its compression: `.json` for `c4-train.00000-of-01024.json.gz`."""
    return path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix


def _placed_objects(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a JSON file: one object per line (as in C4's `.json` shards), or one list of objects."""
    lines = enumerate(_lines(path), 1)
    first = next(((n, line) for n, line in lines if line.strip()), None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        rows = _json("".join([first[1], *(line for _, line in lines)]), str(path))
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in itertools.chain([first], lines):
        if line.strip():
            yield f"{path}, line {number}", _json(line, f"{path}, line {number}")


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, decompressed, one at a time to save memory.

    Every line ends in `\\n`, whatever line end the file has, as in Python's text files; a byte-order mark is left out.
    """
    try:
        with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig") as text:
            yield from text
    except UnicodeDecodeError:
        raise SecateurError(
            f"{path}: not UTF-8 text (byte {_first_wrong_byte(path)}); convert it, or give token ids as .npy"
        ) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk failed, not the unpacking
            raise
        raise SecateurError(
            f"{path}: cannot be unpacked ({error}): it is cut short, or not what its suffix says; download it again"
        ) from None


def _open(path: Path) -> IO[bytes]:
    inner = suffix_of(path)
    if path.suffix in _NOT_UNPACKED or (path.suffix in _COMPRESSED and inner in _NEVER_PACKED):
        ending = path.suffix if path.suffix in _NOT_UNPACKED else inner + path.suffix
        raise SecateurError(
            f"{path}: {ending} files are not read; unpack it first (text and JSON may stay packed as "
            f"{', '.join(_COMPRESSED)})"
        )
    return _COMPRESSED[path.suffix](path) if path.suffix in _COMPRESSED else path.open("rb")


def _first_wrong_byte(path: Path) -> int:
    """The place of the first byte that is not UTF-8, in the file without its compression."""
    place = 0
    with _open(path) as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return place + error.start
            place += len(line)
    return place


def _row_text(row: Any, field: str, where: str) -> str:
    """The text of a row: the value of its field, or an instruction with its answer."""
    if isinstance(row, dict) and field not in row and is_instruction(row):
        return plain_text(instruction_of(row, where))
    if not isinstance(row, dict) or field not in row:
        has = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise SecateurError(f"{where}: has no field '{field}' (it has {has}); name it with --text-field")
    return _string(row[field], field, where)


def read_parquet(path: Path) -> Any:
    """Read a parquet file as a pyarrow table."""
    import pyarrow.parquet as parquet

    try:
        return parquet.read_table(path)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SecateurError(f"{path}: not a parquet file ({error})") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SecateurError(
            f"{where}: not JSON ({error.msg}); the file must have one object per line, or be one list of objects"
        ) from None


def _string(value: Any, field: str, where: str) -> str:
    """The value as text; a missing one is an empty row."""
    if value is not None and not isinstance(value, str):
        raise SecateurError(
            f"{where}: the field '{field}' holds a {type(value).__name__}, not text; "
            "name the field of the text with --text-field"
        )
    return value or ""
