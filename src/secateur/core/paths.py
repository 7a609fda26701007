"""Paths as users give them to Python functions: text or `Path`, with `~` for the home folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import overload

Given = str | Path


@overload
def to_path(given: Given) -> Path: ...
@overload
def to_path(given: Given | None) -> Path | None: ...
def to_path(given: Given | None) -> Path | None:
    """Return a path for text or a path; None stays None."""
    return None if given is None else Path(given).expanduser()


def to_paths(given: Given | Iterable[Given]) -> list[Path]:
    """Return the paths for several, or for a single one, which counts as a list of one."""
    return [to_path(one) for one in ((given,) if isinstance(given, Given) else given)]
