"""Laws: known constants are recovered, curves invert, intervals cover, and each form wins on its own data."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from secateur.core.errors import UsageError
from secateur.predict.fit import Fit, fit, given, log_errors, student_quantile
from secateur.predict.laws import LAWS, Array, Law, find_law, laws_of
from secateur.predict.published import TABLE_3
from secateur.predict.select import interpolation_error, judge, leave_one_out

S = np.array([0.05, 0.12, 0.2, 0.25, 0.31, 0.42, 0.5, 0.58])
# Constants that give plausible curves, by law; those of laws without free constants are theirs.
TRUE: dict[str, tuple[float, ...]] = {
    "ratio": (-1.08, 0.96),
    "theory": (-1.0, 1.0),
    "log-linear": (2.3, 0.4),
    "log-slope": (2.3, 0.0),
    "power": (1.7, -0.2),
    "quadratic": (0.8, 4.0),
    "exponential": (0.3, 5.0),
    "phase": (2.0, 1.6, 9.0, 0.37),
    "log-ratio": (-1.84, 0.04),
    "proportional": (-0.9, 0.0),
    "linear": (-0.8, 1.02),
}
DENSE = {"ppl": 5.47, "acc": 0.78}
EXACT = {"ratio", "theory", "log-linear", "log-slope", "power", "log-ratio", "proportional", "linear"}
every_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)


def curve(law: Law, s: Array = S) -> Array:
    return given(law, TRUE[law.name], DENSE[law.kind]).predict(s)


def fitted(law: Law, values: Array, s: Array = S) -> Fit:
    found = fit(law, s, values, DENSE[law.kind])
    assert found is not None
    return found


@every_law
def test_known_constants_come_back(law: Law) -> None:
    found = fitted(law, curve(law))
    np.testing.assert_allclose(found.constants, TRUE[law.name], atol=1e-12 if law.name in EXACT else 3e-6)
    assert found.rmse is not None
    assert found.rmse < (1e-12 if law.name in EXACT else 1e-7)


@every_law
def test_formula_is_the_curve(law: Law) -> None:
    """Each prediction against its formula written out, so that transforms and mean cannot be wrong together."""
    c, v0 = TRUE[law.name], DENSE[law.kind]
    ln = math.log(v0)

    def phase(s: float) -> float:
        return c[0] * s ** c[1] if s <= c[3] else c[0] * c[3] ** c[1] + c[2] * (s - c[3])

    written = {
        "ratio": lambda s: math.exp(ln / (c[0] * s + c[1])),
        "theory": lambda s: math.exp(ln / (1 - s)),
        "log-linear": lambda s: v0 * math.exp(c[0] * s + c[1]),
        "log-slope": lambda s: v0 * math.exp(c[0] * s),
        "power": lambda s: math.exp(ln / (math.exp(c[1]) * (1 - s) ** c[0])),
        "quadratic": lambda s: v0 * math.exp(c[0] * s + c[1] * s * s),
        "exponential": lambda s: v0 * math.exp(c[0] * (math.exp(c[1] * s) - 1) / c[1]),
        "phase": lambda s: v0 * math.exp(phase(s)),
        "log-ratio": lambda s: v0 * math.exp(c[0] * s + c[1]),
        "proportional": lambda s: v0 * math.exp(c[0] * s),
        "linear": lambda s: v0 * (c[0] * s + c[1]),
    }[law.name]
    np.testing.assert_allclose(curve(law), [written(float(s)) for s in S], rtol=1e-13)


@every_law
def test_the_inverse_of_a_prediction_is_its_sparsity(law: Law) -> None:
    found = given(law, TRUE[law.name], DENSE[law.kind])
    for s, value in zip(S, found.predict(S), strict=True):
        assert found.inverse(float(value)) == pytest.approx(s, abs=1e-9)


@every_law
def test_gradient_is_the_derivative(law: Law) -> None:
    constants, step = np.array(TRUE[law.name]), 1e-6
    free = [law.constants.index(name) for name in law.free]
    away = S[np.abs(S - 0.37) > 0.01]  # the phase law has a corner at its transition
    shifted = np.eye(len(constants))[free] * step
    numeric = [(law.mean(constants + d, away) - law.mean(constants - d, away)) / (2 * step) for d in shifted]
    np.testing.assert_allclose(law.gradient(constants, away), np.reshape(numeric, (len(free), len(away))).T, atol=1e-7)


def test_quadratic_never_falls_with_more_pruning() -> None:
    law = find_law("quadratic", "ppl")
    fades, bends = np.sqrt(S), S**3
    assert law.solve(S, fades)[1] == 0
    assert law.solve(S, bends)[0] == 0
    assert law.solve(S, bends)[1] == pytest.approx(float((S**2 @ bends) / (S**2 @ S**2)))
    assert (np.diff(law.mean(law.solve(S, -S), S)) >= 0).all()


def test_exponential_without_curvature_is_a_line() -> None:
    law = find_law("exponential", "ppl")
    for b in (0.0, 1e-9, -1e-9):
        np.testing.assert_allclose(law.mean(np.array([2.0, b]), S), 2.0 * S, rtol=1e-8)
        np.testing.assert_allclose(law.gradient(np.array([2.0, b]), S)[:, 1], S**2, rtol=1e-6)
    found = fitted(law, DENSE["ppl"] * np.exp(2.0 * S))
    np.testing.assert_allclose(found.constants, [2.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("row", TABLE_3, ids=lambda row: f"{row.model}-{row.dataset}")
def test_published_constants_reproduce_their_curves(row: object) -> None:
    from secateur.predict.published import Published

    assert isinstance(row, Published)
    dense = 7.5 if row.kind == "ppl" else 0.7
    for s in (0.1, 0.2, 0.3):
        value = float(row.at(dense).predict(np.array([s]))[0])
        y = math.log(dense) / math.log(value) if row.kind == "ppl" else math.log(value / dense)
        assert y == pytest.approx(row.a * s + row.b, abs=1e-12)


def test_published_table() -> None:
    """The figures of table 3, in the order of the paper."""
    assert [(row.a, row.b, row.rmse) for row in TABLE_3] == [
        (-1.08, 0.96, 0.03), (-0.90, 1.02, 0.01), (-2.14, 0.04, 0.05), (-1.84, 0.04, 0.04), (-2.02, -0.07, 0.09),
        (-1.88, -0.01, 0.02), (-0.86, -0.02, 0.02), (-0.66, -0.02, 0.02), (-0.91, -0.01, 0.03), (-0.90, 0.01, 0.01),
    ]  # fmt: skip
    assert [row.kind for row in TABLE_3] == ["ppl"] * 2 + ["acc"] * 8


def test_student_quantiles() -> None:
    """Tabulated values (Abramowitz and Stegun, table 26.10)."""
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980}
    for degrees, value in known.items():
        assert student_quantile(degrees) == pytest.approx(value, abs=6e-4)


def test_intervals_of_the_fit_are_the_textbook_ones() -> None:
    draw = np.random.default_rng(5)
    values = np.exp(math.log(5.47) / (-0.9 * S + 1.0 + 0.02 * draw.standard_normal(len(S))))
    found = fitted(find_law("ratio", "ppl"), values)
    y = math.log(5.47) / np.log(values)
    mean_s, spread = S.mean(), float(((S - S.mean()) ** 2).sum())
    a = float(((S - mean_s) * y).sum() / spread)
    b = float(y.mean() - a * mean_s)
    sigma = math.sqrt(float(((y - a * S - b) ** 2).sum()) / (len(S) - 2))
    t = student_quantile(len(S) - 2)
    intervals = found.constant_intervals()
    assert intervals["a"] == pytest.approx((a - t * sigma / math.sqrt(spread), a + t * sigma / math.sqrt(spread)))
    half_b = t * sigma * math.sqrt(1 / len(S) + mean_s**2 / spread)
    assert intervals["b"] == pytest.approx((b - half_b, b + half_b))
    half = t * sigma * math.sqrt(1 + 1 / len(S) + (0.7 - mean_s) ** 2 / spread)
    ends = found.interval(np.array([0.7]))
    assert ends is not None
    assert (ends[0][0], ends[1][0]) == pytest.approx(
        (math.exp(math.log(5.47) / (a * 0.7 + b + half)), math.exp(math.log(5.47) / (a * 0.7 + b - half)))
    )


@pytest.mark.parametrize("name", ["ratio", "theory", "power", "proportional", "exponential"])
def test_intervals_cover(name: str) -> None:
    """2,000 seeded studies of six points with normal errors in y: a seventh falls inside 95% of the intervals (2,000
    draws have a standard error of 0.5%).
    """
    law = next(law for law in LAWS if law.name == name)
    draw, s, new, trials = (
        np.random.default_rng(11),
        np.linspace(0.1, 0.4, 6),
        np.array([0.33]),
        2000 if name != "exponential" else 400,
    )
    dense, constants, inside = DENSE[law.kind], np.array(TRUE[name]), 0
    for _ in range(trials):
        values = law.scale.back(law.mean(constants, s) + 0.01 * draw.standard_normal(6), dense)
        measured = law.scale.back(law.mean(constants, new) + 0.01 * draw.standard_normal(1), dense)[0]
        ends = fit(law, s, values, dense).interval(new)  # type: ignore[union-attr]
        assert ends is not None
        inside += bool(ends[0][0] <= measured <= ends[1][0])
    assert inside / trials == pytest.approx(0.95, abs=0.015 if name != "exponential" else 0.035)


def test_intervals_of_constants_cover() -> None:
    law, draw, s = find_law("ratio", "ppl"), np.random.default_rng(3), np.linspace(0.1, 0.4, 5)
    held = {"a": 0, "b": 0}
    for _ in range(2000):
        values = law.scale.back(-1.0 * s + 1.0 + 0.01 * draw.standard_normal(5), 5.0)
        for name, ends in fit(law, s, values, 5.0).constant_intervals().items():  # type: ignore[union-attr]
            assert ends is not None
            held[name] += ends[0] <= {"a": -1.0, "b": 1.0}[name] <= ends[1]
    assert {name: count / 2000 for name, count in held.items()} == pytest.approx({"a": 0.95, "b": 0.95}, abs=0.015)


@every_law
def test_leave_one_out_is_the_naive_loop(law: Law) -> None:
    draw = np.random.default_rng(2)
    values = law.scale.back(
        law.mean(np.array(TRUE[law.name]), S) + 0.01 * draw.standard_normal(len(S)), DENSE[law.kind]
    )
    errors = leave_one_out(law, S, values, DENSE[law.kind])
    naive = []
    for n in range(len(S)):
        others = [m for m in range(len(S)) if m != n]
        found = fitted(law, values[others], S[others])
        naive.append(math.log(float(found.predict(S[n : n + 1])[0]) / float(values[n])))
    assert errors == pytest.approx(naive, abs=1e-12)
    assert max(map(abs, errors)) > 1e-4


def test_a_straight_line_is_held_out_by_hand() -> None:
    """Three points of the ratio law: two of them give the third, by the line through two points."""
    s, y = (0.1, 0.2, 0.4), (0.9, 0.82, 0.5)
    values = np.exp(1.5 / np.array(y))
    errors = leave_one_out(find_law("ratio", "ppl"), np.array(s), values, math.exp(1.5))
    for n, (p, q) in zip((2, 1, 0), combinations(range(3), 2), strict=True):
        guess = y[p] + (y[q] - y[p]) / (s[q] - s[p]) * (s[n] - s[p])
        assert errors[n] == pytest.approx(1.5 / guess - 1.5 / y[n])


@every_law
def test_each_form_wins_on_its_own_data(law: Law) -> None:
    best = judge(law.kind, S, curve(law), DENSE[law.kind])[0]
    nested = {
        "theory": {"theory", "ratio", "power"},
        "log-slope": {"log-slope", "log-linear", "quadratic", "exponential", "phase"},
        "proportional": {"proportional", "log-ratio"},
    }  # the wider form is exact there too
    assert best.law.name in nested.get(law.name, {law.name})
    assert best.heldout is not None
    # a held-out point next to the corner leaves the transition to be found between its neighbours
    assert best.heldout < (1e-6 if law.name != "phase" else 0.05)


@every_law
def test_too_few_points_are_not_fitted(law: Law) -> None:
    values, enough = curve(law), len(law.free)
    for count in range(len(S)):
        assert (fit(law, S[:count], values[:count], DENSE[law.kind]) is not None) == (count >= enough)
        assert len(leave_one_out(law, S[:count], values[:count], DENSE[law.kind])) == (
            count if count > enough or not enough else 0
        )
    exact = fit(law, S[:enough], values[:enough], DENSE[law.kind])
    assert exact is not None
    assert exact.sigma is None
    assert exact.interval(S) is None
    assert exact.inverse(float(values[1]), "high") is None
    assert set(exact.constant_intervals().values()) <= {None}


def test_beyond_the_domain_there_is_no_perplexity() -> None:
    found = given(find_law("ratio", "ppl"), (-2.0, 1.0), 5.0)
    assert found.predict(np.array([0.49, 0.5, 0.9])).tolist() == [pytest.approx(5.0**50), math.inf, math.inf]
    assert found.inverse(1e9) == pytest.approx((1 - math.log(5) / math.log(1e9)) / 2)
    assert given(find_law("linear", "acc"), (-2.0, 1.0), 0.8).predict(np.array([0.9])).tolist() == [0.0]


def test_targets_that_cannot_be_kept_or_always_are() -> None:
    ratio = given(find_law("ratio", "ppl"), (-1.0, 0.9), 5.0)  # at s = 0 already 5 ** (1 / 0.9) = 5.98
    assert ratio.inverse(5.9) is None
    assert ratio.inverse(6.0) == pytest.approx(0.9 - math.log(5) / math.log(6.0))
    assert given(find_law("proportional", "acc"), (-0.5, 0.0), 0.8).inverse(0.1) == pytest.approx(1.0)


def test_the_cautious_sparsity_keeps_the_worse_end() -> None:
    draw = np.random.default_rng(8)
    law = find_law("ratio", "ppl")
    found = fitted(law, law.scale.back(1.0 - 0.9 * S + 0.01 * draw.standard_normal(len(S)), DENSE["ppl"]))
    mean, cautious, bold = (found.inverse(12.0, bound) for bound in ("mean", "high", "low"))
    assert mean is not None
    assert cautious is not None
    assert bold is not None
    assert cautious < mean < bold
    ends = found.interval(np.array([cautious, bold]))
    assert ends is not None
    assert (ends[1][0], ends[0][1]) == pytest.approx((12.0, 12.0))


def test_rmse_is_in_y_and_in_the_logarithm() -> None:
    values = np.array([10.0, 20.0])
    found = Fit(find_law("theory", "ppl"), np.array([-1.0, 1.0]), 5.0, np.array([0.1, 0.3]), values)
    y = [math.log(5) / math.log(10), math.log(5) / math.log(20)]
    assert found.rmse == pytest.approx(math.sqrt(((y[0] - 0.9) ** 2 + (y[1] - 0.7) ** 2) / 2))
    logs = [math.log(5) / 0.9 - math.log(10), math.log(5) / 0.7 - math.log(20)]
    assert found.rmse_ln == pytest.approx(math.sqrt((logs[0] ** 2 + logs[1] ** 2) / 2))
    assert log_errors(values, np.array([20.0, math.inf])).tolist() == [pytest.approx(math.log(2)), math.inf]


def test_the_last_error_is_of_the_largest_sparsity() -> None:
    s, y = np.array([0.4, 0.1, 0.2]), np.array([0.5, 0.9, 0.82])  # not in order
    (ratio,) = (one for one in judge("ppl", s, np.exp(1.5 / y), math.exp(1.5)) if one.law.name == "ratio")
    assert ratio.last == pytest.approx(1.5 / (0.82 - 2 * 0.08) - 1.5 / 0.5)


def test_interpolation_by_hand() -> None:
    s, logs = np.array([0.3, 0.1, 0.2]), np.array([2.5, 1.2, 1.6])  # not in order; the dense model has 1
    inside = [(1.0 + 1.6) / 2 - 1.2, 1.2 + (2.5 - 1.2) / 2 - 1.6]
    beyond = 1.6 + 0.4 - 2.5
    assert interpolation_error(s, np.exp(logs), math.e) == pytest.approx(
        math.sqrt((inside[0] ** 2 + inside[1] ** 2 + beyond**2) / 3)
    )
    assert interpolation_error(s[:2], np.exp(logs[:2]), math.e) is None


def test_the_dense_point_pulls_the_fit_only_where_asked() -> None:
    values = np.exp(math.log(5.0) / (0.6 - 0.8 * S[:5]))
    without = {one.law.name: one for one in judge("ppl", S[:5], values, 5.0)}
    with_it = {one.law.name: one for one in judge("ppl", S[:5], values, 5.0, dense_in_fit=True)}
    assert without["ratio"].fit is not None
    assert with_it["ratio"].fit is not None
    assert without["ratio"].fit.named() == pytest.approx({"a": -0.8, "b": 0.6})
    slope, intercept = np.polyfit([0, *S[:5]], [1, *(0.6 - 0.8 * S[:5])], 1)
    assert with_it["ratio"].fit.named() == pytest.approx({"a": slope, "b": intercept})
    assert with_it["exponential"].heldout == without["exponential"].heldout  # it passes through the dense model anyway
    assert len(with_it["ratio"].errors) == 5  # the dense model is never held out


def test_unknown_law_names_those_of_its_kind() -> None:
    with pytest.raises(UsageError, match=r"unknown law for accuracy 'ratio'.*log-ratio, proportional"):
        find_law("ratio", "acc")
    assert {law.name for law in laws_of("ppl")} | {law.name for law in laws_of("acc")} == set(TRUE)
