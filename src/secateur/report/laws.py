"""The laws section of a report: one fit for each curve with enough sparsities, whatever the method.

The paper fits SliceGPT alone; whether its law holds for other methods is open, so every curve is tried and judged on
points held out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from secateur.core.errors import SecateurError
from secateur.predict.choose import Prediction, choose
from secateur.predict.doubts import doubts
from secateur.predict.fit import Fit
from secateur.predict.points import Point, make_points
from secateur.report import words
from secateur.report.rows import Group
from secateur.report.series import Series
from secateur.report.tables import Cell, Table

FEWEST = 3
MAXIMUM = 6


@dataclass(frozen=True, eq=False)
class Law:
    """The fit to one curve.

    Attributes:
        label: the label of the curve.
        found: the paper's fitted law and its rivals.
    """

    label: str
    found: Prediction


def fit_curves(group: Group, curves: Sequence[Series]) -> list[Law]:
    """Fit perplexity laws to the curves with three or more sparsities; empty if the dense model was not measured."""
    dense = group.dense
    if dense is None or dense.ppl is None:
        return []
    laws = []
    for curve in curves:
        at: dict[float, list[float]] = {}
        for row in curve.rows:
            if curve.joined and row.sparsity and row.ppl is not None:
                at.setdefault(round(row.sparsity, 6), []).append(row.ppl)
        if len(at) < FEWEST:
            continue
        points = [
            Point(s, math.exp(fmean(math.log(value) for value in several)))
            for s, several in at.items()
            if min(several) > 0
        ]  # seeds share a point
        try:
            laws.append(Law(curve.label, choose(make_points("ppl", Point(0.0, dense.ppl), points))))
        except SecateurError:  # a perplexity that has no logarithm to fit: the table of runs shows it
            continue
    return laws


def table(laws: Sequence[Law]) -> Table:
    """The table with one line per curve: the paper's fit, its held-out error, and the best law."""
    heads = (
        ("Runs", "", True),
        ("Points", "pruned points; the dense model is not one", False),
        ("a", "ln PPL0 / ln PPL = a s + b; the paper says -1; 95% interval", False),
        ("b", "the paper says 1; 95% interval", False),
        ("RMSE in y", "of the fit, as in the paper's table 3", False),
        ("Held out", "typical error of a perplexity predicted from the other points", False),
        ("Parameter-free", "the same of ln PPL0 / ln PPL = 1 - s", False),
        ("Best law", "with its held-out error", True),
    )
    return Table(heads, tuple(_cells(law) for law in laws))


def _cells(law: Law) -> tuple[Cell, ...]:
    prediction = law.found
    errors = {judged.law.name: judged.heldout for judged in prediction.judged}
    best = prediction.winner
    winner = Cell("none", "") if best is None else Cell(f"{best.law.name}, {_percent(best.heldout)}", best.law.formula)
    return (
        Cell(law.label),
        Cell(str(len(prediction.points.s))),
        _constant(prediction.chosen, "a"),
        _constant(prediction.chosen, "b"),
        Cell(f"{prediction.chosen.rmse:.3f}"),
        Cell(_percent(errors["ratio"])),
        Cell(_percent(errors["theory"])),
        winner,
    )


def _constant(fit: Fit, name: str) -> Cell:
    value, ends = fit.named()[name], fit.constant_intervals()[name]
    return Cell(f"{value:.3f}" + ("" if ends is None else f" ({ends[0]:.3f} to {ends[1]:.3f})"), repr(value))


def _percent(error: float | None) -> str:
    """An error in ln as a share of the perplexity."""
    if error is None:
        return "unknown"
    return f"{math.expm1(error):.1%}" if error < math.log(20) else "over 20 times"


def verdicts(laws: Sequence[Law]) -> list[str]:
    """The reasons against the paper's law, one line per curve."""
    return [f"{law.label}: {'; '.join(reasons)}." for law in laws if (reasons := doubts(law.found))]


def title(law: Law) -> str:
    """The title of the plot of a curve."""
    return f"{law.label}, {words.plural(len(law.found.points.s), 'point')}"
