"""The plot of the spectra of the residual stream at each place, and of the share that slicing discards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from secateur.models.save import PLAN_TENSORS, plan_file
from secateur.plan.plan import Plan, read_plan
from secateur.report import words
from secateur.report.looks import Look, look
from secateur.report.plots import DENSE, DPI, GRID, Picture, plain, png
from secateur.report.rows import Row

_SLICED = (0.1, 0.2, 0.3, 0.4, 0.5)
_TICKS = 12  # labels that an axis has room for


def spectra(rows: Sequence[Row]) -> Picture | None:
    """Draw the spectra of the run that slices least, the closest to the dense model; None if no run has spectra."""
    plans = [(row, plan) for row in rows if (plan := _plan(row)) is not None]
    if not plans:
        return None
    row, plan = min(plans, key=lambda pair: pair[0].sparsity or 0.0)
    return _picture(plan, str(row.get("method")), row.sparsity or 0.0, words.gone(row))


def _plan(row: Row) -> Plan | None:
    folder = Path(str(row.get("out") or ""))
    try:
        plan = read_plan(folder) if plan_file(folder, PLAN_TENSORS) else None
        same = (
            plan is not None and plan.rotates and plan.settings.get("sparsity_measured") == row.get("sparsity_measured")
        )
    except Exception:
        return None  # a damaged plan loses its picture; the report goes on
    return plan if same else None


def spectra_of(plan: Plan) -> list[tuple[str, np.ndarray]]:
    """The name and spectrum of every place, in the order of the network; each spectrum has a sum of 1."""
    return [(name, values) for name, values, _ in _places(plan)]


def _places(plan: Plan) -> list[tuple[str, np.ndarray, int]]:
    """The name, spectrum (with a sum of 1) and width of every place, in the order of the network."""
    places = []
    for block in plan.blocks:
        for name, place in block.places.items():
            if place.spectrum_D is not None and (name != "enter" or block.index == 0):
                values = place.spectrum_D.numpy()
                named = "embeddings" if name == "enter" else f"block {block.index}, {name}"
                places.append((named, values / values.sum(), place.width))
    return places


def _picture(plan: Plan, method: str, sparsity: float, gone: str) -> Picture:
    places = spectra_of(plan)
    label = f"{method} at {gone}"
    figure = Figure(figsize=(9, 4), dpi=DPI, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    widths = [width for *_, width in _places(plan)]
    own = np.array([float(values[width:].sum()) for (_, values), width in zip(places, widths, strict=True)])
    worst = places[int(own.argmax())][0]
    figure.suptitle(
        plain(
            f"{label} gives up at most {_share(float(own.max()))} of the residual stream's mean square "
            f"at one place ({worst})"
        ),
        fontsize=11,
        x=0.01,
        ha="left",
    )
    _strengths(left, places, widths)
    _by_place(right, places, own, sparsity, look(method))
    alt = f"{label}: share of the mean square discarded, by place: " + "; ".join(
        f"{name} {_share(float(share))}" for (name, _), share in zip(places, own, strict=True)
    )
    caption = (
        f"From the calibration pass of {label}: what lies before each place was sliced already. "
        "Places: the embeddings, then after attention and after the MLP of each block. "
        "Grey: what other sparsities would give up."
    )
    return Picture("spectra", png(figure), alt, plain(caption))


def _strengths(axes: Axes, places: Sequence[tuple[str, np.ndarray]], widths: Sequence[int]) -> None:
    """Draw the share of each direction, one line for each place, and where the run slices."""
    colours, scale = colormaps["viridis"], Normalize(0, max(1, len(places) - 1))
    for number, (_, values) in enumerate(places):
        axes.plot(np.arange(1, len(values) + 1), np.maximum(values, 1e-12), color=colours(scale(number)), linewidth=1)
    axes.set_yscale("log")
    axes.set_ylim(max(1e-9, min(values[values > 0].min() for _, values in places) / 2), 1)
    if len(set(widths)) == 1:
        axes.axvline(widths[0] + 0.5, color=DENSE, linestyle="--", linewidth=1)
        end = axes.get_xaxis_transform()
        kept = f"{widths[0]:,} of {len(places[0][1]):,} kept "
        axes.annotate(kept, (widths[0] + 0.5, 0.97), xycoords=end, ha="right", va="top", fontsize=8)
    axes.set_title("How strong each direction is", fontsize=10, loc="left")
    _labels(axes, "direction, strongest first", "share of the mean square, log scale")
    figure = axes.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=axes, pad=0.02)
    bar.set_label("place, first to last: block", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    numbers, blocks = _ticks(places)
    bar.set_ticks(numbers, labels=blocks)


def _by_place(
    axes: Axes, places: Sequence[tuple[str, np.ndarray]], own: np.ndarray, sparsity: float, drawn_as: Look
) -> None:
    """Draw the share that each place discards: that of the run, and in grey those of other sparsities."""
    last = len(places) - 1
    lines = [
        (s, np.array([_discarded(values, s) for _, values in places])) for s in _SLICED if abs(s - sparsity) > 0.03
    ]
    styles: list[dict[str, Any]] = [{"color": "#999999", "linewidth": 1.0} for _ in lines]
    styles.append({"color": drawn_as.colour, "marker": drawn_as.marker, "markersize": 4})
    for (s, shares), drawn in zip([*lines, (sparsity, own)], styles, strict=True):
        axes.plot(range(len(places)), shares, **drawn)
        axes.annotate(
            f"{100 * s:.3g}% sliced",
            (last, shares[-1]),
            (6, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
            color="#666666" if drawn["color"] == "#999999" else drawn["color"],
            annotation_clip=False,
        )
    axes.set_yscale("log")
    axes.set_title("What each place gives up", fontsize=10, loc="left")
    _labels(axes, "place, first to last: block (attention, then MLP)", "share of the mean square given up, log scale")
    numbers, blocks = _ticks(places)
    axes.set_xticks(numbers, labels=blocks)


def _discarded(values: np.ndarray, sparsity: float) -> float:
    return float(values[int((1 - sparsity) * len(values)) :].sum())


def _ticks(places: Sequence[tuple[str, np.ndarray]]) -> tuple[list[int], list[str]]:
    """The number of the first place of each block, for at most _TICKS blocks, and its label."""
    first: dict[str, int] = {}
    for number, (name, _) in enumerate(places):
        first.setdefault(name.partition(",")[0].removeprefix("block "), number)
    blocks = [(number, name) for name, number in first.items() if name.isdecimal()]
    step = max(1, math.ceil(len(blocks) / _TICKS))
    shown = blocks[::step]
    if step == 1 and "embeddings" in first:
        shown = [(first["embeddings"], "emb."), *shown]
    return [number for number, _ in shown], [name for _, name in shown]


def _share(value: float) -> str:
    """A share as a percentage with as many decimals as it needs: 0.0004 is 0.04%, not 0.0%."""
    return f"{100 * value:.2g}%" if value < 0.1 else f"{100 * value:.0f}%"


def _labels(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g}%"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
