"""How well laws predict what was not measured, on the records of sweeps: every law fitted to three points of a sweep,
and to all but one.

    secateur sweep MODEL --method slicegpt --sparsity 0.05,0.1,... --out runs/slicegpt
    python benchmarks/laws_from_three_points.py runs/slicegpt [RUNS ...] [--plot FILE]

For each sweep and each value that it measured (perplexity, the accuracy of tasks):

- `all`: the constants of the paper's law fitted to every point, its RMSE in the law's own y, and the 95% intervals of
  the constants;
- `apart`: the smallest sparsity, the one nearest the middle, and the largest make the fit (others lie between them);
- `early`: the three smallest make it (the others lie beyond);
- `each`: each point is predicted from all others.

Errors are root mean squares of ln predicted - ln measured over the points outside the fit. `covered` counts, over all
choices of three points that enclose a fourth, how often the 95% interval of the law holds the fourth. Prints tables,
and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from _common import finish, rms, table
from matplotlib.figure import Figure

from secateur import api
from secateur.predict.find import find_records
from secateur.predict.fit import Fit, fit, log_errors
from secateur.predict.laws import DEFAULT, Law, find_law, laws_of
from secateur.predict.points import Points
from secateur.predict.read import read_points
from secateur.predict.select import judge
from secateur.report.looks import COLOURS, MARKERS

THREE = 3


def apart(points: Points) -> np.ndarray:
    """The first point, the one nearest the middle of the range, and the last."""
    middle = int(np.abs(points.s - (points.s[0] + points.s[-1]) / 2).argmin())
    return np.array([0, middle, len(points.s) - 1])


def early(points: Points) -> np.ndarray:
    return np.arange(min(THREE, len(points.s)))


def error_of(law: Law, points: Points, chosen: np.ndarray) -> float | None:
    """The error over the points that are not chosen, by the law fitted to the chosen ones; None if it has no fit."""
    fitted = fit(law, points.s[chosen], points.values[chosen], points.dense)
    rest = np.delete(np.arange(len(points.s)), chosen)
    if fitted is None or not len(rest):
        return None
    return rms(log_errors(points.values[rest], fitted.predict(points.s[rest])))


def coverage(law: Law, points: Points) -> tuple[int, int]:
    """How many points the 95% interval of three points around them holds, and of how many."""
    held = tried = 0
    for chosen in combinations(range(len(points.s)), THREE):
        at = list(chosen)
        fitted = fit(law, points.s[at], points.values[at], points.dense)
        if fitted is None:
            continue
        for n in set(range(at[0] + 1, at[-1])) - set(at):
            if (ends := fitted.interval(points.s[n : n + 1])) is None:
                continue
            tried += 1
            held += bool(ends[0][0] <= points.values[n] <= ends[1][0])
    return held, tried


def judged(points: Points) -> list[dict[str, Any]]:
    """One row for each law that has constants to fit, and for the one that has none."""
    each = {found.law.name: found for found in judge(points.kind, points.s, points.values, points.dense)}
    rows = []
    for law in laws_of(points.kind):
        held, tried = coverage(law, points) if law.free else (0, 0)
        rows.append(
            {
                "law": law.name,
                "apart": error_of(law, points, apart(points)),
                "early": error_of(law, points, early(points)),
                "each": each[law.name].heldout,
                "covered": held / tried if tried else None,
                "tried": tried,
            }
        )
    return rows


def whole(points: Points) -> dict[str, Any]:
    """The paper's law fitted to every point, as in its table 3."""
    law = find_law(DEFAULT[points.kind], points.kind)
    fitted = fit(law, points.s, points.values, points.dense)
    if fitted is None:
        return {"law": law.name}
    return {"law": law.name, **fitted.named(), "intervals": fitted.constant_intervals(), "rmse": fitted.rmse}


def metrics_of(runs: Path) -> list[str]:
    """What the records of a sweep measured."""
    found = [record for record in find_records([runs]) if record.get("command") == "eval"]
    tasks = dict.fromkeys(name for record in found for name in record.get("tasks") or {})
    return [*(["ppl"] if any(record.get("ppl") for record in found) else []), *tasks]


def shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else "no value" if math.isinf(value) else f"{value:.{digits}f}"


def best_three(points: Points) -> Fit | None:
    """The law that three points far apart make the best of."""
    at = apart(points)
    errors = {law.name: error_of(law, points, at) for law in laws_of(points.kind) if law.free}
    known = {name: error for name, error in errors.items() if error is not None}
    if not known:
        return None
    best = find_law(min(known, key=lambda name: known[name]), points.kind)
    return fit(best, points.s[at], points.values[at], points.dense)


def draw(found: dict[str, Points], file: Path) -> None:
    """Draw ln(PPL / PPL0) of each sweep, and the law that three of its points fit best."""
    figure = Figure(figsize=(7.2, 4.8), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    for (name, points), colour, marker in zip(found.items(), COLOURS, MARKERS, strict=False):
        gain = np.log(points.values / points.dense)
        fitted = best_three(points)
        label = name if fitted is None else f"{name}: {fitted.law.name}"
        axes.plot(points.s, gain, color=colour, marker=marker, markersize=5, linewidth=0, label=label)
        axes.plot(points.s[apart(points)], gain[apart(points)], "o", color=colour, markersize=10, fillstyle="none")
        if fitted is not None:
            grid = np.linspace(0, points.s[-1], 200)
            axes.plot(grid, np.log(fitted.predict(grid) / points.dense), color=colour, linewidth=1)
    axes.set(xlabel="sparsity s, of what the method removes from", ylabel="ln(PPL / PPL0)", xlim=(0, None))
    finish(axes, "Laws fitted to three points (circled)")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of sweeps, or records files")
    parser.add_argument("--plot", type=Path, help="a PNG to write")
    options = parser.parse_args()
    answer, curves = [], {}
    for runs in options.runs:
        for metric in metrics_of(runs):
            try:
                points = read_points([runs], metric)
            except api.SecateurError as error:
                print(f"{runs.name}, {metric}: {error}\n")
                continue
            if metric == "ppl":
                curves[runs.name] = points
            rows, fitted = judged(points), whole(points)
            values = ", ".join(f"{s:.3f}: {v:.4g}" for s, v in zip(points.s, points.values, strict=True))
            print(f"{runs.name}, {metric}: dense {points.dense:.4g}; {values}")
            if "intervals" in fitted:
                constants = ", ".join(
                    f"{name} {fitted[name]:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")
                    for name, ends in fitted["intervals"].items()
                )
                print(f"all points, {fitted['law']}: {constants}; RMSE {fitted['rmse']:.3f}")
            table(
                ("law", "apart", "early", "each", "covered", "of"),
                [
                    (
                        row["law"],
                        *(shown(row[name]) for name in ("apart", "early", "each")),
                        shown(row["covered"], 2),
                        str(row["tried"]),
                    )
                    for row in rows
                ],
            )
            print()
            answer.append(
                {"runs": runs.name, "metric": metric, "all": fitted, "laws": rows, "warnings": points.warnings}
            )
    if options.plot is not None:
        draw(curves, options.plot)
    print(json.dumps({"benchmark": "laws_from_three_points", "rows": answer}))


if __name__ == "__main__":
    main()
