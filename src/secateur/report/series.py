"""Rows as curves: which runs belong together, and which curve is best at a common level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from secateur.report.rows import Row, changed

NEAR = 0.02  # fractions removed that lie so near may be compared, with a word about it
SAME = 0.005  # and so near they are equal
_TINY = 1e-9


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
    """A series at one level: the mean of its runs there.

    Attributes:
        label: that of the series.
        value: what is compared.
        runs: the number of runs.
        stderr: the standard error of the value, where it was measured.
        reached: the fraction that was removed or zeroed.
        changed: whether the model was trained after pruning (healed).
        zeroed: the share of all parameters that is zero, where the records have it.
    """

    label: str
    value: float
    runs: int
    stderr: float | None
    reached: float
    changed: bool
    zeroed: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Series side by side that were asked for the same, or that lie near one another; the best comes first.

    Attributes:
        level: the fraction asked for; the mean of those reached if nothing was asked in common.
        removed: whether parameters were removed (the fraction is of all parameters) or zeroed (it is the sparsity).
        asked: whether all were asked for `level`.
        entries: at least one.
        astray: label and fraction of the runs that were asked for the level too, and landed too far away to compare.
        joined: the labels of entries that were not asked for the level, and lie near it.
    """

    level: float
    removed: bool
    asked: bool
    entries: tuple[Entry, ...]
    astray: tuple[tuple[str, float], ...] = ()
    joined: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The level in words; the fractions reached, if they differ from it or from one another.

        Where weights were zeroed, their share of all parameters comes first, and the sparsity after it.
        """
        shares = [entry.zeroed for entry in self.entries if entry.zeroed is not None]
        if self.removed or len(shares) < len(self.entries):
            return self._level
        least, most = f"{min(shares):.1%}", f"{max(shares):.1%}"
        sparsity = self._level.replace(" (", ", ").rstrip(")")
        return f"{least if least == most else f'{least} to {most}'} zeroed ({sparsity})"

    @property
    def _level(self) -> str:
        noun = "of all parameters removed" if self.removed else "sparsity"
        least, most = min(entry.reached for entry in self.entries), max(entry.reached for entry in self.entries)
        spread = f"{least:.1%} to {most:.1%}"
        if self.asked and max(abs(least - self.level), abs(most - self.level)) > SAME:
            reached = f"{least:.1%}" if f"{least:.1%}" == f"{most:.1%}" else spread
            return f"{100 * self.level:.3g}% {noun.replace('removed', 'asked for')} (reached: {reached})"
        if self.asked or most - least <= SAME:
            return f"{100 * self.level:.3g}% {noun}"
        return f"about {self.level:.0%} {noun} ({spread})"

    @property
    def equal(self) -> bool:
        """Whether all reached the same, within half a point."""
        reached = [entry.reached for entry in self.entries]
        return max(reached) - min(reached) <= SAME

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


@dataclass(frozen=True)
class _Run:
    """A measured row of a series: what was asked for (None if that is no share of the whole), and what was reached."""

    curve: Series
    row: Row
    asked: float | None
    reached: float


@dataclass
class _Group:
    """Runs that are compared, the level that they were asked for (None without one), and what `Comparison` says."""

    runs: list[_Run]
    asked: float | None = None
    astray: list[_Run] = field(default_factory=list)
    joined: list[_Run] = field(default_factory=list)


def compare(
    curves: Sequence[Series],
    value: Callable[[Row], float | None],
    stderr: Callable[[Row], float | None],
    *,
    lowest: bool,
) -> Comparison | None:
    """The first of `comparisons`; None if nothing was measured."""
    return next(iter(comparisons(curves, value, stderr, lowest=lowest)), None)


def by_perplexity(rows: Sequence[Row]) -> list[Comparison]:
    """Compare the perplexities of rows; one that is infinite comes last."""
    return comparisons(series(rows), lambda row: row.cost, lambda _: None, lowest=True)


def comparisons(
    curves: Sequence[Series],
    value: Callable[[Row], float | None],
    stderr: Callable[[Row], float | None],
    *,
    lowest: bool,
) -> list[Comparison]:
    """Compare the series level by level: first the levels with two methods, the highest first, then the others.

    Runs that were asked for the same stand together, whatever they reached, without those that landed more than NEAR
    away from it (if one came near). Runs that were asked for nothing in common stand together within NEAR.
    Results that removed parameters are not compared with results that zeroed them. Per-module runs are not compared.
    """
    found: list[tuple[int, Comparison]] = []
    for removed in (True, False):
        runs = [
            run
            for curve in curves
            if curve.joined
            for row in curve.rows
            if value(row) is not None and (run := _run(curve, row, removed=removed)) is not None
        ]
        together, left = _asked_alike(runs)
        for group in [*together, *map(_Group, _near(left))]:
            entries = _entries(group.runs, value, stderr)
            comparison = Comparison(
                fmean(entry.reached for entry in entries) if group.asked is None else group.asked,
                removed,
                group.asked is not None,
                tuple(sorted(entries, key=lambda entry: entry.value if lowest else -entry.value)),
                tuple((run.curve.label, run.reached) for run in group.astray),
                tuple(dict.fromkeys(run.curve.label for run in group.joined)),
            )
            found.append((len(_methods(group.runs)), comparison))
    order = sorted(found, key=lambda each: (each[0] > 1, each[1].level, not each[1].removed), reverse=True)
    return [comparison for _, comparison in order]


def _run(curve: Series, row: Row, *, removed: bool) -> _Run | None:
    ratio = row.number("pruning_ratio") or 0.0
    if removed:
        return _Run(curve, row, row.number("params_removed"), ratio) if ratio > 0 else None
    return _Run(curve, row, row.number("sparsity"), row.sparsity) if ratio == 0 and row.sparsity else None


def _asked_alike(runs: Sequence[_Run]) -> tuple[list[_Group], list[_Run]]:
    """A group for each level that two series were asked for, and the runs that are in none.

    A run that was not asked for such a level joins the nearest, if it reached it within NEAR. One that was asked for it
    and landed too far away is in none, and stands in no group of its own.
    """
    asked: dict[float, list[_Run]] = {}
    for run in runs:
        if run.asked is not None:
            asked.setdefault(round(run.asked, 4), []).append(run)
    groups = {}
    for level, members in asked.items():
        near = [run for run in members if abs(run.reached - level) <= NEAR + _TINY]
        compared = near or members
        if _several(members):
            groups[level] = _Group(compared, level, [run for run in members if run not in compared])
    placed = {id(run) for group in groups.values() for run in [*group.runs, *group.astray]}
    left: list[_Run] = []
    for run in runs:
        if id(run) in placed:
            continue
        distance, level = min(((abs(run.reached - level), level) for level in groups), default=(math.inf, 0.0))
        (left if distance > NEAR + _TINY else groups[level].joined).append(run)
    for level, group in groups.items():
        known = {id(run.curve) for run in group.runs}
        group.joined = _nearest([run for run in group.joined if id(run.curve) not in known], level)
        group.runs = [*group.runs, *group.joined]
    return list(groups.values()), left


def _several(runs: Sequence[_Run]) -> bool:
    return len(_by_series(runs)) > 1


def _by_series(runs: Sequence[_Run]) -> list[list[_Run]]:
    """The runs of each series."""
    by_curve: dict[int, list[_Run]] = {}
    for run in runs:
        by_curve.setdefault(id(run.curve), []).append(run)
    return list(by_curve.values())


def _nearest(runs: Sequence[_Run], level: float) -> list[_Run]:
    """Of each series the runs nearest to a level."""
    nearest = []
    for own in _by_series(runs):
        best = min(own, key=lambda run: abs(run.reached - level)).reached
        nearest += [run for run in own if abs(run.reached - best) <= SAME]
    return nearest


def _near(runs: Sequence[_Run]) -> list[list[_Run]]:
    """Groups of runs within NEAR of one another: those with the most methods first, of equal ones the highest.

    Of a series that has several runs in a group, those nearest to the middle stay.
    """
    left, groups = list(runs), []
    while left:
        windows = [[r for r in left if -_TINY <= r.reached - low.reached <= NEAR + _TINY] for low in left]
        window = max(windows, key=lambda members: (len(_methods(members)), min(r.reached for r in members)))
        groups.append(_nearest(window, fmean(run.reached for run in window)))
        left = [run for run in left if run not in window]
    return groups


def _methods(runs: Sequence[_Run]) -> set[str]:
    return {run.curve.method for run in runs}


def _entries(
    runs: Sequence[_Run], value: Callable[[Row], float | None], stderr: Callable[[Row], float | None]
) -> list[Entry]:
    """One entry for each series."""
    entries = []
    for members in _by_series(runs):
        rows = [run.row for run in members]
        errors = [e for row in rows if (e := stderr(row)) is not None]
        zeroed = [share for row in rows if (share := row.zeroed) is not None]
        entries.append(
            Entry(
                members[0].curve.label,
                fmean(v for row in rows if (v := value(row)) is not None),
                len(rows),
                fmean(errors) if errors else None,
                fmean(run.reached for run in members),
                all(changed(row) for row in rows),
                fmean(zeroed) if len(zeroed) == len(rows) else None,
            )
        )
    return entries
