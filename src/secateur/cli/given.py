"""Build requests from the arguments of a command.

Each field of a request comes from the argument of the same name, or of the name in `OPTION_OF`. `LEFT_OUT` lists the
fields that a command has no such option for, each with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from secateur.requests import BenchRequest, EvalRequest, GenerateRequest, HealRequest, ReconstructRequest, Request

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

_SEVERAL = {"sparsity": "--sparsity has several"}
_ZEROES = dict.fromkeys(("params_removed", "at_least"), "the runs zero weights, and none of them removes parameters")
_NO_SHIFT = dict.fromkeys(("against", "against_revision", "shift"), "the table has no place for a shift")
_DENSE_REVISION = {
    "against_revision": "the dense model is MODEL, at --revision",
    "shift": "--against-dense is there for the shift alone",
}
_HEALING = (
    *("batch", "lr", "schedule", "weight_decay", "rank", "alpha", "targets"),
    *("completion_only", "keep_adapter", "samples", "save_every", "checkpointing"),
)
_TIMING = ("dense", "batches", "prompt", "new", "repeats", "revision", "seed", "semi_structured")
_PASS = (
    *("method", "sparsity", "params_removed", "at_least", "modules", "pattern", "options", "seed", "revision"),
    *("device", "dtype", "text_field", "include_path", "spill", "stock_only", "ignore_unknown"),
    "prompt_form",
    "reconstruct",
)

LEFT_OUT: Mapping[tuple[str, type], Mapping[str, str]] = {
    ("prune", Request): {},
    ("eval", EvalRequest): {},
    ("heal", HealRequest): {},
    ("reconstruct", ReconstructRequest): {},
    ("generate", GenerateRequest): {},
    ("bench", BenchRequest): {"batches": "--batch has them"},
    ("sweep", Request): {**_SEVERAL, "params_removed": "--params-removed has several"},
    ("sweep", EvalRequest): _DENSE_REVISION,
    ("compare", Request): {
        **_SEVERAL,
        "params_removed": "--params-removed has several",
        "method": "--methods has several",
        "pattern": "--patterns has several",
        "options": "--set has those of several methods",
        "modules": "no one choice goes with every method",
    },
    ("compare", EvalRequest): _NO_SHIFT,
    ("compare", HealRequest): {
        **dict.fromkeys(_HEALING, "each result is healed with the defaults of heal"),
        "steps": "--heal-steps has them",
        "evaluate": "perplexity is what a comparison compares",
    },
    ("compare", BenchRequest): dict.fromkeys(_TIMING, "each result is timed with the defaults of bench"),
    ("study modules", Request): {
        **_SEVERAL,
        **_ZEROES,
        "modules": "--kinds has them",
        "reconstruct": "the cells are masks on one model in memory",
        "spill": "the cells share one model in memory",
        "stock_only": "no checkpoint is written",
    },
    ("study modules", EvalRequest): _NO_SHIFT,
    ("study disp-llm", Request): {
        **_SEVERAL,
        "params_removed": "--params-removed has several",
        "at_least": "the method comes as near to a share as it learns to, not in steps",
        "method": "it is a study of one method",
        "modules": "the method has none",
        "pattern": "the method has none",
        "reconstruct": "the study is of what learning the gates alone gives",
        "stock_only": "no result is a stock architecture",
    },
    ("study disp-llm", EvalRequest): _DENSE_REVISION,
    ("predict", Request): {
        **dict.fromkeys(_PASS, "it is one pass of SliceGPT with the defaults of prune"),
        "model": "--spectrum has it",
    },
}
"""(command, request class) -> field without an option of the same form -> the reason."""

OPTION_OF: Mapping[type, Mapping[str, str]] = {EvalRequest: {"seqlen": "eval_seqlen"}}
"""Request class -> field -> the argument it comes from, where that has another name: `seqlen` is the calibration's."""


def given(kind: type[T], command: str, values: Mapping[str, Any], **more: Any) -> T:
    """Make a request from the arguments of a command.

    Args:
        kind: a dataclass of `secateur.requests`.
        command: the name of the command, as in `LEFT_OUT`.
        values: the arguments of the command by name, usually `locals()`.
        more: fields whose argument has another name or another form.
    """
    taken = {field.name for field in fields(kind)} - LEFT_OUT[command, kind].keys() - more.keys()
    named = OPTION_OF.get(kind, {})
    return kind(**{name: values[named.get(name, name)] for name in taken}, **more)
