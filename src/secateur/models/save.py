"""Writing checkpoints: block by block into a folder beside the final one, which appears whole or not at all.

The folder `OUT.partial` holds a journal (what is being made, so that a resumed run can tell whether it is the same), finished
blocks, and the pieces of the plan. It has no config.json until the end, so nothing can take it for a model.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.core.errors import SecateurError, UsageError

JOURNAL = "journal.json"
ONE_FILE_UP_TO = 5 * 2**30
_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1}
_COPIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "generation_config.json",
    "LICENSE*",
)


class CheckpointWriter:
    """A checkpoint being written.

    Args:
        out: the final folder.
        settings: what decides the result; a resumed run must have the same.
        resume: go on with what an interrupted run left.
        overwrite: replace an existing folder, and forget an interrupted run.
        needed: bytes the result will need, to refuse a full disk before the work.

    Raises:
        UsageError: the folder exists and is not empty, an interrupted run lies there, or it had other settings.
        SecateurError: the disk has no room.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], *, resume: bool, overwrite: bool, needed: int) -> None:
        self.out, self.overwrite = out, overwrite
        self.partial = out.with_name(out.name + ".partial")
        self._names: dict[str, str] = {}
        refuse_existing(out, overwrite)
        if self.partial.exists() and resume:
            self._check_journal(settings)
        elif self.partial.exists() and not overwrite:
            raise UsageError(f"an interrupted run lies in '{self.partial}': go on with --resume, or start again with --overwrite")
        else:
            shutil.rmtree(self.partial, ignore_errors=True)
            _check_room(out, needed)
            with self._disk():
                self.partial.mkdir(parents=True)
                _write_json(self.partial / JOURNAL, dict(settings))

    def _check_journal(self, settings: Mapping[str, Any]) -> None:
        file = self.partial / JOURNAL
        before = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        now = json.loads(json.dumps(dict(settings), default=str))
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                raise UsageError(
                    f"--resume: the interrupted run in '{self.partial}' had {key} = {_short(before.get(key))}, this one has {_short(now.get(key))}; "
                    "give the same settings, or start again with --overwrite"
                )

    def has(self, name: str) -> bool:
        """Whether a part was finished by an earlier run."""
        return self._file(name).is_file()

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A finished part: its tensors and its note."""
        return load_file(self._file(name)), self.read_note(name)

    def read_note(self, name: str) -> dict[str, Any]:
        """The note of a finished part alone."""
        with safe_open(self._file(name), framework="pt") as handle:
            note: dict[str, Any] = json.loads((handle.metadata() or {}).get("note", "{}"))
        return note

    def write(self, name: str, tensors: Mapping[str, Tensor], note: Mapping[str, Any] | None = None) -> None:
        """Write a part, whole or not at all."""
        file, temporary = self._file(name), self._file(name).with_suffix(".tmp")
        with self._disk():
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, temporary, metadata={"format": "pt", "note": json.dumps(dict(note or {}))})
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.rename(file)

    def finish(self, parts: list[str], config: Mapping[str, Any], source: Path | None, files: Mapping[str, str]) -> None:
        """Put weights, configuration and companions in place, then rename the folder.

        Args:
            parts: the parts that hold weights, in order.
            config: the content of config.json.
            source: the original's folder: tokenizer, generation settings and licence are copied from it.
            files: more text files by name; `plan.json` and the model card are among them.
        """
        with self._disk():
            if source is not None:
                _copy_companions(source, self.partial)
            for name, content in files.items():
                (self.partial / name).write_text(content, "utf-8")
            _gather([self._file(part) for part in parts], self.partial)
            for leftover in self.partial.glob("part-*"):
                leftover.unlink()
            _write_json(self.partial / "config.json", config)
            _swap(self.partial, self.out)
            (self.out / JOURNAL).unlink()  # last: until the folder has its name, a resumed run needs the journal

    def discard(self) -> None:
        """Give up: nothing is left."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.partial / f"part-{name}.safetensors"

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
                raise SecateurError(f"no space left on the disk of '{self.out.parent}'; free some and go on with --resume, or choose another --out") from error
            if isinstance(error, PermissionError):
                raise SecateurError(f"'{self.out.parent}' cannot be written ({error.strerror}); choose another --out") from error
            raise


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raises UsageError where `out` is a file, or a folder with something in it that may not be replaced."""
    if out.is_file():
        raise UsageError(f"--out '{out}' is a file; give a new folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UsageError(f"--out '{out}' exists and is not empty; choose another folder, or replace it with --overwrite")


def _check_room(out: Path, needed: int) -> None:
    place = next(folder for folder in (out, *out.parents) if folder.exists()) if out.is_absolute() else Path.cwd()
    free = shutil.disk_usage(place).free
    if free < needed:
        raise SecateurError(f"no space: the result needs about {needed / 1e9:.2f} GB, '{place}' has {free / 1e9:.2f} GB; free some, or choose another --out")


def _gather(parts: list[Path], folder: Path) -> None:
    """Parts become `model.safetensors`, or, where that would be large or badly aligned, one shard each with an index."""
    headers = [_header(part) for part in parts]
    joined = _joined_header([header for header, _ in headers])
    if joined is not None and sum(part.stat().st_size for part in parts) <= ONE_FILE_UP_TO:
        _concatenate(parts, [begin for _, begin in headers], joined, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    total = 0
    for number, (part, (header, begin)) in enumerate(zip(parts, headers, strict=True), start=1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        total += part.stat().st_size - begin
        shutil.copyfile(part, folder / name)
        weight_map |= dict.fromkeys(header, name)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file (8 bytes of length, then JSON) without its metadata, and where the data begins."""
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _joined_header(headers: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The header of the parts one after the other; None where a tensor would not be aligned to its own items."""
    joined: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for header in headers:
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if (start + offset) % _ITEM_BYTES.get(entry["dtype"], 8):
                return None
            joined[name] = {**entry, "data_offsets": [start + offset, end + offset]}
        offset += max((entry["data_offsets"][1] for entry in header.values()), default=0)
    return joined


def _concatenate(parts: list[Path], begins: list[int], joined: Mapping[str, Any], target: Path) -> None:
    """One safetensors file from several, data copied in streams: no tensor is in memory."""
    text = json.dumps(joined, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    with target.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for part, begin in zip(parts, begins, strict=True):
            with part.open("rb") as handle:
                handle.seek(begin)
                shutil.copyfileobj(handle, out, 1 << 22)
        out.flush()
        os.fsync(out.fileno())


def _copy_companions(source: Path, target: Path) -> None:
    for pattern in _COPIED:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.suffix not in (".safetensors", ".bin"):
                shutil.copyfile(file, target / file.name)


def _swap(partial: Path, out: Path) -> None:
    old = out.with_name(out.name + ".replaced")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", "utf-8")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."
