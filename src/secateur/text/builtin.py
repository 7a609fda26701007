"""The built-in text: the standard library's own sources and documentation, which every Python carries.

Nothing of it is copied into the package. `documents` reads the sources where the interpreter keeps them, and the language
reference from `pydoc_data.topics`, one document a topic. A document belongs to the held-out part when a hash of its *name* says
so, hence the split is the same on every machine although the text varies a little with the Python version (which is why records
carry the hash of the tokens).
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Part = Literal["train", "test"]

HELD_OUT_ONE_IN = 10

# Left out: what some distributions do not install (tests, Tk, IDLE, packaging tools), what left the library during Python 3.12,
# and tables of numbers that are no text (the character maps).
_SKIPPED_FOLDERS = frozenset(
    (
        *(
            "__pycache__",
            "__phello__",
            "site-packages",
            "dist-packages",
            "test",
            "tests",
            "idlelib",
            "tkinter",
            "turtledemo",
        ),
        *("ensurepip", "venv", "distutils", "lib2to3", "encodings", "pydoc_data", "msilib"),
    )
)
_TEST_FOLDERS = frozenset(("test", "tests"))


@dataclass(frozen=True)
class Document:
    """One document of the built-in text: a stable name, which decides its part, and its text."""

    name: str
    text: str

    @property
    def part(self) -> Part:
        """`test` for one name in ten, by its hash."""
        return "test" if _digest(self.name)[0] % HELD_OUT_ONE_IN == 0 else "train"


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def documents(part: Part, *, with_tests: bool = False) -> list[Document]:
    """The documents of one part, in the order of the hash of their names (a fixed shuffle).

    Args:
        part: `train` or `test`; no document is in both.
        with_tests: also read the library's own test suite, where it is installed. The bundled model was trained with it;
            calibration and evaluation leave it out, since many distributions do.
    """
    found = [d for d in _library(with_tests) + _topics() if d.part == part and d.text.strip()]
    return sorted(found, key=lambda d: _digest(d.name))


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
