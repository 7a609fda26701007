"""The plot of the spectra of the residual stream at each place, and of the share that slicing discards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secateur.models.save import PLAN_TENSORS, plan_file
from secateur.plan.plan import Plan, read_plan
from secateur.report import words
from secateur.report.plots import DPI, GRID, Percent, Picture, plain, png
from secateur.report.rows import Row

_SLICED = (0.1, 0.2, 0.3, 0.4, 0.5)


def spectra(rows: Sequence[Row]) -> Picture | None:
    """Draw the spectra of the run that slices least, the closest to the dense model; None if no run has spectra."""
    plans = [(row, plan) for row in rows if (plan := _plan(row)) is not None]
    if not plans:
        return None
    row, plan = min(plans, key=lambda pair: pair[0].sparsity or 0.0)
    return _picture(plan, f"{row.get('method')} at {words.percent(row.sparsity)}")


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
    spectra_by_place = []
    for block in plan.blocks:
        for name, place in block.places.items():
            if place.spectrum_D is not None and (name != "enter" or block.index == 0):
                values = place.spectrum_D.numpy()
                spectra_by_place.append(
                    ("embeddings" if name == "enter" else f"block {block.index}, {name}", values / values.sum())
                )
    return spectra_by_place


def _picture(plan: Plan, label: str) -> Picture:
    places = spectra_of(plan)
    figure = Figure(figsize=(8, 3.6), dpi=DPI, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    discarded = np.array([[values[int((1 - s) * len(values)) :].sum() for s in _SLICED] for _, values in places])
    figure.suptitle(
        plain(
            f"Slicing {_SLICED[1]:.0%} of the directions gives up {_range(discarded[:, 1])} of the residual's mean "
            "square"
        ),
        fontsize=11,
        x=0.01,
        ha="left",
    )
    colours = colormaps["viridis"]
    scale = Normalize(0, max(1, len(places) - 1))
    for number, (_, values) in enumerate(places):
        left.plot(np.arange(1, len(values) + 1), np.maximum(values, 1e-12), color=colours(scale(number)), linewidth=1)
    left.set_yscale("log")
    left.set_ylim(max(1e-9, min(values[values > 0].min() for _, values in places) / 2), 1)
    _labels(left, "direction, strongest first", "share of the mean square")
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=left, pad=0.02)
    bar.set_label("place in the network, first to last", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    for column, sparsity in enumerate(_SLICED):
        right.plot(
            range(len(places)),
            discarded[:, column],
            marker="o",
            markersize=3,
            linewidth=1.2,
            color=colormaps["plasma"](0.85 - 0.8 * column / len(_SLICED)),
        )
        right.annotate(
            f"s = {sparsity:g}",
            (len(places) - 1, discarded[-1, column]),
            (5, 0),
            textcoords="offset points",
            fontsize=7,
            va="center",
        )
    right.set_yscale("log")
    right.yaxis.set_major_formatter(Percent())
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xlim(-0.3, (len(places) - 1) * 1.18 + 0.3)
    _labels(right, "place in the network, first to last", "share discarded")
    alt = f"{label}: share of the mean square discarded at s = 0.2, by place: " + "; ".join(
        f"{name} {words.percent(float(row[1]))}" for (name, _), row in zip(places, discarded, strict=True)
    )
    caption = (
        f"From the calibration pass of {label}: what lies before each place was sliced already. "
        "Places: the embeddings, then after attention and after the MLP of each block."
    )
    return Picture("spectra", png(figure), alt, plain(caption))


def _labels(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _range(values: np.ndarray) -> str:
    return f"{words.percent(float(values.min()))} to {words.percent(float(values.max()))}"
