"""The pruning methods, found by name. `--method wanda` is `methods/wanda.py`, or the folder `methods/wanda/`.

What such a module must say and may say is written down in `methods/contract.py`. Other packages add methods by the
entry point `secateur.methods`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from secateur.core.docstrings import attributes
from secateur.core.errors import UsageError, unknown
from secateur.methods.contract import Says, read_contract
from secateur.models.view import ModelView
from secateur.plan.pattern import Pattern, parse_pattern
from secateur.plan.quantity import UNITS, WEIGHTS, Quantity

_NO_METHODS = ("contract",)
_KINDS = {"unstructured": "unstructured", "N:M": "2:4", "rows": "rows", "columns": "columns"}
_PAPERS = re.compile(r"arXiv:(?P<arxiv>\d{4}\.\d{4,5})|(?P<openreview>openreview\.net/forum\?id=\w+)")


@dataclass(frozen=True)
class Method:
    """A method as the driver sees it: its module, its options, and what its module defines (`contract.Says`)."""

    name: str
    module: ModuleType
    options_class: type[Any]
    says: Says

    def pattern(self, options: Any) -> Pattern | None:
        """Return the pattern that the options name, or None for a method without the option `pattern`."""
        return parse_pattern(options.pattern) if hasattr(options, "pattern") else None

    def quantity(self, options: Any) -> Quantity:
        """Return the quantity that a sparsity is a fraction of."""
        pattern = self.pattern(options)
        if pattern is not None and not pattern.structured:
            return WEIGHTS
        if self.says.quantity_of is not None:
            return self.says.quantity_of(options)
        return self.says.REMOVES or (WEIGHTS if pattern is None else UNITS)

    def streams(self, options: Any) -> int:
        """Return how many residual streams of the text it has at a time."""
        streams = self.says.STREAMS
        return streams if isinstance(streams, int) else streams(options)

    def whole_model(self, options: Any) -> bool:
        """Return True if it plans all blocks at once: it has no other way, or the option `whole_model` is set."""
        both = self.says.plan_block is not None
        return self.says.plan_model is not None and (not both or bool(getattr(options, "whole_model", False)))

    def keeps_tied(self, view: ModelView, options: Any) -> bool:
        """Return True if the head of a model is the embedding, and stays it where the residual stream is rotated."""
        return self.says.keeps_tied is not None and self.says.keeps_tied(view, options)

    def by_rows(self, options: Any) -> bool:
        """Return True if it removes the same number of weights from each row, with the pattern `unstructured`."""
        return self.says.by_rows is not None and self.says.by_rows(options)

    def gradual(self, options: Any) -> bool:
        """Return True if a run may go on from the state of a run at a lower sparsity."""
        return self.says.gradual is not None and self.says.gradual(options)

    def options(self, given: Mapping[str, Any]) -> Any:
        """Make the options from values, or from text as `--set` gives it.

        Raises:
            UsageError: the method has no such option, or the option does not allow the value.
        """
        fields = {f.name: f for f in dataclasses.fields(self.options_class)}
        values = {}
        for name, value in given.items():
            if name not in fields:
                raise unknown(f"option of {self.name}", name, fields)
            values[name] = _convert(f"{self.name}: option {name}", value, fields[name].default)
        return self.options_class(**values)

    @property
    def summary(self) -> str:
        """The first line of the docstring of its module; `secateur methods` prints it."""
        return next(iter((self.module.__doc__ or "").strip().splitlines()), "")

    @property
    def about(self) -> str:
        """The docstring of its module without the first line."""
        return inspect.cleandoc(self.module.__doc__ or "").partition("\n")[2].strip()

    @property
    def paper(self) -> str | None:
        """The address of the first paper that the docstring of its module names; None if it names none."""
        if (named := _PAPERS.search(self.module.__doc__ or "")) is None:
            return None
        return f"https://arxiv.org/abs/{named['arxiv']}" if named["arxiv"] else f"https://{named['openreview']}"

    def patterns(self) -> dict[str, Quantity]:
        """Return the patterns that its options allow, each with what a sparsity is then a fraction of."""
        allowed = {}
        if "pattern" in (field.name for field in dataclasses.fields(self.options_class)):
            for kind, example in _KINDS.items():
                with suppress(UsageError):
                    allowed[kind] = self.quantity(self.options({"pattern": example}))
        return allowed

    @property
    def needs(self) -> str:
        """What it needs beside the model, the dearest of it: `nothing`, `text`, `gradients` (of a text), `training`."""
        if self.says.TRAINS:
            return "training"
        if self.says.GRADIENTS:
            return "gradients"
        return "nothing" if self.says.CALIBRATION is None else "text"

    def describe(self) -> dict[str, Any]:
        """Return what a user can know of it before a run, as JSON values.

        Returns:
            `method`, `summary`, `about` (the rest of its docstring), `advice` (a setting to prefer, or None), `paper`,
            `module`; `sparsity_of`, in words, with the default options; `result` with the default options, `smaller`
            (parameters are removed) or `zeros` (weights are set to zero, and the size stays); `needs`, see there;
            `pattern`, the default, `patterns`: name -> what the sparsity is a fraction of, and `results`: name -> the
            result with that pattern; `calibration`: `spec`, `samples` and `seqlen`, or None; whether it takes
            `gradients`, `trains`, or works under `torchrun`; and `options`, each with `name`, `default` and `meaning`,
            which is empty where its docstring does not say.
        """
        defaults = self.options({})
        says, meanings, patterns = self.says, attributes(self.options_class), self.patterns()
        size = {"spec": says.CALIBRATION, "samples": says.SAMPLES, "seqlen": says.SEQLEN}
        return {
            "method": self.name,
            "summary": self.summary,
            "about": self.about,
            "advice": says.ADVICE,
            "paper": self.paper,
            "module": self.module.__name__,
            "sparsity_of": self.quantity(defaults).words,
            "result": self.quantity(defaults).result,
            "needs": self.needs,
            "pattern": getattr(defaults, "pattern", None),
            "patterns": {kind: counted.words for kind, counted in patterns.items()},
            "results": {kind: counted.result for kind, counted in patterns.items()},
            "calibration": None if says.CALIBRATION is None else size,
            "gradients": says.GRADIENTS,
            "trains": says.TRAINS,
            "torchrun": says.SHARDS,
            "options": [
                {"name": field.name, "default": getattr(defaults, field.name), "meaning": meanings.get(field.name, "")}
                for field in dataclasses.fields(self.options_class)
            ],
        }


def method_names() -> list[str]:
    """Return the names of all methods, built in or added by other packages, sorted."""
    return sorted({*built_in_methods(), *_added()})


def built_in_methods() -> list[str]:
    """Return the names of the methods of this package, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NO_METHODS)


def find_method(name: str) -> Method:
    """Find a method by name, and check its module against the contract.

    Raises:
        UsageError: no method has that name, or its module breaks the contract; the message names file and attribute.
    """
    if name not in method_names():
        raise unknown("method", name, method_names())
    module = _load(_added()[name]) if name in _added() else importlib.import_module(f"{__name__}.{name}")
    options = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and dataclasses.is_dataclass(c) and c.__module__ == module.__name__
    ]
    if len(options) != 1:
        raise UsageError(f"method '{name}': its file must define one dataclass, its options; it defines {len(options)}")
    return Method(name, module, options[0], read_contract(name, module, options[0]))


def sharing_methods() -> list[str]:
    """Return the names of the methods whose work the processes of torchrun can share; broken ones are left out."""
    names = []
    for name in method_names():
        with suppress(UsageError):
            names += [name] if find_method(name).says.SHARDS else []
    return names


def _load(entry: EntryPoint) -> ModuleType:
    """Import the module of a method of another package.

    Raises:
        UsageError: it cannot be imported.
    """
    try:
        module = entry.load()
    except Exception as error:  # whatever the file of someone else does
        raise UsageError(
            f"method '{entry.name}': its module {entry.value} cannot be imported ({type(error).__name__}: {error});"
            " repair or uninstall the package that adds it"
        ) from error
    if not isinstance(module, ModuleType):
        raise UsageError(
            f"method '{entry.name}': its entry point {entry.value} is of type {type(module).__name__}; it must name a"
            " module, as in my_package.chance"
        )
    return module


@cache
def _added() -> dict[str, EntryPoint]:
    """Return the methods of other packages, by name. Cached: the look-up takes about ten milliseconds."""
    return {entry.name: entry for entry in entry_points(group="secateur.methods")}


def _convert(where: str, value: Any, default: Any) -> Any:
    """Convert text to the type of the default. Without a default, or with None, read it as JSON or keep the text."""
    if not isinstance(value, str) or isinstance(default, str):
        return value
    if default is None or default is dataclasses.MISSING:
        try:
            return json.loads(value)
        except ValueError:
            return value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise UsageError(f"{where} must be true or false, not '{value}'")
        return value.lower() == "true"
    try:
        return type(default)(value)
    except ValueError:
        raise UsageError(f"{where} must be of type {type(default).__name__}, not '{value}'") from None
