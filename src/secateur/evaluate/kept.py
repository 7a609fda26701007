"""Evaluations of dense models, kept for the next command that needs the same numbers.

`sweep`, `compare`, the studies and `eval --against` all need the perplexity of the dense model. It is measured once for
each protocol, machine and version, and kept in the user's cache folder: `SECATEUR_CACHE`, or `secateur` in the folder
of XDG_CACHE_HOME (`~/.cache`). Deleting that folder loses nothing but time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from secateur.core import records
from secateur.core.errors import SecateurError


def kept(key: str, versions: Mapping[str, str]) -> records.Record | None:
    """Return the record of an evaluation with this key and these versions, or None."""
    try:
        (record,) = records.read([_file(key, versions)])
    except (OSError, ValueError, SecateurError):
        return None
    return record


def keep(record: records.Record, versions: Mapping[str, str]) -> None:
    """Keep the record of an evaluation by its `key`; a folder that cannot be written keeps nothing."""
    file = _file(record["key"], versions)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(records.to_json(record) + "\n", "utf-8")
        temporary.rename(file)
    except OSError:
        return


def _file(key: str, versions: Mapping[str, str]) -> Path:
    named = hashlib.sha256(json.dumps([key, dict(sorted(versions.items()))]).encode()).hexdigest()[:32]
    return _folder() / "dense" / f"{named}.jsonl"


def _folder() -> Path:
    if own := os.environ.get("SECATEUR_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "secateur"
