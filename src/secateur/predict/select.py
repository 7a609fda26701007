"""Which law predicts held-out points best: leave-one-out, in the logarithm of the value, one unit for all laws."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from secateur.predict.fit import Fit, fit, log_errors
from secateur.predict.laws import Array, Kind, Law, laws_of


@dataclass(frozen=True, eq=False)
class Judged:
    """A law, its fit to all points, and its errors on held-out points.

    Attributes:
        law: the form.
        fit: None if there are fewer points than constants.
        errors: ln predicted - ln measured of each point, predicted by the fit to the others; infinite if that fit has
            no value there. Empty if the others are fewer than the constants.
        last: the error at the largest sparsity, predicted from the smaller ones (the error of an extrapolation).
    """

    law: Law
    fit: Fit | None
    errors: tuple[float, ...]
    last: float | None

    @property
    def heldout(self) -> float | None:
        """Root of the mean squared held-out error; infinity if a point has no predicted value, None without errors."""
        return math.sqrt(math.fsum(error * error for error in self.errors) / len(self.errors)) if self.errors else None

    @property
    def strayed(self) -> int:
        """The number of held-out points at which the law has no value."""
        return sum(math.isinf(error) for error in self.errors)


def leave_one_out(law: Law, s: Array, values: Array, dense: float, *, dense_in_fit: bool = False) -> tuple[float, ...]:
    """The error of each point, predicted from the others; empty if those are too few.

    The dense model is never held out.
    """
    errors = []
    for n in range(len(s)):
        fitted = fit_points(law, np.delete(s, n), np.delete(values, n), dense, dense_in_fit=dense_in_fit)
        if fitted is None:
            return ()
        errors.append(float(log_errors(values[n : n + 1], fitted.predict(s[n : n + 1]))[0]))
    return tuple(errors)


def fit_points(law: Law, s: Array, values: Array, dense: float, *, dense_in_fit: bool = False) -> Fit | None:
    """Fit the law; `dense_in_fit` adds the dense model as a point, unless the law passes through it anyway."""
    if dense_in_fit and not law.pinned:
        s, values = np.append(0.0, s), np.append(dense, values)
    return fit(law, s, values, dense)


def judge(kind: Kind, s: Array, values: Array, dense: float, *, dense_in_fit: bool = False) -> list[Judged]:
    """Judge every law for this kind of value; the law with the least held-out error comes first."""
    judged = []
    for law in laws_of(kind):
        errors = leave_one_out(law, s, values, dense, dense_in_fit=dense_in_fit)
        last = errors[int(s.argmax())] if errors else None
        judged.append(Judged(law, fit_points(law, s, values, dense, dense_in_fit=dense_in_fit), errors, last))
    return sorted(judged, key=lambda entry: math.inf if entry.heldout is None else entry.heldout)


def interpolation_error(s: Array, values: Array, dense: float) -> float | None:
    """Held-out error without a law, by linear interpolation of the logarithm; None below three points.

    The last point is extrapolated from the two before it.
    """
    if len(s) < 3:
        return None
    order = np.argsort(s)
    at, logs = np.append(0.0, s[order]), np.log(np.append(dense, values[order]))
    errors = []
    for n in range(1, len(at)):
        x, y = np.delete(at, n), np.delete(logs, n)
        if n == len(at) - 1:
            guess = y[-1] + (y[-1] - y[-2]) / (x[-1] - x[-2]) * (at[n] - x[-1])
        else:
            guess = np.interp(at[n], x, y)
        errors.append(float(guess - logs[n]))
    return math.sqrt(math.fsum(error * error for error in errors) / len(errors))
