"""Fit and judge every law, and choose one for the predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from secateur.core.errors import SecateurError
from secateur.predict.fit import Fit
from secateur.predict.laws import DEFAULT, Law, find_law
from secateur.predict.points import Points
from secateur.predict.select import Judged, fit_points, interpolation_error, judge

# A rival is named when its held-out error is this much smaller: less is luck with so few points.
_CLEARLY = 0.9
_NOISE = 0.002  # below it, held-out errors are those of the measurement


@dataclass(frozen=True, eq=False)
class Prediction:
    """The law chosen for some points, and the laws it was compared with.

    Attributes:
        points: the measured points.
        judged: every law for this metric, the least held-out error first.
        chosen: the fit that makes the predictions.
        interpolation: held-out error of plain interpolation between points, without a law.
        dense_in_fit: whether the dense model counts as a point of the fit.
    """

    points: Points
    judged: tuple[Judged, ...]
    chosen: Fit
    interpolation: float | None
    dense_in_fit: bool

    @property
    def verdict(self) -> Judged:
        """The held-out errors of the chosen law."""
        return next(judged for judged in self.judged if judged.law.name == self.chosen.law.name)

    @property
    def winner(self) -> Judged | None:
        """The law with the least held-out error; None if no point could be held out."""
        return self.judged[0] if self.judged[0].heldout is not None and math.isfinite(self.judged[0].heldout) else None

    @property
    def others(self) -> list[Fit]:
        """The fits of the other laws with fitted constants: those judged on held-out points, or all if none could be.

        A law without fitted constants says nothing of these points, and one that cannot be judged may go anywhere.
        """
        rivals = [judged for judged in self.judged if judged.law.free and judged.law.name != self.chosen.law.name]
        sound = [judged for judged in rivals if judged.heldout is not None and math.isfinite(judged.heldout)]
        return [judged.fit for judged in sound or rivals if judged.fit is not None]

    @property
    def beaten(self) -> bool:
        """Whether another law does clearly better on three held-out points or more."""
        best, held = self.winner, self.verdict.heldout
        if best is None or best.heldout is None or len(self.points.s) < 3 or best.law.name == self.chosen.law.name:
            return False
        return held is None or (held > _NOISE and best.heldout < _CLEARLY * held)


def choose(points: Points, law: str | None = None, *, dense_in_fit: bool = False) -> Prediction:
    """Fit every law, judge each on held-out points, and choose one.

    Args:
        points: at least as many as the law has constants; without points, only the parameter-free law is possible.
        law: its name, or "best" for the law with the least held-out error. None takes the paper's fitted law (without
            points, its parameter-free law).
        dense_in_fit: count the dense model as a point. It is not one by default: y = 1 (or 0) at s = 0 holds by
            definition, so this point would only pull the line towards the law's claim.

    Raises:
        UsageError: the law is unknown.
        SecateurError: the points are fewer than the constants.
    """
    kind, count = points.kind, len(points.s)
    if law not in (None, "best"):
        find_law(law or "", kind)  # check the name first
    judged = tuple(judge(kind, points.s, points.values, points.dense, dense_in_fit=dense_in_fit))
    if law == "best":
        ranked = [
            rival
            for rival in judged
            if rival.heldout is not None and math.isfinite(rival.heldout) and rival.fit is not None
        ]
        # the parameter-free law can be judged on a single point: then there is only one law to choose from
        if count < 3 or not ranked:
            raise SecateurError(
                f"--law best compares held-out errors, which takes three pruned points or more (there are {count}): "
                "name a law, or measure more"
            )
        name = ranked[0].law.name
    else:
        name = law or ("theory" if kind == "ppl" and count == 0 else DEFAULT[kind])
    chosen_law = find_law(name, kind)
    fit = fit_points(chosen_law, points.s, points.values, points.dense, dense_in_fit=dense_in_fit)
    if fit is None:
        raise SecateurError(_too_few(chosen_law, points))
    return Prediction(points, judged, fit, interpolation_error(points.s, points.values, points.dense), dense_in_fit)


def _too_few(law: Law, points: Points) -> str:
    count = len(points.s)
    have = "one pruned point" if count == 1 else f"{count} pruned points" if count else "no pruned point"
    fewer = (
        ", or --law theory, which needs none"
        if points.kind == "ppl"
        else ", or --law proportional, which has one constant"
        if count == 1
        else ""
    )
    lost = [warning for warning in points.warnings if warning.endswith("left out")]
    why = f" ({len(lost)} more left out, the first: {lost[0]})" if lost else ""
    more = (
        "measure more sparsities with 'secateur sweep'"
        if points.sweep is None
        else f"first measure other sizes with '{points.sweep}' and the same calibration, and give DIR too"
    )
    return f"{have}{why} cannot fit law '{law.name}' ({len(law.free)} constants: {', '.join(law.free)}): {more}{fewer}"
