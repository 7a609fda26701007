"""The figures of the report on module-specific pruning (its 4.1 to 4.4), and the grid of attention rate x MLP rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, PercentFormatter

from secateur.predict.points import CHANCE
from secateur.report import words
from secateur.report.modules import NAMES, Point, Study, task_bars
from secateur.report.plots import COLOURS, DPI, GRID, MARKERS, Picture, logarithmic, plain, png

_DENSE = "#333333"
_MORE = ("#000000", "#999999", "#8C564B", "#7F3C8D")
_LOG_ABOVE = 3


def pictures(study: Study) -> list[Picture]:
    """Those that there are cells for."""
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
    figure, (axes,) = _figure(1)
    _curves(axes, study, study.projections, lambda p: p.measured)
    axes.set_title("Perplexity against the sparsity of one kind of matrix (figure 4.1)", fontsize=11, loc="left")
    _sparsity_axis(axes)
    return _picture("modules-sparsity", figure, study, study.projections, "Each curve prunes one kind in all blocks and leaves the rest as it is.")


def _by_weights(study: Study) -> Picture:
    figure, (axes,) = _figure(1)
    _curves(axes, study, study.projections, lambda p: p.weights)
    axes.set_title("Perplexity against the number of weights pruned (figure 4.2)", fontsize=11, loc="left")
    _weights_axis(axes)
    return _picture("modules-weights", figure, study, study.projections, "The cells of the figure before, by the weights that they remove.")


def _groups(study: Study) -> Picture:
    figure, (left, right) = _figure(2)
    _curves(left, study, study.groups, lambda p: p.measured)
    _curves(right, study, study.groups, lambda p: p.weights)
    left.set_title("Attention, MLP, uniform: by rate (figure 4.3)", fontsize=11, loc="left")
    right.set_title("by number of weights pruned", fontsize=11, loc="left")
    _sparsity_axis(left)
    _weights_axis(right)
    return _picture("modules-groups", figure, study, study.groups, "'Uniform' prunes attention and MLP at one rate.")


def _figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(7 if panels == 1 else 11, 4.4), dpi=DPI, layout="constrained", facecolor="white")
    return figure, [figure.add_subplot(1, panels, n + 1) for n in range(panels)]


def _curves(axes: Axes, study: Study, kinds: Sequence[str], axis: Callable[[Point], float]) -> None:
    colours = (*COLOURS, *_MORE)
    drawn = [study.dense]
    for number, kind in enumerate(kinds):
        points = sorted(((axis(p), p.ppl) for p in study.curves[kind] if p.ppl is not None), key=lambda pair: pair[0])
        xs, ys = [0.0, *(x for x, _ in points)], [study.dense, *(y for _, y in points)]
        drawn += ys
        look: dict[str, Any] = {"color": colours[number % len(colours)], "marker": MARKERS[number % len(MARKERS)], "linestyle": ("-", "--")[number // 7 % 2]}
        axes.plot(xs, ys, linewidth=1.6, markersize=4.5, label=plain(NAMES.get(kind, kind)), **look)
    axes.axhline(study.dense, color=_DENSE, linestyle=":", linewidth=1.2, label=f"dense, {words.perplexity(study.dense)}")
    wide = max(drawn) > _LOG_ABOVE * min(drawn)
    if wide:
        logarithmic(axes, max(drawn) / min(drawn))
    axes.set_ylabel("perplexity, log scale" if wide else "perplexity")
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, framealpha=0.9, edgecolor=GRID, loc="upper left")


def _sparsity_axis(axes: Axes) -> None:
    axes.set_xlabel("sparsity of the kind, measured")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _weights_axis(axes: Axes) -> None:
    axes.set_xlabel("weights pruned")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{words.count(value)}" if value else "0"))


def _picture(name: str, figure: Figure, study: Study, kinds: Sequence[str], caption: str) -> Picture:
    readings = [
        f"{NAMES.get(kind, kind)}: " + ", ".join(f"{words.perplexity(p.ppl)} at {p.measured:.0%} ({p.weights:,} weights)" for p in study.curves[kind] if p.ppl)
        for kind in kinds
    ]
    return Picture(name, png(figure), f"Perplexity, dense {words.perplexity(study.dense)}; " + "; ".join(readings), f"{study.about}. {caption}")


def _task_bars(study: Study) -> Picture | None:
    where, bars = task_bars(study)
    if not bars:
        return None
    figure, (axes,) = _figure(1)
    kinds = list(next(iter(bars.values())))
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        xs = [n + (number - (len(kinds) - 1) / 2) * width for n in range(len(bars))]
        heights, errors = [found[kind][0] for found in bars.values()], [found[kind][1] for found in bars.values()]
        axes.bar(xs, heights, 0.92 * width, yerr=errors, capsize=3, color=COLOURS[number], label=NAMES[kind], error_kw={"linewidth": 1})
    for n, task in enumerate(bars):
        for value, line, what in ((_accuracy(study, task), "-", "dense"), (CHANCE.get(task), ":", "chance")):
            if value is not None:
                axes.plot([n - 0.45, n + 0.45], [value, value], color=_DENSE, linestyle=line, linewidth=1.4, label=what if not n else None)
    axes.set_xticks(range(len(bars)), [plain(task) for task in bars])
    axes.set_ylabel("accuracy, with one standard error")
    axes.set_title(f"Accuracy with {where} (figure 4.4)", fontsize=11, loc="left")
    axes.set_xlim(-0.7, len(bars) - 0.3)
    axes.set_ylim(0, min(1.0, 1.35 * max(acc + err for found in bars.values() for acc, err in found.values())))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, framealpha=0.9, edgecolor=GRID, ncols=3, loc="upper center")
    alt = "; ".join(f"{task}: " + ", ".join(f"{NAMES[k]} {acc:.3f}" for k, (acc, _) in found.items()) for task, found in bars.items())
    return Picture("modules-tasks", png(figure), f"Accuracy with {where}: {alt}", f"{study.about}.")


def _accuracy(study: Study, task: str) -> float | None:
    found = study.dense_tasks.get(task) or {}
    value = found.get("acc")
    return float(value) if isinstance(value, int | float) else None


def _grid(study: Study) -> Picture:
    attention, mlp = sorted({a for a, _ in study.grid}), sorted({m for _, m in study.grid})
    figure, (axes,) = _figure(1)
    for column, a in enumerate(attention):
        for row, m in enumerate(mlp):
            if (a, m) in study.grid:
                times = study.grid[a, m] / study.dense
                shade = min(1.0, max(0.0, times - 1) / 3)  # four times the dense perplexity is as bad as anything
                axes.add_patch(_square(column, row, (1 - 0.75 * shade, 1 - 0.55 * shade, 1 - 0.25 * shade)))
                axes.text(column, row, f"{words.perplexity(study.grid[a, m])}", ha="center", va="center", fontsize=10, color="#111111")
    axes.set_xlim(-0.5, len(attention) - 0.5)
    axes.set_ylim(-0.5, len(mlp) - 0.5)
    axes.set_xticks(range(len(attention)), [f"{a:.0%}" for a in attention])
    axes.set_yticks(range(len(mlp)), [f"{m:.0%}" for m in mlp])
    axes.set_xlabel("sparsity of attention")
    axes.set_ylabel("sparsity of MLP")
    axes.set_title("Perplexity at combinations of the two rates", fontsize=11, loc="left")
    alt = ", ".join(f"{words.perplexity(ppl)} at attention {a:.0%} and MLP {m:.0%}" for (a, m), ppl in sorted(study.grid.items()))
    return Picture("modules-grid", png(figure), f"Perplexity: {alt}", f"{study.about}. The darker, the worse; dense {words.perplexity(study.dense)}.")


def _square(column: int, row: int, colour: tuple[float, float, float]) -> Rectangle:
    return Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, facecolor=colour, edgecolor="none")
