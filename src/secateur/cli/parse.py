"""Read arguments that hold several values: lists, and NAME=VALUE pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from secateur.core.errors import UsageError

_RANGES: Mapping[str, Callable[[float], bool]] = {
    "[0, 1)": lambda value: 0 <= value < 1,
    "[0, 1]": lambda value: 0 <= value <= 1,
    "[0, inf)": lambda value: 0 <= value < math.inf,
}


def names(text: str) -> tuple[str, ...]:
    """Return the names in NAME,NAME,..."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(text: str, option: str, *, within: str = "[0, 1)") -> list[float]:
    """Return the numbers in S,S,...

    Args:
        text: the value of the option.
        option: the name of the option, for messages.
        within: the allowed range, a key of `_RANGES`.

    Raises:
        UsageError: not numbers, none at all, or one outside the range.
    """
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"{option} {text}: numbers separated by commas are expected, as in 0.1,0.2,0.3") from None
    if not values:
        raise UsageError(f"{option} is empty: numbers separated by commas are expected, as in 0.1,0.2,0.3")
    for value in values:
        if not _RANGES[within](value):
            raise UsageError(f"{option}: {value:g} is outside {within}")
    return values


def counts(text: str, option: str) -> tuple[int, ...]:
    """Return the whole numbers in N,N,..."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"{option} {text}: whole numbers separated by commas are expected, as in 1,16") from None


def settings(parts: Sequence[str] | None, option: str = "--set") -> dict[str, str]:
    """Return name -> value from parts of the form NAME=VALUE."""
    values = {}
    for part in parts or ():
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise UsageError(f"{option} {part}: write {'OPTION' if option == '--set' else 'NAME'}=VALUE")
        values[name.strip()] = value.strip()
    return values


def method_settings(parts: Sequence[str] | None, methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return method -> its options from parts of the form METHOD.OPTION=VALUE."""
    values: dict[str, dict[str, str]] = {}
    for part in parts or ():
        name, equals, value = part.partition("=")
        method, dot, option = (word.strip() for word in name.partition("."))
        if not (equals and dot and method and option):
            example = _example(methods, option or method, value)
            raise UsageError(f"--set {part}: METHOD.OPTION=VALUE is expected, as in {example}")
        values.setdefault(method, {})[option] = value.strip()
    return values


def _example(methods: Sequence[str], option: str, value: str) -> str:
    """Return an example: the option of that name if one of the methods has it, otherwise any of their options."""
    from secateur.cli.quiet_api import api

    options = {method: vars(api.find_method(method).options({})) for method in methods}
    defaults = {(method, name): default for method in methods for name, default in options[method].items()}
    defaults = {pair: default for pair, default in defaults.items() if pair[1] != "pattern"}
    meant = next((pair for pair in defaults if pair[1] == option), None)
    if meant is not None:
        return f"--set {meant[0]}.{option}={value.strip() or defaults[meant]}"
    method, name = min(defaults, key=lambda pair: not defaults[pair], default=("slicegpt", "round"))
    return f"--set {method}.{name}={defaults.get((method, name), 8)}"


def folder_for_calibration(include_path: Path | None, calibration: str | None) -> Path | None:
    """Return the folder of task files if the calibration text is a task, otherwise None."""
    return include_path if (calibration or "").startswith("task:") else None


def folder_for_tasks(include_path: Path | None, calibration: str | None, tasks: str) -> Path | None:
    """Return the folder of task files for the evaluation; None if only the calibration needs it."""
    return include_path if tasks or folder_for_calibration(include_path, calibration) is None else None
