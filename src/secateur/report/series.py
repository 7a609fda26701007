"""Rows as curves: which runs belong together, and which curve is best at a common level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from secateur.report.rows import Row


@dataclass(frozen=True)
class Series:
    """Runs that differ only in sparsity (and seed), ascending. The per-module runs of a method are one unjoined series.

    Attributes:
        label: method and pattern, and the options that differ from other series.
        method: the method, which decides the colour.
        joined: whether a line through the points has a meaning.
    """

    label: str
    method: str
    joined: bool
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Entry:
    """A series at one level of sparsity: the mean of its runs there."""

    label: str
    value: float
    runs: int
    stderr: float | None


@dataclass(frozen=True)
class Comparison:
    """Series side by side at an equal removed fraction; the best comes first.

    Attributes:
        level: the fraction removed.
        removed: whether parameters were removed (the fraction is of all parameters) or zeroed (it is the sparsity).
        entries: at least one.
    """

    level: float
    removed: bool
    entries: tuple[Entry, ...]

    @property
    def where(self) -> str:
        """The level in words."""
        return f"{self.level:.0%} of all parameters removed" if self.removed else f"{self.level:.0%} sparsity"

    @property
    def clear(self) -> bool:
        """Whether the best leads by more than two standard errors of the difference; unknown errors count as 0."""
        if len(self.entries) < 2:
            return True
        first, second = self.entries[:2]
        error = math.hypot(first.stderr or 0.0, second.stderr or 0.0)
        return abs(first.value - second.value) > 2 * error


def series(rows: Sequence[Row]) -> list[Series]:
    """The curves of the pruned rows, by method and label."""
    by_label: dict[str, list[Row]] = {}
    pruned = [row for row in rows if not row.dense]
    varied = {base(row): _varied([other for other in pruned if base(other) == base(row)]) for row in pruned}
    for row in pruned:
        extra = [f"{name}={value}" for name, value in _variant(row).items() if name in varied[base(row)]]
        by_label.setdefault(", ".join([base(row), *extra]), []).append(row)
    curves = [
        Series(label, str(members[0].get("method")), not members[0].get("modules"), tuple(members))
        for label, members in by_label.items()
    ]
    return sorted(curves, key=lambda curve: (curve.method, curve.label))


def base(row: Row) -> str:
    """Method and pattern of a row; the pattern `unstructured` is not named."""
    pattern = row.get("pattern")
    name = f"{row.get('method') or 'unknown method'}" + (f" {pattern}" if pattern not in (None, "unstructured") else "")
    return f"{name} per module" if row.get("modules") else name


def _variant(row: Row) -> dict[str, Any]:
    """The options and calibration settings, in which runs of one method and pattern may differ."""
    calibration = row.part("calibration")
    options = {name: value for name, value in row.part("options").items() if name != "pattern"}
    return options | {
        f"calibration {name}": calibration.get(name) for name in ("spec", "samples", "seqlen") if calibration
    }


def _varied(rows: Sequence[Row]) -> set[str]:
    variants = [_variant(row) for row in rows]
    return {
        name for variant in variants for name in variant if any(other.get(name) != variant[name] for other in variants)
    }


def compare(
    curves: Sequence[Series],
    value: Callable[[Row], float | None],
    stderr: Callable[[Row], float | None],
    *,
    lowest: bool,
) -> Comparison | None:
    """Compare the series at the highest level with two methods, or at the highest level if no level has two.

    Results that removed parameters are not compared with results that zeroed them. Per-module runs are not compared.
    """
    levels: dict[tuple[bool, float], list[tuple[Series, list[Row]]]] = {}
    for curve in curves:
        here: dict[tuple[bool, float], list[Row]] = {}
        for row in curve.rows:
            if curve.joined and value(row) is not None and (level := _level(row)):
                here.setdefault(level, []).append(row)
        for level, members in here.items():
            levels.setdefault(level, []).append((curve, members))
    if not levels:
        return None
    best = max(
        levels, key=lambda level: (len({curve.method for curve, _ in levels[level]}) > 1, level[1], not level[0])
    )
    entries = [_entry(curve.label, members, value, stderr) for curve, members in levels[best]]
    return Comparison(
        best[1], best[0], tuple(sorted(entries, key=lambda entry: entry.value if lowest else -entry.value))
    )


def _level(row: Row) -> tuple[bool, float] | None:
    ratio, sparsity = row.number("pruning_ratio") or 0.0, row.sparsity
    if ratio > 0:
        return True, round(ratio, 2)
    return None if sparsity is None else (False, round(sparsity, 2))


def _entry(
    label: str, rows: Sequence[Row], value: Callable[[Row], float | None], stderr: Callable[[Row], float | None]
) -> Entry:
    values = [v for row in rows if (v := value(row)) is not None]
    errors = [e for row in rows if (e := stderr(row)) is not None]
    return Entry(label, fmean(values), len(values), fmean(errors) if errors else None)
