"""The pruning methods: one file each, found by name. `--method wanda` is `methods/wanda.py`.

A method is a module with one frozen dataclass (its options) and one of three functions:

    plan_block(block, statistics, options) -> BlockPlan     the blocks are streamed, each cut before the next is calibrated
    plan_place(moment, before, sparsity, options, seed)     the same, for what narrows the residual stream: one Place of it at a time
    plan_model(view, data, options, run) -> BlockPlans      the whole model is needed at once; data is token ids [S, T], or None; run is
                                                            `plan.run.Run`: the seed, where to compute, how much to remove of the whole

It says with `CALIBRATION` which text its paper calibrates with (None: it needs no tokens), with `SAMPLES` and `SEQLEN` how much of it, with
`STATISTICS` what to collect for each distinct input of a block, and with `DEMO` what `secateur demo` shows of it. Other packages add methods by the
entry point `secateur.methods`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from secateur.calibrate.statistics import NewStatistic
from secateur.core.errors import UsageError, unknown
from secateur.plan.pattern import Pattern, parse_pattern


@dataclass(frozen=True)
class Method:
    """A method as the driver sees it."""

    name: str
    module: ModuleType
    options_class: type[Any]

    @property
    def statistics(self) -> NewStatistic | None:
        """What to collect for each distinct input, None for a method that needs no tokens."""
        return getattr(self.module, "STATISTICS", None)

    @property
    def plan_block(self) -> Callable[..., Any] | None:
        """The function that plans one block."""
        return getattr(self.module, "plan_block", None)

    @property
    def plan_place(self) -> Callable[..., Any] | None:
        """The function that plans one place of the residual stream; its module has more of them, see `slicegpt`."""
        return getattr(self.module, "plan_place", None)

    @property
    def plan_model(self) -> Callable[..., Any] | None:
        """The function that plans the whole model at once."""
        return getattr(self.module, "plan_model", None)

    def pattern(self, options: Any) -> Pattern | None:
        """What its options say of it, None where it has no such option."""
        return parse_pattern(options.pattern) if hasattr(options, "pattern") else None

    def whole_model(self, options: Any) -> bool:
        """Whether it plans all blocks at once: it can do nothing else, or its options say so."""
        return self.plan_model is not None and (self.plan_block is None or bool(getattr(options, "whole_model", False)))

    def gradual(self, options: Any) -> bool:
        """Whether a lower sparsity is a stop on its way to a higher one, which may go on from the same `run.checkpoint`: `gradual` in its file."""
        return hasattr(self.module, "gradual") and bool(self.module.gradual(options))

    def counts_parameters(self, options: Any) -> bool:
        """Whether its sparsity is of the parameters of the whole model: it plans that alone, and not matrix by matrix. Zeroes are always of matrices."""
        pattern = self.pattern(options)
        return self.plan_model is not None and self.plan_block is None and (pattern is None or pattern.structured)

    @property
    def quick(self) -> dict[str, Any]:
        """The options that make a run short, whatever it is worth then: `QUICK` in its file."""
        return dict(getattr(self.module, "QUICK", {}))

    @property
    def may_change(self) -> tuple[str, ...]:
        """The options that may have another value where an interrupted run goes on before its first block: `MAY_CHANGE` in its file."""
        return getattr(self.module, "MAY_CHANGE", ())

    @property
    def removes(self) -> str:
        """What that sparsity is a fraction of, where it is not parameters: `REMOVES` in its file."""
        return getattr(self.module, "REMOVES", "parameters")

    @property
    def gradients(self) -> bool:
        """Whether it takes gradients of the loss from `calibrate/backward.py`: `GRADIENTS` in its file."""
        return getattr(self.module, "GRADIENTS", False)

    @property
    def operations(self) -> Callable[..., float] | None:
        """The function of its file, of a method that trains, that says about how many multiplications a plan of the whole model takes."""
        return getattr(self.module, "operations", None)

    @property
    def trains(self) -> bool:
        """Whether it goes over the text as often as its options say, so that a dry run knows neither its time (unless `operations` says) nor its memory:
        `TRAINS` in its file."""
        return getattr(self.module, "TRAINS", False)

    def options(self, given: Mapping[str, Any]) -> Any:
        """The options from their values, or from text as `--set` gives it.

        Raises:
            UsageError: an option the method does not have, or a value it does not take.
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
        """The first line of the docstring of its file."""
        return (self.module.__doc__ or "").strip().splitlines()[0]


def method_names() -> list[str]:
    """Every method there is."""
    built_in = [m.name for m in pkgutil.iter_modules(__path__)]
    return sorted({*built_in, *_added()})


def find_method(name: str) -> Method:
    """Raises UsageError where no method has that name."""
    if name not in method_names():
        raise unknown("method", name, method_names())
    added = _added()
    module = added[name].load() if name in added else importlib.import_module(f"{__name__}.{name}")
    options = [c for c in vars(module).values() if isinstance(c, type) and dataclasses.is_dataclass(c) and c.__module__ == module.__name__]
    if len(options) != 1:
        raise UsageError(f"method '{name}': its file must define one dataclass, its options; it defines {len(options)}")
    return Method(name, module, options[0])


@cache
def _added() -> dict[str, EntryPoint]:
    """What other packages add, by name; to ask every installed package takes some ten milliseconds."""
    return {entry.name: entry for entry in entry_points(group="secateur.methods")}


def _convert(what: str, value: Any, default: Any) -> Any:
    """Text to the type of the default; where there is none to go by, numbers become numbers."""
    if not isinstance(value, str) or isinstance(default, str):
        return value
    if default is None or default is dataclasses.MISSING:
        try:
            return json.loads(value)
        except ValueError:
            return value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise UsageError(f"{what} is true or false, not '{value}'")
        return value.lower() == "true"
    try:
        return type(default)(value)
    except ValueError:
        raise UsageError(f"{what} needs a {type(default).__name__}, not '{value}'") from None
