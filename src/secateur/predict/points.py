"""Measured points from the records of a sweep, or from a CSV.

The points must belong together: one model, one method, one protocol. Fits use the measured sparsity
(`sparsity_measured`), not the requested one.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from secateur.core import records
from secateur.core.errors import SecateurError, UsageError
from secateur.core.names import named, shown
from secateur.core.records import Record
from secateur.evaluate.cloze import CHANCE as CLOZE_CHANCE
from secateur.predict.laws import Array, Kind

# Accuracy of guessing, by task (the bundled cloze task has four choices); records of lm-eval's tasks hold their own.
CHANCE = {"cloze": CLOZE_CHANCE}

_PROTOCOL = ("spec", "seqlen", "windows", "tokens", "bos", "tail", "join", "sha256")
_CALIBRATION = ("spec", "samples", "seqlen", "sha256")


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        s: measured sparsity, in [0, 1).
        value: perplexity or accuracy.
        stderr: standard error of an accuracy, if it was measured.
        place: the file and line, or the folder, that it comes from, for messages.
        removed: the share of all parameters that was removed, if it is known.
    """

    s: float
    value: float
    stderr: float | None = None
    place: str = ""
    removed: float | None = None


@dataclass(frozen=True, eq=False)
class Points:
    """The points of one fit, ascending in s, and the dense model's value.

    Attributes:
        metric: "ppl" or the name of a task.
        dense: the value of the dense model.
        s, values: pruned points, float64 [N].
        chance: the accuracy of guessing; None if unknown, and for perplexity.
        removed: the share of all parameters that each pruned point has lost, float64 [N]; None if it is not known.
        about: model, method and so on, for titles; empty for a CSV.
        warnings: points that were left out, and values that look odd.
    """

    metric: str
    dense: float
    s: Array
    values: Array
    chance: float | None = None
    about: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    removed: Array | None = None

    def removed_at(self, sparsities: Array) -> Array | None:
        """The share of all parameters that each sparsity removes [N]; None if the points do not tell.

        It is a straight line between measured points and from nothing to the first, and goes on like the last line.
        """
        if self.removed is None or not (self.removed > 0).any():
            return None
        s, removed = np.append(0.0, self.s), np.append(0.0, self.removed)
        slope = (removed[-1] - removed[-2]) / (s[-1] - s[-2])
        shares: Array = np.interp(sparsities, s, removed) + slope * np.clip(sparsities - s[-1], 0, None)
        return np.minimum(shares, 1.0)

    def sparsity_for(self, removed: float) -> float:
        """The sparsity that removes this share of all parameters.

        Raises:
            UsageError: the points do not tell, or no sparsity below 1 removes as much.
        """
        if not 0 <= removed < 1:
            raise UsageError(f"--params-removed {removed:g} is outside [0, 1)")
        grid = np.linspace(0.0, 0.999, 1000)
        if (shares := self.removed_at(grid)) is None:
            raise UsageError(
                "--params-removed: these points do not tell how many parameters were removed (weights were zeroed, or "
                "they come from a CSV); use --at S"
            )
        # adapters make small sparsities add parameters
        start = int(shares[grid <= self.s[0]].argmin())
        rising = np.maximum.accumulate(shares[start:])
        if removed > rising[-1]:
            raise UsageError(f"--params-removed {removed:g}: these points go up to {max(0.0, rising[-1]):.3f} at most")
        return float(np.interp(removed, rising, grid[start:]))

    @property
    def kind(self) -> Kind:
        """The kind of value: "ppl" or "acc"."""
        return "ppl" if self.metric == "ppl" else "acc"


def read_points(
    paths: Sequence[Path],
    metric: str | None = None,
    *,
    chance: float | None = None,
    where: dict[str, str] | None = None,
) -> Points:
    """Read points from records files (or folders that hold one), or from one CSV.

    Args:
        paths: the files.
        metric: "ppl", the name of a task (its `acc`), or "TASK:acc_norm"; None takes perplexity if it was measured,
            else accuracy.
        chance: the accuracy of guessing; None takes it from `CHANCE`, or from the records.
        where: keep the records with these field values, such as {"method": "wanda", "options.scope": "row"}.

    Raises:
        UsageError: a file is neither records nor a CSV, or the metric was not measured.
        SecateurError: the points do not belong together, or no law can be fitted to them.
    """
    if not paths:
        raise UsageError(
            "no points: give a records.jsonl that 'secateur sweep' wrote, or a CSV with columns sparsity,ppl or "
            "sparsity,acc"
        )
    if chance is not None and not 0 <= chance < 1:
        raise UsageError(
            f"--chance {chance:g} is outside [0, 1): give the accuracy of guessing, as 0.25 for four choices"
        )
    csv_files = [path for path in paths if not _holds_records(path)]
    if csv_files and len(paths) > 1:
        raise UsageError(
            f"'{csv_files[0]}' is a CSV and was given with other files: give one CSV, or records files only"
        )
    if csv_files and where:
        raise UsageError(
            f"--where chooses among records, and '{csv_files[0]}' is a CSV: remove the rows that are not wanted"
        )
    recorded = None
    if csv_files:
        name, dense, points, notes = _from_csv(csv_files[0], metric)
        about: dict[str, Any] = {}
    else:
        name, dense, points, about, notes = _from_records(records.read(paths), metric, where or {})
        recorded = about.pop("chance", None)
    if chance is None:
        chance = CHANCE.get(name.partition(":")[0], recorded)
    return make_points(name, dense, points, chance=chance, about=about, notes=notes)


def make_points(
    metric: str,
    dense: Point,
    found: Iterable[Point],
    *,
    chance: float | None = None,
    about: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Points:
    """Check the points of one metric, and leave out those that no law can be fitted to.

    Raises:
        SecateurError: a value is impossible, a sparsity is outside [0, 1), or one sparsity has two values.
    """
    warnings = list(notes)
    check = _check_ppl if metric == "ppl" else _check_acc
    for point in (dense, *(found := list(found))):
        if not 0 <= point.s < 1:
            raise SecateurError(
                f"{point.place}: sparsity {point.s:g} is outside [0, 1): give the fraction removed, not a percentage"
            )
        check(point)
    distinct = _distinct(found, warnings)
    if metric != "ppl":
        distinct = _above_chance(dense, distinct, chance, metric, warnings)
    distinct.sort(key=lambda point: point.s)
    _note_non_monotone([dense, *distinct], metric, warnings)
    s, values = (np.array([getattr(point, name) for point in distinct], dtype=np.float64) for name in ("s", "value"))
    removed = [point.removed for point in distinct]
    known = np.array(removed, dtype=np.float64) if removed and None not in removed else None
    return Points(
        metric, dense.value, s, values, chance if metric != "ppl" else None, about or {}, tuple(warnings), known
    )


def _check_ppl(point: Point) -> None:
    if not (math.isfinite(point.value) and point.value > 1):
        raise SecateurError(
            f"{point.place}: perplexity {point.value:g} is not a finite number above 1, "
            "so its logarithm cannot be fitted; measure it anew"
        )


def _check_acc(point: Point) -> None:
    if not 0 <= point.value <= 1:
        raise SecateurError(
            f"{point.place}: accuracy {point.value:g} is outside [0, 1]: give a fraction, not a percentage"
        )


def _distinct(points: list[Point], warnings: list[str]) -> list[Point]:
    """Count equal points once.

    Two different values at one sparsity are refused: a held-out point would have its twin in the fit.
    """
    by_sparsity: dict[float, Point] = {}
    for point in points:
        first = by_sparsity.setdefault(point.s, point)
        if first is point:
            continue
        if first.value != point.value:
            raise SecateurError(
                f"two values at sparsity {point.s:g}: {first.value:g} ({first.place}) and {point.value:g} "
                f"({point.place}); keep one, or give their mean in a CSV"
            )
        warnings.append(f"sparsity {point.s:g} with value {point.value:g} occurs more than once and is counted once")
    return list(by_sparsity.values())


def _above_chance(
    dense: Point, points: list[Point], chance: float | None, metric: str, warnings: list[str]
) -> list[Point]:
    """Leave out accuracies of 0, and those within one standard error of chance, where accuracy no longer falls."""
    if dense.value == 0 or (chance is not None and dense.value - (dense.stderr or 0.0) <= chance):
        raise SecateurError(
            f"the dense model's accuracy on {metric} is {dense.value:g}"
            + ("" if dense.value == 0 else f", not above chance ({chance:g})")
            + ": there is nothing to lose, so no law can be fitted; choose another task"
        )
    usable = []
    for point in points:
        if point.value == 0:
            warnings.append(f"accuracy 0 at sparsity {point.s:g} has no logarithm and is left out")
        elif chance is not None and point.value - (point.stderr or 0.0) <= chance:
            margin = f" within its standard error {point.stderr:.3g}" if point.stderr and point.value > chance else ""
            warnings.append(
                f"accuracy {point.value:g} at sparsity {point.s:g} is at chance ({chance:g}){margin} and is left out: "
                "it falls no further there"
            )
        else:
            usable.append(point)
    if chance is None:
        warnings.append(
            f"what guessing scores on {metric} is unknown, so points at chance cannot be recognised: give --chance"
        )
    return usable


def _note_non_monotone(points: list[Point], metric: str, warnings: list[str]) -> None:
    """Add a warning if the metric improves from one sparsity to the next."""
    worse: Callable[[Point, Point], bool] = (
        (lambda a, b: b.value < a.value) if metric == "ppl" else (lambda a, b: b.value > a.value)
    )
    better = [f"{b.s:g} ({b.value:g}) than at {a.s:g} ({a.value:g})" for a, b in pairwise(points) if worse(a, b)]
    if better:
        warnings.append(
            f"not monotone: {'perplexity' if metric == 'ppl' else metric} is better at sparsity "
            f"{'; at '.join(better)}; every law here says the opposite"
        )


# CSV


def _holds_records(path: Path) -> bool:
    """Whether the path holds records: a folder, or a file of JSON lines.

    Raises:
        UsageError: the file is missing, or neither JSON lines nor a table with a sparsity column.
    """
    if path.is_dir():
        return True
    if not path.is_file():
        raise UsageError(
            f"no file '{path}': give a records.jsonl, the folder that holds it, "
            "or a CSV with columns sparsity,ppl or sparsity,acc"
        )
    try:
        first = next((line for line in path.read_text("utf-8-sig").splitlines() if line.strip()), "")
    except (UnicodeDecodeError, OSError) as error:
        raise UsageError(
            f"'{path}' cannot be read as text ({error.__class__.__name__}): records (JSON lines) or a CSV are expected"
        ) from None
    if first.lstrip().startswith("{"):
        return True
    if "sparsity" not in [name.strip() for name in next(csv.reader([first]), [])]:
        start = f"starts with '{first.strip()[:40]}'" if first else "is empty"
        raise UsageError(
            f"'{path}' is neither records (JSON lines) nor a CSV whose first line names a column sparsity: it {start}"
        )
    return False


def _from_csv(path: Path, metric: str | None) -> tuple[str, Point, list[Point], list[str]]:
    reader = csv.DictReader(path.read_text("utf-8-sig").splitlines(), skipinitialspace=True)
    columns = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = columns
    name, column = _column(path, columns, metric)
    rows = [
        (reader.line_num, row)
        for row in reader
        if any((value or "").strip() for value in row.values() if isinstance(value, str))
    ]
    points = []
    for line, row in rows:
        place = f"{path}, line {line}"
        stderr = _number(row["stderr"], place, "stderr") if (row.get("stderr") or "").strip() else None
        points.append(
            Point(_number(row["sparsity"], place, "sparsity"), _number(row[column], place, column), stderr, place)
        )
    warnings: list[str] = []
    dense = _distinct([point for point in points if point.s == 0], warnings)
    if not dense:
        raise SecateurError(
            f"'{path}' has no row with sparsity 0: add the dense model's {column}, which every law starts from"
        )
    return name, dense[0], [point for point in points if point.s != 0], warnings


def _column(path: Path, columns: list[str], metric: str | None) -> tuple[str, str]:
    """The metric, and its column: the column has the name of the metric, or of the task, or is `acc`."""
    if metric is None:
        metric = "ppl" if "ppl" in columns else "acc"
    column = metric if metric in columns or metric == "ppl" else "acc"
    if column not in columns:
        raise UsageError(
            f"'{path}' has no column {column} (its columns: {', '.join(columns)}); name the column, "
            "or choose with --metric"
        )
    return metric, column


def _number(text: str | None, place: str, column: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        raise SecateurError(f"{place}: {column} '{text or ''}' is no number") from None
    if math.isnan(value):
        raise SecateurError(f"{place}: {column} is NaN: remove the row, or measure it anew")
    return value


# Records


def _from_records(
    found: list[Record], metric: str | None, where: dict[str, str]
) -> tuple[str, Point, list[Point], dict[str, Any], list[str]]:
    """The metric, the dense point, the pruned points, facts about the runs, and warnings."""
    where = {name: shown(value) if name == "model" else value for name, value in where.items()}
    measured = _evaluations(named(found))
    dense = [record for record in measured if _is_dense(record)]
    all_pruned = [record for record in measured if not _is_dense(record)]
    pruned = [record for record in all_pruned if all(_as_text(_field(record, k)) == v for k, v in where.items())]
    pruned, healed = _without_healed(pruned)
    if where and not pruned:
        raise _no_match(where, all_pruned)
    name, read = _reader([*dense, *pruned], metric)
    _same(pruned, {**_EVERY, **_PRUNED}, "--where NAME=VALUE keeps one of them")
    measured_by = _protocol_fields() if name == "ppl" else _task_fields(name.partition(":")[0])
    if pruned:
        dense = _dense_of(pruned[0], dense, measured_by)
    _same([*dense, *pruned], {**_EVERY, **measured_by}, "give the records of one model, measured in one way")
    with_value = [record for record in dense if read(record) is not None]
    if not with_value:
        model = _model(pruned[0]) if pruned else "the model"
        raise SecateurError(
            f"the dense model's {name} is not among the records: run 'secateur eval {model}' under the same protocol"
        )
    points, skipped = _pruned_points(pruned, name, read)
    warnings = [*(f"{_place(record)}: was healed; left out" for record in healed), *skipped]
    about = (
        {key: pruned[0].get(key) for key in ("model", "method", "pattern", "options")}
        if pruned
        else {"model": dense[0].get("model")}
    )
    base = read(with_value[-1])
    assert base is not None
    about["chance"] = (with_value[-1].get("tasks") or {}).get(name.partition(":")[0], {}).get("chance")
    return name, base, points, about, warnings


def _evaluations(found: list[Record]) -> list[Record]:
    """The `eval` records; a later evaluation of a folder replaces an earlier one.

    The dense model is kept once per protocol, since it may have been measured under several.

    Raises:
        SecateurError: no record is of `eval`.
    """
    measured: dict[str, Record] = {}
    for index, record in enumerate(found):
        if record.get("command") == "eval":
            protocol = records.to_json(record.get("ppl_protocol") or {}) if _is_dense(record) else ""
            measured[str(record.get("out") or index) + protocol] = record
    if not measured:
        commands = ", ".join(sorted({str(record.get("command") or "unnamed") for record in found})) or "none"
        raise SecateurError(
            f"no evaluations among {len(found)} records (commands: {commands}): run 'secateur eval DIR', or "
            "'secateur sweep'"
        )
    return list(measured.values())


def _without_healed(pruned: list[Record]) -> tuple[list[Record], list[Record]]:
    """The records without healed ones, and the healed ones; if all are healed, they stay, and none is left out.

    A law of pruning must not mix in recovery.
    """
    healed = [record for record in pruned if record.get("heal")]
    if len(healed) == len(pruned):
        return pruned, []
    return [record for record in pruned if not record.get("heal")], healed


def _no_match(where: dict[str, str], pruned: list[Record]) -> UsageError:
    """The error for `--where` without a matching record; it names the values that occur."""
    choices = "; ".join(
        f"{name}: {', '.join(sorted({_as_text(_field(record, name)) for record in pruned})) or 'none'}"
        for name in where
    )
    return UsageError(f"no pruned record has {', '.join(f'{k}={v}' for k, v in where.items())} (there are {choices})")


def _dense_of(pruned: Record, dense: list[Record], measured_by: _Fields) -> list[Record]:
    """The dense records of the same model and then of the same measurement; a step without a match keeps all."""
    dense = [record for record in dense if _model(record) == _model(pruned)] or dense
    return [record for record in dense if all(read(record) == read(pruned) for read in measured_by.values())] or dense


def _pruned_points(
    pruned: list[Record], name: str, read: Callable[[Record], Point | None]
) -> tuple[list[Point], list[str]]:
    """The points that a law can be fitted to, and a line for each record that is left out."""
    points: list[Point] = []
    skipped: list[str] = []
    for record in pruned:
        point = read(record)
        if point is None:
            skipped.append(f"{_place(record)}: {name} was not measured, or is infinite; left out")
        elif math.isinf(point.value):
            skipped.append(f"{_place(record)}: the perplexity is infinite, which no law can give; left out")
        elif point.s == 0:
            skipped.append(f"{_place(record)}: nothing was removed; left out")
        else:
            points.append(point)
    return points, skipped


def _is_dense(record: Record) -> bool:
    return record.get("method") is None and not record.get("sparsity")


def _reader(records_read: list[Record], metric: str | None) -> tuple[str, Callable[[Record], Point | None]]:
    """The metric, and a function that reads its point from a record."""
    tasks = sorted({task for record in records_read for task in record.get("tasks") or {}})
    if metric is None:
        metric = "ppl" if not tasks or any("ppl" in record for record in records_read) else tasks[0]
    name, _, variant = metric.partition(":")
    if metric != "ppl" and (name not in tasks or variant not in ("", "acc", "acc_norm")):
        raise UsageError(
            f"--metric {metric} was not measured (allowed: "
            f"{', '.join(['ppl', *tasks, *(f'{task}:acc_norm' for task in tasks)])})"
        )

    def read(record: Record) -> Point | None:
        task = (record.get("tasks") or {}).get(name) or {}
        value = record.get("ppl") if metric == "ppl" else task.get(variant or "acc")
        s = record.get("sparsity_measured", record.get("sparsity"))
        if value is None or (s is None and not _is_dense(record)):
            return None
        return Point(
            float(s or 0.0),
            float(value),
            task.get("stderr_norm" if variant == "acc_norm" else "stderr"),
            _place(record),
            record.get("pruning_ratio"),
        )

    return metric, read


def _place(record: Record) -> str:
    return str(record.get("out") or "a record without a folder")


def _model(record: Record) -> str:
    return str(record.get("model") or "unknown model")


def _field(record: Record, name: str) -> Any:
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


# Fields that must agree, by their name in messages.
_Fields = dict[str, Callable[[Record], Any]]
_EVERY: _Fields = {
    "model": _model,
    "model_revision": lambda record: record.get("model_revision"),
    "dtype": lambda record: record.get("dtype"),
}


def _fields(names: Iterable[str]) -> _Fields:
    return {name: lambda record, name=name: _field(record, name) for name in names}  # type: ignore[misc]


_PRUNED = _fields(
    ("method", "pattern", "modules", "options", "seed", *(f"calibration.{name}" for name in _CALIBRATION))
)


def _protocol_fields() -> _Fields:
    return _fields(f"ppl_protocol.{name}" for name in _PROTOCOL)


def _task_fields(task: str) -> _Fields:
    """Fields that identify the items of a task: runs may use only the first ones, or another version."""

    def reader(name: str) -> Callable[[Record], Any]:
        return lambda record: ((record.get("tasks") or {}).get(task) or {}).get(name)

    return {f"{task}'s items ({name})": reader(name) for name in ("n", "sha256")}


def _same(found: list[Record], fields: _Fields, step: str) -> None:
    for name, read in fields.items():
        values = sorted({_as_text(read(record)) for record in found})
        if len(values) > 1:
            shown = ", ".join(value[:60] for value in values[:4]) + (", ..." if len(values) > 4 else "")
            raise SecateurError(f"the records differ in {name}: {shown}; one law is for one of them: {step}")
