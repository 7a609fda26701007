"""Write checkpoints block by block into a folder beside the final one, which appears complete or not at all.

The folder `OUT.partial` holds a journal (the settings, so that a resumed run can compare them), finished blocks, and
the parts of the plan. It has no config.json until the end, so no program mistakes it for a model.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.core.errors import SecateurError, UsageError
from secateur.core.names import without_paths
from secateur.core.progress import say
from secateur.models.companions import copy_companions

OWN_FOLDER = "secateur"  # the folder inside a checkpoint for the plan, where no other tool looks for weights
PLAN, PLAN_TENSORS = "plan.json", "plan.safetensors"
PLAN_PATH = f"{OWN_FOLDER}/{PLAN}"
RECIPE = "recipe.yaml"
RECIPE_PATH = f"{OWN_FOLDER}/{RECIPE}"
# settings that plans of version 0.1 lack
_ADDED = ("model_fingerprint", "file_sha256", "params_removed", "at_least", "form")
JOURNAL = "journal.json"
_SPENT = "seconds_spent"  # the entry of the journal that says what the parts of a run took so far
_DIGEST = "digest"
_PART = "part-"
ONE_FILE_UP_TO = 5 * 2**30
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The name of a dtype in safetensors -> the dtype."""
_PIECE = 1 << 22


_saved: Callable[[], None] | None = None  # what is called after every whole file; see `CheckpointWriter.counting`


@dataclass(frozen=True)
class Spent:
    """What a run took before it was interrupted, in all its parts.

    Attributes:
        seconds: the sum of the parts.
        by: the same by the names of a stopwatch.
        whole: whether every part is in it until its end. A part that was killed counts until the last file it saved.
    """

    seconds: float = 0.0
    by: Mapping[str, float] = field(default_factory=dict)
    whole: bool = True

    @property
    def facts(self) -> dict[str, bool]:
        """The field `seconds_at_least` of a record, where more time passed than `seconds` says; else nothing."""
        return {} if self.whole else {"seconds_at_least": True}


class CheckpointWriter:
    """A checkpoint being written.

    Args:
        out: the final folder.
        settings: the settings that decide the result; a resumed run must have the same ones.
        resume: continue an interrupted run.
        overwrite: replace an existing folder, and discard an interrupted run with other settings.
        needed: the bytes that the result will need; a full disk is refused before the work.
        may_change: options of the method that a resumed run may change as long as no block is written.

    Attributes:
        before: what the interrupted run took that this one continues.

    Raises:
        UsageError: the folder exists and is not empty, or an interrupted run is there, or it has other settings.
        SecateurError: the disk has too little space.
    """

    def __init__(
        self,
        out: Path,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool,
        needed: int,
        may_change: Sequence[str] = (),
    ) -> None:
        self.out = out.absolute()
        self.partial = partial_folder(self.out)
        self.before = Spent()
        self._settings = dict(settings)
        refuse_existing(self.out, overwrite)
        before = _read_journal(self.partial)
        if before is not None and resume:
            free = [] if any(self.partial.glob(f"{_PART}block-*")) else may_change
            difference = differing(_without_options(before, free), _without_options(settings, free))
            if difference is None:
                self.before = _read_spent(before)
                with self.disk():
                    self._write_journal(replace(self.before, whole=False))
                    _drop_damaged(self.partial)
                return
            if not overwrite:
                raise UsageError(
                    f"--resume: the interrupted run in '{self.partial}' {difference}; "
                    "give the same settings, or start again with --overwrite"
                )
        else:
            refuse_interrupted(self.out, resume=False, overwrite=overwrite)
        shutil.rmtree(self.partial, ignore_errors=True)
        _check_room(self.out, needed)
        with self.disk():
            self.partial.mkdir(parents=True)
            self._write_journal(Spent(whole=False))

    @property
    def scratch(self) -> Path:
        """The path of a temporary file, which is removed at the end of the run."""
        return self.partial / "scratch.bin"

    def has(self, name: str) -> bool:
        """Whether a part was finished by an earlier run."""
        return self.part(name).is_file()

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the note of a finished part."""
        return load_file(self.part(name)), self.read_note(name)

    def read_note(self, name: str) -> dict[str, Any]:
        """Return only the note of a finished part."""
        with safe_open(self.part(name), framework="pt") as handle:
            note: dict[str, Any] = json.loads((handle.metadata() or {}).get("note", "{}"))
        return note

    def write(self, name: str, tensors: Mapping[str, Tensor], note: Mapping[str, Any] | None = None) -> None:
        """Write a part, completely or not at all."""
        with self.disk():
            save_whole(self.part(name), tensors, {"format": "pt", "note": json.dumps(dict(note or {}))})

    @contextmanager
    def counting(self, spent: Callable[[], Spent]) -> Iterator[None]:
        """Keep in the journal what the run took, inside the `with` statement: after every file, and at the end.

        Args:
            spent: returns what it took so far, with the parts before (`before`).
        """
        global _saved

        def note(whole: bool = False) -> None:
            if self.partial.is_dir():  # it has its final name at the end
                now = spent()
                self._write_journal(replace(now, whole=now.whole and whole))

        outer, _saved = _saved, note
        try:
            yield
        finally:
            _saved = outer
            with suppress(OSError):  # the disk may be full, which was said
                note(whole=True)

    def _write_journal(self, spent: Spent) -> None:
        taken = {"seconds": round(spent.seconds, 3), "by": dict(spent.by), "whole": spent.whole}
        content = json.dumps({**self._settings, _SPENT: taken}, indent=1, default=str)
        _write_whole(self.partial / JOURNAL, content)

    def finish(
        self,
        weights: Sequence[str],
        plan: Sequence[str],
        config: Mapping[str, Any],
        source: Path | None,
        files: Mapping[str, str],
        recipe: Callable[[Mapping[str, str]], str],
    ) -> None:
        """Put weights, plan, configuration and companions in place, then rename the folder.

        It can be repeated after a kill at any point.

        Args:
            weights: the parts that hold weights, in the order of the model.
            plan: the parts that hold the tensors of the plan.
            config: the content of config.json.
            source: the folder of the original, from which tokenizer, generation settings and licence are copied.
            files: path in the folder -> content of more text files, such as the JSON part of the plan and the model
                card.
            recipe: makes the recipe from file of weights -> its SHA-256.
        """
        with self.disk():
            if source is not None:
                copy_companions(source, self.partial)
            for name, content in files.items():
                _write_whole(self.partial / name, content)
            hashes = _gather([self.part(name) for name in weights], self.partial)
            _write_whole(self.partial / RECIPE_PATH, recipe(hashes))
            _join([self.part(name) for name in plan], self.partial / OWN_FOLDER / PLAN_TENSORS)
            _write_whole(self.partial / "config.json", json.dumps(config, indent=2) + "\n")
            self.publish({})

    def publish(self, files: Mapping[str, str]) -> None:
        """Add text files, path in the folder -> content, and give the folder its final name."""
        with self.disk():
            for name, content in files.items():
                _write_whole(self.partial / name, content)
            _swap(self.partial, self.out)
            clean(self.out)

    def discard(self) -> None:
        """Remove everything that was written."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def part(self, name: str) -> Path:
        """Return the file of a part."""
        return self.partial / f"{_PART}{name}.safetensors"

    def disk(self) -> AbstractContextManager[None]:
        """Turn a full or read-only disk into a SecateurError, inside a `with` statement."""
        return disk(self.out.parent)


@contextmanager
def written_folder(out: Path, overwrite: bool, needed: int) -> Iterator[Path]:
    """Give a folder to write to; at the end rename it to `out`, or remove it after an error.

    Args:
        out: the final folder.
        overwrite: replace it if it exists.
        needed: the bytes that it will need.

    What an interrupted run of this kind left is removed: it cannot go on.

    Raises:
        UsageError, SecateurError: as for `CheckpointWriter`.
    """
    refuse_existing(out, overwrite)
    partial = partial_folder(out.absolute())
    if (left := _read_journal(partial)) is not None and left.keys() <= {_SPENT}:
        shutil.rmtree(partial)
    writer = CheckpointWriter(out, {}, resume=False, overwrite=overwrite, needed=needed)
    try:
        with writer.disk():
            yield writer.partial
        writer.publish({})
    except BaseException:
        writer.discard()
        raise


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Iterable[Tensor]]],
) -> None:
    """Write the weights of a model whose tensors come in pieces, so that none has to be in memory as a whole.

    Args:
        folder: the folder of the model.
        shapes: tensor name -> shape, in the order of `tensors`. Shards hold whole tensors, each at most
            `ONE_FILE_UP_TO` bytes if no tensor is larger.
        dtype: the dtype of all of them.
        tensors: the names, in the order of `shapes`, each with its numbers in pieces, row after row.
    """
    stored = dtype_name(dtype)
    shards: list[dict[str, Any]] = [{}]
    offset = total = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and offset + size > ONE_FILE_UP_TO:
            shards.append({})
            offset = 0
        shards[-1][name] = {"dtype": stored, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset, total = offset + size, total + size
    several = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = several if len(shards) > 1 else ["model.safetensors"]
    coming = iter(tensors)
    for file, header in zip(names, shards, strict=True):
        with (folder / file).open("wb") as out:
            out.write(header_bytes({"__metadata__": {"format": "pt"}, **header}))
            for name in header:
                came, parts = next(coming)
                assert came == name, f"{came} came, and {name} was expected"
                for part in parts:
                    out.write(part.contiguous().view(torch.uint8).numpy().data)
            out.flush()
            os.fsync(out.fileno())
    if len(shards) > 1:
        weight_map = {name: file for file, header in zip(names, shards, strict=True) for name in header}
        _write_index(folder, total, weight_map)


def save_whole(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, completely or not at all, with a digest in its metadata for `is_intact`."""
    temporary = file.with_suffix(".tmp")
    content, about = {name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata or {})
    save_file(content, temporary, metadata={**about, _DIGEST: _digest(content, about)})
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    temporary.rename(file)
    if _saved is not None:
        _saved()


def is_intact(file: Path) -> bool:
    """Whether a file that `save_whole` wrote is unchanged."""
    try:
        with safe_open(file, framework="pt") as handle:
            about = dict(handle.metadata() or {})
            digest = about.pop(_DIGEST, None)
            return bool(digest == _digest({name: handle.get_tensor(name) for name in handle.keys()}, about))  # noqa: SIM118  # the handle has no iterator
    except SafetensorError:
        return False


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(about.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _drop_damaged(partial: Path) -> None:
    """Remove damaged parts of an interrupted run, so that they are made again. A saved state loses all its parts."""
    for file in sorted(partial.glob(f"{_PART}*.safetensors")):
        if file.is_file() and not is_intact(file):
            state = file.name.startswith(f"{_PART}learning")
            say(f"'{file}' is damaged: it is made again")
            for damaged in partial.glob(f"{_PART}learning*") if state else [file]:
                damaged.unlink()


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Turn a full disk, or a folder without write permission, into a SecateurError with advice."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise SecateurError(
                f"no space left on the disk of '{folder}'; free some and go on with --resume, or choose another --out"
            ) from error
        if isinstance(error, PermissionError):
            raise SecateurError(f"'{folder}' cannot be written ({error.strerror}); choose another --out") from error
        raise


def clean(folder: Path) -> None:
    """Remove the temporary files of the run from a finished folder. The journal goes last: it marks what to clean."""
    for pattern in (f"{_PART}*", "scratch*.bin", "*.tmp", JOURNAL):
        for leftover in folder.glob(pattern):
            leftover.unlink()


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return in words the first setting in which two runs differ, or None."""
    for key, value in json.loads(json.dumps(dict(now), default=str)).items():
        had = before.get(key)
        if isinstance(had, dict) and isinstance(value, dict) and had.keys() == value.keys():
            if (inner := differing(had, value)) is not None:
                return inner.replace("had ", f"had {key}.", 1)
        elif had != value and key == "source":
            return "started from other files of the model, which have changed since or been copied anew"
        elif had != value:
            return f"had {key} = {_short(had)}, this one has {_short(value)}"
    return None


def _without_options(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    options = settings.get("options")
    if not isinstance(options, Mapping):
        return dict(settings)
    return {**settings, "options": {name: value for name, value in options.items() if name not in names}}


def differing_from_plan(plan: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the same as `differing`, for the plan of a finished run.

    A plan names files without their folders, and a plan of an earlier version lacks some settings.
    """
    plan, now = without_paths(plan), without_paths(now)
    return differing(_comparable(plan, now), _comparable(now, plan))


def _comparable(content: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    shared = {name: value for name, value in content.items() if name in other or name not in _ADDED}
    nested = {name: (value, other.get(name)) for name, value in shared.items()}
    return {
        name: _comparable(a, b) if isinstance(a, Mapping) and isinstance(b, Mapping) else a
        for name, (a, b) in nested.items()
    }


def _read_journal(partial: Path) -> dict[str, Any] | None:
    """Return the settings of an interrupted run; None if there is no run, or its journal is incomplete."""
    try:
        journal: dict[str, Any] = json.loads((partial / JOURNAL).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return journal


def _read_spent(journal: Mapping[str, Any]) -> Spent:
    """Return what the parts of a run took, by its journal; those of an earlier version did not say."""
    taken = journal.get(_SPENT)
    try:
        return Spent(float(taken["seconds"]), {n: float(s) for n, s in taken["by"].items()}, taken["whole"] is True)  # type: ignore[index]  # None is caught too
    except (AttributeError, KeyError, TypeError, ValueError):
        return Spent(whole=False)


def weight_bytes(folder: Path) -> int:
    """The bytes of the files of weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def partial_folder(out: Path) -> Path:
    """The folder of an unfinished run, beside its result."""
    return out.with_name(out.name + ".partial")


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise UsageError if `out` is a file, or a folder that is not empty and may not be replaced."""
    if out.is_file():
        raise UsageError(f"--out '{out}' is a file; give a new folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UsageError(
            f"--out '{out}' exists and is not empty; choose another folder, or replace it with --overwrite"
        )


def refuse_interrupted(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise UsageError if an interrupted run lies beside `out`, and is neither resumed nor replaced."""
    if not resume and not overwrite and _read_journal(partial_folder(out)) is not None:
        raise UsageError(
            f"an interrupted run lies in '{partial_folder(out)}': go on with --resume, or start again with --overwrite"
        )


def refuse_inside(out: Path, precious: Mapping[str, Path]) -> None:
    """Raise UsageError if `out` contains a path that the run needs, or lies inside such a path.

    Replacing `out` would remove the first; the second would be lost together with that path.
    """
    place = out.resolve()
    for what, path in precious.items():
        if path.resolve().is_relative_to(place):
            raise UsageError(
                f"--out '{out}' holds {what} ('{path}'), which replacing it would remove; choose another --out"
            )
        if place.is_relative_to(path.resolve()):
            raise UsageError(
                f"--out '{out}' lies inside {what} ('{path}'), and would be lost together with it; "
                "choose a folder beside it"
            )


def is_finished(out: Path, *, resume: bool, overwrite: bool) -> bool:
    """Whether the result of a resumed run is already complete.

    Raises:
        UsageError: it is not complete, and `out`, or the interrupted run beside it, may not be replaced.
    """
    finished = resume and plan_file(out) is not None
    if not finished:
        refuse_existing(out, overwrite)
        refuse_interrupted(out, resume=resume, overwrite=overwrite)
    return finished


def plan_file(folder: Path, name: str = PLAN) -> Path | None:
    """Return the file of the plan in a folder, or None.

    It is in `secateur/`, or at the root for earlier versions and for a plan without a model.
    """
    return next((file for file in (folder / OWN_FOLDER / name, folder / name) if file.is_file()), None)


def same_run(out: Path, difference: str | None, overwrite: bool) -> bool:
    """Whether a finished result belongs to the run that resumes; False if it is another one that may be replaced.

    Args:
        out: the folder of the result.
        difference: the result of `differing`.
        overwrite: whether the result may be replaced.

    Raises:
        UsageError: the result belongs to another run, and may not be replaced.
    """
    if difference is not None and not overwrite:
        raise UsageError(
            f"--resume: '{out}' is finished, and its run {difference}; "
            "give the same settings, another --out, or --overwrite"
        )
    return difference is None


def _check_room(out: Path, needed: int) -> None:
    place = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise SecateurError(
            f"no space: the result needs about {needed / 1e9:.2f} GB, '{place}' has {free / 1e9:.2f} GB; "
            "free some, or choose another --out"
        )


def _join(parts: Sequence[Path], target: Path) -> None:
    """Write the tensors of all parts into one file; write nothing if there are none."""
    headers = [_header(part) for part in parts]
    if any(header for header, _ in headers):
        _concatenate(parts, headers, target)


def _gather(parts: Sequence[Path], folder: Path) -> dict[str, str]:
    """Write the parts as `model.safetensors`, or, if that is too large, as one shard per part and an index.

    Returns:
        Name of a file of weights -> its SHA-256.
    """
    headers = [_header(part) for part in parts]
    if sum(part.stat().st_size for part in parts) <= ONE_FILE_UP_TO:
        return {"model.safetensors": _concatenate(parts, headers, folder / "model.safetensors")}
    weight_map: dict[str, str] = {}
    hashes: dict[str, str] = {}
    total = 0
    for number, (part, (header, begin)) in enumerate(zip(parts, headers, strict=True), start=1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        total += part.stat().st_size - begin
        # not a plain copy: safetensors writes the metadata of a part in random order, so equal runs would differ
        hashes[name] = _concatenate([part], [(header, begin)], folder / name)
        weight_map |= dict.fromkeys(header, name)
    _write_index(folder, total, weight_map)
    return hashes


def _write_index(folder: Path, total: int, weight_map: Mapping[str, str]) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in safetensors."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """Return the beginning of a safetensors file; the format requires data aligned to 8 bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file (8 bytes of length, then JSON), without metadata, and the data offset."""
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _concatenate(parts: Sequence[Path], headers: Sequence[tuple[dict[str, Any], int]], target: Path) -> str:
    """Join several safetensors files into one by copying bytes, without a tensor in memory; return its SHA-256.

    Tensors with larger items come first, as in every safetensors file. So each tensor is aligned, although the format
    has no padding.
    """
    order = sorted(
        (-DTYPES[e["dtype"]].itemsize, number, *e["data_offsets"], name)
        for number, (header, _) in enumerate(headers)
        for name, e in header.items()
    )
    joined: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for _, number, start, end, name in order:
        joined[name] = {**headers[number][0][name], "data_offsets": [offset, offset + end - start]}
        offset += end - start
    begin = header_bytes(joined)
    with target.open("wb") as out, ExitStack() as opened:
        handles = [opened.enter_context(part.open("rb")) for part in parts]
        digest = hashlib.sha256(begin)
        out.write(begin)
        for _, number, start, end, _name in order:
            handles[number].seek(headers[number][1] + start)
            _copy(handles[number], out, end - start, digest)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _copy(source: BinaryIO, target: BinaryIO, count: int, digest: Any) -> None:
    while count:
        piece = source.read(min(count, _PIECE))
        if not piece:
            raise SecateurError(
                f"'{source.name}' ends {count} bytes too early: the disk lost data; start again with --overwrite"
            )
        target.write(piece)
        digest.update(piece)
        count -= len(piece)


def _swap(partial: Path, out: Path) -> None:
    """Give the folder its final name. A previous folder of that name is removed only after that."""
    old = None
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent)) / out.name
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old is not None:
            old.rename(out)
        raise
    if old is not None:
        shutil.rmtree(old.parent, ignore_errors=True)


def _write_whole(path: Path, content: str) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, "utf-8")
    temporary.rename(path)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."
