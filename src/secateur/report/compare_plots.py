"""The plots of a comparison: perplexity after removing parameters or zeroing weights, before and after recovery."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from secateur.report import words
from secateur.report.looks import look, looks
from secateur.report.plots import (
    DENSE,
    DPI,
    GRID,
    Far,
    Percent,
    Picture,
    legend,
    plain,
    png,
    room,
    scale,
)
from secateur.report.rows import Row
from secateur.report.series import by_perplexity

_TALL = 10  # times the lowest bar: what is taller is cut off, with its value, so that the others can be told apart
_FEW = 3  # levels of sparsity: more of them are curves, which the report has anyway


@dataclass(frozen=True)
class _Point:
    """A result: its method, its level (a number and a text), its perplexity or inf, and whether it was healed."""

    row: Row
    name: str
    at: float
    where: str
    ppl: float
    healed: bool


def pictures(rows: Sequence[Row]) -> list[Picture]:
    """The plots of rows of one model under one protocol.

    One plot is for results with fewer parameters, one for zeroed weights; each needs two methods.
    """
    dense = next((row for row in rows if row.dense), None)
    removed, zeroed = [], []
    for row in rows:
        if row.dense or (ppl := row.cost) is None or row.get("modules"):
            continue
        pattern, healed = row.get("pattern"), bool(row.get("heal"))
        method, *added = [part for part in str(row.get("method")).split(" + ") if part != "LoRA"]
        if ratio := row.number("pruning_ratio"):
            name = " + ".join([" ".join(filter(None, (method, pattern))), *added])
            removed.append(_Point(row, name, ratio, f"{100 * ratio:.3g}%", ppl, healed))
        elif pattern and row.sparsity:
            where = f"{pattern}, {row.sparsity:.0%} of the weights"
            zeroed.append(_Point(row, method, round(row.sparsity, 2), where, ppl, healed))
    drawn = []
    removed, zeroed = (points if any(math.isfinite(p.ppl) for p in points) else [] for points in (removed, zeroed))
    if len({point.name for point in removed}) > 1:
        drawn.append(_curves(removed, dense))
    if len({point.name for point in zeroed}) > 1 and len({point.where for point in zeroed}) <= _FEW:
        drawn.append(_bars(zeroed, dense))
    return drawn


def _title(points: Sequence[_Point], dense: Row | None, otherwise: str) -> str:
    """The main result of the points; `otherwise` if no two of them can be compared."""
    found = next((c for c in by_perplexity([point.row for point in points]) if len(c.entries) > 1), None)
    return otherwise if found is None else words.perplexity_title(found, dense)


def _curves(points: Sequence[_Point], dense: Row | None) -> Picture:
    figure, axes = _figure(_title(points, dense, "What removing parameters costs"), height=5)
    names = _best_first(points)
    curves = [(name, healed) for name in names for healed in (False, True)]
    for (name, healed), own in zip(
        curves, looks([_method(name) + " + LoRA" * healed for name, healed in curves]), strict=True
    ):
        at = sorted(
            (point.at, point.ppl)
            for point in points
            if point.name == name and point.healed == healed and math.isfinite(point.ppl)
        )
        axes.plot(
            [x for x, _ in at],
            [y for _, y in at],
            linestyle=own.dash,
            markersize=6,
            label=None if healed else plain(name),
            **own.points,
        )
    axes.set_xlabel("share of all parameters removed, measured")
    axes.xaxis.set_major_formatter(Percent())
    caption = (
        "Results of one model under one protocol, at the share of all parameters that the written checkpoint lacks."
    )
    if any(point.healed for point in points):
        axes.plot([], [], "--", color="#777777", marker="o", markerfacecolor="white", label="after recovery (LoRA)")
        caption += " Dashed and hollow: after recovery with low-rank adapters."
    _dense_line(axes, dense)
    room(axes, [point.at for point in points])
    known = [point.ppl for point in points if math.isfinite(point.ppl)]
    far = [
        Far(point.at, point.ppl if math.isfinite(point.ppl) else None, look(_method(point.name)).colour)
        for point in points
    ]
    caption += scale(axes, known, None if dense is None else dense.ppl, far)
    legend(axes, figure, inside=0)
    return Picture(
        "compare-removed",
        png(figure),
        f"Perplexity against the share of parameters removed: {_readings(points)}",
        caption,
        frozenset(point.row for point in points),
    )


def _bars(points: Sequence[_Point], dense: Row | None) -> Picture:
    figure, axes = _figure(_title(points, dense, "What zeroing weights costs"), height=4.2)
    groups = list(
        dict.fromkeys(
            point.where for point in sorted(points, key=lambda point: (point.at, point.where[0].isdigit(), point.where))
        )
    )
    names = _best_first(points)
    wide = 0.8 / len(names)
    lowest = min(point.ppl for point in points)
    reference = 0.0 if dense is None else dense.ppl or 0.0
    top = 1.12 * max(value for value in [reference, *(point.ppl for point in points)] if value <= _TALL * lowest)
    cut, labelled = [point for point in points if point.ppl > top], set()
    for point in sorted(points, key=lambda point: (point.healed, names.index(point.name))):
        nth = names.index(point.name)
        x = groups.index(point.where) - 0.4 + wide * (nth + 0.5)
        if point.healed and point.ppl <= top:
            axes.plot(
                [x - wide * 0.4, x + wide * 0.4],
                [point.ppl, point.ppl],
                color="white",
                linewidth=2,
                linestyle=(0, (2, 1)),
            )
        elif not point.healed:
            label = None if point.name in labelled else plain(point.name)
            labelled.add(point.name)
            axes.bar(x, min(point.ppl, top), wide * 0.92, color=look(point.name).colour, label=label)
            said = words.perplexity(point.ppl)
            arrow = "\N{UPWARDS ARROW} " if point.ppl > top else ""
            axes.annotate(f"{arrow}{said}", (x, min(point.ppl, top)), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(groups)), [plain(group) for group in groups])
    axes.grid(visible=False, axis="x")
    caption = "Parameters stay, as zeros."
    if any(point.healed for point in points):
        caption += " White dashes: after recovery with low-rank adapters, which keeps the zeros."
    if cut:
        axes.set_ylim(0, 1.06 * top)
        caption += f" Bars with an arrow go on to their value: it is above {_TALL} times the lowest, or infinite."
    if lost := [point for point in cut if point.healed]:
        told = ", ".join(f"{point.name} {words.perplexity(point.ppl)}" for point in lost)
        caption += f" Off the scale after recovery: {told}."
    _dense_line(axes, dense)
    axes.set_ylabel("perplexity (lower is better)")
    legend(axes, figure, inside=0)
    return Picture(
        "compare-zeroed",
        png(figure),
        f"Perplexity where weights are zeroed: {_readings(points)}",
        caption,
        frozenset(point.row for point in points),
    )


def _figure(title: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    axes.set_title(plain(textwrap.fill(title, 84)), fontsize=11, loc="left", color="#111111")
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _dense_line(axes: Axes, dense: Row | None) -> None:
    if dense is not None and dense.ppl is not None:
        label = f"dense, {words.perplexity(dense.ppl)}"
        axes.axhline(dense.ppl, color=DENSE, linestyle="--", linewidth=1.2, label=label)


def _best_first(points: Sequence[_Point]) -> list[str]:
    """The names, ordered by mean perplexity over their results; the lowest comes first."""
    return sorted(
        {point.name for point in points},
        key=lambda name: (fmean(point.ppl for point in points if point.name == name), name),
    )


def _method(name: str) -> str:
    return name.partition(" ")[0]


def _readings(points: Sequence[_Point]) -> str:
    by_name: dict[str, list[str]] = {}
    for point in sorted(points, key=lambda point: (point.name, point.healed, point.at)):
        by_name.setdefault(point.name + " + LoRA" * point.healed, []).append(
            f"{words.perplexity(point.ppl)} at {point.where}"
        )
    return "; ".join(f"{name}: {', '.join(readings)}" for name, readings in by_name.items())
