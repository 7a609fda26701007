"""Evaluations of dense models, kept for the next command that needs the same numbers.

`sweep`, `compare`, `study disp-llm` and `eval --against` all need the perplexity of the dense model. It is measured
once for each protocol, machine and version, and kept in the user's cache folder: `SECATEUR_CACHE`, or `secateur` in the
folder of XDG_CACHE_HOME (`~/.cache`). Deleting that folder loses nothing but time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from secateur.core import records
from secateur.core.errors import SecateurError
from secateur.models.companions import companions
from secateur.models.load import Checkpoint


def kept(key: str) -> records.Record | None:
    """Return what was kept under this key, or None."""
    try:
        (record,) = records.read([_file(key)])
    except (OSError, ValueError, SecateurError):
        return None
    return record


def keep(key: str, record: records.Record) -> None:
    """Keep numbers under a key; a folder that cannot be written keeps nothing."""
    file = _file(key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(records.to_json(record) + "\n", "utf-8")
        temporary.rename(file)
    except OSError:
        return


def key_of(checkpoint: Checkpoint, facts: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """Return the key of an evaluation: a hash of the model, of what was measured, and of the versions.

    The model is told by its configuration, and by size and time of every file that decides a result: configuration,
    weights and tokenizer, wherever the folder is named from.
    """
    folder = checkpoint.folder
    names = ["config.json", *companions(folder)]
    files = sorted({file.resolve() for file, _ in checkpoint.index.values()} | {(folder / n).resolve() for n in names})
    everything = [
        file_facts(file for file in files if file.is_file()),
        checkpoint.raw_config,
        dict(facts),
        {**versions, "secateur": records.version()},
    ]
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:32]


def file_facts(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return path, size and time of each file, which tell its content from another without reading it."""
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _file(key: str) -> Path:
    return _folder() / "dense" / f"{key}.jsonl"


def _folder() -> Path:
    if own := os.environ.get("SECATEUR_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "secateur"
