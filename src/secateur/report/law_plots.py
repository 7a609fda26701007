"""Plots of the laws.

They are figures 3a and 3b of arXiv:2503.04377 (points, fitted line, the paper's parameter-free line, interval), the
same in real units beside the rivals, and figure 10 of DISP-LLM (what was removed against the sparsity).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from secateur.core.errors import SecateurError
from secateur.core.records import Record
from secateur.predict.choose import Prediction
from secateur.predict.fit import Fit
from secateur.predict.laws import Array
from secateur.predict.select import Judged
from secateur.report import words
from secateur.report.looks import looks
from secateur.report.plots import (
    COLOURS,
    DPI,
    GRID,
    MARKERS,
    Name,
    Percent,
    Picture,
    legend,
    logarithmic,
    name_ends,
    plain,
    png,
)
from secateur.report.series import Series

_INK, _LAW, _CLAIM = "#111111", COLOURS[0], COLOURS[1]
# Colour and dash of each law; the law of the first panel keeps its colour in the second.
_RIVALS = {
    "ratio": (_LAW, "-"),
    "theory": (_CLAIM, "--"),
    "log-linear": (COLOURS[2], "-."),
    "log-slope": (COLOURS[2], ":"),
    "power": (COLOURS[3], ":"),
    "quadratic": (COLOURS[5], ":"),
    "exponential": (COLOURS[4], "--"),
    "phase": (COLOURS[5], "-"),
    "log-ratio": (_LAW, "-"),
    "proportional": (_CLAIM, "--"),
    "linear": (COLOURS[2], "-."),
}
_ASKED = 4  # questions that the legend has room for
_ROOM = 3  # the axis is logarithmic if the largest perplexity is more than this many times the smallest


@dataclass(frozen=True)
class Answer:
    """A question that the plot shows with its answer.

    Attributes:
        s, value: the point.
        text: what was asked and what the law says.
    """

    s: float
    value: float
    text: str


def answers_of(record: Record) -> list[Answer]:
    """The questions in a record of `secateur predict`, with the answers that can be drawn."""
    kind = "ppl" if record["metric"] == "ppl" else "acc"
    entries = [*(record["predictions"] if record["asked"] else []), *([record["target"]] if record["target"] else [])]
    found = []
    for entry in entries:
        s, value = entry["sparsity"], entry[kind]
        if s is None or value is None or not np.isfinite(value):
            continue
        share = entry.get("params_removed")
        where = f"{words.percent(s)} sparsity" if share is None else f"{words.percent(share)} of all parameters"
        found.append(Answer(s, value, f"{where}: {value:.4g}"))
    return found


def laws(found: Prediction, name: str, title: str, answers: Sequence[Answer] = ()) -> Picture:
    """Draw the chosen law in its y, and all laws in real units.

    Args:
        found: the law, its points and its rivals.
        name: the name of the file, without `.png`.
        title: the model and the method.
        answers: what was asked; the axes reach as far.
    """
    figure = Figure(figsize=(10, 4.4), dpi=DPI, layout="constrained", facecolor="white")
    figure.suptitle(plain(textwrap.fill(_heading(found, title), 110)), fontsize=11, x=0.01, ha="left", color=_INK)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.set_xlabel("sparsity, measured", fontsize=9)
        axes.xaxis.set_major_formatter(Percent())
        axes.tick_params(labelsize=8)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _in_y(left, found, answers)
    _in_units(right, found, answers)
    caption = (
        "Left: the law in the y that it is fitted in, with its 95% interval for a new measurement, "
        "dashed outside the fitted range. "
        "Right: the same points in real units with every "
        "law that could be fitted, the one that predicts held-out points best first in the legend."
    )
    asked = "".join(f" Asked: {answer.text}." for answer in answers)
    return Picture(name, png(figure), _alt(found, title) + asked, caption)


def write(found: Prediction, path: Path, answers: Sequence[Answer] = ()) -> None:
    """Draw the laws to a file, with what was asked.

    Raises:
        SecateurError: the file cannot be written.
    """
    about = found.points.about
    title = " ".join(str(about[key]) for key in ("model", "method") if about.get(key))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(laws(found, path.stem, title, answers).png)
    except OSError as error:
        raise SecateurError(
            f"cannot write the plot to '{path}' ({error.strerror}): give a path in a folder that you can write to"
        ) from None


def _heading(found: Prediction, title: str) -> str:
    best, chosen = found.winner, found.verdict
    lead = f"{title}: " if title else ""
    if best is None or best.heldout is None or len(found.points.s) < 3:
        return f"{lead}law '{chosen.law.name}' on {words.plural(len(found.points.s), 'pruned point')}"
    if best.law.name == chosen.law.name:
        return (
            f"{lead}law '{chosen.law.name}' predicts held-out points best of {len(found.judged)}, to {_percent(best)}"
        )
    if chosen.heldout is not None and not found.beaten:
        return f"{lead}law '{chosen.law.name}' misses held-out points by {_percent(chosen)}, and no other clearly less"
    return (
        f"{lead}law '{chosen.law.name}' misses held-out points by {_percent(chosen)}, "
        f"'{best.law.name}' by {_percent(best)}"
    )


def _percent(judged: Judged) -> str:
    if judged.heldout is None:
        return "an unknown amount"
    return f"{np.expm1(judged.heldout):.1%}" if judged.heldout < 3 else "more than a factor of 20"


def _alt(found: Prediction, title: str) -> str:
    points = ", ".join(
        f"{v:.4g} at {words.percent(s)}" for s, v in zip(found.points.s, found.points.values, strict=True)
    )
    errors = "; ".join(
        f"{judged.law.name} {judged.heldout:.3g}" for judged in found.judged if judged.heldout is not None
    )
    metric = "Perplexity" if found.points.kind == "ppl" else f"Accuracy on {found.points.metric}"
    return (
        f"{title}. {metric}: dense {found.points.dense:.4g}; {points}. Held-out errors in its logarithm: "
        f"{errors or 'unknown'}."
    )


def _grid(found: Prediction, answers: Sequence[Answer], most: float = 0.99) -> Array:
    """Sparsities from 0 to a little beyond the last point and the last question, for the curves."""
    last = max([float(found.points.s.max()) if len(found.points.s) else 0.5, *(answer.s for answer in answers)])
    return np.linspace(0.0, min(most, last * 1.12), 300)


def _by_range(axes: Axes, fit: Fit, s: Array, values: Array, width: float, label: str) -> None:
    """Draw the chosen law: solid where it was fitted, and dashed outside."""
    low, high = fit.range or (0.0, 0.0)
    within = (s >= low) & (s <= high)
    for outside in (s <= low, s >= high):
        axes.plot(s[outside], values[outside], color=_LAW, linewidth=0.7 * width, linestyle="--")
    if within.any():
        axes.plot(s[within], values[within], color=_LAW, linewidth=width, label=label)
    else:
        axes.plot([], [], color=_LAW, linewidth=0.7 * width, linestyle="--", label=label)


def _mark(axes: Axes, answers: Sequence[Answer], ys: Sequence[float], *, named: bool) -> None:
    """Draw what was asked as stars; `named` puts each question into the legend, and its value beside the star."""
    star: dict[str, Any] = {
        "marker": "*",
        "markersize": 13,
        "color": _LAW,
        "markeredgecolor": "white",
        "linestyle": "none",
    }
    for nth, (answer, y) in enumerate(zip(answers, ys, strict=True)):
        label = f"asked, {answer.text}" if named and nth < _ASKED else "" if nth else "asked"
        axes.plot([answer.s], [y], label=label or None, zorder=6, **star)
        if named:
            below: dict[str, Any] = {
                "textcoords": "offset points",
                "ha": "center",
                "va": "top",
                "fontsize": 8,
                "color": _INK,
            }
            axes.annotate(f"{answer.value:,.4g}", (answer.s, y), (0, -9), **below)


def _in_y(axes: Axes, found: Prediction, answers: Sequence[Answer]) -> None:
    points, fit, s = found.points, found.chosen, _grid(found, answers)
    mean = fit.law.mean(fit.constants, s)
    scale = fit.law.scale
    if (ends := fit.interval(s)) is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            first, second = (scale.to(end, points.dense) for end in ends)
        axes.fill_between(s, first, second, color=_LAW, alpha=0.14, linewidth=0, label="95% of new measurements")
    _by_range(axes, fit, s, mean, 2.0, _equation(fit))
    if fit.law.name == "ratio":
        axes.plot(s, 1 - s, color=_CLAIM, linestyle="--", linewidth=1.5, label="y = 1 - s, no fitted constant")
    _draw_points(axes, points.s, scale.to(points.values, points.dense))
    with np.errstate(divide="ignore", invalid="ignore"):
        asked = [float(scale.to(np.array([answer.value]), points.dense)[0]) for answer in answers]
    _mark(axes, answers, asked, named=False)
    at_zero = float(scale.to(np.array([points.dense]), points.dense)[0])
    if np.isfinite(at_zero):
        axes.plot(
            [0],
            [at_zero],
            color="#333333",
            marker="o",
            markerfacecolor="none",
            markersize=7,
            linestyle="none",
            label="dense, by definition",
        )
    axes.set_ylabel(
        f"y = {scale.formula.replace('acc', points.metric) if points.kind == 'acc' else scale.formula}", fontsize=9
    )
    ys = [*scale.to(points.values, points.dense), *(mean[np.isfinite(mean)]), at_zero]
    ys += [y for y in asked if np.isfinite(y)]
    room = 0.15 * (max(ys) - min(ys) or 1.0)
    axes.set_ylim(min(ys) - room, max(ys) + room)
    axes.legend(fontsize=8, framealpha=0.9, edgecolor=GRID)


def _equation(fit: Fit) -> str:
    a, b = fit.constants[:2]
    if fit.law.scale.formula == fit.law.formula.partition(" = ")[0] and fit.law.name in (
        "ratio",
        "log-linear",
        "log-ratio",
        "linear",
    ):
        return f"fitted: y = {a:.3f} s {'+' if b >= 0 else '-'} {abs(b):.3f}"
    return f"{fit.law.name}: " + ", ".join(f"{name} {value:.3g}" for name, value in fit.named().items())


def _draw_points(axes: Axes, s: Array, y: Array) -> None:
    axes.plot(s, y, color=_INK, marker=MARKERS[0], markersize=5.5, linestyle="none", label="measured", zorder=5)


def _in_units(axes: Axes, found: Prediction, answers: Sequence[Answer]) -> None:
    points, s = found.points, _grid(found, answers)
    if (ends := found.chosen.interval(s)) is not None:
        known = np.isfinite(ends[0]) & np.isfinite(ends[1])
        axes.fill_between(s[known], ends[0][known], ends[1][known], color=_LAW, alpha=0.14, linewidth=0)
    for judged in found.judged:
        if judged.fit is None:
            continue
        colour, dash = _RIVALS[judged.law.name]
        error = (
            ""
            if judged.heldout is None
            else f", held out {judged.heldout:.3f}"
            if np.isfinite(judged.heldout)
            else ", leaves its domain"
        )
        label = f"{judged.law.name}{error}"
        if judged.law.name == found.chosen.law.name:
            _by_range(axes, found.chosen, s, judged.fit.predict(s), 2.2, label)
            continue
        axes.plot(s, judged.fit.predict(s), color=colour, linestyle=dash, linewidth=1.4, label=label)
    _draw_points(axes, points.s, points.values)
    _mark(axes, answers, [answer.value for answer in answers], named=True)
    axes.axhline(points.dense, color="#333333", linestyle="--", linewidth=1.0)
    axes.annotate(
        f"dense {points.dense:.4g}",
        (1.0, points.dense),
        (-2, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=8,
        ha="right",
    )
    values = [*points.values, points.dense, *(answer.value for answer in answers)]
    low, high = min(values), max(values)
    if points.kind == "ppl":
        wide = high > _ROOM * low
        if wide:
            logarithmic(axes, high / low)
            span = np.log(high / low)
            axes.set_ylim(low * np.exp(-0.12 * span), high * np.exp(0.25 * span))
        else:
            axes.set_ylim(low - 0.2 * (high - low or 1), high + 0.4 * (high - low or 1))
        axes.set_ylabel(
            "perplexity, log scale (lower is better)" if wide else "perplexity (lower is better)", fontsize=9
        )
    else:
        if points.chance is not None:
            axes.axhline(
                points.chance, color="#888888", linestyle=":", linewidth=1.6, label=f"chance, {points.chance:g}"
            )
        axes.set_ylabel(f"accuracy on {plain(points.metric)} (higher is better)", fontsize=9)
    axes.legend(fontsize=7.5, framealpha=0.9, edgecolor=GRID, title="errors in the logarithm", title_fontsize=7.5)


def compression(curves: Sequence[Series]) -> Picture | None:
    """Draw the share of parameters removed against sparsity, as figure 10 of DISP-LLM.

    Returns:
        None without a curve of two sparsities that removes parameters (zeroed weights stay in the file): the table has
        single points.
    """
    found = []
    for curve in curves:
        at = [(row.sparsity, row.removed) for row in curve.rows]
        known = sorted((s, share) for s, share in at if s is not None and share is not None)
        if curve.joined and any(share for _, share in known) and len({round(s, 3) for s, _ in known}) > 1:
            found.append((curve, known))
    if not found:
        return None
    figure = Figure(figsize=(7, 4.6), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    names = []
    for (curve, known), own in zip(found, looks([curve.method for curve, _ in found]), strict=True):
        xs, ys = [s for s, _ in known], [share for _, share in known]
        axes.plot(xs, ys, linestyle=own.dash, linewidth=1.6, markersize=6, label=plain(curve.label), **own.points)
        names.append(Name(xs[-1], ys[-1], curve.label, own.colour))
    most = 1.05 * max(s for _, known in found for s, _ in known)
    axes.plot([0, most], [0, most], color="#333333", linestyle="--", linewidth=1.2, label="removed = sparsity")
    names.append(Name(most, most, "removed = sparsity", "#333333"))
    if any(share < 0 for _, known in found for _, share in known):
        axes.axhline(0.0, color=_INK, linewidth=0.8)
    gaps = [(share - s, s, share, curve.label) for curve, known in found for s, share in known]
    axes.set_title(plain(textwrap.fill(_gap(gaps), 72)), fontsize=11, loc="left", color=_INK)
    axes.set_xlabel("sparsity, measured (% of what the method prunes)")
    axes.set_ylabel("removed (% of all parameters)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(Percent())
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(names) <= _NAMED:
        name_ends(axes, names)
    else:
        legend(axes, figure)
    caption = (
        "Each point is a checkpoint. Below the dashed line less leaves the file than the sparsity says: methods "
        "leave embeddings alone or narrow one side of a matrix, and the adapters that some add are counted. "
        "--params-removed asks for a share of all parameters."
    )
    if any(share < 0 for _, known in found for _, share in known):
        caption += " Below zero the checkpoint is larger than the dense one."
    readings = (
        f"{curve.label}: " + ", ".join(f"{words.percent(share)} at {words.percent(s)}" for s, share in known)
        for curve, known in found
    )
    return Picture(
        "compression", png(figure), "Share of all parameters removed, by sparsity: " + "; ".join(readings), caption
    )


_NAMED = 9  # curves that have room for their names at their ends
_AS_ASKED = 0.01  # a share this near to the sparsity is as much


def _gap(gaps: Sequence[tuple[float, float, float, str]]) -> str:
    """The title: how far what was removed is from the sparsity, at the run where it is farthest."""
    gap, s, share, label = max(gaps, key=lambda each: abs(each[0]))
    if abs(gap) <= _AS_ASKED:
        return "Every run removes as large a share of all parameters as its sparsity says"
    so = "less" if gap < 0 else "more"
    every = all((other < -_AS_ASKED) == (gap < 0) and abs(other) > _AS_ASKED for other, *_ in gaps)
    lead = f"The file shrinks {so} than the sparsity says" if every else "Sparsity is not the share removed"
    did = f"removes {words.percent(share)} of all parameters" if share >= 0 else f"adds {words.percent(-share)}"
    return f"{lead}: {label} at {words.percent(s)} sparsity {did}"
