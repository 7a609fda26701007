"""The built-in text: the standard library's own sources and documentation, which every Python carries.

The package holds no copy of it. `documents` reads the sources from the interpreter's own folder, and the language
reference from `pydoc_data.topics`, one document per topic. The hash of a document's *name* decides whether it is held
out, so the split is the same on every machine. The text itself varies a little with the Python version, so records hold
the hash of the tokens.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Part = Literal["train", "test"]

HELD_OUT_ONE_IN = 10

# Left out: folders that some distributions do not install (tests, Tk, IDLE, packaging tools), those that Python 3.12
# removed, and tables of numbers (the character maps).
_SKIPPED_FOLDERS = frozenset(
    (
        *("__pycache__", "__phello__", "site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter"),
        *("turtledemo", "ensurepip", "venv", "distutils", "lib2to3", "encodings", "pydoc_data", "msilib"),
    )
)
_TEST_FOLDERS = frozenset(("test", "tests"))


@dataclass(frozen=True)
class Document:
    """One document of the built-in text: its text, and a stable name, which decides its part."""

    name: str
    text: str

    @property
    def part(self) -> Part:
        """`test` for one name in ten, by the hash of the name."""
        return "test" if _digest(self.name)[0] % HELD_OUT_ONE_IN == 0 else "train"


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def documents(part: Part, *, with_tests: bool = False) -> list[Document]:
    """The documents of one part, ordered by the hash of their names (a fixed shuffle).

    Args:
        part: `train` or `test`; no document is in both.
        with_tests: also read the library's own test suite, if it is installed. The bundled model was trained with it.
            Calibration and evaluation do not read it, since many distributions do not install it.
    """
    chosen = [d for d in _library(with_tests) + _topics() if d.part == part and d.text.strip()]
    return sorted(chosen, key=lambda d: _digest(d.name))


def _library(with_tests: bool) -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = _SKIPPED_FOLDERS - (_TEST_FOLDERS if with_tests else frozenset())
    read = []
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        if skipped.isdisjoint(folders) and not any(f.startswith("config-") for f in folders):
            read.append(Document(path.relative_to(root).as_posix(), path.read_text("utf-8", errors="replace")))
    return read


def _topics() -> list[Document]:
    try:
        from pydoc_data.topics import topics  # some minimal distributions leave it out
    except ImportError:
        return []
    return [Document(f"pydoc_data/topics/{name}", text) for name, text in topics.items()]
