"""The figure of `inspect --flow`: where the parameters and FLOPs of a model are.

It also shows the part that depends on the residual width, and what is left at a smaller width.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from secateur.core.errors import SecateurError, UsageError
from secateur.evaluate.flow import SPARSITIES, Flow
from secateur.report import words
from secateur.report.plots import COLOURS, DPI, GRID, Percent, Picture, plain, png

_TOUCHED, _REST, _SLICED = COLOURS[0], "#999999", COLOURS[1]
_ATTENTION = "scores, values"


def write_flow(flow: Flow, out: Path) -> None:
    """Draw the figure to the file `out`.

    Raises:
        UsageError: the name does not end in `.png`, or is a folder.
        SecateurError: the file cannot be written.
    """
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UsageError(f"--plot '{out}': a PNG file is drawn; give a name that ends in .png, and is no folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(flow_picture(flow).png)
    except OSError as error:
        raise SecateurError(
            f"cannot write the plot to '{out}' ({error.strerror}): give a path in a folder that you can write to"
        ) from None


def flow_picture(flow: Flow) -> Picture:
    """Draw parameters (above) and FLOPs per token (below).

    The left panels are by kind of map. The right ones are against s; a model without a table over s has none.
    """
    parameters = _kinds(flow, lambda entry: (entry.touched_parameters(), entry.parameters()))
    flops = _kinds(flow, lambda entry: (entry.flops() if entry.touched else 0, entry.flops()))
    flops[_ATTENTION] = (0, flow.attention_flops())
    figure = Figure(figsize=(10, 7.6), dpi=DPI, layout="constrained", facecolor="white")
    figure.suptitle(plain(textwrap.fill(_title(flow), 105)), fontsize=12, x=0.01, ha="left", color="#111111")
    panels = figure.subplots(
        2, 1 if flow.refusal else 2, squeeze=False, width_ratios=None if flow.refusal else (1.15, 1)
    )
    bars, flop_bars = panels[:, 0]
    _bars(
        bars,
        parameters,
        "parameters"
        + (
            ", the head's are the embedding's"
            if any(entry.tied and entry.name == "head" for entry in flow.maps)
            else ""
        ),
    )
    figure.legend(
        *bars.get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=9, frameon=False
    )  # below, where it hides no bar
    _bars(flop_bars, flops, f"FLOPs per token, attention at {flow.context:,} positions")
    if not flow.refusal:
        _by_sparsity(flow, panels[0, 1], panels[1, 1])
    readings = "; ".join(f"{name} {words.count(total)}" for name, (_, total) in parameters.items())
    return Picture(
        "flow", png(figure), f"Parameters by kind of map: {readings}", "Blue is what scales with the residual width d."
    )


def _by_sparsity(flow: Flow, curve: Axes, flop_curve: Axes) -> None:
    """Draw the parameters and FLOPs that are left against s."""
    points = [flow.at(sparsity) for sparsity in SPARSITIES]
    whole, attention = flow.parameters(), flow.attention_flops()
    sliced = [point.parameters + point.adapter_parameters + point.untied_parameters for point in points]
    added = "with SliceGPT's adapters" + (", untied head" if any(point.untied_parameters for point in points) else "")
    _curves(
        curve,
        "parameters left",
        {"(1 - s)d alone": [p.parameters / whole for p in points], added: [count / whole for count in sliced]},
    )
    whole = flow.flops() + attention
    plain_flops, sliced_flops = (
        [p.flops + attention for p in points],
        [p.flops + p.adapter_flops + attention for p in points],
    )
    kinds = {
        "(1 - s)d alone": [f / whole for f in plain_flops],
        "with SliceGPT's adapters": [f / whole for f in sliced_flops],
    }
    _curves(flop_curve, "FLOPs per token left, attention's products included", kinds)


def _title(flow: Flow) -> str:
    """The title of the figure, with its main numbers."""
    parameters, flops = (
        flow.touched_parameters() / flow.parameters(),
        flow.touched_flops() / (flow.flops() + flow.attention_flops()),
    )
    name = Path(flow.name).name or flow.name
    few, most = min(flow.widths[:-1]), max(flow.widths[:-1])  # the last one is whole unless the head is sliced
    width = (
        f"{flow.width:,}"
        if not flow.sliced
        else f"{most:,} of {flow.hidden:,}"
        if few == most
        else f"{few:,} to {most:,} of {flow.hidden:,}"
    )
    return (
        f"{name}: the residual width d = {width} touches {parameters:.1%} of the parameters and {flops:.1%} of the "
        "FLOPs"
    )


def _kinds(flow: Flow, counts: Callable[..., tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Kind of map -> (count that d touches, total count), summed over all blocks, in the order of the flow.

    All norms are one kind. Kinds with a total of 0 are left out.
    """
    kinds: dict[str, tuple[int, int]] = {}
    for entry in flow.maps:
        name = "norms" if entry.kind == "scale" else entry.name
        touched, total = counts(entry)
        sums = kinds.get(name, (0, 0))
        kinds[name] = (sums[0] + touched, sums[1] + total)
    return {name: pair for name, pair in kinds.items() if pair[1]}


def _bars(axes: Axes, kinds: Mapping[str, tuple[int, int]], title: str) -> None:
    whole = sum(total for _, total in kinds.values())
    names, places = list(kinds), range(len(kinds))
    axes.barh(
        places,
        [touched for touched, _ in kinds.values()],
        color=_TOUCHED,
        label="multiplied by 1 - s where d becomes (1 - s)d",
    )
    rest = [total - touched for touched, total in kinds.values()]
    axes.barh(
        places,
        rest,
        left=[touched for touched, _ in kinds.values()],
        color=_REST,
        hatch="///",
        edgecolor="white",
        label="as before",
    )
    for place, (_, total) in zip(places, kinds.values(), strict=True):
        axes.annotate(
            f"{words.count(total)}, {total / whole:.1%}",
            (total, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(places, labels=[plain(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * max(total for _, total in kinds.values()))  # room for the numbers
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.count(value) or ""))
    _dress(axes, f"{words.count(whole)} {title}", "x")


def _curves(axes: Axes, title: str, curves: Mapping[str, list[float]]) -> None:
    for (label, shares), colour, marker, dash in zip(
        curves.items(), (_TOUCHED, _SLICED), "os", ("-", "--"), strict=True
    ):
        axes.plot(
            SPARSITIES,
            shares,
            color=colour,
            marker=marker,
            linestyle=dash,
            linewidth=1.8,
            markersize=5,
            label=f"{label}: {shares[-1]:.1%} at s = {SPARSITIES[-1]:g}",
        )
    axes.axhline(1, color="#333333", linestyle=":", linewidth=1.2)
    axes.set_ylim(0, 1.08 * max(1.0, *(share for shares in curves.values() for share in shares)))
    axes.set_xlabel("s, by which d is narrowed")
    axes.yaxis.set_major_formatter(Percent())
    _dress(axes, title, "both")
    axes.legend(fontsize=8, framealpha=0.9, edgecolor=GRID, loc="lower left")


def _dress(axes: Axes, title: str, grid: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color="#111111")
    axes.grid(color=GRID, linewidth=0.6, axis=grid)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
