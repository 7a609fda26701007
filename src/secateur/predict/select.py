"""Which law says most of points it has not seen: leave-one-out, in the logarithm of the value so that all laws compare in one unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from secateur.predict.fit import Fit, fit, log_errors
from secateur.predict.laws import Array, Kind, Law, laws_of


@dataclass(frozen=True, eq=False)
class Judged:
    """A law, its fit to all points, and how it did on points held out.

    Attributes:
        law: the form.
        fit: None where there are fewer points than constants.
        errors: ln predicted - ln measured of each point, by the fit to the others; infinite where that fit has no value there. Empty
            where the others are fewer than the constants.
        last: the error at the largest sparsity, predicted from the smaller ones: what a step of extrapolation costs.
    """

    law: Law
    fit: Fit | None
    errors: tuple[float, ...]
    last: float | None

    @property
    def heldout(self) -> float | None:
        """Root of the mean squared held-out error; infinity where the law has no value for some point, None where nothing was held out."""
        return math.sqrt(math.fsum(error * error for error in self.errors) / len(self.errors)) if self.errors else None

    @property
    def strayed(self) -> int:
        """How many held-out points the law has no value for."""
        return sum(math.isinf(error) for error in self.errors)


def leave_one_out(law: Law, s: Array, values: Array, dense: float, *, dense_in_fit: bool = False) -> tuple[float, ...]:
    """The error of each point predicted from the others; empty where those are too few. The dense model is never held out."""
    errors = []
    for n in range(len(s)):
        found = fit_points(law, np.delete(s, n), np.delete(values, n), dense, dense_in_fit=dense_in_fit)
        if found is None:
            return ()
        errors.append(float(log_errors(values[n : n + 1], found.predict(s[n : n + 1]))[0]))
    return tuple(errors)


def fit_points(law: Law, s: Array, values: Array, dense: float, *, dense_in_fit: bool = False) -> Fit | None:
    """Fit, with the dense model as one more point where that is asked for and the law does not pass through it anyway."""
    if dense_in_fit and not law.pinned:
        s, values = np.append(0.0, s), np.append(dense, values)
    return fit(law, s, values, dense)


def judge(kind: Kind, s: Array, values: Array, dense: float, *, dense_in_fit: bool = False) -> list[Judged]:
    """Every law for this kind of value, the one with the least held-out error first."""
    found = []
    for law in laws_of(kind):
        errors = leave_one_out(law, s, values, dense, dense_in_fit=dense_in_fit)
        last = errors[int(s.argmax())] if errors else None
        found.append(Judged(law, fit_points(law, s, values, dense, dense_in_fit=dense_in_fit), errors, last))
    return sorted(found, key=lambda one: math.inf if one.heldout is None else one.heldout)


def interpolation_error(s: Array, values: Array, dense: float) -> float | None:
    """Held-out error of no law at all: straight lines in the logarithm between neighbours, the last one prolonged. None below three points."""
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
