"""The YAML of recipes: plain values alone, read as YAML 1.2 reads them.

PyYAML reads YAML 1.1, where `2:4` is the number 124, `no` is false and `2e-4` is text. A recipe has patterns and
learning rates, so its words and numbers are those of YAML 1.2 (its core schema). Names that are given twice are
refused, and so are anchors: nobody needs them here, and a few of them can stand for gigabytes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # it has no types

from secateur.core.errors import SecateurError, UsageError

LARGEST = 1 << 20  # bytes of a recipe: more is another file, given by mistake
_NUMBERS = {
    "int": (re.compile(r"[-+]?[0-9]+$"), "-+0123456789"),
    "float": (
        re.compile(r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN))$"),
        "-+.0123456789",
    ),
}
_WORDS = {
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "null": (re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # untyped
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own form

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(None, None, "anchors (&, *) are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            seen.add(str(key.value))
        return dict(super().construct_mapping(node, deep))


def _integer(loader: Any, node: Any) -> int:
    return int(loader.construct_scalar(node))


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # untyped
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)


for _name, (_pattern, _first) in {**_NUMBERS, **_WORDS}.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)  # 1.1 reads 010 as 8


def load(file: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        UsageError: there is no such file.
        SecateurError: it is not YAML, or not one document of plain values; the message names the line.
    """
    try:
        if file.stat().st_size > LARGEST:
            raise SecateurError(f"{file}: has {file.stat().st_size:,} bytes, and a recipe has at most {LARGEST:,}")
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"no recipe '{file}': give a recipe file, or the folder of a result that holds one") from None
    except UnicodeDecodeError as error:
        raise SecateurError(f"{file}: not UTF-8 text (byte {error.start}), so it is no recipe") from None
    except OSError as error:
        raise SecateurError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}, line {mark.line + 1}" if mark else str(file)
        raise SecateurError(f"{where}: {_problem(error, text, mark)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SecateurError(f"{file}: not YAML ({type(error).__name__}: {error!s:.200})") from None


def _problem(error: yaml.MarkedYAMLError, text: str, mark: Any) -> str:
    lines = text.splitlines()
    if mark and mark.line < len(lines) and "\t" in lines[mark.line]:
        return "a tab, which YAML does not take for spaces: indent with spaces"
    if "could not determine a constructor" in (error.problem or ""):
        return "a tag (!...) is not allowed: a recipe has plain values alone"
    if isinstance(error, (yaml.composer.ComposerError, yaml.constructor.ConstructorError)):
        return str(error.problem)
    return f"not YAML ({error.problem}); look at the colons, the spaces behind them and the indentation"


def dump(content: dict[str, Any]) -> str:
    """Return YAML text that both versions of YAML read alike."""
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))
