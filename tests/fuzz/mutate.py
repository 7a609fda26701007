"""Damage to JSON, bytes and arrays, decided by a seeded generator alone."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

# Wrong values for a key. Numbers stay small where a library would allocate that much memory: the tests are about our
# messages, not about memory.
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        1000,
        0.5,
        -0.5,
        1e-5,
        1e30,
        "",
        "x",
        "0",
        "none",
        "\N{SNOWMAN}",
        "a" * 300,
    ),
    *(
        [],
        [1],
        [None],
        ["x"],
        [[]],
        {},
        {"x": 1},
        {"type": "x"},
        {"rope_type": "x"},
        {"rope_type": "linear"},
        {"rope_type": "default"},
    ),
)


def paths(content: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside, the outermost first."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path for key, value in inner for path in ((*here, key), *paths(value, (*here, key)))]


def mutated(content: Any, draw: Random, extra: tuple[str, ...] = ()) -> tuple[Any, str]:
    """A copy with one key missing, of another type, or out of range; and what was done.

    Args:
        content: JSON.
        draw: the generator.
        extra: keys of the outermost object that may be there too.
    """
    content = copy.deepcopy(content)
    path = draw.choice([*paths(content), *((key,) for key in extra)])
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    name = ".".join(map(str, path))
    if draw.random() < 0.25 and (isinstance(parent, list) or path[-1] in parent):
        del parent[path[-1]]
        return content, f"{name} deleted"
    value = copy.deepcopy(draw.choice(VALUES))
    parent[path[-1]] = value
    return content, f"{name} = {value!r:.40}"


def damaged(content: bytes, draw: Random) -> tuple[bytes, str]:
    """Bytes cut short, flipped, doubled, or with some put in."""
    kind = draw.choice(["cut", "flip", "insert", "empty", "head", "zeros"])
    place = draw.randrange(len(content)) if content else 0
    if kind == "cut":
        return content[:place], f"cut at byte {place}"
    if kind == "flip":
        bit = 1 << draw.randrange(8)
        return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :], f"byte {place} flipped"
    if kind == "insert":
        more = draw.choice([b"\x00", b"\xff\xfe", b"{", b"\n", "\N{SNOWMAN}".encode(), b'"'])
        return content[:place] + more + content[place:], f"{more!r} at byte {place}"
    if kind == "head":
        few = draw.randrange(1, 16)
        return bytes(draw.randrange(256) for _ in range(few)) + content[few:], f"the first {few} bytes are others"
    if kind == "zeros":
        return content[:place] + bytes(len(content) - place), f"zeros from byte {place}"
    return b"", "empty"
