"""From points to an answer: the fitted law, its rivals, predictions with their intervals, a target, and what to be wary of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from secateur.core.errors import UsageError
from secateur.core.records import Record, version
from secateur.predict.choose import Prediction, choose
from secateur.predict.doubts import warnings
from secateur.predict.fit import LEVEL, Fit
from secateur.predict.points import Points
from secateur.predict.published import SOURCE, TABLE_3
from secateur.predict.select import Judged

_NO_POINTS_AT = (0.1, 0.2, 0.3, 0.4, 0.5)


def predict(
    points: Points,
    law: str | None = None,
    *,
    at: Sequence[float] = (),
    target: float | None = None,
    dense_in_fit: bool = False,
) -> tuple[Prediction, Record]:
    """Answer what a sparsity costs and what a wanted value allows.

    Args:
        points, law, dense_in_fit: as for `choose`.
        at: sparsities in [0, 1); none takes the measured ones.
        target: the perplexity not to exceed, or the accuracy not to fall below.

    Returns:
        The prediction, and the record that `secateur predict --json` prints.
    """
    _check_target(points, target)
    found = choose(points, law, dense_in_fit=dense_in_fit)
    for s in at:
        if not 0 <= s < 1:
            raise UsageError(f"--at {s:g} is outside [0, 1)")
    asked = list(at) or (list(points.s) or list(_NO_POINTS_AT)) * (target is None)
    answers = [_at(found.chosen, s) for s in asked]
    aim = None if target is None else _aim(found.chosen, target)
    chosen, constants = found.chosen, found.chosen.named()
    record: Record = {
        "command": "predict",
        "version": version(),
        **points.about,
        "metric": points.metric,
        "law": chosen.law.name,
        "formula": chosen.law.formula,
        "source": chosen.law.source,
        "y": chosen.law.scale.formula,
        "domain": chosen.law.domain,
        "a": constants["a"],
        "b": constants["b"],
        "constants": constants,
        "intervals": chosen.constant_intervals(),
        "level": LEVEL,
        "rmse": chosen.rmse,
        "rmse_ln": chosen.rmse_ln,
        "heldout_rmse": found.verdict.heldout,
        "points": len(points.s),
        "dense": points.dense,
        "dense_in_fit": found.dense_in_fit,
        "chance": points.chance,
        "fitted_range": chosen.range,
        "measured": [
            {"sparsity": float(s), points.kind: float(v)} for s, v in zip(points.s, points.values, strict=True)
        ],
        "predictions": answers,
        "target": aim,
        "best": found.winner.law.name if found.winner and len(points.s) >= 3 else None,
        "rivals": [_rival(one) for one in found.judged],
        "interpolation_rmse": found.interpolation,
        "published": _published(points, asked),
        "warnings": warnings(found, answers, aim),
    }
    return found, record


def _check_target(points: Points, target: float | None) -> None:
    if target is None:
        return
    if points.kind == "ppl" and not (math.isfinite(target) and target > 1):
        raise UsageError(f"--target-ppl {target:g}: a finite perplexity above 1 is needed")
    if points.kind == "acc" and not 0 < target <= 1:
        raise UsageError(f"--target-acc {target:g}: an accuracy in (0, 1] is needed")


def _at(found: Fit, s: float) -> Record:
    at = np.array([s])
    ends = found.interval(at)
    return {
        "sparsity": float(s),
        found.law.kind: float(found.predict(at)[0]),
        "low": None if ends is None else float(ends[0][0]),
        "high": None if ends is None else float(ends[1][0]),
        "extrapolated": found.extrapolates(s),
    }


def _aim(found: Fit, target: float) -> Record:
    """The largest sparsity that keeps the target; `cautious` keeps it at the worse end of the interval too."""
    s = found.inverse(target)
    worse = "high" if found.law.kind == "ppl" else "low"
    return {
        found.law.kind: float(target),
        "sparsity": s,
        "cautious": found.inverse(target, worse),
        "extrapolated": None if s is None else found.extrapolates(s),
    }


def _rival(one: Judged) -> Record:
    found = one.fit
    constants = None if found is None else found.named()
    return {
        "law": one.law.name,
        "formula": one.law.formula,
        "source": one.law.source,
        "fitted": found is not None,
        "a": constants and constants["a"],
        "b": constants and constants["b"],
        "constants": constants,
        "fitted_constants": len(one.law.free),
        "rmse": found.rmse if found else None,
        "rmse_ln": found.rmse_ln if found else None,
        "heldout_rmse": one.heldout,
        "heldout_points": len(one.errors),
        "heldout_outside_domain": one.strayed,
        "last_error": one.last,
    }


def _published(points: Points, asked: Sequence[float]) -> list[Record]:
    """The paper's constants, and what they would say here."""
    rows = [row for row in TABLE_3 if row.kind == points.kind]
    at = np.array(asked, dtype=np.float64)
    return [
        {
            "model": row.model,
            "dataset": row.dataset,
            "method": "slicegpt",
            "a": row.a,
            "b": row.b,
            "rmse": row.rmse,
            "source": SOURCE,
            "predictions": [
                {"sparsity": float(s), points.kind: float(v)}
                for s, v in zip(at, row.at(points.dense).predict(at), strict=True)
            ],
        }
        for row in rows
    ]
