"""Names of models and texts without private folders.

Cards, plans and reports are shared with others; the folders of the machine that wrote them stay private.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_NAMING = ("model", "spec")  # the fields of settings and records that may hold a path


def shown(name: str) -> str:
    """A path without its folders; a hub name, a named text or `task:NAME` unchanged."""
    if not _is_path(name):
        return name
    return Path(os.path.normpath(name)).name or name


def _is_path(name: str) -> bool:
    return (
        name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or ("/" in name and Path(name).exists())
    )


def without_paths(content: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of settings, or of a record, with `shown` applied to every model and text, at any depth."""
    return {key: _without(key, value) for key, value in content.items()}


def _without(key: str, value: Any) -> Any:
    if isinstance(value, str):
        return shown(value) if key in _NAMING else value
    return without_paths(value) if isinstance(value, Mapping) else value


def named(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of records without folders.

    Two models whose folders have the same name keep as much of their paths as tells them apart.
    """
    paths = {os.path.normpath(str(record["model"])) for record in found if record.get("model")}
    names = {path: _apart(path, paths) for path in paths}
    plain = [without_paths(record) for record in found]
    for record, original in zip(plain, found, strict=True):
        if original.get("model"):
            record["model"] = names[os.path.normpath(str(original["model"]))]
    return plain


def _apart(path: str, paths: set[str]) -> str:
    name = shown(path)
    others = {
        other
        for other in paths
        if other not in (path, name) and shown(other) == name and Path(other).absolute() != Path(path).absolute()
    }
    if not others or path == name:  # a bare name, from a plan, stands for any path with this ending
        return name
    parts = Path(path).parts
    return next(
        (
            tail
            for n in range(2, len(parts))
            if not any(Path(o).parts[-n:] == parts[-n:] for o in others) and (tail := "/".join(parts[-n:]))
        ),
        path,
    )
