"""The figures 4.1 to 4.4 of the report on module-specific pruning, and the grid of attention rate x MLP rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from secateur.predict.points import CHANCE
from secateur.report import words
from secateur.report.modules import NAMES, Point, Study, task_bars
from secateur.report.plots import COLOURS, DPI, GRID, MARKERS, Percent, Picture, logarithmic, plain, png

_DENSE = "#333333"
_MORE = ("#000000", "#999999", "#8C564B", "#7F3C8D")
_LOG_ABOVE = 3
_LEAST_ADDED = 1e-3  # nats a token
_WORST = 4.0  # times the dense perplexity: the darkest shade
_SHADES = LinearSegmentedColormap.from_list("worse", [(1.0, 1.0, 1.0), (0.25, 0.45, 0.75)])


def pictures(study: Study) -> list[Picture]:
    """Draw the figures that the study has cells for."""
    if math.isinf(study.dense):
        return []
    drawn = []
    if study.projections:
        drawn += [_by_sparsity(study), _by_weights(study)]
    if len(study.groups) > 1:
        drawn.append(_groups(study))
    if (bars := _task_bars(study)) is not None:
        drawn.append(bars)
    if len(study.grid) > 4:
        drawn.append(_grid(study))
    return drawn


def _by_sparsity(study: Study) -> Picture:
    figure, (left, right) = _figure(2)
    _curves(left, study, study.projections, lambda p: p.measured)
    left.set_title("Against the sparsity of one kind of matrix (figure 4.1)", fontsize=11, loc="left")
    _added(right, study, study.projections, lambda p: p.measured)
    for axes in (left, right):
        _sparsity_axis(axes)
    return _picture(
        "modules-sparsity",
        figure,
        study,
        study.projections,
        "Each curve prunes one kind in all blocks and leaves the rest as it is.",
    )


def _by_weights(study: Study) -> Picture:
    figure, (left, right) = _figure(2)
    _curves(left, study, study.projections, lambda p: p.weights)
    left.set_title("Against the number of weights pruned (figure 4.2)", fontsize=11, loc="left")
    _added(right, study, study.projections, lambda p: p.weights)
    for axes in (left, right):
        _weights_axis(axes)
    return _picture(
        "modules-weights",
        figure,
        study,
        study.projections,
        "The cells of the figure before, by the weights that they remove.",
    )


def _groups(study: Study) -> Picture:
    figure, (left, right, under_left, under_right) = _figure(4)
    _curves(left, study, study.groups, lambda p: p.measured)
    _curves(right, study, study.groups, lambda p: p.weights)
    left.set_title("Attention, MLP, uniform: by rate (figure 4.3)", fontsize=11, loc="left")
    right.set_title("by number of weights pruned", fontsize=11, loc="left")
    _added(under_left, study, study.groups, lambda p: p.measured)
    _added(under_right, study, study.groups, lambda p: p.weights)
    for axes in (left, under_left):
        _sparsity_axis(axes)
    for axes in (right, under_right):
        _weights_axis(axes)
    return _picture("modules-groups", figure, study, study.groups, "'Uniform' prunes attention and MLP at one rate.")


def _figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    rows, columns = (panels + 1) // 2, min(panels, 2)
    figure = Figure(figsize=(7 if panels == 1 else 11, 4.4 * rows), dpi=DPI, layout="constrained", facecolor="white")
    return figure, [figure.add_subplot(rows, columns, n + 1) for n in range(panels)]


def _curves(axes: Axes, study: Study, kinds: Sequence[str], axis: Callable[[Point], float]) -> None:
    drawn = [study.dense]
    for number, kind in enumerate(kinds):
        points = sorted(((axis(p), p.ppl) for p in study.curves[kind] if p.ppl is not None), key=lambda pair: pair[0])
        xs, ys = [0.0, *(x for x, _ in points)], [study.dense, *(y for _, y in points)]
        drawn += ys
        axes.plot(xs, ys, label=plain(NAMES.get(kind, kind)), **_look(number))
    axes.axhline(
        study.dense, color=_DENSE, linestyle=":", linewidth=1.2, label=f"dense, {words.perplexity(study.dense)}"
    )
    wide = max(drawn) > _LOG_ABOVE * min(drawn)
    if wide:
        logarithmic(axes, max(drawn) / min(drawn))
    axes.set_ylabel("perplexity, log scale" if wide else "perplexity")
    _bare(axes)
    axes.legend(fontsize=8, framealpha=0.9, edgecolor=GRID, loc="upper left")


def _added(axes: Axes, study: Study, kinds: Sequence[str], axis: Callable[[Point], float]) -> None:
    """Draw the added loss on a logarithmic axis, where small damage can be told apart.

    Points that add next to nothing are left out.
    """
    highest = 1.0
    for number, kind in enumerate(kinds):
        added = [(axis(p), math.log(p.ppl / study.dense)) for p in study.curves[kind] if p.ppl is not None]
        points = sorted((x, y) for x, y in added if y >= _LEAST_ADDED)
        highest = max([highest, *(y for _, y in points)])
        axes.plot([x for x, _ in points], [y for _, y in points], label=plain(NAMES.get(kind, kind)), **_look(number))
    axes.set_yscale("log")
    axes.set_ylim(0.8 * _LEAST_ADDED, 1.4 * highest)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for share, label in ((1.01, "+1%"), (1.1, "+10%"), (2.0, "twice")):
        axes.axhline(math.log(share), color=_DENSE, linestyle=":", linewidth=1)
        axes.annotate(
            label, (1.01, math.log(share)), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=_DENSE
        )
    axes.set_xlim(left=0)
    axes.set_ylabel("loss added, ln(perplexity / dense), log scale")
    axes.set_title("The loss that this adds; at the right, in perplexity", fontsize=11, loc="left")
    _bare(axes)


def _look(number: int) -> dict[str, Any]:
    """The colour, marker and line of a curve, by its number."""
    colours = (*COLOURS, *_MORE)
    style = ("-", "--")[number // 7 % 2]
    return {
        "color": colours[number % len(colours)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": style,
        "linewidth": 1.6,
        "markersize": 4.5,
    }


def _bare(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _sparsity_axis(axes: Axes) -> None:
    axes.set_xlabel("sparsity of the kind, measured")
    axes.xaxis.set_major_formatter(Percent())


def _weights_axis(axes: Axes) -> None:
    axes.set_xlabel("weights pruned")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{words.count(value)}" if value else "0"))


def _picture(name: str, figure: Figure, study: Study, kinds: Sequence[str], caption: str) -> Picture:
    readings = [
        f"{NAMES.get(kind, kind)}: "
        + ", ".join(
            f"{words.perplexity(p.ppl)} at {p.measured:.0%} ({p.weights:,} weights)"
            for p in study.curves[kind]
            if p.ppl
        )
        for kind in kinds
    ]
    return Picture(
        name,
        png(figure),
        f"Perplexity, dense {words.perplexity(study.dense)}; " + "; ".join(readings),
        f"{study.about}. {caption}",
    )


def _task_bars(study: Study) -> Picture | None:
    where, bars = task_bars(study)
    if not bars:
        return None
    figure, (axes,) = _figure(1)
    kinds = list(next(iter(bars.values())))
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        xs = [n + (number - (len(kinds) - 1) / 2) * width for n in range(len(bars))]
        heights, errors = (
            [by_kind[kind][0] for by_kind in bars.values()],
            [by_kind[kind][1] for by_kind in bars.values()],
        )
        axes.bar(
            xs,
            heights,
            0.92 * width,
            yerr=errors,
            capsize=3,
            color=COLOURS[number],
            label=NAMES[kind],
            error_kw={"linewidth": 1},
        )
    for n, task in enumerate(bars):
        for value, line, name in ((_accuracy(study, task), "-", "dense"), (CHANCE.get(task), ":", "chance")):
            if value is not None:
                axes.plot(
                    [n - 0.45, n + 0.45],
                    [value, value],
                    color=_DENSE,
                    linestyle=line,
                    linewidth=1.4,
                    label=name if not n else None,
                )
    axes.set_xticks(range(len(bars)), [plain(task) for task in bars])
    axes.set_ylabel("accuracy, with one standard error")
    axes.set_title(f"Accuracy with {where} (figure 4.4)", fontsize=11, loc="left")
    axes.set_xlim(-0.7, len(bars) - 0.3)
    axes.set_ylim(0, min(1.0, 1.35 * max(acc + err for by_kind in bars.values() for acc, err in by_kind.values())))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, framealpha=0.9, edgecolor=GRID, ncols=3, loc="upper center")
    alt = "; ".join(
        f"{task}: " + ", ".join(f"{NAMES[k]} {acc:.3f}" for k, (acc, _) in by_kind.items())
        for task, by_kind in bars.items()
    )
    return Picture("modules-tasks", png(figure), f"Accuracy with {where}: {alt}", f"{study.about}.")


def _accuracy(study: Study, task: str) -> float | None:
    measured = study.dense_tasks.get(task) or {}
    value = measured.get("acc")
    return float(value) if isinstance(value, int | float) else None


def _grid(study: Study) -> Picture:
    attention, mlp = sorted({a for a, _ in study.grid}), sorted({m for _, m in study.grid})
    figure, (axes,) = _figure(1)
    shades = ScalarMappable(LogNorm(1, _WORST, clip=True), _SHADES)
    bar = figure.colorbar(
        shades, ax=axes, extend="max", ticks=[1, 1.5, 2, 3, 4], format=FuncFormatter(lambda value, _: f"{value:g}")
    )
    bar.ax.minorticks_off()
    bar.set_label(f"times the dense perplexity, {words.perplexity(study.dense)}")
    for column, a in enumerate(attention):
        for row, m in enumerate(mlp):
            if (a, m) in study.grid:
                axes.add_patch(
                    Rectangle(
                        (column - 0.48, row - 0.48),
                        0.96,
                        0.96,
                        facecolor=_shade(study.grid[a, m] / study.dense),
                        edgecolor="none",
                    )
                )
                axes.text(
                    column,
                    row,
                    f"{words.perplexity(study.grid[a, m])}",
                    ha="center",
                    va="center",
                    fontsize=10,
                    color="#111111",
                )
    axes.set_xlim(-0.5, len(attention) - 0.5)
    axes.set_ylim(-0.5, len(mlp) - 0.5)
    axes.set_xticks(range(len(attention)), [f"{a:.0%}" for a in attention])
    axes.set_yticks(range(len(mlp)), [f"{m:.0%}" for m in mlp])
    axes.set_xlabel("sparsity of attention")
    axes.set_ylabel("sparsity of MLP")
    axes.set_title("Perplexity at combinations of the two rates", fontsize=11, loc="left")
    alt = ", ".join(
        f"{words.perplexity(ppl)} at attention {a:.0%} and MLP {m:.0%}" for (a, m), ppl in sorted(study.grid.items())
    )
    return Picture(
        "modules-grid",
        png(figure),
        f"Perplexity: {alt}",
        f"{study.about}. The darker, the worse; dense {words.perplexity(study.dense)}.",
    )


def _shade(times: float) -> tuple[float, float, float, float]:
    """The shade of the colour bar for a multiple of the dense perplexity."""
    return _SHADES(min(1.0, max(0.0, math.log(times, _WORST))))
