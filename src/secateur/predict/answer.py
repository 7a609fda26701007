"""From points to an answer: the fitted law, its rivals, predictions with intervals, the target, and warnings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from secateur.core.errors import UsageError
from secateur.core.records import Record, version
from secateur.predict.choose import Prediction, choose
from secateur.predict.doubts import warnings
from secateur.predict.fit import LEVEL
from secateur.predict.points import Points
from secateur.predict.published import SOURCE, TABLE_3
from secateur.predict.select import Judged

_NO_POINTS_AT = (0.1, 0.2, 0.3, 0.4, 0.5)


def predict(
    points: Points,
    law: str | None = None,
    *,
    at: Sequence[float] = (),
    removed: Sequence[float] = (),
    target: float | None = None,
    dense_in_fit: bool = False,
) -> tuple[Prediction, Record]:
    """Predict the value at each sparsity, and the largest sparsity that keeps a target.

    Args:
        points, law, dense_in_fit: see `choose`.
        at: sparsities in [0, 1); empty, and without `removed`, takes the measured ones.
        removed: shares of all parameters to remove, instead of sparsities.
        target: the perplexity not to exceed, or the accuracy not to fall below.

    Returns:
        The prediction, and the record that `secateur predict --json` prints.
    """
    _check_target(points, target)
    prediction = choose(points, law, dense_in_fit=dense_in_fit)
    for s in at:
        if not 0 <= s < 1:
            raise UsageError(f"--at {s:g} is outside [0, 1)")
    sparsities = [*at, *map(points.sparsity_for, removed)] or (list(points.s) or list(_NO_POINTS_AT)) * (target is None)
    answers = [_at(prediction, s) | _removed(points, s) for s in sparsities]
    target_answer = None if target is None else _aim(prediction, target)
    if target_answer is not None and target_answer["sparsity"] is not None:
        target_answer |= _removed(points, target_answer["sparsity"])
    chosen, constants = prediction.chosen, prediction.chosen.named()
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
        "heldout_rmse": prediction.verdict.heldout,
        "points": len(points.s),
        "dense": points.dense,
        "dense_in_fit": prediction.dense_in_fit,
        "chance": points.chance,
        "fitted_range": chosen.range,
        "measured": [
            {"sparsity": float(s), points.kind: float(v)} for s, v in zip(points.s, points.values, strict=True)
        ],
        "asked": bool(at or removed),
        "predictions": answers,
        "target": target_answer,
        "best": prediction.winner.law.name if prediction.winner and len(points.s) >= 3 else None,
        "rivals": [_rival(judged) for judged in prediction.judged],
        "interpolation_rmse": prediction.interpolation,
        "published": _published(points, sparsities),
        "warnings": warnings(prediction, answers, target_answer),
    }
    return prediction, record


def _check_target(points: Points, target: float | None) -> None:
    if target is None:
        return
    if points.kind == "ppl" and not (math.isfinite(target) and target > 1):
        raise UsageError(f"--target-ppl {target:g}: a finite perplexity above 1 is needed")
    if points.kind == "acc" and not 0 < target <= 1:
        raise UsageError(f"--target-acc {target:g}: an accuracy in (0, 1] is needed")


def _at(prediction: Prediction, s: float) -> Record:
    """The value at a sparsity, its interval, and `other_laws`: the least and the most that the other laws give."""
    fit, at_s = prediction.chosen, np.array([s])
    ends = fit.interval(at_s)
    return {
        "sparsity": float(s),
        fit.law.kind: float(fit.predict(at_s)[0]),
        "low": None if ends is None else float(ends[0][0]),
        "high": None if ends is None else float(ends[1][0]),
        "other_laws": _spread(float(other.predict(at_s)[0]) for other in prediction.others),
        "extrapolated": fit.extrapolates(s),
    }


def _removed(points: Points, s: float) -> Record:
    """The share of all parameters that a sparsity removes, if the points tell."""
    shares = points.removed_at(np.array([s]))
    return {"params_removed": None if shares is None else float(shares[0])}


def _spread(values: Iterable[float | None]) -> list[float] | None:
    """The least and the greatest of what laws give; infinity for a law without a value, None without laws."""
    found = [math.inf if value is None or math.isnan(value) else value for value in values]
    return [min(found), max(found)] if found else None


def _aim(prediction: Prediction, target: float) -> Record:
    """The largest sparsity that keeps the target; at `cautious` the worse end of the interval keeps it too.

    `other_laws` are the least and the most that the other laws give, 0 where one has no such sparsity.
    """
    fit = prediction.chosen
    s = fit.inverse(target)
    worse = "high" if fit.law.kind == "ppl" else "low"
    return {
        fit.law.kind: float(target),
        "sparsity": s,
        "cautious": fit.inverse(target, worse),
        "other_laws": _spread(other.inverse(target) or 0.0 for other in prediction.others),
        "extrapolated": None if s is None else fit.extrapolates(s),
    }


def _rival(judged: Judged) -> Record:
    fit = judged.fit
    constants = None if fit is None else fit.named()
    return {
        "law": judged.law.name,
        "formula": judged.law.formula,
        "source": judged.law.source,
        "fitted": fit is not None,
        "a": constants and constants["a"],
        "b": constants and constants["b"],
        "constants": constants,
        "fitted_constants": len(judged.law.free),
        "rmse": fit.rmse if fit else None,
        "rmse_ln": fit.rmse_ln if fit else None,
        "heldout_rmse": judged.heldout,
        "heldout_points": len(judged.errors),
        "heldout_outside_domain": judged.strayed,
        "last_error": judged.last,
    }


def _published(points: Points, sparsities: Sequence[float]) -> list[Record]:
    """The paper's fits, and their predictions for this dense model."""
    rows = [row for row in TABLE_3 if row.kind == points.kind]
    at = np.array(sparsities, dtype=np.float64)
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
