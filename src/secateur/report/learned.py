"""Runs with learned selections, by what was varied: variants, weight of the budget term, seeds.

They correspond to tables 4, 10 and 12 of DISP-LLM (arXiv:2410.11988).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from secateur.methods import find_method
from secateur.report import words
from secateur.report.published import PublishedTable, published
from secateur.report.rows import Row, as_number
from secateur.report.tables import MISSING, Cell, Table

FULL = "defaults"
PAPER = "disp_llm"
MISSED = 0.05  # a final budget term above this means that T(s) is more than 5% off
_NAMES = {
    "hypernetwork=none": "without hypernetwork",
    "hypernetwork=linear": "without Bi-GRU",
    "constrained=True": "constrained",
    "norm=selected": "select, then norm",
    "separate=True": "q, k and v apart",
    "scale=True": "scales",
}


@dataclass(frozen=True, eq=False)
class Run:
    """A row with a learning curve.

    Attributes:
        row: the run.
        varied: the options that are not defaults and differ among the runs, in words, without `strength`.
        strength: lambda, the weight of the budget term.
        sparsity: the requested sparsity.
        seed: the seed of the run.
    """

    row: Row
    varied: str
    strength: float
    sparsity: float
    seed: int

    @property
    def learning(self) -> Mapping[str, Any]:
        """The curves: `step`, `loss`, `budget`, `left`."""
        return self.row.part("learning")

    @property
    def missed(self) -> bool:
        """Whether the run missed the budget."""
        return bool(self.learning["budget"]) and self.learning["budget"][-1] > MISSED


def learned(rows: Sequence[Row]) -> list[Run]:
    """The runs with learned selections among the rows."""
    learned_rows = [
        row for row in rows if row.part("learning").get("step") and row.number("sparsity") and row.part("options")
    ]
    if not learned_rows:
        return []
    options = {row: _changed(row) for row in learned_rows}
    varied = {
        name
        for changed in options.values()
        for name in changed
        if any(other.get(name) != changed[name] for other in options.values())
    } - {"strength"}
    runs = []
    for row in learned_rows:
        labels = [
            _NAMES.get(f"{name}={value}", f"{name}={value}") for name, value in options[row].items() if name in varied
        ]
        strength = as_number(row.part("options").get("strength")) or 0.0
        runs.append(
            Run(row, ", ".join(labels) or FULL, strength, row.number("sparsity") or 0.0, int(row.number("seed") or 0))
        )
    return sorted(runs, key=lambda run: (run.varied != FULL, run.varied, run.strength, run.sparsity, run.seed))


def _changed(row: Row) -> dict[str, Any]:
    """The options that are not the defaults of the method; all options if the method is unknown here."""
    options = row.part("options")
    try:
        defaults = vars(find_method(str(row.get("method"))).options({}))
    except Exception:
        return options
    return {name: value for name, value in options.items() if value != defaults.get(name, value)}


def at_default_strength(runs: Sequence[Run]) -> list[Run]:
    """The runs with the most frequent lambda."""
    if not runs:
        return []
    counts = [run.strength for run in runs]
    usual = max(dict.fromkeys(counts), key=counts.count)
    return [run for run in runs if run.strength == usual]


def perplexities(runs: Sequence[Run]) -> dict[str, dict[float, list[float]]]:
    """Variant -> sparsity -> the perplexities of its seeds."""
    by_variant: dict[str, dict[float, list[float]]] = {}
    for run in at_default_strength(runs):
        if run.row.ppl is not None:
            by_variant.setdefault(run.varied, {}).setdefault(run.sparsity, []).append(run.row.ppl)
    return by_variant


def by_strength(runs: Sequence[Run]) -> tuple[float, list[Run]] | None:
    """The sparsity with the most values of lambda, and its runs by ascending lambda; None below three values."""
    best: tuple[float, list[Run]] | None = None
    plain = [run for run in runs if run.varied == (FULL if any(r.varied == FULL for r in runs) else runs[0].varied)]
    for sparsity in sorted({run.sparsity for run in plain}):
        here = {
            run.strength: run
            for run in plain
            if run.sparsity == sparsity and run.row.ppl is not None and run.seed == min(r.seed for r in plain)
        }
        if len(here) >= 3 and (best is None or len(here) > len(best[1])):
            best = sparsity, [here[strength] for strength in sorted(here)]
    return best


def table(runs: Sequence[Run]) -> Table | None:
    """The table of perplexities, one line per variant, one column per sparsity; None below two cells."""
    values = perplexities(runs)
    sparsities = sorted({s for at in values.values() for s in at})
    if sum(len(at) for at in values.values()) < 2:
        return None
    heads = (
        ("Variant", "options that are not the defaults", True),
        *((f"{s:.0%} removed", "perplexity, with the deviation over seeds", False) for s in sparsities),
    )
    rows = tuple((Cell(name), *(_mean(at.get(s, [])) for s in sparsities)) for name, at in values.items())
    return Table(heads, rows)


def _mean(values: Sequence[float]) -> Cell:
    if not values:
        return Cell(MISSING)
    text = words.perplexity(fmean(values)) or MISSING
    return Cell(text if len(values) < 2 else f"{text} ± {stdev(values):.2f} ({len(values)})", f"{fmean(values)!r}")


def strength_table(runs: Sequence[Run]) -> Table | None:
    """The table of the sweep of lambda; None without one."""
    sweep = by_strength(runs)
    if sweep is None:
        return None
    sparsity, runs_there = sweep
    heads = (
        ("lambda", "weight of the budget term", False),
        (f"PPL at {sparsity:.0%}", "", False),
        ("Budget term at the end", "|log(T(s) / target)|", False),
    )
    body = tuple(
        (
            Cell(f"{r.strength:g}"),
            Cell((words.perplexity(r.row.ppl) or MISSING) + (" (NC)" if r.missed else "")),
            _small(r),
        )
        for r in runs_there
    )
    return Table(heads, body)


def _small(run: Run) -> Cell:
    return Cell(f"{run.learning['budget'][-1]:.4f}")


def cost_table(runs: Sequence[Run]) -> Table | None:
    """The table of the cost of learning, one line per model and number of steps: the fastest run."""
    best: dict[tuple[str, Any, Any, Any], Run] = {}
    for run in runs:
        seconds = as_number((run.row.pruning.get("seconds_by") or {}).get("selection"))
        if seconds is not None:
            options = run.row.part("options")
            key = (run.row.model, options.get("steps"), options.get("batch"), run.row.pruning.get("device"))
            if key not in best or seconds < best[key].row.pruning["seconds_by"]["selection"]:
                best[key] = run
    if not best:
        return None
    heads = (
        ("Model", "", True),
        ("Parameters", "", False),
        ("Steps", "", False),
        ("Batch", "windows a step", False),
        ("Device", "", True),
        ("Learning", "the fastest run", False),
        ("Peak memory", "resident set of the whole process", False),
    )
    rows = []
    for (model, steps, batch, device), run in best.items():
        pruning = run.row.pruning
        facts = [
            words.count(run.row.number("params_before")),
            f"{steps}",
            f"{batch}",
            f"{device}",
            words.duration(pruning["seconds_by"]["selection"]),
        ]
        rows.append(
            (
                Cell(model),
                *(Cell(fact or MISSING) for fact in [*facts, words.size(as_number(pruning.get("peak_rss_bytes")))]),
            )
        )
    return Table(heads, tuple(rows))


def printed(runs: Sequence[Run]) -> list[tuple[PublishedTable, Table]]:
    """The tables of the paper as cells, in their order; empty if no run is of its method."""
    if not any(run.row.get("method") == PAPER for run in runs):
        return []
    return [(paper_table, _cells(paper_table)) for paper_table in published(PAPER).values()]


def _cells(published_table: PublishedTable) -> Table:
    text = [any(isinstance(row[n], str) for row in published_table.rows) for n in range(len(published_table.columns))]
    share = [name == "removed" for name in published_table.columns]
    rows = tuple(tuple(Cell(_say(value, share[n])) for n, value in enumerate(row)) for row in published_table.rows)
    return Table(tuple((name, "", text[n]) for n, name in enumerate(published_table.columns)), rows)


def _say(value: Any, share: bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, str):
        return value or MISSING
    return f"{value:.0%}" if share else f"{value:g}" if isinstance(value, int) else f"{value:.2f}"
