"""The records that a report or a prediction of a folder is about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from secateur.core import records
from secateur.core.errors import SecateurError, UsageError
from secateur.core.records import CHANGES, Record, model_of, source_of
from secateur.models.save import plan_file

_FILE = "records.jsonl"


def find_records(paths: Sequence[Path]) -> list[Record]:
    """The records of files and folders, each file read once, in order.

    A file gives all its records. A folder gives, by the first that applies:

    1. those of its own `records.jsonl` (the folder of a sweep or comparison, or where checkpoints were written);
    2. if it is a checkpoint, those in its parent's `records.jsonl` that are about it: what it was made from, what was
       healed from it, and the dense model;
    3. those of every `records.jsonl` one level below (a parent of several sweeps).

    Raises:
        UsageError: a path does not exist.
        SecateurError: a folder has no records, or a line is not a record.
    """
    found: list[Record] = []
    read: dict[Path, list[Record]] = {}
    for path in paths:
        for file, own in _files(path):
            if file not in read:
                read[file] = records.read([file])
            taken = read[file] if own is None else _about(own, read[file], file)
            known = {id(record) for record in found}
            found += [record for record in taken if id(record) not in known]
    return found


def _files(path: Path) -> list[tuple[Path, Path | None]]:
    """The files of a path; beside each the checkpoint that its records must be about, None for all of them."""
    place = path.expanduser().resolve()
    if place.is_file():
        return [(place, None)]
    if not place.exists():
        begun = place.with_name(place.name + ".partial").is_dir()
        hint = "its run is not finished: go on with --resume" if begun else "give a records.jsonl, or a folder"
        raise UsageError(f"'{path}' does not exist; {hint}")
    if (place / _FILE).is_file():
        return [(place / _FILE, None)]
    checkpoint = any((place / name).is_file() for name in ("config.json", "adapter_config.json")) or plan_file(place)
    if checkpoint:
        if not (place.parent / _FILE).is_file():
            raise SecateurError(
                f"no records of the checkpoint '{path}': {place.parent / _FILE} does not exist; "
                f"run 'secateur eval {path}', or give the file that --records named"
            )
        return [(place.parent / _FILE, place)]
    below = sorted(file.resolve() for file in place.glob(f"*/{_FILE}"))
    if not below:
        raise SecateurError(
            f"no records in '{path}': it has no {_FILE}, none of its folders has one, and it is no checkpoint; "
            "give the file, the folder of a sweep or comparison, or a checkpoint"
        )
    return [(file, None) for file in below]


def _about(folder: Path, found: Sequence[Record], file: Path) -> list[Record]:
    """The records about a checkpoint, its sources, what was made from it, and the dense model.

    Raises:
        SecateurError: there are none.
    """
    outs = {str(record["out"]) for record in found if record.get("out")}
    own = {out for out in outs if Path(out).resolve() == folder}
    if not own:  # the folders may have been moved together with the records
        moved = {out for out in outs if Path(out).name == folder.name and not Path(out).exists()}
        own = moved if len(moved) == 1 else set()
    if not own:
        names = ", ".join(sorted({Path(out).name for out in outs})[:5]) or "none"
        raise SecateurError(
            f"no record in {file} is about '{folder.name}' (folders named there: {names}); "
            f"run 'secateur eval {folder}', or give the file that --records named"
        )
    changes = [(source_of(r, outs), str(r.get("out"))) for r in found if r.get("command") in CHANGES]
    upward, downward = set(own), set(own)
    for _ in changes:  # a chain is no longer than its steps
        upward |= {source for source, out in changes if source is not None and out in upward}
        downward |= {out for source, out in changes if source in downward}
    family = upward | downward
    models = {model_of(r.get("model")) for r in found if r.get("out") in family}
    return [
        record
        for record in found
        if record.get("out") in family
        or (
            record.get("command") == "eval" and record.get("method") is None and model_of(record.get("model")) in models
        )
    ]
