"""The figures of DISP-LLM (arXiv:2410.11988), from records and checkpoints.

They show the course of learning, the features that each block keeps, and the effect of the settings.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secateur.core.records import Record
from secateur.models.save import PLAN_TENSORS, plan_file
from secateur.plan.plan import Plan, read_plan
from secateur.report import words
from secateur.report.learned import FULL, Run, at_default_strength, by_strength, perplexities
from secateur.report.looks import look, looks
from secateur.report.plots import COLOURS, DPI, GRID, MARKERS, Percent, Picture, legend, logarithmic, plain, png
from secateur.report.rows import Group, Row, as_number, task_names
from secateur.report.series import Series, base, series

_INK, _MOST = "#111111", 8
_STYLES = [(colour, dash) for dash in ("-", "--") for colour in COLOURS]
_SELECTIONS = {
    "attention_in": "attention reads",
    "q_in": "q reads",
    "k_in": "k reads",
    "v_in": "v reads",
    "attention_out": "attention writes",
    "mlp_in": "MLP reads",
    "mlp_out": "MLP writes",
}


def pictures(runs: Sequence[Run], group: Group) -> list[Picture]:
    """Draw all figures that the runs have data for."""
    drawn = [
        _measured_ratio(group),
        _by_ratio(runs),
        _by_variant(runs),
        _variants(runs, group.dense),
        _strengths(runs),
        _selections(runs),
        _repetition(group),
    ]
    return [picture for picture in drawn if picture is not None]


def _by_ratio(runs: Sequence[Run]) -> Picture | None:
    """Draw figures 5e, 5f and 11: one curve per sparsity, for the variant with the most sparsities."""
    variants: dict[str, dict[float, Run]] = {}
    for run in at_default_strength(runs):
        variants.setdefault(run.varied, {}).setdefault(run.sparsity, run)
    name, several = max(variants.items(), key=lambda item: (len(item[1]), item[0] == FULL), default=("", {}))
    chosen = [several[s] for s in sorted(several)][:_MOST]
    if len(chosen) < 2:
        return None
    return dynamics(
        chosen,
        [f"{run.sparsity:.0%} removed" for run in chosen],
        "learning-ratios",
        f"Learning at {len(chosen)} ratios ({name})",
    )


def _by_variant(runs: Sequence[Run]) -> Picture | None:
    """Draw figures 5a and 5b: one curve per variant, at the sparsity with the most variants."""
    at: dict[float, dict[str, Run]] = {}
    for run in at_default_strength(runs):
        at.setdefault(run.sparsity, {}).setdefault(run.varied, run)
    sparsity, several = max(at.items(), key=lambda item: (len(item[1]), item[0]), default=(0.0, {}))
    chosen = list(several.values())[:_MOST]
    if len(chosen) < 2:
        return None
    return dynamics(
        chosen, [run.varied for run in chosen], "learning-variants", f"Learning to remove {sparsity:.0%}, by variant"
    )


def dynamics(runs: Sequence[Run], labels: Sequence[str], name: str, title: str) -> Picture:
    """Draw the loss of the language model and the budget term against the step, one curve per run."""
    figure = Figure(figsize=(9, 3.8), dpi=DPI, layout="constrained", facecolor="white")
    figure.suptitle(plain(textwrap.fill(title, 90)), fontsize=11, x=0.01, ha="left", color=_INK)
    left, right = figure.subplots(1, 2)
    for run, label, (colour, dash) in zip(runs, labels, _STYLES, strict=False):
        step = run.learning["step"]
        left.plot(step, _smooth(run.learning["loss"]), color=colour, linestyle=dash, linewidth=1.6, label=plain(label))
        left.plot(step, run.learning["loss"], color=colour, linewidth=0.6, alpha=0.3)
        budget = np.maximum(run.learning["budget"], 1e-5)
        right.plot(step, budget, color=colour, linestyle=dash, linewidth=1.2, label=plain(label))
    _dress(left, "step", "loss of the language model, nats a token")
    _dress(right, "step", "budget term |log(T(s) / target)|")
    right.set_yscale("log")
    right.axhline(0.01, color="#888888", linewidth=1.0, linestyle=":")
    right.annotate(
        "1% off",
        (1.0, 0.01),
        (-2, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=7,
        ha="right",
        color="#666666",
    )
    figure.legend(
        *left.get_legend_handles_labels(),
        fontsize=8,
        frameon=False,
        loc="outside lower center",
        ncols=min(4, len(runs)),
    )
    alt = f"{title}: " + "; ".join(
        f"{label}: loss {run.learning['loss'][0]:.2f} to {_smooth(run.learning['loss'])[-1]:.2f}, "
        f"budget term {run.learning['budget'][-1]:.4f} at the end"
        for run, label in zip(runs, labels, strict=True)
    )
    caption = (
        "Losses are of drawn gates on calibration windows: thin as seen, thick their running mean over a tenth of the "
        "run. The budget term is without lambda."
    )
    return Picture(name, png(figure), alt, caption)


def _smooth(values: Sequence[float]) -> np.ndarray:
    """The running mean: at each point, the mean over the tenth of the run before it."""
    width = max(1, len(values) // 10)
    sums = np.cumsum(np.concatenate([[0.0], np.asarray(values, dtype=float)]))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - width)
    means: np.ndarray = (sums[ends] - sums[begins]) / (ends - begins)
    return means


def _variants(runs: Sequence[Run], dense: Row | None) -> Picture | None:
    """Draw figures 5c and 5d, and table 10: perplexity against the ratio, one line per variant, bars over seeds."""
    lines = {name: at for name, at in perplexities(runs).items() if len(at) > 1}
    if not lines or len(perplexities(runs)) < 2:
        return None
    figure = Figure(figsize=(7, 4.2), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    values = [v for at in lines.values() for several in at.values() for v in several]
    for (name, at), (colour, dash), marker in zip(lines.items(), _STYLES, MARKERS * 2, strict=False):
        xs = sorted(at)
        errors = [stdev(at[x]) if len(at[x]) > 1 else 0.0 for x in xs]
        axes.errorbar(
            xs,
            [fmean(at[x]) for x in xs],
            yerr=errors,
            color=colour,
            linestyle=dash,
            marker=marker,
            markersize=5,
            capsize=3,
            label=plain(name),
        )
    if dense is not None and dense.ppl is not None:
        axes.axhline(
            dense.ppl, color=_INK, linestyle="--", linewidth=1.0, label=f"dense, {words.perplexity(dense.ppl)}"
        )
        values.append(dense.ppl)
    logarithmic(axes, max(values) / min(values))
    _dress(axes, "parameters removed, asked", "perplexity, log scale (lower is better)")
    axes.xaxis.set_major_formatter(Percent())
    axes.legend(fontsize=8, framealpha=0.9, edgecolor=GRID)
    highest = max(s for at in lines.values() for s in at)
    there = {name: fmean(at[highest]) for name, at in lines.items() if highest in at}
    best = min(there, key=lambda name: there[name])
    axes.set_title(
        plain(f"Variants: at {highest:.0%} removed, '{best}' is best with {words.perplexity(there[best])}"),
        fontsize=11,
        loc="left",
        color=_INK,
    )
    alt = "; ".join(
        f"{name}: " + ", ".join(f"{words.perplexity(fmean(at[s]))} at {s:.0%}" for s in sorted(at))
        for name, at in lines.items()
    )
    return Picture(
        "learning-perplexity", png(figure), alt, "Bars are one standard deviation over seeds, where there are several."
    )


def _strengths(runs: Sequence[Run]) -> Picture | None:
    """Draw table 12: perplexity against lambda."""
    sweep = by_strength(runs) if runs else None
    if sweep is None:
        return None
    sparsity, runs_there = sweep
    figure = Figure(figsize=(6, 3.6), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    for chosen, (marker, line), label in (
        ([r for r in runs_there if not r.missed], ("o", "-"), "budget reached"),
        ([r for r in runs_there if r.missed], ("X", "none"), "budget not reached while learning (NC)"),
    ):
        if chosen:
            axes.plot(
                [r.strength for r in chosen],
                [r.row.ppl or 0.0 for r in chosen],
                color=COLOURS[0],
                marker=marker,
                linestyle=line,
                label=label,
            )
    _dress(axes, "lambda, the weight of the budget term", "perplexity (lower is better)")
    best = min(runs_there, key=lambda r: r.row.ppl or 0.0)
    axes.set_title(
        f"At {sparsity:.0%} removed, lambda {best.strength:g} is best: {words.perplexity(best.row.ppl)}",
        fontsize=11,
        loc="left",
        color=_INK,
    )
    axes.legend(fontsize=8, framealpha=0.9, edgecolor=GRID)
    alt = "Perplexity by lambda: " + ", ".join(f"{words.perplexity(r.row.ppl)} at {r.strength:g}" for r in runs_there)
    return Picture(
        "learning-lambda",
        png(figure),
        alt,
        "The cut meets the budget in any case; NC: what was learned did not, by more than 5%.",
    )


def _selections(runs: Sequence[Run]) -> Picture | None:
    """Draw figures 4, 8 and 12, for the run closest to half of the parameters."""
    for run in sorted(
        at_default_strength(runs), key=lambda run: (run.varied != FULL, abs(run.sparsity - 0.5), run.seed)
    ):
        if (plan := _plan(run.row)) is not None:
            return selections(
                plan,
                f"{run.row.get('method')} at {words.gone(run.row)}" + ("" if run.varied == FULL else f", {run.varied}"),
            )
    return None


def _plan(row: Row) -> Plan | None:
    folder = Path(str(row.get("out") or ""))
    try:
        plan = read_plan(folder) if plan_file(folder, PLAN_TENSORS) else None
        same = plan is not None and plan.settings.get("sparsity_measured") == row.get("sparsity_measured")
        return (
            plan
            if same
            and plan is not None
            and all(block.select and set(_SELECTIONS) & set(block.keep) for block in plan.blocks)
            else None
        )
    except Exception:
        return None  # a damaged plan loses its picture; the report goes on


def selections(plan: Plan, label: str) -> Picture:
    """Draw which features of the residual each block reads and writes, and how often each feature is used."""
    width = plan.blocks[0].of["attention_out"]
    kept = {name: np.zeros((len(plan.blocks), width)) for name in _SELECTIONS if name in plan.blocks[0].keep}
    for number, block in enumerate(plan.blocks):
        for name, matrix in kept.items():
            matrix[number, block.keep[name].numpy()] = 1
    figure = Figure(figsize=(9, 1.4 + 1.2 * len(kept)), dpi=DPI, layout="constrained", facecolor="white")
    *axes, last = figure.subplots(len(kept) + 1, 1, sharex=True, height_ratios=[1] * len(kept) + [1.2])
    for panel, (name, matrix) in zip(axes, kept.items(), strict=True):
        panel.imshow(
            matrix, aspect="auto", cmap=ListedColormap(["#f0f0f0", COLOURS[0]]), vmin=0, vmax=1, interpolation="nearest"
        )
        panel.set_ylabel("block", fontsize=8)
        panel.set_title(f"{_SELECTIONS[name]}: {matrix.mean():.0%} kept", fontsize=9, loc="left")
        panel.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        panel.tick_params(labelsize=8)
    rate = np.mean([matrix.mean(0) for matrix in kept.values()], axis=0)
    last.plot(rate, color=COLOURS[1], linewidth=1.0, drawstyle="steps-mid")
    last.axhline(rate.mean(), color=_INK, linestyle="--", linewidth=1.0)
    last.set_ylim(0, 1.02)
    last.yaxis.set_major_formatter(Percent())
    last.set_title(
        f"share of all selections that keep the feature: {rate.min():.0%} to {rate.max():.0%}, mean {rate.mean():.0%}",
        fontsize=9,
        loc="left",
    )
    _dress(last, "feature of the residual stream", "kept")
    unused = int((rate == 0).sum())
    usage = "every feature is used somewhere" if not unused else f"{unused} of {width} features are used nowhere"
    figure.suptitle(plain(f"{label}: {usage}"), fontsize=11, x=0.01, ha="left", color=_INK)
    alt = f"Kept by each selection: {', '.join(f'{_SELECTIONS[n]} {m.mean():.0%}' for n, m in kept.items())}; {usage}"
    return Picture(
        "selections", png(figure), alt, "Coloured: the block keeps the feature. Features in the order of the model."
    )


def _measured_ratio(group: Group) -> Picture | None:
    """Draw tables 13 and 14, and table 1 with other methods: perplexity and accuracy against the measured ratio.

    Returns:
        None where no method has several variants: other plots of the report then have the same curves.
    """
    # Among the variants of a method, take the one with the most points; the figure of the variants has the others.
    longest: dict[str, Series] = {}
    curves: list[str] = []
    for curve in series(group.rows):
        points = sum((row.number("pruning_ratio") or 0) > 0 and row.ppl is not None for row in curve.rows)
        name = base(curve.rows[0])
        curves += [name] if curve.joined and points else []
        if curve.joined and points > 1 and (name not in longest or len(curve.rows) > len(longest[name].rows)):
            longest[name] = curve
    removing = [replace(curve, label=name) for name, curve in longest.items()][:_MOST]
    if len({curve.method for curve in removing}) < 2 or len(set(curves)) == len(curves):
        return None
    tasks = [(task, lambda row, t=task: row.accuracy(t)) for task in task_names(group.rows)[:1]]
    panels: list[tuple[str, Callable[[Row], float | None]]] = [("perplexity", lambda row: row.ppl), *tasks]
    figure = Figure(figsize=(4.6 * len(panels) + 0.6, 4.2), dpi=DPI, layout="constrained", facecolor="white")
    readings = []
    for number, (name, value) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        values = []
        for curve, own in zip(removing, looks([curve.method for curve in removing]), strict=True):
            at: dict[float, list[float]] = {}
            for row in curve.rows:
                ratio, y = row.number("pruning_ratio"), value(row)
                if ratio and y is not None:
                    at.setdefault(round(ratio, 3), []).append(y)
            means = [fmean(at[ratio]) for ratio in sorted(at)]
            axes.plot(
                sorted(at),
                means,
                linestyle=own.dash,
                markersize=5,
                linewidth=1.6,
                label=plain(curve.label),
                **own.points,
            )
            values += means
            readings.append(
                f"{name} of {curve.label}: "
                + ", ".join(f"{y:.4g} at {x:.1%}" for x, y in zip(sorted(at), means, strict=True))
            )
        dense = None if group.dense is None else value(group.dense)
        if dense is not None:
            axes.axhline(dense, color=_INK, linestyle="--", linewidth=1.0, label="dense")
        if name == "perplexity" and values:
            logarithmic(axes, max(values) / min(values))
        _dress(
            axes,
            "pruning ratio, measured",
            "perplexity, log scale (lower is better)" if name == "perplexity" else f"accuracy on {plain(name)}",
        )
        axes.xaxis.set_major_formatter(Percent())
    figure.suptitle(
        "What the same share of all parameters costs, method by method", fontsize=11, x=0.01, ha="left", color=_INK
    )
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=3
    )
    return Picture(
        "ratios",
        png(figure),
        "; ".join(readings),
        "The ratio is that of the written file, adapters counted; seeds share a point.",
    )


def _repetition(group: Group) -> Picture | None:
    """Draw table 16 as a curve: how much greedy continuations repeat themselves."""
    by_method: dict[str, list[tuple[float, float]]] = {}
    dense = None
    for row in group.rows:
        repeats, ratio = row.part("shift").get("repetition"), row.number("pruning_ratio")
        if isinstance(repeats, float) and ratio and not row.dense:
            by_method.setdefault(str(row.get("method")), []).append((ratio, repeats))
            dense = row.part("shift").get("repetition_dense", dense)
    if sum(len(points) for points in by_method.values()) < 2:
        return None
    figure = Figure(figsize=(7, 3.8), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    for (method, points), own in zip(by_method.items(), looks(list(by_method)), strict=True):
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, linestyle=own.dash, linewidth=1.4, label=plain(method), **own.points)
    if dense is not None:
        axes.axhline(dense, color=_INK, linestyle="--", linewidth=1.2, label=f"dense, {dense:.0%}")
    _dress(axes, "pruning ratio, measured", "4-grams repeated")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(Percent())
    axes.set_title("Repetition in greedy continuations", fontsize=11, loc="left", color=_INK)
    axes.legend(fontsize=8, framealpha=0.9, edgecolor=GRID)
    alt = "; ".join(
        f"{method}: " + ", ".join(f"{y:.0%} at {x:.0%}" for x, y in sorted(points))
        for method, points in by_method.items()
    )
    return Picture(
        "repetition",
        png(figure),
        f"Share of repeated 4-grams: {alt}",
        "The share of 4-grams that occurred before in the same continuation; few prompts.",
    )


def throughput(records: Sequence[Record]) -> Picture | None:
    """Draw figure 5g and table 11: the speed as a multiple of the dense model's.

    Returns:
        None without a record of `bench` that also measured the dense model.
    """
    curves: dict[tuple[str, str, int], dict[float, float]] = {}
    for record in records:
        ratio = as_number(record.get("pruning_ratio"))
        if record.get("command") != "bench" or not ratio:
            continue
        for entry in record.get("speedup") or []:
            for phase in ("decode", "prefill"):
                # a later record replaces an earlier one
                curves.setdefault((str(record.get("method")), phase, entry["batch"]), {})[ratio] = entry[phase]
    if not curves:
        return None
    figure = Figure(figsize=(7, 4.0), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    batches = sorted({batch for _, _, batch in curves})
    for (method, phase, batch), at in curves.items():
        own = look(method)
        of_phase = {"linestyle": "-"} if phase == "decode" else {"linestyle": ":", "markerfacecolor": "none"}
        label = plain(f"{method}, {phase}, batch {batch}")
        axes.plot(
            sorted(at),
            [at[r] for r in sorted(at)],
            color=own.colour,
            marker=own.marker,
            markersize=5 + 3 * batches.index(batch),
            label=label,
            **of_phase,  # type: ignore[arg-type]
        )
    axes.axhline(1.0, color=_INK, linestyle="--", linewidth=1.0, label="dense")
    ratios = np.linspace(0.0, max(r for at in curves.values() for r in at), 50)
    axes.plot(
        ratios,
        1 / (1 - ratios),
        color="#888888",
        linestyle="-.",
        linewidth=1.2,
        label="as much as parameters removed, 1 / (1 - ratio)",
    )
    _dress(axes, "pruning ratio, measured", "times as fast as the dense model")
    axes.xaxis.set_major_formatter(Percent())
    best, at = max(curves.items(), key=lambda item: max(item[1].values()))
    axes.set_title(
        plain(f"Throughput: at most {max(at.values()):.2f} times the dense model's ({best[0]}, {best[1]})"),
        fontsize=11,
        loc="left",
        color=_INK,
    )
    legend(axes, figure)
    alt = "; ".join(
        f"{method}, {phase}, batch {batch}: " + ", ".join(f"{y:.2f} at {x:.0%}" for x, y in at.items())
        for (method, phase, batch), at in curves.items()
    )
    return Picture(
        "throughput",
        png(figure),
        f"Times as fast as the dense model: {alt}",
        "Best of several turns, both models taking turns; see the records for lengths and threads. "
        "The larger the marker, the larger the batch.",
    )


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
