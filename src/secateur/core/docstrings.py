"""Read what a docstring says of each attribute, so that commands and pages can show it and nobody writes it twice."""

from __future__ import annotations

import inspect
import re

_ENTRY = re.compile(r"(\w+(?:, \w+)*): +(\S.*)")


def attributes(documented: object) -> dict[str, str]:
    """Return name -> its text, from the section `Attributes:` of a docstring in Google style.

    Text over several lines is joined by spaces. `first, last: text` stands for both names. A docstring without the
    section gives an empty dictionary.
    """
    lines = iter((inspect.getdoc(documented) or "").splitlines())
    found: dict[str, list[str]] = {}
    current: list[str] = []
    depth: int | None = None  # the indentation of the entries; lines of their text are indented further
    for line in lines:
        if line.rstrip() == "Attributes:":
            break
    for line in lines:
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        if indent == 0:
            break  # the next section
        depth = indent if depth is None else depth
        entry = _ENTRY.match(line.strip()) if indent == depth else None
        if entry:
            current = [entry[2]]
            found |= dict.fromkeys(entry[1].split(", "), current)
        else:
            current.append(line.strip())
    return {name: " ".join(text) for name, text in found.items()}
