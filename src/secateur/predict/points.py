"""The measured points that a law is fitted to; values that no law can have are refused or left out.

`read.py` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from secateur.core.errors import SecateurError, UsageError
from secateur.evaluate.cloze import CHANCE as CLOZE_CHANCE
from secateur.predict.laws import Array, Kind

# Accuracy of guessing, by task (the bundled cloze task has four choices); records of lm-eval's tasks hold their own.
CHANCE = {"cloze": CLOZE_CHANCE}


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        s: measured sparsity, in [0, 1).
        value: perplexity or accuracy.
        stderr: standard error of an accuracy, if it was measured.
        place: the file and line, or the folder, that it comes from, for messages.
        removed: the share of all parameters that was removed, if it is known.
    """

    s: float
    value: float
    stderr: float | None = None
    place: str = ""
    removed: float | None = None


@dataclass(frozen=True, eq=False)
class Points:
    """The points of one fit, ascending in s, and the dense model's value.

    Attributes:
        metric: "ppl" or the name of a task.
        dense: the value of the dense model.
        s, values: pruned points, float64 [N].
        chance: the accuracy of guessing; None if unknown, and for perplexity.
        removed: the share of all parameters that each pruned point has lost, float64 [N]; None if it is not known.
        about: model, method and so on, for titles; empty for a CSV.
        warnings: points that were left out, and values that look odd.
        sweep: the command that measures other sizes; None where the points do not tell.
    """

    metric: str
    dense: float
    s: Array
    values: Array
    chance: float | None = None
    about: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    removed: Array | None = None
    sweep: str | None = None

    def removed_at(self, sparsities: Array) -> Array | None:
        """The share of all parameters that each sparsity removes [N]; None if the points do not tell.

        It is a straight line between measured points and from nothing to the first, and goes on like the last line.
        """
        if self.removed is None or not (self.removed > 0).any():
            return None
        s, removed = np.append(0.0, self.s), np.append(0.0, self.removed)
        slope = (removed[-1] - removed[-2]) / (s[-1] - s[-2])
        shares: Array = np.interp(sparsities, s, removed) + slope * np.clip(sparsities - s[-1], 0, None)
        return np.minimum(shares, 1.0)

    def sparsity_for(self, removed: float) -> float:
        """The sparsity that removes this share of all parameters.

        Raises:
            UsageError: the points do not tell, or no sparsity below 1 removes as much.
        """
        if not 0 <= removed < 1:
            raise UsageError(f"--params-removed {removed:g} is outside [0, 1)")
        grid = np.linspace(0.0, 0.999, 1000)
        if (shares := self.removed_at(grid)) is None:
            raise UsageError(
                "--params-removed: these points do not tell how many parameters were removed (weights were zeroed, or "
                "they come from a CSV); use --at S"
            )
        # adapters make small sparsities add parameters
        start = int(shares[grid <= self.s[0]].argmin())
        rising = np.maximum.accumulate(shares[start:])
        if removed > rising[-1]:
            raise UsageError(f"--params-removed {removed:g}: these points go up to {max(0.0, rising[-1]):.3f} at most")
        return float(np.interp(removed, rising, grid[start:]))

    @property
    def kind(self) -> Kind:
        """The kind of value: "ppl" or "acc"."""
        return "ppl" if self.metric == "ppl" else "acc"


def make_points(
    metric: str,
    dense: Point,
    found: Iterable[Point],
    *,
    chance: float | None = None,
    about: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Points:
    """Check the points of one metric, and leave out those that no law can be fitted to.

    Raises:
        SecateurError: a value is impossible, a sparsity is outside [0, 1), or one sparsity has two values.
    """
    warnings = list(notes)
    check = _check_ppl if metric == "ppl" else _check_acc
    for point in (dense, *(found := list(found))):
        if not 0 <= point.s < 1:
            raise SecateurError(
                f"{point.place}: sparsity {point.s:g} is outside [0, 1): give the fraction removed, not a percentage"
            )
        check(point)
    distinct = distinct_points(found, warnings)
    if metric != "ppl":
        distinct = _above_chance(dense, distinct, chance, metric, warnings)
    distinct.sort(key=lambda point: point.s)
    _note_non_monotone([dense, *distinct], metric, warnings)
    s, values = (np.array([getattr(point, name) for point in distinct], dtype=np.float64) for name in ("s", "value"))
    removed = [point.removed for point in distinct]
    known = np.array(removed, dtype=np.float64) if removed and None not in removed else None
    return Points(
        metric, dense.value, s, values, chance if metric != "ppl" else None, about or {}, tuple(warnings), known
    )


def _check_ppl(point: Point) -> None:
    if not (math.isfinite(point.value) and point.value > 1):
        raise SecateurError(
            f"{point.place}: perplexity {point.value:g} is not a finite number above 1, "
            "so its logarithm cannot be fitted; measure it anew"
        )


def _check_acc(point: Point) -> None:
    if not 0 <= point.value <= 1:
        raise SecateurError(
            f"{point.place}: accuracy {point.value:g} is outside [0, 1]: give a fraction, not a percentage"
        )


def distinct_points(points: list[Point], warnings: list[str]) -> list[Point]:
    """Count equal points once.

    Two different values at one sparsity are refused: a held-out point would have its twin in the fit.
    """
    by_sparsity: dict[float, Point] = {}
    for point in points:
        first = by_sparsity.setdefault(point.s, point)
        if first is point:
            continue
        if first.value != point.value:
            raise SecateurError(
                f"two values at sparsity {point.s:g}: {first.value:g} ({first.place}) and {point.value:g} "
                f"({point.place}); keep one, or give their mean in a CSV"
            )
        warnings.append(f"sparsity {point.s:g} with value {point.value:g} occurs more than once and is counted once")
    return list(by_sparsity.values())


def _above_chance(
    dense: Point, points: list[Point], chance: float | None, metric: str, warnings: list[str]
) -> list[Point]:
    """Leave out accuracies of 0, and those within one standard error of chance, where accuracy no longer falls."""
    if dense.value == 0 or (chance is not None and dense.value - (dense.stderr or 0.0) <= chance):
        raise SecateurError(
            f"the dense model's accuracy on {metric} is {dense.value:g}"
            + ("" if dense.value == 0 else f", not above chance ({chance:g})")
            + ": there is nothing to lose, so no law can be fitted; choose another task"
        )
    usable = []
    for point in points:
        if point.value == 0:
            warnings.append(f"accuracy 0 at sparsity {point.s:g} has no logarithm and is left out")
        elif chance is not None and point.value - (point.stderr or 0.0) <= chance:
            margin = f" within its standard error {point.stderr:.3g}" if point.stderr and point.value > chance else ""
            warnings.append(
                f"accuracy {point.value:g} at sparsity {point.s:g} is at chance ({chance:g}){margin} and is left out: "
                "it falls no further there"
            )
        else:
            usable.append(point)
    if chance is None:
        warnings.append(
            f"what guessing scores on {metric} is unknown, so points at chance cannot be recognised: give --chance"
        )
    return usable


def _note_non_monotone(points: list[Point], metric: str, warnings: list[str]) -> None:
    """Add a warning if the metric improves from one sparsity to the next."""
    worse: Callable[[Point, Point], bool] = (
        (lambda a, b: b.value < a.value) if metric == "ppl" else (lambda a, b: b.value > a.value)
    )
    better = [f"{b.s:g} ({b.value:g}) than at {a.s:g} ({a.value:g})" for a, b in pairwise(points) if worse(a, b)]
    if better:
        warnings.append(
            f"not monotone: {'perplexity' if metric == 'ppl' else metric} is better at sparsity "
            f"{'; at '.join(better)}; every law here says the opposite"
        )
