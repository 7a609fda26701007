"""A law with its constants: predictions, their intervals, and the sparsity at which a target value is reached.

Intervals are 95% intervals of least squares. They are exact for linear laws with normal errors in y; the other laws use
the tangent at the fitted constants (the delta method). With only as many points as constants the errors cannot be
estimated, and the result has no intervals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from secateur.predict.laws import Array, Law

LEVEL = 0.95
_END = 1 - 1e-9  # sparsity 1 leaves nothing


@dataclass(frozen=True, eq=False)
class Fit:
    """A law fitted to points, or with given constants and no points.

    Attributes:
        law: the form.
        constants: in the order of `law.constants`.
        dense: perplexity or accuracy of the dense model.
        s, values: the points of the fit, [N].
    """

    law: Law
    constants: Array
    dense: float
    s: Array
    values: Array

    @cached_property
    def y(self) -> Array:
        """The points in the law's y."""
        return self.law.scale.to(self.values, self.dense)

    @cached_property
    def residuals(self) -> Array:
        """Measured minus fitted, in y."""
        return self.y - self.law.mean(self.constants, self.s)

    @property
    def spare(self) -> int:
        """The number of points minus the number of fitted constants (degrees of freedom)."""
        return len(self.s) - len(self.law.free)

    @property
    def rmse(self) -> float | None:
        """Root of the mean squared error in y, as in the paper's table 3; None without points."""
        return math.sqrt(float(np.square(self.residuals).mean())) if len(self.s) else None

    @property
    def rmse_ln(self) -> float | None:
        """Root of the mean squared error in ln(value), the same unit for all laws; None without points."""
        return (
            math.sqrt(float(np.square(log_errors(self.values, self.predict(self.s))).mean())) if len(self.s) else None
        )

    @cached_property
    def sigma(self) -> float | None:
        """Standard deviation of one measurement, in y; None without spare points."""
        return math.sqrt(float(np.square(self.residuals).sum()) / self.spare) if self.spare > 0 else None

    @cached_property
    def _spread(self) -> Array:
        """Covariance of the free constants in units of sigma squared, [K, K]."""
        gradient = self.law.gradient(self.constants, self.s)
        return np.asarray(np.linalg.pinv(gradient.T @ gradient)) if gradient.shape[1] else np.zeros((0, 0))

    def constant_intervals(self) -> dict[str, tuple[float, float] | None]:
        """The 95% interval of each free constant; None without spare points."""
        if self.sigma is None:
            return dict.fromkeys(self.law.free)
        half = student_quantile(self.spare) * self.sigma * np.sqrt(np.diag(self._spread))
        given = dict(zip(self.law.constants, self.constants, strict=True))
        return {
            name: (float(given[name] - h), float(given[name] + h)) for name, h in zip(self.law.free, half, strict=True)
        }

    def predict(self, s: Array) -> Array:
        """Perplexity or accuracy at s; infinity if the law has no perplexity there."""
        return self.law.scale.back(self.law.mean(self.constants, s), self.dense)

    def interval(self, s: Array) -> tuple[Array, Array] | None:
        """The range of a new measurement at s with 95% probability, if the law holds; None without spare points."""
        if self.sigma is None:
            return None
        gradient = self.law.gradient(self.constants, s)
        half = (
            student_quantile(self.spare)
            * self.sigma
            * np.sqrt(1 + np.einsum("nk,kl,nl->n", gradient, self._spread, gradient))
        )
        mean = self.law.mean(self.constants, s)
        ends = np.stack([self.law.scale.back(mean - half, self.dense), self.law.scale.back(mean + half, self.dense)])
        return ends.min(0), ends.max(0)

    def inverse(self, wanted: float, bound: str = "mean") -> float | None:
        """The largest sparsity that keeps the target.

        Args:
            wanted: the perplexity not to exceed, or the accuracy not to fall below.
            bound: "mean", the law's own line, or an end of the interval ("low", "high").

        Returns:
            A sparsity in [0, 1); None if no sparsity keeps the target, or if the interval does not exist.
        """

        def keeps(s: Array) -> Array:
            ends = self.interval(s) if bound != "mean" else None
            value = self.predict(s) if ends is None else ends[bound == "high"]
            return np.asarray(value <= wanted if self.law.kind == "ppl" else value >= wanted)

        if bound != "mean" and self.sigma is None:
            return None
        grid = np.linspace(0.0, _END, 4001)
        keeping = np.flatnonzero(keeps(grid))
        if not len(keeping):
            return None
        last = int(keeping[-1])
        if last == len(grid) - 1:
            return _END
        low, high = grid[last], grid[last + 1]
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if keeps(np.array([middle]))[0] else (low, middle)
        return float(low)

    @property
    def range(self) -> tuple[float, float] | None:
        """The smallest and largest sparsity of the fit, between which the law interpolates; None without points."""
        if not len(self.s):
            return None
        return (0.0 if self.law.pinned else float(self.s.min())), float(self.s.max())

    def extrapolates(self, s: float) -> bool:
        """Whether s lies outside the fitted range."""
        return self.range is None or not self.range[0] <= s <= self.range[1]

    def named(self) -> dict[str, float]:
        """The constants by name."""
        return {name: float(value) for name, value in zip(self.law.constants, self.constants, strict=True)}


def fit(law: Law, s: Array, values: Array, dense: float) -> Fit | None:
    """Fit by least squares in the law's y; None if there are fewer distinct sparsities than constants."""
    if len(np.unique(s)) < len(law.free):
        return None
    return Fit(law, law.solve(s, law.scale.to(values, dense)), dense, s, values)


def given(law: Law, constants: tuple[float, ...], dense: float) -> Fit:
    """A law with known constants and no points: predictions without intervals."""
    return Fit(law, np.array(constants), dense, np.zeros(0), np.zeros(0))


def log_errors(values: Array, predicted: Array) -> Array:
    """ln predicted - ln measured; infinite outside the domain of the law."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(predicted) - np.log(values))


@lru_cache
def student_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t with P(|T| < t) = level, for a whole number of degrees of freedom.

    From the finite sums 26.7.3 and 26.7.4 of Abramowitz and Stegun, solved by bisection; numpy has no quantiles.
    """
    low, high = 0.0, math.pi / 2  # theta = atan(t / sqrt(degrees)) maps the whole axis to a finite interval
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _central_probability(theta: float, degrees: int) -> float:
    odd = degrees % 2
    term, total = (math.cos(theta) if odd else 1.0), 0.0
    for k in range(odd + 1, degrees, 2):  # `degrees // 2` terms
        total += term
        term *= math.cos(theta) ** 2 * k / (k + 1)
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
