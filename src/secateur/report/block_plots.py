"""The plot of the removed share of each block: heat maps for masked matrices, widths for removed units, else bars.

A block that is dropped whole is hatched in each of them.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from secateur.report import words
from secateur.report.layers import Layers
from secateur.report.looks import look
from secateur.report.plots import COLOURS, DPI, GRID, MARKERS, Percent, Picture, plain, png

MAXIMUM = 6
_SHARES = (0, 0.25, 0.5, 0.75, 1)
_WHOLE = ("block",)  # the parts of a plan that drops blocks and changes nothing else
_SPACES = {  # what the spaces of a plan are
    "groups": "groups: key-value heads, each with the query heads that share it.",
    "heads": "heads: query heads.",
    "ffn": "ffn: feed-forward units.",
}
_NUMBERED = 12  # blocks up to which the panels have room for numbers


def block_removal(layers: Sequence[Layers], labels: Sequence[str]) -> Picture | None:
    """One panel per run, at most six; None without plans.

    Args:
        layers: the plans, the most unequal first.
        labels: the names of the runs, in the same order.
    """
    layers = layers[:MAXIMUM]
    if not layers:
        return None
    columns = 1 if len(layers) == 1 else 2
    rows = math.ceil(len(layers) / columns)
    figure = Figure(
        figsize=(8, min(5.4, 0.9 + 1.9 * rows) if columns == 2 else 3.4),
        dpi=DPI,
        layout="constrained",
        facecolor="white",
    )
    figure.suptitle(plain(textwrap.fill(_title(layers, labels), 86)), fontsize=11, x=0.01, ha="left", color="#111111")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    scale = _scale(layers)
    images = [_panel(axes, plan, label, scale) for axes, plan, label in zip(panels, layers, labels, strict=False)]
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    drawn = [(image, axes) for image, axes in zip(images, panels, strict=False) if image is not None]
    if drawn:
        bar = figure.colorbar(drawn[0][0], ax=list(panels), format=Percent(), shrink=0.9, pad=0.02)
        bar.set_label("removed", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    return Picture(
        "blocks",
        png(figure),
        "; ".join(_reading(plan, label) for plan, label in zip(layers, labels, strict=False)),
        _caption(layers),
    )


def _title(layers: Sequence[Layers], labels: Sequence[str]) -> str:
    matters = [(plan, label) for plan, label in zip(layers, labels, strict=False) if plan.parts != _WHOLE]
    several = f"{len(layers)} runs with unequal blocks; "
    if not matters:
        alone = f"{labels[0]}, drops {_dropped(layers[0])}"
        return f"Removed by block: {alone if len(layers) == 1 else f'{len(layers)} runs drop whole blocks (hatched)'}"
    worst, label = matters[0]
    part = max(worst.parts, key=lambda name: _range(worst, name)[1] - _range(worst, name)[0])
    low, high = _range(worst, part)
    if len(layers) == 1:
        return f"Removed by block: from {low:.0%} to {high:.0%} of {part}"
    return f"Removed by block: {several}the widest range of a part is {low:.0%} to {high:.0%} of {part} ({label})"


def _dropped(plan: Layers) -> str:
    noun = "block" if len(plan.dropped) == 1 else "blocks"
    return f"{noun} {', '.join(map(str, plan.dropped))} of 0 to {plan.blocks - 1}"


def _range(plan: Layers, part: str) -> tuple[float, float]:
    values = [value or 0.0 for value in plan.removed[part]]
    return min(values), max(values)


def _caption(layers: Sequence[Layers]) -> str:
    sentences = []
    if any(plan.dropped for plan in layers):
        sentences.append("A hatched block is dropped whole.")
    if any(not plan.kept and plan.parts != _WHOLE for plan in layers):
        sentences.append("Colour is the fraction removed of a matrix; grey is a matrix the plan leaves alone.")
    if any(plan.kept for plan in layers):
        sentences.append(
            "Lines are the kept share of each part; ..._in and ..._out are the features of the residual stream that "
            "attention and MLP read and write; numbers are widths."
        )
    parts = {part for plan in layers for part in plan.parts}
    sentences += [sentence for part, sentence in _SPACES.items() if part in parts]
    return " ".join(sentences)


def _scale(layers: Sequence[Layers]) -> Normalize:
    """One scale for all heat maps, over the values in them."""
    values = [
        v
        for plan in layers
        if not plan.kept and plan.parts != _WHOLE
        for part in plan.parts
        for n, v in enumerate(plan.removed[part])
        if v is not None and n not in plan.dropped
    ] or [0.0, 1.0]
    return Normalize(math.floor(min(values) * 20) / 20, math.ceil(max(values) * 20) / 20)


def _panel(axes: Axes, plan: Layers, label: str, scale: Normalize) -> AxesImage | None:
    axes.set_title(plain(textwrap.shorten(label, 44, placeholder="…")), fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.set_xlabel("block", fontsize=8, labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    if plan.parts == _WHOLE:
        _bars(axes, plan)
        return None
    if plan.kept:
        _hatch(axes, plan)
        _widths(axes, plan)
        return None
    image = _heat_map(axes, plan, scale)
    if plan.dropped:
        _hatch(axes, plan)
        axes.legend(fontsize=7, loc="lower right", framealpha=0.9)
    return image


def _bars(axes: Axes, plan: Layers) -> None:
    """Draw a full bar for each block that stays; a dropped one has none."""
    stay = [index for index in range(plan.blocks) if index not in plan.dropped]
    axes.bar(stay, [1.0] * len(stay), 0.8, color=look(str(plan.row.get("method"))).colour, label=f"{len(stay)} stay")
    _hatch(axes, plan)
    axes.set_xlim(-0.6, plan.blocks - 0.4)
    axes.set_ylim(0, 1.35)
    axes.set_yticks((0, 1))
    axes.set_ylabel("kept", fontsize=8)
    axes.yaxis.set_major_formatter(Percent())
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="upper left", ncols=2, columnspacing=1.0)


def _hatch(axes: Axes, plan: Layers) -> None:
    """Hatch the places of the dropped blocks; the first is in the legend."""
    for nth, index in enumerate(plan.dropped):
        axes.axvspan(
            index - 0.4,
            index + 0.4,
            ymax=1 / 1.35 if plan.parts == _WHOLE else 1.0,
            facecolor="white",
            edgecolor="#555555",
            hatch="////",
            linewidth=0.6,
            label=None if nth else f"{len(plan.dropped)} dropped",
        )


def _heat_map(axes: Axes, plan: Layers, scale: Normalize) -> AxesImage:
    cells = [
        [math.nan if value is None or n in plan.dropped else value for n, value in enumerate(plan.removed[part])]
        for part in plan.parts
    ]
    colours = colormaps["YlGnBu"].with_extremes(bad="#e4e4e4")
    image = axes.imshow(cells, aspect="auto", cmap=colours, norm=scale, interpolation="nearest")
    axes.set_yticks(range(len(plan.parts)), labels=[plain(part) for part in plan.parts])
    if plan.blocks <= _NUMBERED:
        for y, row in enumerate(cells):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    dark = scale(value) > 0.55
                    axes.text(
                        x,
                        y,
                        f"{100 * value:.0f}",
                        ha="center",
                        va="center",
                        fontsize=6.5,
                        color="white" if dark else "#111111",
                    )
    return image


def _widths(axes: Axes, plan: Layers) -> None:
    few = len(plan.parts) <= 2
    for part, colour, marker in zip(plan.parts, COLOURS, MARKERS, strict=False):
        shares, most = [kept / of for kept, of in plan.kept[part]], max(of for _, of in plan.kept[part])
        axes.plot(
            shares,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.4,
            label=f"{plain(part)}, of {most:,}" if few else plain(part),
        )
    if few and plan.blocks <= _NUMBERED:
        _number_widths(axes, plan)
    axes.set_ylim(0, 1.18 if few else 1.6)
    axes.set_yticks(_SHARES)
    axes.set_ylabel("kept", fontsize=8)
    axes.yaxis.set_major_formatter(Percent())
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        fontsize=7 if few else 6.5,
        frameon=False,
        loc="lower left" if few else "upper left",
        ncols=min(3, len(plan.parts)),
        columnspacing=1.0,
    )


def _number_widths(axes: Axes, plan: Layers) -> None:
    """Write each width at its point: the highest of a block above it, the others below, so that they do not overlap."""
    for x in range(plan.blocks):
        points = [
            (plan.kept[part][x][0] / plan.kept[part][x][1], plan.kept[part][x][0], colour)
            for part, colour in zip(plan.parts, COLOURS, strict=False)
        ]
        highest = max(points, key=lambda point: point[0])
        for share, kept, colour in points:
            offset = (0, 5) if (share, kept, colour) == highest else (0, -11)
            axes.annotate(
                f"{kept}", (x, share), offset, textcoords="offset points", ha="center", fontsize=7, color=colour
            )


def _reading(plan: Layers, label: str) -> str:
    whole = f"{label}, dropped: {_dropped(plan)}"
    if plan.parts == _WHOLE:
        return whole
    ranges = (
        f"{part} {words.percent(_range(plan, part)[0])} to {words.percent(_range(plan, part)[1])}"
        for part in plan.parts
    )
    return f"{whole if plan.dropped else label}, removed by block: {', '.join(ranges)}"
