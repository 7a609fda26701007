"""What a docstring says of each attribute."""

from __future__ import annotations

from secateur.core.docstrings import attributes


class Documented:
    """A thing.

    Attributes:
        one: the first
            line and the second, which says
            allowed: `a` or `b`.
        two, three: of both.

        four: after an empty line.

    Raises:
        five: of another section.
    """


class Plain:
    """No section."""


class Bare:
    pass


def test_each_attribute_has_its_text_in_one_line() -> None:
    assert attributes(Documented) == {
        "one": "the first line and the second, which says allowed: `a` or `b`.",
        "two": "of both.",
        "three": "of both.",
        "four": "after an empty line.",
    }


def test_without_the_section_there_is_nothing() -> None:
    assert attributes(Plain) == attributes(Bare) == {}
