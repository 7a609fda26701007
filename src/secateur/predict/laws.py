"""The laws: perplexity or accuracy as a function of sparsity s, each one small frozen object.

The paper's laws are equations 2 and 3 of "How can representation dimension dominate structurally pruned LLMs?"
(arXiv:2503.04377): ln PPL0 / ln PPL = 1 - s, fitted as y = a s + b, and ln(acc / acc0) = a s + b. Equation 3 as printed
(proportional to 1 - s) cannot hold at s = 0, where ln(acc / acc0) = 0. It must mean the form with b = 0; table 3 of the
paper has a free slope and b near 0.

The other laws are rivals on the same points. `phase` follows the study "Phase transitions in large language model
compression" (npj Artificial Intelligence, 2026; repository whucs21Mzy/Model-Phase-Transitions): a power law up to a
transition point, an exponential beyond. The study has the power law in PPL. Here it is in ln PPL, which is the same to
first order and makes two of the four constants linear.

Legend of shapes: N points, K fitted constants, G trials of constants. s, y and values are float64 arrays [N].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import unknown

Array = NDArray[np.float64]
Kind = Literal["ppl", "acc"]


@dataclass(frozen=True)
class Scale:
    """The quantity y in which a law is fitted, computed from a value and the dense model's value.

    Attributes:
        formula: y in words.
        to: (values, dense value) to y.
        back: (y, dense value) to values; infinity, or an accuracy of 0, if no value gives this y.
    """

    formula: str
    to: Callable[[Array, float], Array]
    back: Callable[[Array, float], Array]


def _ratio_back(y: Array, dense: float) -> Array:
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(y > 0, np.exp(np.log(dense) / np.where(y > 0, y, 1.0)), np.inf)


def _exp(y: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(y))


RATIO = Scale("ln PPL0 / ln PPL", lambda v, v0: np.log(v0) / np.log(v), _ratio_back)
LOG = Scale("ln PPL - ln PPL0", lambda v, v0: np.log(v / v0), lambda y, v0: v0 * _exp(y))
LOG_RATIO = Scale(
    "ln(ln PPL0 / ln PPL)", lambda v, v0: np.log(np.log(v0) / np.log(v)), lambda y, v0: _exp(np.log(v0) * _exp(-y))
)
LOG_ACC = Scale("ln(acc / acc0)", lambda v, v0: np.log(v / v0), lambda y, v0: v0 * _exp(y))
SHARE = Scale("acc / acc0", lambda v, v0: v / v0, lambda y, v0: np.maximum(0.0, v0 * y))


class Law(Protocol):
    """A formula with constants, of which `free` are fitted.

    `pinned`: whether the law passes through the dense model for all constants; then s = 0 lies inside its fitted range.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def kind(self) -> Kind: ...  # noqa: D102
    @property
    def formula(self) -> str: ...  # noqa: D102
    @property
    def domain(self) -> str: ...  # noqa: D102
    @property
    def source(self) -> str: ...  # noqa: D102
    @property
    def scale(self) -> Scale: ...  # noqa: D102
    @property
    def constants(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def free(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def pinned(self) -> bool: ...  # noqa: D102

    def solve(self, s: Array, y: Array) -> Array:
        """The constants with the least squared error in y; needs at least as many points as `free` constants."""
        ...

    def mean(self, constants: Array, s: Array) -> Array:
        """y at s."""
        ...

    def gradient(self, constants: Array, s: Array) -> Array:
        """Derivatives of y by the free constants, [N, K]."""
        ...


@dataclass(frozen=True)
class LinearLaw:
    """y = a x(s) + b, by least squares; a constant with a given value is not fitted.

    Attributes:
        regressor: x, a function of s.
        a, b: None if fitted.
    """

    name: str
    kind: Kind
    formula: str
    domain: str
    source: str
    scale: Scale
    regressor: Callable[[Array], Array] = lambda s: s
    a: float | None = None
    b: float | None = None

    constants = ("a", "b")

    @property
    def free(self) -> tuple[str, ...]:
        """The constants without a given value."""
        return tuple(name for name in self.constants if getattr(self, name) is None)

    @property
    def pinned(self) -> bool:
        """Whether b is given."""
        return self.b is not None

    def solve(self, s: Array, y: Array) -> Array:
        """Return (a, b)."""
        constants = np.array([self.a or 0.0, self.b or 0.0])
        if not self.free:
            return constants
        rest = y - self.mean(constants, s)  # the free constants are still 0
        fitted, *_ = np.linalg.lstsq(self.gradient(constants, s), rest, rcond=None)
        constants[[self.constants.index(name) for name in self.free]] = fitted
        return constants

    def mean(self, constants: Array, s: Array) -> Array:
        """y at s."""
        return np.asarray(constants[0] * self.regressor(s) + constants[1])

    def gradient(self, constants: Array, s: Array) -> Array:
        """Derivatives of y by the free constants, [N, K]."""
        columns = {"a": self.regressor(s), "b": np.ones_like(s)}
        return np.stack([columns[name] for name in self.free], axis=1) if self.free else np.zeros((len(s), 0))


@dataclass(frozen=True)
class QuadraticLaw:
    """y = a s + b s^2, with a and b at least 0: more pruning does not help.

    Both are linear: with a bound reached, the other one alone is fitted.
    """

    name: str = "quadratic"
    kind: Kind = "ppl"
    formula: str = "ln(PPL / PPL0) = a s + b s^2"
    domain: str = "0 <= s < 1"
    source: str = "arXiv:2504.04342: the loss rises with the square of the compression"
    scale: Scale = LOG

    constants = free = ("a", "b")
    pinned = True

    def solve(self, s: Array, y: Array) -> Array:
        """Return (a, b)."""
        _, constants = _two_columns(s[None], np.square(s)[None], y)
        return np.asarray(constants[0])

    def mean(self, constants: Array, s: Array) -> Array:
        """y at s."""
        return np.asarray(constants[0] * s + constants[1] * np.square(s))

    def gradient(self, constants: Array, s: Array) -> Array:
        """Derivatives of y by a and b, [N, 2]."""
        return np.stack([s, np.square(s)], axis=1)


_POWER_AT_MOST, _GROWTH_AT_MOST = 16.0, 60.0


@dataclass(frozen=True)
class ExponentialLaw:
    """y = a (exp(b s) - 1) / b: slope a at s = 0, which grows (b > 0) or fades with s.

    The law is linear in a, so only b is searched.
    """

    name: str = "exponential"
    kind: Kind = "ppl"
    formula: str = "ln(PPL / PPL0) = a (exp(b s) - 1) / b"
    domain: str = "0 <= s < 1"
    source: str = "a rival form"
    scale: Scale = LOG

    constants = free = ("a", "b")
    pinned = True

    def solve(self, s: Array, y: Array) -> Array:
        """Return (a, b), with b in [-60, 60]."""

        def trial(trials_G1: Array) -> tuple[Array, Array]:
            x_GN = _growth(trials_G1, s)
            a_G = (x_GN @ y) / np.square(x_GN).sum(1)
            return np.square(y - a_G[:, None] * x_GN).sum(1), a_G[:, None]

        (b,), (a,) = _search(trial, [np.linspace(-_GROWTH_AT_MOST, _GROWTH_AT_MOST, 241)])
        return np.array([a, b])

    def mean(self, constants: Array, s: Array) -> Array:
        """y at s."""
        a, b = constants
        return np.asarray(a * _growth(np.array([[b]]), s)[0])

    def gradient(self, constants: Array, s: Array) -> Array:
        """Derivatives of y by a and b, [N, 2]."""
        a, b = constants
        x = _growth(np.array([[b]]), s)[0]
        # near b = 0 the derivative of x by b is s^2 / 2, which the quotient below cannot give
        slope = np.square(s) / 2 if abs(b) < 1e-6 else (s * np.exp(b * s) - x) / b
        return np.stack([x, a * slope], axis=1)


def _growth(b_G1: Array, s: Array) -> Array:
    """(exp(b s) - 1) / b, or s if b is 0; [G, N]."""
    safe_G1 = np.where(np.abs(b_G1) < 1e-12, 1e-12, b_G1)
    return np.asarray(np.expm1(safe_G1 * s) / safe_G1)


@dataclass(frozen=True)
class PhaseLaw:
    """y = a s^b up to t, y = a t^b + c (s - t) beyond: a power law, then exponential growth of PPL; continuous at t.

    a and c are linear and at least 0 (more pruning does not help). b and the transition t are searched. t lies between
    the second and the last but one sparsity, so that points lie on both sides.
    """

    name: str = "phase"
    kind: Kind = "ppl"
    formula: str = "ln(PPL / PPL0) = a s^b for s <= t, a t^b + c (s - t) beyond"
    domain: str = "0 <= s < 1"
    source: str = "Phase transitions in large language model compression (npj Artificial Intelligence, 2026), in ln PPL"
    scale: Scale = LOG

    constants = free = ("a", "b", "c", "t")
    pinned = True

    def solve(self, s: Array, y: Array) -> Array:
        """Return (a, b, c, t), with b in [0.25, 16]."""
        ordered = np.unique(s[s > 0])
        low, high = (ordered[1], ordered[-2]) if len(ordered) > 3 else (ordered[0], ordered[-1])

        def trial(trials_G2: Array) -> tuple[Array, Array]:
            b_G1, t_G1 = trials_G2[:, :1], trials_G2[:, 1:]
            return _two_columns(np.minimum(s, t_G1) ** b_G1, np.maximum(0.0, s - t_G1), y)

        (b, t), (a, c) = _search(trial, [np.geomspace(0.25, _POWER_AT_MOST, 49), np.linspace(low, high, 61)])
        return np.array([a, b, c, t])

    def mean(self, constants: Array, s: Array) -> Array:
        """y at s."""
        a, b, c, t = constants
        return np.asarray(a * np.minimum(s, t) ** b + c * np.maximum(0.0, s - t))

    def gradient(self, constants: Array, s: Array) -> Array:
        """Derivatives of y by a, b, c and t, [N, 4]."""
        a, b, c, t = constants
        low = np.minimum(s, t)
        by_b = a * low**b * np.log(np.where(low > 0, low, 1.0))
        by_t = np.where(s > t, a * b * t ** (b - 1) - c, 0.0)
        return np.stack([low**b, by_b, np.maximum(0.0, s - t), by_t], axis=1)


def _two_columns(u_GN: Array, v_GN: Array, y: Array) -> tuple[Array, Array]:
    """Solve least squares y = a u + c v with a, c >= 0 for each trial; return errors [G] and (a, c) [G, 2]."""
    uu, vv, uv, uy, vy = (u_GN**2).sum(1), (v_GN**2).sum(1), (u_GN * v_GN).sum(1), u_GN @ y, v_GN @ y
    tiny = np.finfo(np.float64).tiny
    determinant = uu * vv - uv**2
    proper = determinant > 1e-14 * uu * vv
    safe = np.where(proper, determinant, 1.0)
    both = np.stack([(vv * uy - uv * vy) / safe, (uu * vy - uv * uy) / safe], 1)
    only_u = np.stack([np.maximum(0.0, uy / np.maximum(uu, tiny)), np.zeros_like(uu)], 1)
    only_v = np.stack([np.zeros_like(vv), np.maximum(0.0, vy / np.maximum(vv, tiny))], 1)
    usable = proper & (both >= 0).all(1)
    candidates = np.stack([np.where(usable[:, None], both, only_u), only_u, only_v])
    errors = np.square(y - candidates[..., :1] * u_GN - candidates[..., 1:] * v_GN).sum(-1)
    best, every = errors.argmin(0), np.arange(len(uu))
    return errors[best, every], candidates[best, every]


def _search(trial: Callable[[Array], tuple[Array, Array]], axes: list[Array]) -> tuple[Array, Array]:
    """Minimise over a grid, then over smaller and smaller grids around the best point.

    A grid is needed because the errors have several minima: one each time the transition passes a measured sparsity.

    Returns:
        The searched constants, and the linear ones.
    """
    low, high = np.array([axis[0] for axis in axes]), np.array([axis[-1] for axis in axes])
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    steps = np.stack(np.meshgrid(*[np.linspace(-1, 1, 5)] * len(axes), indexing="ij"), -1).reshape(-1, len(axes))
    errors, linear = trial(points)
    n = int(errors.argmin())
    best, best_linear, least = points[n], linear[n], errors[n]
    width = np.array([np.diff(axis).max() for axis in axes])
    for _ in range(60):
        points = np.clip(best + steps * width, low, high)
        errors, linear = trial(points)
        n = int(errors.argmin())
        if errors[n] < least:
            best, best_linear, least = points[n], linear[n], errors[n]
        else:
            width = width / 2
    return best, best_linear


_PAPER = "arXiv:2503.04377"
_RATIO_DOMAIN = "a s + b > 0; beyond it the law has no perplexity"

LAWS: tuple[Law, ...] = (
    LinearLaw(
        "ratio",
        "ppl",
        "ln PPL0 / ln PPL = a s + b",
        _RATIO_DOMAIN,
        f"{_PAPER}, equation 2, fitted as in its table 3",
        RATIO,
    ),
    LinearLaw(
        "theory",
        "ppl",
        "ln PPL0 / ln PPL = 1 - s",
        "0 <= s < 1",
        f"{_PAPER}, equation 2, no fitted constant",
        RATIO,
        a=-1.0,
        b=1.0,
    ),
    LinearLaw(
        "log-linear",
        "ppl",
        "ln PPL - ln PPL0 = a s + b",
        "0 <= s < 1",
        "a rival form: PPL grows exponentially with s",
        LOG,
    ),
    LinearLaw(
        "log-slope",
        "ppl",
        "ln PPL - ln PPL0 = a s",
        "0 <= s < 1",
        "a rival form: log-linear through the dense model; one point determines it",
        LOG,
        b=0.0,
    ),
    LinearLaw(
        "power",
        "ppl",
        "ln PPL0 / ln PPL = exp(b) (1 - s)^a",
        "0 <= s < 1",
        "a rival form: equation 2 to a power",
        LOG_RATIO,
        lambda s: np.log1p(-s),
    ),
    QuadraticLaw(),
    ExponentialLaw(),
    PhaseLaw(),
    LinearLaw(
        "log-ratio",
        "acc",
        "ln(acc / acc0) = a s + b",
        "0 <= s < 1; knows no chance level",
        f"{_PAPER}, equation 3, fitted as in its table 3",
        LOG_ACC,
    ),
    LinearLaw(
        "proportional",
        "acc",
        "ln(acc / acc0) = a s",
        "0 <= s < 1; knows no chance level",
        f"{_PAPER}, equation 3 with b = 0",
        LOG_ACC,
        b=0.0,
    ),
    LinearLaw("linear", "acc", "acc / acc0 = a s + b", "a s + b > 0; knows no chance level", "a rival form", SHARE),
)

DEFAULT: dict[Kind, str] = {"ppl": "ratio", "acc": "log-ratio"}


def laws_of(kind: Kind) -> list[Law]:
    """The laws for perplexity ("ppl") or for accuracy ("acc")."""
    return [law for law in LAWS if law.kind == kind]


def find_law(name: str, kind: Kind) -> Law:
    """The law with this name.

    Raises:
        UsageError: no law for this kind of value has this name.
    """
    laws = {law.name: law for law in laws_of(kind)}
    if name not in laws:
        raise unknown(f"law for {'perplexity' if kind == 'ppl' else 'accuracy'}", name, [*laws, "best"])
    return laws[name]
