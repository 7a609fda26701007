"""The plots of a report, as PNG bytes that are the same for the same rows.

Figures are made without pyplot, which keeps global state. Colours are those of Okabe and Ito (jfly.uni-koeln.de/color),
chosen to be told apart with any colour vision; shape of marker and dash of line say the same again for print.
"""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from secateur.predict.points import CHANCE
from secateur.report import words
from secateur.report.rows import Row
from secateur.report.series import Comparison, Series

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS, _DASHES = "osD^vPX*", ("-", "--", "-.", ":")
DENSE, GRID, DPI = "#333333", "#dddddd", 150


@dataclass(frozen=True)
class Picture:
    """A plot.

    Attributes:
        name: the name of its file, without `.png`.
        png: the bytes of the file.
        alt: its content in words, for readers who cannot see it.
        caption: a caution for the reader.
    """

    name: str
    png: bytes
    alt: str
    caption: str


_LOG_ABOVE = 3  # where the largest perplexity is so many times the smallest, small differences drown on a linear axis


def perplexity(curves: Sequence[Series], dense: Row | None, found: Comparison | None) -> Picture | None:
    """Draw perplexity against sparsity; None if no pruned row has both. The title states the comparison `found`."""
    if not _drawable(curves, lambda row: row.ppl):
        return None
    figure, axes = _axes(words.perplexity_title(found, dense))
    low, high = _draw_curves(axes, curves, lambda row: row.ppl)
    if dense is not None and dense.ppl is not None:
        low = min(low, dense.ppl)
        axes.axhline(
            dense.ppl, color=DENSE, linestyle="--", linewidth=1.2, label=f"dense, {words.perplexity(dense.ppl)}"
        )
    wide = low > 0 and high > _LOG_ABOVE * low
    if wide:
        logarithmic(axes, high / low)
    axes.set_ylabel("perplexity, log scale (lower is better)" if wide else "perplexity (lower is better)")
    legend(axes, figure)
    alt = "Perplexity against measured sparsity: " + "; ".join(_readings(curves, lambda row: row.ppl, words.perplexity))
    caption = (
        "Sparsity is the fraction removed of what a method removes from (the weights of the targeted matrices, "
        "or widths)"
    )
    return Picture(
        "perplexity", png(figure), alt, f"{caption}; the table has the pruning ratio, which is what files shrink by."
    )


def accuracy(task: str, curves: Sequence[Series], dense: Row | None, found: Comparison | None) -> Picture | None:
    """Draw the accuracy of a task against sparsity, with standard errors; None if no pruned row has both."""
    if not _drawable(curves, lambda row: row.accuracy(task)):
        return None
    reference = dense.accuracy(task) if dense is not None else None
    figure, axes = _axes(words.accuracy_title(task, found, reference))
    _draw_curves(axes, curves, lambda row: row.accuracy(task), lambda row: row.task(task, "stderr"))
    if reference is not None:
        axes.axhline(reference, color=DENSE, linestyle="--", linewidth=1.2, label=f"dense, {reference:.3f}")
    if task in CHANCE:
        axes.axhline(CHANCE[task], color="#888888", linestyle=":", linewidth=1.6, label=f"chance, {CHANCE[task]:g}")
    axes.set_ylabel(f"accuracy on {plain(task)} (higher is better)")
    legend(axes, figure)
    alt = f"Accuracy on {task} against measured sparsity: " + "; ".join(
        _readings(curves, lambda row: row.accuracy(task), lambda value: f"{value:.3f}")
    )
    slug = "".join(c if c.isascii() and c.isalnum() else "-" for c in task)
    return Picture(
        f"accuracy-{slug}", png(figure), alt, "Bars are one standard error of the accuracy, where it was measured."
    )


def _drawable(curves: Sequence[Series], value: Callable[[Row], float | None]) -> bool:
    return any(row.sparsity is not None and value(row) is not None for curve in curves for row in curve.rows)


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.2), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    axes.set_title(plain(textwrap.fill(title, 76)), fontsize=11, loc="left", color="#111111")
    axes.set_xlabel("sparsity, measured")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_curves(
    axes: Axes,
    curves: Sequence[Series],
    value: Callable[[Row], float | None],
    error: Callable[[Row], float | None] | None = None,
) -> tuple[float, float]:
    """Draw the points of each curve and a line through their means; returns the least and the largest value."""
    drawn: list[float] = []
    methods = list(dict.fromkeys(curve.method for curve in curves))
    lines: dict[str, int] = {}
    for curve, marker in zip(curves, itertools.cycle(MARKERS)):
        points = [
            (row.sparsity, y, error(row) if error else None)
            for row in curve.rows
            if row.sparsity is not None and (y := value(row)) is not None
        ]
        if not points:
            continue
        colour, line = COLOURS[methods.index(curve.method) % len(COLOURS)], "none"
        if curve.joined and len({round(x, 3) for x, _, _ in points}) > 1:
            nth = lines[curve.method] = lines.get(curve.method, -1) + 1
            line = _DASHES[nth % len(_DASHES)]
            axes.plot(*_means([(x, y) for x, y, _ in points]), color=colour, linestyle=line, linewidth=1.8)
        xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
        if error:
            axes.errorbar(
                xs, ys, yerr=[e or 0.0 for _, _, e in points], fmt="none", ecolor=colour, elinewidth=1.0, capsize=3
            )
        # Points without a line are hollow, so that several points at one sparsity stay visible.
        look: dict[str, Any] = (
            {"markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.8}
            if line == "none"
            else {"markersize": 6}
        )
        axes.plot(xs, ys, color=colour, marker=marker, linestyle="none", **look)
        # The legend shows line and marker together; the calls above drew them separately.
        axes.plot([], [], color=colour, marker=marker, linestyle=line, linewidth=1.8, label=plain(curve.label), **look)
        drawn += ys
    return min(drawn), max(drawn)


def _means(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The points of the line, one per sparsity: the mean over runs that differ only in their seed."""
    at: dict[float, list[float]] = {}
    for x, y in points:
        at.setdefault(round(x, 3), []).append(y)
    return sorted(at), [fmean(at[x]) for x in sorted(at)]


def logarithmic(axes: Axes, span: float) -> None:
    """Make the y axis logarithmic, with plain numbers, and ticks for a largest value of `span` times the smallest."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if span < 10 else (1.0, 2.0, 5.0) if span < 1000 else (1.0,))
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


_LINE = 0.19  # inches per line of a legend


def legend(axes: Axes, figure: Figure) -> None:
    """Draw the legend inside a plot with few curves, else beside it in an enlarged figure, where it hides no point."""
    entries = len(axes.get_legend_handles_labels()[1])
    if entries <= 6:
        axes.legend(fontsize=9, framealpha=0.9, edgecolor=GRID)
        return
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + (2 if entries > 12 else 0), max(height, _LINE * entries + 1))


def _readings(
    curves: Sequence[Series], value: Callable[[Row], float | None], say: Callable[[float], str | None]
) -> list[str]:
    return [
        f"{curve.label}: "
        + ", ".join(f"{say(y)} at {words.percent(row.sparsity)}" for row in curve.rows if (y := value(row)) is not None)
        for curve in curves
        if any(value(row) is not None for row in curve.rows)
    ]


def plain(text: str) -> str:
    """Escape text for matplotlib, where a dollar sign would start a formula."""
    return text.replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """The bytes of a figure, the same for the same drawing."""
    buffer = io.BytesIO()
    # By default the file names the version of matplotlib.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
