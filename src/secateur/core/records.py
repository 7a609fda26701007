"""Records: one run, one JSON line, appended to a file that several processes may share."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import resource
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from secateur.core.errors import SecateurError
from secateur.core.names import shown

Record = dict[str, Any]

# Commands that change a pruned checkpoint and measure it before and after, each with the field that names its source.
CHANGES = {"heal": "healed", "reconstruct": "reconstructed"}


def changed(record: Record) -> bool:
    """Whether a checkpoint was changed after it was pruned."""
    return any(record.get(command) for command in CHANGES)


_LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "tokenizers")


def version() -> str:
    """The version of secateur."""
    return _version("secateur")


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that a result may depend on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}}


@cache
def _version(library: str) -> str:
    return metadata.version(library)


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far, in bytes.

    On Linux `ru_maxrss` of a child includes its parent's, so /proc is read there instead.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    if peaks := [line.split()[1] for line in lines if line.startswith("VmHWM:")]:
        return int(peaks[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def to_json(record: Record) -> str:
    """One line of strict JSON: numbers that are not finite become null, since JSON cannot hold them."""
    return json.dumps(_finite(record), allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def append(path: Path, record: Record) -> None:
    """Append one whole line; the file is locked for the write, and flushed before the lock is released."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        whole, torn = _split_torn(
            path.read_bytes()
        )  # an incomplete last line of a killed process must not merge with this one
        if torn:
            file.truncate(len(whole))
        file.write(("" if whole.endswith(b"\n") or not whole else "\n") + to_json(record) + "\n")
        file.flush()


def _split_torn(content: bytes) -> tuple[bytes, bytes]:
    """The content without an incomplete last line, and that line."""
    start = content.rfind(b"\n") + 1
    tail = content[start:]
    try:
        json.loads(tail or b"{}")
    except ValueError:
        if tail.startswith(b"{"):  # the start of a record of ours
            return content[:start], tail
    return content, b""


def read(paths: Iterable[Path]) -> list[Record]:
    """Read all records of files, and of `records.jsonl` in folders, in order; an incomplete last line is skipped.

    Raises:
        SecateurError: a path is missing, or a line is not a JSON object (the file and the line are named).
    """
    records: list[Record] = []
    for path in paths:
        file = path / "records.jsonl" if path.is_dir() else path
        if not file.is_file():
            raise SecateurError(f"no records at '{path}': give a records.jsonl file, or the folder that holds it")
        for number, line in enumerate(_text(file).splitlines(), start=1):
            if line.strip():
                records.append(_parse(line, file, number))
    return records


def _text(file: Path) -> str:
    try:
        return _split_torn(file.read_bytes())[0].decode("utf-8")
    except UnicodeDecodeError as error:
        raise SecateurError(
            f"{file}: not UTF-8 text (byte {error.start}); records are JSON lines: remove or repair that line"
        ) from None


def zeroes(record: Mapping[str, Any]) -> bool:
    """Whether a pruning zeroed weights, so that its zeros count; others are there by accident. Old records do not tell.

    Args:
        record: a record, or the facts of a plan.
    """
    return record.get("sparsity_of") in (None, "weights")


def model_of(named: Any) -> str:
    """A model as a normal path, so that `./m/` and `m` are equal; hub names stay unchanged."""
    return os.path.normpath(str(named or "unknown model"))


def source_of(record: Record, places: Iterable[str]) -> str | None:
    """The folder that a record of CHANGES started from; None if it does not say.

    Args:
        record: the record.
        places: folders of other records. Records of version 0.1.0 may name the source relative to a folder that nobody
            knows any more; it is then the one of these with this ending, or lies beside the result.
    """
    named = record.get(CHANGES.get(str(record.get("command")), ""))
    if not isinstance(named, str) or Path(named).is_absolute():
        return named if isinstance(named, str) else None
    parts = Path(os.path.normpath(named)).parts
    ending = sorted(place for place in places if Path(place).parts[-len(parts) :] == parts)
    beside = str(Path(str(record.get("out"))).parent / parts[-1])
    return beside if beside in ending or len(ending) != 1 else ending[0]


def last(file: Path, command: str, out: Path) -> Record | None:
    """The last record of a command that wrote `out`; None without one."""
    matching = (
        [r for r in read([file]) if r.get("command") == command and r.get("out") == str(out)] if file.is_file() else []
    )
    return matching[-1] if matching else None


def original(name: str, folder: Path, places: Iterable[Path]) -> str:
    """Find the path of a model that a plan names without its folders, in the records of the runs that led to a result.

    Args:
        name: the name in the plan.
        folder: the result; of one that was changed after pruning, the checkpoint before is asked too.
        places: files of records. Those beside each folder are read too.

    Returns:
        The path as the records have it, if it is a folder; else the name.
    """
    files, asked = list(places), set[Path]()
    while (folder := folder.absolute()) not in asked:
        asked.add(folder)
        here = dict.fromkeys([*files, folder.parent / "records.jsonl"])
        found = [_last_if_readable(file, command, folder) for file in here for command in ("prune", *CHANGES)]
        models = [str(record["model"]) for record in found if record is not None and record.get("model")]
        for model in models:
            if shown(model) == name and Path(model).expanduser().is_dir():
                return model
        sources = [r[field] for r in found if r is not None for field in CHANGES.values() if r.get(field)]
        folder = Path(str(sources[0])) if sources else folder
    return name


def _last_if_readable(file: Path, command: str, out: Path) -> Record | None:
    try:
        return last(file, command, out)
    except (SecateurError, OSError):
        return None


# The types that other commands rely on. A field may be missing or null; `_SCALARS` hold text and numbers alone.
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("command", "model", "method", "modules", "pattern", "device", "dtype", "out", "version"), str),
    **dict.fromkeys(
        ("options", "calibration", "ppl_protocol", "tasks", "learning", "shift", *CHANGES, "versions", "weights"), dict
    ),
    **dict.fromkeys(
        (
            "sparsity",
            "sparsity_measured",
            "pruning_ratio",
            "pruning_ratio_blocks",
            "params_removed",
            "ppl",
            "loss",
            "seconds",
        ),
        (int, float),
    ),
    "warnings": list,
    **dict.fromkeys(("params_before", "params_after", "nonzero_after", "peak_rss_bytes", "seed"), (int, float)),
}
_EXPECTED: dict[Any, str] = {str: "text", dict: "an object", list: "a list"}
_SCALARS = ("options", "calibration", "ppl_protocol")


def _wrong_field(record: Record) -> str | None:
    """The first field of a wrong type, described in words; None without one."""
    for name, allowed in _TYPES.items():
        value = record.get(name)
        if value is not None and (not isinstance(value, allowed) or (isinstance(value, bool) and allowed is not dict)):
            return f"'{name}' is {_named(value)}, and {_EXPECTED.get(allowed, 'a number')} is expected"
    for name in _SCALARS:
        for key, value in (record.get(name) or {}).items():
            if isinstance(value, dict | list):
                return f"'{name}.{key}' is {_named(value)}, and text or a number is expected"
    for task, scores in (record.get("tasks") or {}).items():
        if not isinstance(scores, dict):
            return f"'tasks.{task}' is {_named(scores)}, and an object is expected"
    return None


def _named(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", bool: "true or false"}.get(type(value), "a number")


def _parse(line: str, file: Path, number: int) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise SecateurError(f"{file}, line {number}: not JSON ({error.msg}); remove or repair that line") from None
    if not isinstance(record, dict):
        raise SecateurError(f"{file}, line {number}: a record is a JSON object, this is {_named(record)}")
    if (wrong := _wrong_field(record)) is not None:
        raise SecateurError(f"{file}, line {number}: {wrong}; remove or repair that line")
    if "ppl" in record and record["ppl"] is None and isinstance(record.get("loss"), int | float):
        record["ppl"] = math.inf  # JSON cannot hold infinity
    return record
