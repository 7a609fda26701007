"""What to be wary of in an answer: laws that do not hold, rivals that do better, questions outside of what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from secateur.core.records import Record
from secateur.predict.choose import Prediction
from secateur.predict.fit import Fit
from secateur.predict.points import Points

# The law is said not to hold where interpolation does this many times better on held-out points, and the law errs by more than this in ln.
_WORSE, _NOTABLE = 1.5, 0.05
_FEW = 4


def warnings(found: Prediction, answers: Sequence[Record], aim: Record | None) -> list[str]:
    """One line each.

    Args:
        found: the law and its rivals.
        answers: the predictions of the record.
        aim: its target.
    """
    chosen, points, said = found.chosen, found.points, list(found.points.warnings)
    count, name = len(points.s), chosen.law.name
    if count == 0:
        said.append(
            f"no pruned point was measured: law '{name}' is a hypothesis here, with no interval; "
            "on some models it is far off, so measure a few sparsities"
        )
    elif chosen.sigma is None:
        said.append(
            f"law '{name}' has as many constants as there are points ({count}): it passes through all of them, "
            "so there is no interval"
        )
    elif count < _FEW:
        said.append(f"only {count} pruned points: intervals and held-out errors say little")
    if found.verdict.fit is not None and not found.verdict.errors and count:
        said.append(
            f"held-out error of law '{name}' is unknown: {count} pruned points with one left out are fewer than its "
            "constants"
        )
    said += doubts(found)
    said += _outside(chosen, answers, points)
    said += _about_target(chosen, aim, points.chance)
    return said


def doubts(found: Prediction) -> list[str]:
    """Whether the law holds on these points."""
    said = []
    name, held, count = found.chosen.law.name, found.verdict.heldout, len(found.points.s)
    claims = {"ratio": {"a": -1.0, "b": 1.0}, "log-ratio": {"b": 0.0}}.get(name, {})
    for constant, ends in found.chosen.constant_intervals().items():
        claimed = claims.get(constant)
        if ends is not None and claimed is not None and not ends[0] <= claimed <= ends[1]:
            said.append(
                f"the paper's {constant} = {claimed:g} does not hold: fitted {found.chosen.named()[constant]:.3f}, "
                f"95% interval {ends[0]:.3f} to {ends[1]:.3f}"
            )
    slope = found.chosen.constants[0]
    if name in ("ratio", "log-ratio", "proportional", "linear") and slope > 0:
        said.append(f"law '{name}' does not hold: its fitted slope a = {slope:.3f} says that pruning helps")
    if found.verdict.strayed:
        said.append(
            f"law '{name}' does not hold: fitted to the others, it has no value at {found.verdict.strayed} of {count} "
            "held-out points"
        )
    elif (
        held is not None and found.interpolation is not None and held > _NOTABLE and held > _WORSE * found.interpolation
    ):
        said.append(
            f"law '{name}' does not hold: it misses held-out points by {_factor(held)}, "
            f"and straight lines between neighbours by {_factor(found.interpolation)}"
        )
    best = found.winner
    if found.beaten and best is not None and best.heldout is not None:
        missed = "cannot be judged" if held is None else f"misses by {_factor(held)}"
        said.append(
            f"law '{best.law.name}' predicts the {count} held-out points better: it misses by {_factor(best.heldout)}, "
            f"'{name}' {missed} (--law {best.law.name})"
        )
    return said


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
    said, kind = [], points.kind
    beyond = [entry["sparsity"] for entry in answers if entry["extrapolated"]]
    if beyond and chosen.range is not None:
        said.append(
            f"sparsity {', '.join(f'{s:g}' for s in beyond)} is outside the fitted range {chosen.range[0]:g} to "
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
            said.append(
                f"law '{chosen.law.name}' has no perplexity at sparsity {s:g}: there ln PPL0 / ln PPL would be 0 or "
                "less (or PPL beyond all numbers)"
            )
        elif kind == "acc" and value > 1:
            said.append(f"law '{chosen.law.name}' gives an accuracy of {value:g} at sparsity {s:g}, which is above 1")
        elif kind == "acc" and points.chance is not None and value < points.chance:
            said.append(
                f"law '{chosen.law.name}' gives {value:.3f} at sparsity {s:g}, below chance ({points.chance:g}): "
                "expect chance"
            )
    return said


def _about_target(chosen: Fit, aim: Record | None, chance: float | None) -> list[str]:
    if aim is None:
        return []
    if chance is not None and aim["acc"] <= chance:
        return [
            f"accuracy {aim['acc']:g} is not above chance ({chance:g}): a model that guesses reaches it, "
            "and the law knows nothing of that"
        ]
    wanted = f"{'perplexity' if chosen.law.kind == 'ppl' else 'accuracy'} {aim[chosen.law.kind]:g}"
    if aim["sparsity"] is None:
        at_zero = float(chosen.predict(np.array([0.0]))[0])
        return [
            f"{wanted} is not reachable: at sparsity 0 law '{chosen.law.name}' gives {at_zero:.4g}, "
            f"and the dense model has {chosen.dense:.4g}"
        ]
    if aim["extrapolated"] and chosen.range is not None:
        return [
            f"the sparsity for {wanted}, {aim['sparsity']:.3f}, is outside the fitted range {chosen.range[0]:g} to "
            f"{chosen.range[1]:g}: "
            "measure there before relying on it"
        ]
    return []
