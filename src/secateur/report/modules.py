"""A study of modules: its cells as curves, and a verdict in words with its evidence.

Perplexities are compared by their logarithm, the loss. It is interpolated linearly between measured points, and never
extrapolated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from secateur.core.records import Record, to_json
from secateur.report import words

GROUPS = ("attention", "mlp", "all")
NAMES = {"attention": "attention alone", "mlp": "MLP alone", "all": "uniform"}
_TWICE = math.log(2)


@dataclass(frozen=True)
class Point:
    """A cell: the request, the removed weights and the measurements. `ppl` is None if it is infinite."""

    kind: str
    modules: str
    sparsity: float | None
    measured: float
    weights: int
    ppl: float | None
    tasks: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """The cells of one model, method, calibration and protocol.

    Attributes:
        about: model, method, pattern and mode, as text.
        calibration: SPEC and size, as text.
        dense: the perplexity of the dense model; nothing can be compared with one that is infinite.
        dense_tasks: the task results of the dense model.
        curves: kind -> points, ascending by removed weights.
        grid: (attention rate, MLP rate) -> perplexity.
    """

    about: str
    calibration: str
    dense: float
    dense_tasks: Mapping[str, Any]
    curves: Mapping[str, tuple[Point, ...]]
    grid: Mapping[tuple[float, float], float]

    @property
    def projections(self) -> list[str]:
        """The kinds that are not groups."""
        return [kind for kind in self.curves if kind not in GROUPS]

    @property
    def groups(self) -> list[str]:
        """The measured groups among attention, MLP and all."""
        return [kind for kind in GROUPS if kind in self.curves]

    def at_sparsity(self, kind: str, sparsity: float) -> Point | None:
        """The cell of a kind at a requested sparsity; None without one."""
        return next((p for p in self.curves[kind] if p.sparsity == sparsity and p.ppl is not None), None)

    def common(self, kinds: Sequence[str], highest: float = 1.0) -> list[float]:
        """The sparsities up to `highest` at which all these kinds were measured."""
        every = [
            {p.sparsity for p in self.curves[kind] if p.sparsity is not None and p.ppl is not None} for kind in kinds
        ]
        return sorted(s for s in set.intersection(*every) if s <= highest) if every else []

    def loss_at(self, kind: str, weights: float) -> float | None:
        """ln(ppl / dense) of a kind with this number of weights removed, interpolated; None beyond the points."""
        return self._between(kind, weights, lambda p: p.weights)

    def _between(self, kind: str, at: float, axis: Callable[[Point], float]) -> float | None:
        points = [(0.0, 0.0), *((axis(p), math.log(p.ppl / self.dense)) for p in self.curves[kind] if p.ppl)]
        xs, ys = zip(*sorted(points), strict=True)
        return float(np.interp(at, xs, ys)) if at <= xs[-1] else None

    def doubles_at(self, kind: str) -> float | None:
        """The sparsity at which perplexity is twice the dense model's, interpolated; None if it is not reached."""
        points = [(0.0, 0.0), *sorted((p.measured, math.log(p.ppl / self.dense)) for p in self.curves[kind] if p.ppl)]
        for (x0, y0), (x1, y1) in pairwise(points):
            if y0 < _TWICE <= y1:
                return x0 + (x1 - x0) * (_TWICE - y0) / (y1 - y0)
        return None


def read_studies(found: Sequence[Record]) -> list[Study]:
    """Read the studies among records, the largest first; a study without a measured dense model is left out."""
    plain = [json.loads(to_json(record)) for record in found]
    cells: dict[str, list[Record]] = {}
    for record in plain:
        if record.get("command") == "study" and record.get("study") == "modules" and record.get("modules"):
            cells.setdefault(_group(record), []).append(record)
    studies = []
    for members in cells.values():
        first = members[0]
        same = [r for r in plain if is_dense(r) and _model_and_text(r) == _model_and_text(first) and "ppl" in r]
        if same:
            studies.append(_study(members, same))
    return sorted(studies, key=lambda study: -sum(map(len, study.curves.values())))


def is_dense(record: Record) -> bool:
    """Whether a record measures a dense model, in a study or by `eval`."""
    return record.get("command") in ("study", "eval") and not record.get("method")


def _model_and_text(record: Record) -> Any:
    protocol = record.get("ppl_protocol") or {}
    return record.get("model"), protocol.get("sha256"), protocol.get("seqlen")


def _group(record: Record) -> str:
    calibration = record.get("calibration") or {}
    return repr(
        [
            *(record.get(name) for name in ("method", "options", "pattern", "mode", "seed")),
            calibration.get("sha256"),
            _model_and_text(record),
        ]
    )


def _study(members: Sequence[Record], dense: Sequence[Record]) -> Study:
    curves: dict[str, dict[str, Point]] = {}
    # A cell may have two records: the one with more tasks comes later, and replaces the other.
    for record in sorted(members, key=lambda r: len(r.get("tasks") or {})):
        point = Point(
            record["kind"],
            record["modules"],
            record["sparsity"],
            record["sparsity_measured"],
            record["weights_removed"],
            record["ppl"],
            record["tasks"] or {},
        )
        curves.setdefault(point.kind, {})[point.modules] = point
    dense_ppl = math.inf if dense[-1]["ppl"] is None else float(dense[-1]["ppl"])
    grid = {(0.0, 0.0): dense_ppl}
    for kind in (*GROUPS, "attention x mlp"):
        for point in curves.get(kind, {}).values():
            rates = dict(part.split("=") for part in point.modules.split(","))
            both = [float(rates.get(group, rates.get("all", 0.0))) for group in ("attention", "mlp")]
            if point.ppl is not None:
                grid[(both[0], both[1])] = point.ppl
    first, combined = members[0], curves.pop("attention x mlp", {})
    sides = {
        float(rate) for point in combined.values() for rate in (part.split("=")[1] for part in point.modules.split(","))
    } | {0.0}
    calibration = first.get("calibration") or {}
    return Study(
        f"{first['model']}, {first['method']}"
        + (f" {first['pattern']}" if first["pattern"] != "unstructured" else "")
        + f", {first['mode']} statistics",
        f"{calibration['spec']}, {calibration['samples']} \N{MULTIPLICATION SIGN} {calibration['seqlen']} tokens"
        if calibration
        else "none",
        dense_ppl,
        next((r["tasks"] for r in reversed(dense) if r.get("tasks")), {}),
        {kind: tuple(sorted(points.values(), key=lambda p: p.weights)) for kind, points in curves.items()},
        {both: ppl for both, ppl in grid.items() if combined and both[0] in sides and both[1] in sides},
    )


def verdict(study: Study) -> list[str]:
    """The conclusions of the study, each sentence with its numbers."""
    if math.isinf(study.dense):
        return ["The dense model has an infinite perplexity, so no cell can be compared with it.", *_tasks(study)]
    sentences = [*_per_sparsity(study), *_per_weight(study), *_steep(study), *_groups(study), *_tasks(study)]
    return sentences or [
        "Too few cells for a verdict: it compares kinds at sparsities that all of them were measured at."
    ]


def _ranked(values: Mapping[str, float]) -> list[str]:
    return sorted(values, key=lambda kind: -values[kind])


def _times(value: float) -> str:
    times = math.exp(value)
    return f"{times:.3f}\N{MULTIPLICATION SIGN}" if times < 2 else f"{times:.3g}\N{MULTIPLICATION SIGN}"


def _listed(values: Mapping[str, float], kinds: Sequence[str]) -> str:
    return ", ".join(f"{kind} {_times(values[kind])}" for kind in kinds)


def _per_sparsity(study: Study) -> list[str]:
    kinds = study.projections
    levels = study.common(kinds)
    if len(kinds) < 2 or not levels:
        return []
    tables = {
        s: {k: math.log(p.ppl / study.dense) for k in kinds if (p := study.at_sparsity(k, s)) and p.ppl} for s in levels
    }
    level = max([s for s in levels if s <= 0.9] or levels)
    ranked = _ranked(tables[level])
    firsts = sum(_ranked(tables[s])[0] == ranked[0] for s in levels)
    return [
        f"Per sparsity, {ranked[0]} is the most sensitive projection and {ranked[-1]} the least: "
        f"at {level:.0%} of each, perplexity is "
        f"{_listed(tables[level], ranked)} the dense model's {words.perplexity(study.dense)}. "
        f"{ranked[0]} comes first at {firsts} of {len(levels)} sparsities."
    ]


def _per_weight(study: Study) -> list[str]:
    kinds = study.projections
    reach = {kind: max(p.weights for p in study.curves[kind]) for kind in kinds}
    if len(kinds) < 2:
        return []
    sentences: list[str] = []
    # If the smallest kind is small, the others are compared at a larger number of weights too.
    for size in sorted(set(reach.values()))[:2]:
        count = 0.9 * size
        values = {kind: loss for kind in kinds if (loss := study.loss_at(kind, count)) is not None}
        if len(values) > 1:
            ranked = _ranked(values)
            ranking = (
                f"{ranked[0]} is the most sensitive and {ranked[-1]} the least"
                if len(values) == len(kinds)
                else f"of {', '.join(values)} it is {ranked[0]}"
            )
            lead = "Per weight," if not sentences else "With more weights removed,"
            sentences.append(
                f"{lead} {ranking}: with {words.count(count)} weights removed, perplexity is {_listed(values, ranked)} "
                "the dense model's."
            )
    return sentences


def _steep(study: Study) -> list[str]:
    kinds = list(study.curves)
    doubled = {kind: study.doubles_at(kind) for kind in kinds}
    some = {kind: s for kind, s in doubled.items() if s is not None}
    never = [kind for kind, s in doubled.items() if s is None]
    sentences = []
    if some:
        order = sorted(some, key=lambda kind: some[kind])
        rest = f"; it has not at any measured sparsity of {', '.join(never)}" if never else ""
        sentences.append(f"Perplexity has doubled at {', '.join(f'{some[k]:.0%} of {k}' for k in order)}{rest}.")
    shares = {}
    for kind in kinds:
        whole, nine = study.at_sparsity(kind, 1.0), study.at_sparsity(kind, 0.9)
        if whole and nine and whole.ppl and nine.ppl and whole.ppl > study.dense:
            shares[kind] = 1 - math.log(nine.ppl / study.dense) / math.log(whole.ppl / study.dense)
    if shares:
        order = _ranked(shares)
        sentences.append(
            "Of the loss that removing a kind whole adds, the last tenth of its weights adds "
            f"{', '.join(f'{max(0.0, shares[k]):.0%} ({k})' for k in order)}; "
            "a straight line would say 10%."
        )
    return sentences


def _groups(study: Study) -> list[str]:
    kinds = study.groups
    if not {"attention", "mlp"} <= set(kinds):
        return []
    sentences = []
    if levels := study.common(kinds):
        worse = [s for s in levels if _ppl(study, "mlp", s) > _ppl(study, "attention", s)]
        level = max([s for s in levels if s <= 0.7] or levels)
        values = {NAMES[k]: math.log(_ppl(study, k, level) / study.dense) for k in kinds}
        sentences.append(
            f"At one rate, pruning MLP alone costs more than attention alone at {len(worse)} of {len(levels)} "
            f"sparsities; at {level:.0%}: "
            f"{_listed(values, _ranked(values))}."
        )
    count = min(max(p.weights for p in study.curves[kind]) for kind in kinds)
    counts = [count * part for part in (0.25, 0.5, 0.75)]
    for part in counts:
        losses = {NAMES[k]: v for k in kinds if (v := study.loss_at(k, part)) is not None}
        sentences.append(
            f"With {words.count(part)} weights removed in all: {_listed(losses, _ranked(losses))} the dense perplexity."
        )
    return sentences


def _ppl(study: Study, kind: str, sparsity: float) -> float:
    point = study.at_sparsity(kind, sparsity)
    assert point is not None
    assert point.ppl is not None
    return point.ppl


def task_bars(study: Study) -> tuple[str, dict[str, dict[str, tuple[float, float]]]]:
    """The data of figure 4.4: the level of comparison, and task -> group -> (accuracy, standard error).

    Groups are compared at an equal number of removed weights, if measured; else at one sparsity, the highest up to 0.5.
    """
    with_tasks = {kind: [p for p in study.curves[kind] if p.tasks] for kind in study.groups}
    if len(with_tasks) < 2 or not all(with_tasks.values()):
        return "", {}
    fewest = min(with_tasks, key=lambda kind: max(p.weights for p in with_tasks[kind]))
    for point in reversed(with_tasks[fewest]):
        near = {kind: min(points, key=lambda p: abs(p.weights - point.weights)) for kind, points in with_tasks.items()}
        if all(abs(p.weights - point.weights) < 0.05 * point.weights for p in near.values()):
            return f"about {words.count(point.weights)} weights removed", _bars(near)
    levels = [{p.sparsity for p in points} for points in with_tasks.values()]
    shared = sorted(s for s in set.intersection(*levels) if s is not None)
    if not shared:
        return "", {}
    level = max([s for s in shared if s <= 0.5] or shared[:1])
    return f"{level:.0%} sparsity", _bars(
        {kind: next(p for p in points if p.sparsity == level) for kind, points in with_tasks.items()}
    )


def _bars(points: Mapping[str, Point]) -> dict[str, dict[str, tuple[float, float]]]:
    tasks = sorted(set.intersection(*(set(p.tasks) for p in points.values())))
    bars = {}
    for task in tasks:
        metric = "acc" if all(p.tasks[task].get("acc") is not None for p in points.values()) else "acc_norm"
        if all(isinstance(p.tasks[task].get(metric), int | float) for p in points.values()):
            bars[task] = {
                kind: (float(p.tasks[task][metric]), float(p.tasks[task].get("stderr") or 0.0))
                for kind, p in points.items()
            }
    return bars


def _tasks(study: Study) -> list[str]:
    where, bars = task_bars(study)
    if not bars:
        return []
    parts = [
        f"{task}: "
        + ", ".join(f"{NAMES[k]} {acc:.3f} \N{PLUS-MINUS SIGN} {err:.3f}" for k, (acc, err) in by_kind.items())
        for task, by_kind in bars.items()
    ]
    return [f"Accuracy, {where}: {'; '.join(parts)}."]


def rows(study: Study) -> tuple[list[str], list[list[str]]]:
    """The table of perplexities, one line per kind, one column per sparsity."""
    levels = sorted(
        {
            p.sparsity
            for points in study.curves.values()
            for p in points
            if p.sparsity is not None and round(p.sparsity, 4) == p.sparsity
        }
    )
    body = []
    for kind, points in study.curves.items():
        cells = []
        for level in levels:
            point = next((p for p in points if p.sparsity == level), None)
            cells.append("" if point is None else words.perplexity(point.ppl) or "infinite")
        body.append([kind, f"{_size(points):,}", *cells])
    return ["kind", "weights", *(f"{level:.0%}" for level in levels)], body


def _size(points: Sequence[Point]) -> int:
    last = points[-1]
    return round(last.weights / last.measured) if last.measured else 0
