"""The options of a step: the fields of the request of its command, under the names of the command line.

There is no second list of them. A field is an option of a step unless the recipe as a whole has it (`ELSEWHERE`), and
the type of its value is what the dataclass says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from secateur.core.errors import UsageError, unknown
from secateur.requests import EvalRequest, HealRequest, ReconstructRequest, Request

KINDS: Mapping[str, type[Any] | None] = {
    "prune": Request,
    "reconstruct": ReconstructRequest,
    "heal": HealRequest,
    "eval": EvalRequest,
    "report": None,
}
"""Step -> the request of its command; `report` has no options."""
WRITES = ("prune", "reconstruct", "heal")  # the steps that write a checkpoint
ELSEWHERE = {
    "model": "a step works on the result of the step before it, the first one on the model at the top of the recipe",
    "revision": "it is that of the model: write it at the top of the recipe",
    **dict.fromkeys(
        ("out", "records", "resume", "overwrite", "dry_run", "json", "verbose", "debug"),
        "it is an option of 'secateur run', for all steps: leave it out here",
    ),
}
"""What is no option of a step, and why."""
PLACES = ("calibration", "text", "against", "dense", "include_path")
"""Fields that may name a file or a folder; a relative one is looked up beside the recipe."""
SET = "set"
OPTION_OF: Mapping[str, Mapping[str, str]] = {
    "prune": {"options": SET},
    "reconstruct": {},
    "heal": {"evaluate": "eval"},
    "eval": {"seqlen": "eval_seqlen"},
}
"""Step -> field -> option, where the names differ."""
_SECOND_NAMES = {("eval", "seqlen"): "eval_seqlen"}  # as on the command line

_WORDS: Mapping[Any, str] = {
    bool: "true or false is expected",
    int: "a whole number is expected",
    float: "a number is expected",
    str: "text is expected",
    Path: "text is expected",
    Sequence: "names are expected, as in [q, k] or q,k",
    Mapping: "options of the method are expected, as in {scope: row}",
}


def options_of(kind: str) -> dict[str, Any]:
    """Return the options of a step, each with the type of its field."""
    request = KINDS[kind]
    if request is None:
        return {}
    hints = get_type_hints(request)
    names = (field.name for field in fields(request) if field.name not in ELSEWHERE)
    return {OPTION_OF[kind].get(name, name): hints[name] for name in names}


def request_of(kind: str, given: Mapping[Any, Any], where: str) -> tuple[Any, frozenset[str]]:
    """Make the request of a step, on no model yet, from its options; also return the names that were given.

    Args:
        kind: the step, a key of `KINDS`.
        given: the options as the recipe has them.
        where: names the step in messages.

    Raises:
        UsageError: an option is unknown, given twice, missing, or has a value of another type.
    """
    known, values = options_of(kind), {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        name = _SECOND_NAMES.get((kind, name), name)
        if name in ELSEWHERE:
            raise UsageError(f"{where}: '{key}' is no option of a step: {ELSEWHERE[name]}")
        if name not in known:
            raise UsageError(f"{where}: {unknown('option', str(key), known)}")
        if name in values:
            raise UsageError(f"{where}: '{key}' is given twice, under two names: keep one")
        values[name] = _value(f"{where}: {key}", known[name], value)
    request = KINDS[kind]
    if request is None:
        return None, frozenset()
    if kind == "prune" and not (
        values.get("method") or any(values.get(name) is not None for name in ("params_removed", "pattern"))
    ):
        raise UsageError(
            f"{where}: method is missing: the name of a method (`secateur methods` lists them); params_removed alone, "
            "or a pattern of zeros, takes the best one"
        )
    if SET in values:
        values[SET] = {str(name): _as_text(f"{where}: {SET}", name, v) for name, v in values[SET].items()}
    field_of = {option: name for name, option in OPTION_OF[kind].items()}
    values = {field_of.get(option, option): value for option, value in values.items()}
    return request(model="", **values), frozenset(values)


def _value(where: str, hint: Any, value: Any) -> Any:
    """Return a value if it is of the type of its field."""
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in allowed:
        return None
    kinds = [get_origin(kind) or kind for kind in allowed if kind is not NoneType]
    for kind in kinds:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if kind in (str, Path) and isinstance(value, str) and value:
            return value
        if kind is Mapping and isinstance(value, dict):
            return value
        if kind is Sequence and isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        if kind is Sequence and isinstance(value, list) and all(isinstance(part, str) for part in value):
            return tuple(value)
    expected = " or ".join(dict.fromkeys(_WORDS[kind] for kind in kinds))
    quotes = ""
    if str in kinds and isinstance(value, bool | int | float):
        quotes = f": write it in quotes, as in '{json.dumps(value)}'"
    raise UsageError(f"{where} {met(value)}; {expected}{quotes}")


def met(value: Any) -> str:
    """Return words for a value of a recipe: `is 'many'`, `is a list`."""
    if value is None or value == "":
        return "has no value"
    if isinstance(value, list | dict):
        return "is a list" if isinstance(value, list) else "is a mapping (names with values)"
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)
    return f"is {text if len(text) <= 60 else text[:57] + '...'}"


def _as_text(where: str, name: Any, value: Any) -> str:
    """Return the value of an option of a method as `--set` gives it."""
    if isinstance(value, list | dict):
        raise UsageError(f"{where}: {name} {met(value)}; one value is expected, as in {{scope: row}}")
    return value if isinstance(value, str) else json.dumps(value, default=str)
