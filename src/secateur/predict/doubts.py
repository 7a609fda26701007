"""Warnings about a prediction: a law that does not hold, a better rival, a sparsity outside the measured range."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from secateur.core.records import Record
from secateur.predict.choose import Prediction
from secateur.predict.fit import Fit
from secateur.predict.points import Points

# A law does not hold if its held-out error is _WORSE times that of interpolation, and above _NOTABLE (in ln).
_WORSE, _NOTABLE = 1.5, 0.05
_FEW = 4


def warnings(found: Prediction, answers: Sequence[Record], aim: Record | None) -> list[str]:
    """The warnings about a prediction, one line each.

    Args:
        found: the law and its rivals.
        answers: `predictions` of the record.
        aim: `target` of the record.
    """
    chosen, points, lines = found.chosen, found.points, list(found.points.warnings)
    count, name = len(points.s), chosen.law.name
    if count == 0:
        lines.append(
            f"no pruned point was measured: law '{name}' is a hypothesis here, with no interval; "
            "on some models it is far off, so measure a few sparsities"
        )
    elif chosen.sigma is None:
        lines.append(
            f"law '{name}' has as many constants as there are points ({count}): it passes through all of them, "
            "so there is no interval"
        )
    elif count < _FEW:
        lines.append(f"only {count} pruned points: intervals and held-out errors say little")
    if found.verdict.fit is not None and not found.verdict.errors and count:
        lines.append(
            f"held-out error of law '{name}' is unknown: {count} pruned points with one left out are fewer than its "
            "constants"
        )
    lines += doubts(found)
    lines += _outside(chosen, answers, points)
    lines += _about_target(chosen, aim, points.chance)
    return lines


def doubts(found: Prediction) -> list[str]:
    """The reasons why the law may not hold on these points, one line each; empty if there are none."""
    lines = []
    name, heldout, count = found.chosen.law.name, found.verdict.heldout, len(found.points.s)
    claims = {"ratio": {"a": -1.0, "b": 1.0}, "log-ratio": {"b": 0.0}}.get(name, {})
    for constant, interval in found.chosen.constant_intervals().items():
        claimed = claims.get(constant)
        if interval is not None and claimed is not None and not interval[0] <= claimed <= interval[1]:
            lines.append(
                f"the paper's {constant} = {claimed:g} does not hold: fitted {found.chosen.named()[constant]:.3f}, "
                f"95% interval {interval[0]:.3f} to {interval[1]:.3f}"
            )
    slope = found.chosen.constants[0]
    if name in ("ratio", "log-ratio", "proportional", "linear") and slope > 0:
        lines.append(f"law '{name}' does not hold: its fitted slope a = {slope:.3f} says that pruning helps")
    if found.verdict.strayed:
        lines.append(
            f"law '{name}' does not hold: fitted to the others, it has no value at {found.verdict.strayed} of {count} "
            "held-out points"
        )
    elif (
        heldout is not None
        and found.interpolation is not None
        and heldout > _NOTABLE
        and heldout > _WORSE * found.interpolation
    ):
        lines.append(
            f"law '{name}' does not hold: it misses held-out points by {_factor(heldout)}, "
            f"and straight lines between neighbours by {_factor(found.interpolation)}"
        )
    best = found.winner
    if found.beaten and best is not None and best.heldout is not None:
        missed = "cannot be judged" if heldout is None else f"misses by {_factor(heldout)}"
        lines.append(
            f"law '{best.law.name}' predicts the {count} held-out points better: it misses by {_factor(best.heldout)}, "
            f"'{name}' {missed} (--law {best.law.name})"
        )
    return lines


def _factor(error: float) -> str:
    """An error in ln as a percentage of the value."""
    return (
        f"{math.expm1(error):.1%}"
        if error < 3
        else f"a factor of {math.exp(min(error, 700.0)):.3g}"
        if math.isfinite(error)
        else "an infinite factor"
    )


def _outside(chosen: Fit, answers: Sequence[Record], points: Points) -> list[str]:
    lines, kind = [], points.kind
    outside = [entry["sparsity"] for entry in answers if entry["extrapolated"]]
    if outside and chosen.range is not None:
        lines.append(
            f"sparsity {', '.join(f'{s:g}' for s in outside)} is outside the fitted range {chosen.range[0]:g} to "
            f"{chosen.range[1]:g}: "
            "extrapolated"
            + (
                ", and the interval holds only if the law does"
                if any(entry["low"] is not None for entry in answers)
                else ""
            )
        )
    for entry in answers:
        value, s = entry[kind], entry["sparsity"]
        if not math.isfinite(value):
            lines.append(
                f"law '{chosen.law.name}' has no perplexity at sparsity {s:g}: there ln PPL0 / ln PPL would be 0 or "
                "less (or PPL too large for a float)"
            )
        elif kind == "acc" and value > 1:
            lines.append(f"law '{chosen.law.name}' gives an accuracy of {value:g} at sparsity {s:g}, which is above 1")
        elif kind == "acc" and points.chance is not None and value < points.chance:
            lines.append(
                f"law '{chosen.law.name}' gives {value:.3f} at sparsity {s:g}, below chance ({points.chance:g}): "
                "expect chance"
            )
    return lines


def _about_target(chosen: Fit, aim: Record | None, chance: float | None) -> list[str]:
    if aim is None:
        return []
    if chance is not None and aim["acc"] <= chance:
        return [
            f"accuracy {aim['acc']:g} is not above chance ({chance:g}): a model that guesses reaches it, "
            "and the law knows nothing of that"
        ]
    target = f"{'perplexity' if chosen.law.kind == 'ppl' else 'accuracy'} {aim[chosen.law.kind]:g}"
    if aim["sparsity"] is None:
        at_zero = float(chosen.predict(np.array([0.0]))[0])
        return [
            f"{target} is not reachable: at sparsity 0 law '{chosen.law.name}' gives {at_zero:.4g}, "
            f"and the dense model has {chosen.dense:.4g}"
        ]
    if aim["extrapolated"] and chosen.range is not None:
        return [
            f"the sparsity for {target}, {aim['sparsity']:.3f}, is outside the fitted range {chosen.range[0]:g} to "
            f"{chosen.range[1]:g}: "
            "measure there before relying on it"
        ]
    return []
