"""From `--sparsity` and `--modules` to a sparsity for each matrix of each block."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from secateur.core.errors import UsageError
from secateur.models.family import ATTENTION, CANONICAL, HEADS, MLP, Family, check_can
from secateur.models.view import ModelView
from secateur.plan.pattern import Pattern

Rates = tuple[dict[str, float], ...]
"""One entry for each block: canonical matrix name -> sparsity. A matrix without an entry stays unchanged."""

ALLOCATIONS = ("auto", "owl")
"""Values of `--modules` that leave the sparsity of each matrix to `secateur.prune.allocation`."""

_GROUPS = {"attention": ATTENTION, "mlp": MLP, "all": CANONICAL}


def check_sparsity(value: float) -> float:
    """Return the sparsity; raise UsageError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise UsageError(f"sparsity {value:g} is outside [0, 1): it is the fraction that is removed, as in 0.5")
    return value


def resolve_rates(view: ModelView, sparsity: float | None, modules: str | None, pattern: Pattern) -> Rates:
    """The sparsity of every matrix.

    Args:
        view: the model.
        sparsity: the sparsity of all matrices, or of the names in `modules` without a value. N:M implies it.
        modules: `NAME=S,...` or `NAME,...`: canonical names, `attention`, `mlp`, `all`, the family's own names, or
            globs over `model.layers.3.mlp.down_proj`-like paths. A later entry overrides an earlier one;
            other matrices stay unchanged.
        pattern: the pattern, which may not fit every matrix.

    Raises:
        UsageError: a value is outside [0, 1], a name matches nothing, M does not divide the inputs of a matrix, or the
            sparsity contradicts N:M.
    """
    sparsity = _with_pattern(sparsity, pattern)
    entries = _entries(modules, sparsity, pattern) if modules else [("all", sparsity)]
    rates: Rates = tuple({} for _ in range(view.blocks))
    for name, value in entries:
        if value is None:
            raise UsageError("give --sparsity S, --pattern N:M, or a value for every module: --modules NAME=S")
        matched = False
        for index in range(view.blocks):
            for matrix in matching(view, index, name):
                rates[index][matrix] = value
                matched = True
        if not matched:
            own = sorted({path.rpartition(".")[2] for path in view.family.matrices.values()})
            canonical = [n for n in CANONICAL if n in view.family.matrices]
            raise UsageError(
                f"module '{name}' matches nothing in family {view.family.name} (known: "
                f"{', '.join([*canonical, *_GROUPS, *own])}, or a glob)"
            )
    _check_pattern(view, rates, pattern)
    return rates


def check_allocation(name: str, sparsity: float | None, pattern: Pattern) -> None:
    """Raise UsageError if no sparsity is given, or if this pattern needs the same one everywhere."""
    if pattern.kind == "n:m":
        raise UsageError(
            f"--modules {name}: pattern {pattern} fixes the sparsity of every matrix, so there is nothing to "
            "allocate; use pattern unstructured"
        )
    if pattern.structured:
        raise UsageError(
            f"--modules {name} needs pattern unstructured: pattern {pattern} removes units that several matrices "
            "share, so these matrices cannot have different sparsities"
        )
    if sparsity is None:
        raise UsageError(f"--modules {name} needs --sparsity S, the share of weights to remove over all matrices")


def matching(view: ModelView, index: int, name: str) -> Sequence[str]:
    """The matrices of block `index` that a name of `--modules` stands for. A part that is gone has none."""
    shapes = view.matrix_shapes(index)
    return [matrix for matrix in _matching(view.family, index, name) if 0 not in shapes[matrix]]


def _matching(family: Family, index: int, name: str) -> Sequence[str]:
    if name in _GROUPS:
        return [m for m in _GROUPS[name] if m in family.matrices]
    if name in family.matrices:
        return [name]
    return [
        matrix
        for matrix, path in family.matrices.items()
        if path.rpartition(".")[2] == name
        or any(fnmatch.fnmatchcase(f"{family.blocks}.{index}.{p}", name) for p in (path, matrix))
    ]


def _with_pattern(sparsity: float | None, pattern: Pattern) -> float | None:
    implied = pattern.implied_sparsity
    if implied is None:
        return sparsity if sparsity is None else check_sparsity(sparsity)
    if sparsity is not None and abs(sparsity - implied) > 1e-9:
        raise UsageError(
            f"pattern {pattern} implies sparsity {implied:g}, but --sparsity is {sparsity:g}; leave --sparsity out"
        )
    return implied


def _entries(modules: str, sparsity: float | None, pattern: Pattern) -> list[tuple[str, float | None]]:
    entries: list[tuple[str, float | None]] = []
    for part in filter(None, (p.strip() for p in modules.split(","))):
        name, _, text = part.partition("=")
        value = sparsity
        if text:
            try:
                value = float(text)
            except ValueError:
                raise UsageError(f"--modules {part}: '{text}' is no number; write NAME=S with S in [0, 1]") from None
            if not 0 <= value <= 1:
                raise UsageError(f"--modules {part}: sparsity {value:g} is outside [0, 1]")
            if pattern.implied_sparsity not in (None, value):
                raise UsageError(
                    f"--modules {part}: pattern {pattern} implies sparsity {pattern.implied_sparsity:g}; name the "
                    "modules without a value"
                )
        entries.append((name.strip(), value))
    if not entries:
        raise UsageError("--modules is empty: write NAME=S,..., for instance attention=0.3,mlp=0.6")
    return entries


def _check_pattern(view: ModelView, rates: Rates, pattern: Pattern) -> None:
    for index, rate in enumerate(rates):
        shapes = view.matrix_shapes(index)
        if pattern.kind == "n:m":
            for name in rate:
                if shapes[name][1] % pattern.group:
                    raise UsageError(
                        f"pattern {pattern}: matrix {name} of block {index} has {shapes[name][1]} inputs, not a "
                        f"multiple of {pattern.group}"
                    )
        if pattern.structured:
            _check_units(view.family, rate, pattern)
            if any(rate.get(name) for name in ATTENTION):
                check_can(view.family, HEADS, view.name)


def _check_units(family: Family, rate: dict[str, float], pattern: Pattern) -> None:
    for group, names in (("attention", ATTENTION), ("mlp", MLP)):
        values = {rate.get(name) for name in names if name in family.matrices}
        if len(values) > 1:
            raise UsageError(
                f"pattern {pattern} removes whole units, which all matrices of {group} share: give one value, {group}=S"
            )
        if values == {1.0}:
            raise UsageError(
                f"pattern {pattern} with {group}=1 would leave nothing of {group}; use a value below 1, or pattern "
                "unstructured to zero it"
            )
