"""The method of a prune that names none: what is best within minutes by the tables of docs/which-method.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from secateur.core.errors import UsageError
from secateur.core.progress import say
from secateur.core.torchrun import launched
from secateur.plan.pattern import parse_pattern
from secateur.requests import Request

SMALLER, ZEROS = "search", "sparsegpt"


def with_method(request: Request) -> Request:
    """Return a request that names no method with one, and with reconstruction; any other request as it is.

    A share of all parameters takes `search` (with equal widths for `stock_only`), a pattern of zeros `sparsegpt` with
    `refine=2`. What was chosen is said.

    Raises:
        UsageError: the request says neither, or torchrun started this process.
    """
    if request.method:
        return request
    if launched():
        raise UsageError(
            "the method is missing (--method M): under torchrun name one whose work several processes share (`secateur "
            "methods`); the default methods work in one process only"
        )
    options: Mapping[str, Any]
    if request.pattern is not None and not parse_pattern(request.pattern).structured:
        method, what = ZEROS, "zeros"
        options = {"refine": 2, **request.options}
    elif request.params_removed is not None and request.pattern is None:
        method, what = SMALLER, "a smaller model"
        options = {"uniform": True, **request.options} if request.stock_only else request.options
    else:
        raise UsageError(
            "the method is missing (--method M): name one (`secateur methods` lists them), or say what you want: "
            "--params-removed R for a smaller model, --pattern 2:4 or --pattern unstructured --sparsity S for zeros"
        )
    taken = " ".join([method, *(f"--set {name}={str(value).lower()}" for name, value in options.items())])
    say(f"no --method: {taken}, then reconstruct, first for {what} in docs/which-method.md; --dry-run has the time")
    mended = request.params_removed != 0  # at 0 there is nothing to mend
    return replace(request, method=method, options=options, reconstruct=mended)
