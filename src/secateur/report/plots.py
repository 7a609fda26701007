"""The plots of a report, as PNG bytes that are the same for the same rows.

Figures are made without pyplot, which keeps global state. `looks.py` has the colour and the marker of each method.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, NullFormatter

from secateur.predict.points import CHANCE
from secateur.report import words
from secateur.report.looks import COLOURS as COLOURS
from secateur.report.looks import MARKERS as MARKERS
from secateur.report.looks import look, looks
from secateur.report.rows import Row
from secateur.report.series import Comparison, Series

DENSE, GRID, DPI = "#333333", "#dddddd", 150


@dataclass(frozen=True)
class Picture:
    """A plot.

    Attributes:
        name: the name of its file, without `.png`.
        png: the bytes of the file.
        alt: its content in words, for readers who cannot see it.
        caption: a caution for the reader.
        shows: the rows whose perplexity it shows against what is gone; empty if it shows something else.
    """

    name: str
    png: bytes
    alt: str
    caption: str
    shows: frozenset[Row] = frozenset()


FAR = 100  # times the lowest perplexity of a pruned model: what lies above has its value at the edge of the plot
_LOG_ABOVE = 3  # where the largest perplexity is so many times the smallest, small differences drown on a linear axis


def perplexity(curves: Sequence[Series], dense: Row | None, found: Comparison | None) -> Picture | None:
    """Draw perplexity against what is gone; None if no pruned row has both. The title states the comparison `found`."""
    gone = _amount(curves)
    if not _drawable(curves, gone, lambda row: row.ppl):
        return None
    figure, axes = _axes(words.perplexity_title(found, dense), gone)
    values = [row.ppl for curve in curves for row in curve.rows if gone.of(row) is not None and row.ppl is not None]
    _draw_curves(axes, curves, gone, lambda row: row.ppl)
    if dense is not None and dense.ppl is not None:
        axes.axhline(
            dense.ppl, color=DENSE, linestyle="--", linewidth=1.2, label=f"dense, {words.perplexity(dense.ppl)}"
        )
    far = [
        Far(x, row.ppl, look(curve.method).colour)
        for curve in curves
        for row in curve.rows
        if (x := gone.of(row)) is not None and (row.ppl is not None or row.diverged)
    ]
    cut = scale(axes, values, None if dense is None else dense.ppl, far)
    legend(axes, figure)
    readings = "; ".join(_readings(curves, gone, lambda row: row.ppl, words.perplexity))
    shows = frozenset(
        row
        for curve in curves
        for row in curve.rows
        if gone.of(row) is not None and row.cost is not None and (gone is _GONE or not row.removed)
    )
    return Picture(
        "perplexity", png(figure), f"Perplexity against {gone.name}: {readings}", f"{gone.caption}{cut}", shows
    )


def accuracy(task: str, curves: Sequence[Series], dense: Row | None, found: Comparison | None) -> Picture | None:
    """Draw the accuracy of a task against what is gone, with standard errors; None if no pruned row has both."""
    gone = _amount(curves)
    if not _drawable(curves, gone, lambda row: row.accuracy(task)):
        return None
    reference = dense.accuracy(task) if dense is not None else None
    figure, axes = _axes(words.accuracy_title(task, found, reference), gone)
    _draw_curves(axes, curves, gone, lambda row: row.accuracy(task), lambda row: row.task(task, "stderr"))
    if reference is not None:
        axes.axhline(reference, color=DENSE, linestyle="--", linewidth=1.2, label=f"dense, {reference:.3f}")
    if task in CHANCE:
        axes.axhline(CHANCE[task], color="#888888", linestyle=":", linewidth=1.6, label=f"chance, {CHANCE[task]:g}")
    axes.set_ylabel(f"accuracy on {plain(task)} (higher is better)")
    legend(axes, figure)
    alt = f"Accuracy on {task} against {gone.name}: " + "; ".join(
        _readings(curves, gone, lambda row: row.accuracy(task), lambda value: f"{value:.3f}")
    )
    slug = "".join(c if c.isascii() and c.isalnum() else "-" for c in task)
    return Picture(
        f"accuracy-{slug}", png(figure), alt, "Bars are one standard error of the accuracy, where it was measured."
    )


@dataclass(frozen=True)
class _Amount:
    """What stands on the x axis: how much of the model is gone.

    Attributes:
        name: what it is a share of, for the axis.
        of: the share of a row; None if it is not known.
        caption: the same as a sentence, with its limits.
    """

    name: str
    of: Callable[[Row], float | None]
    caption: str


_GONE = _Amount(
    "parameters removed or zeroed",
    lambda row: row.gone,
    "Removed parameters make the files smaller; zeroed ones stay in them. The table has both shares.",
)
_SPARSITY = _Amount(
    "sparsity, measured",
    lambda row: row.sparsity,
    "Sparsity is the fraction removed of what a method removes from (the weights of the targeted matrices, or widths).",
)


def _amount(curves: Sequence[Series]) -> _Amount:
    """What all rows know: the parameters that are gone, or else (records of earlier versions) the sparsity alone."""
    rows = [row for curve in curves for row in curve.rows]
    return _GONE if all(row.gone is not None for row in rows) else _SPARSITY


def _drawable(curves: Sequence[Series], gone: _Amount, value: Callable[[Row], float | None]) -> bool:
    return any(gone.of(row) is not None and value(row) is not None for curve in curves for row in curve.rows)


def _axes(title: str, gone: _Amount) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.2), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    axes.set_title(plain(textwrap.fill(title, 76)), fontsize=11, loc="left", color="#111111")
    axes.set_xlabel(gone.name)
    axes.xaxis.set_major_formatter(Percent())
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_curves(
    axes: Axes,
    curves: Sequence[Series],
    gone: _Amount,
    value: Callable[[Row], float | None],
    error: Callable[[Row], float | None] | None = None,
) -> None:
    """Draw the points of each curve and a line through their means."""
    drawn: list[float] = []
    for curve, own in zip(curves, looks([curve.method for curve in curves]), strict=True):
        points = [
            (x, y, error(row) if error else None)
            for row in curve.rows
            if (x := gone.of(row)) is not None and (y := value(row)) is not None
        ]
        if not points:
            continue
        joined = curve.joined and len({round(x, 3) for x, _, _ in points}) > 1
        line = own.dash if joined else "none"
        if joined:
            axes.plot(*_means([(x, y) for x, y, _ in points]), color=own.colour, linestyle=line, linewidth=1.8)
        xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
        if error:
            axes.errorbar(
                xs, ys, yerr=[e or 0.0 for _, _, e in points], fmt="none", ecolor=own.colour, elinewidth=1.0, capsize=3
            )
        axes.plot(xs, ys, linestyle="none", markersize=7, **own.points)
        # The legend shows line and marker together; the calls above drew them separately.
        axes.plot([], [], linestyle=line, linewidth=1.8, markersize=7, label=plain(curve.label), **own.points)
        drawn += xs
    room(axes, drawn)


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


class Percent(Formatter):
    """Fractions as percentages, with as many decimals as the ticks have: no two read the same, and 12.5% is not 12%."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of one value, which has no neighbours to differ from."""
        return f"{100 * x:.3g}%"

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """The labels of all ticks."""
        for decimals in range(5):
            labels = [f"{round(100 * value, decimals) + 0.0:.{decimals}f}%" for value in values]  # + 0.0: no "-0%"
            exact = all(abs(round(100 * value, decimals) - 100 * value) < 1e-6 for value in values)
            if exact and len(set(labels)) == len({round(value, 9) for value in values}):
                break
        return labels


_ROOM = 0.05  # the least width of an axis of fractions: results within half a point should not look far apart


def room(axes: Axes, xs: Sequence[float]) -> None:
    """Make an x axis of fractions at least _ROOM wide."""
    if xs and max(xs) - min(xs) < _ROOM:
        middle = (max(xs) + min(xs)) / 2
        axes.set_xlim(middle - 0.55 * _ROOM, middle + 0.55 * _ROOM)


@dataclass(frozen=True)
class Far:
    """A point that may lie above the plot: its place, its value (None if infinite) and its colour."""

    x: float
    y: float | None
    colour: str


def scale(axes: Axes, values: Sequence[float], dense: float | None, points: Sequence[Far]) -> str:
    """Fit the y axis to perplexities, mark what lies above it with arrows, and label it.

    The axis is logarithmic where the values spread. It ends at FAR times the lowest value.

    Args:
        axes: what was drawn on.
        values: the measured perplexities of pruned models; at least one.
        dense: that of the dense model.
        points: every point.

    Returns:
        A sentence for the caption, with a space before it; empty if everything is drawn.
    """
    limit = FAR * min(values)
    drawn = [value for value in [*values, *([] if dense is None else [dense])] if value <= limit]
    low, high = min(drawn), max(drawn)
    wide = low > 0 and high > _LOG_ABOVE * low
    cut = [point for point in points if point.y is None or point.y > limit]
    if wide:
        logarithmic(axes, high / low)
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    if cut:  # the arrows need room above the highest point that is drawn
        span = 0.06 * (high - low) or 0.05 * high
        axes.set_ylim((low / 1.15, high * 1.6) if wide else (low - span, high + 4 * span))
    axes.set_ylabel("perplexity, log scale (lower is better)" if wide else "perplexity (lower is better)")
    _mark(axes, cut)
    above = [point for point in cut if point.y is not None]
    said = [
        f"above {FAR} times the lowest perplexity of a pruned model" if above else "",
        "infinite" if len(above) < len(cut) else "",
    ]
    return (
        f" Arrows at the upper edge stand for results off the scale ({', '.join(filter(None, said))})." if cut else ""
    )


def _mark(axes: Axes, points: Sequence[Far]) -> None:
    """Draw an arrow at the upper edge for each point, with its value; values at one place stand below one another."""
    low, high = axes.get_xlim()
    used: list[float] = []
    for point in sorted(points, key=lambda point: (point.x, point.y is None, point.y or 0.0)):
        place = (point.x - low) / ((high - low) or 1.0)
        nth = sum(abs(place - other) < 0.15 for other in used)
        used.append(place)
        right = place > 0.8
        edge = axes.get_xaxis_transform()
        axes.plot(point.x, 1.0, "^", color=point.colour, markersize=8, clip_on=False, transform=edge, zorder=5)
        axes.annotate(
            words.perplexity(point.y) or "infinite",
            (point.x, 1.0),
            xycoords=edge,
            xytext=(-8 if right else 8, -4 - 11 * nth),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            fontsize=8,
            color=point.colour,
        )
    axes.set_xlim(low, high)


@dataclass(frozen=True)
class Name:
    """The name of a curve, and the end of the curve where it stands."""

    x: float
    y: float
    text: str
    colour: str


def name_ends(axes: Axes, names: Sequence[Name]) -> None:
    """Write the name of each curve at the right of the plot, at the height of its end, so that no two overlap.

    Thin lines lead from the ends to the names. The limits of the axes are then fixed.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    low, high = axes.get_ylim()
    least = 14 / (72 * 0.75 * figure.get_size_inches()[1])  # of the height of the axes: one line of text
    places: list[float] = []
    ordered = sorted(names, key=lambda name: (name.y, name.text))
    for name in ordered:
        wanted = (name.y - low) / (high - low)
        places.append(max(wanted, places[-1] + least) if places else wanted)
    for nth in range(len(places) - 1, -1, -1):  # what was pushed out at the top comes down again
        top = places[nth + 1] - least if nth + 1 < len(places) else 1.0
        places[nth] = min(places[nth], top)
    for name, place in zip(ordered, places, strict=True):
        axes.annotate(
            plain(name.text),
            (name.x, name.y),
            (1.03, place),
            textcoords="axes fraction",
            ha="left",
            va="center",
            fontsize=9,
            color=name.colour,
            arrowprops={
                "arrowstyle": "-",
                "color": name.colour,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


_LABEL = 44  # letters in a line of a legend beside a plot


def legend(axes: Axes, figure: Figure, *, inside: int = 6) -> None:
    """Draw the legend inside a plot with few curves, else beside it in an enlarged figure, where it hides no point.

    Args:
        axes, figure: the plot.
        inside: the most entries that stand inside; 0 puts every legend beside.
    """
    handles, labels = axes.get_legend_handles_labels()
    labels = [textwrap.fill(label, _LABEL) for label in labels]
    if len(labels) <= inside:
        axes.legend(handles, labels, fontsize=9, framealpha=0.9, edgecolor=GRID)
        return
    beside = axes.legend(
        handles,
        labels,
        fontsize=8 if len(labels) > 6 else 9,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    FigureCanvasAgg(figure)  # which can measure text; without it matplotlib gives up where the legend takes all room
    size = beside.get_window_extent()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width - _OWN + size.width / figure.dpi, max(height, size.height / figure.dpi + 1))


_OWN = 1.5  # inches of a figure's width that a legend beside the plot may take


def _readings(
    curves: Sequence[Series],
    gone: _Amount,
    value: Callable[[Row], float | None],
    say: Callable[[float], str | None],
) -> list[str]:
    return [
        f"{curve.label}: "
        + ", ".join(f"{say(y)} at {words.percent(gone.of(row))}" for row in curve.rows if (y := value(row)) is not None)
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
