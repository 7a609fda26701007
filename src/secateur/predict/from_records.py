"""Points from records.

The records must belong together: one model, one method, one protocol. Fits use the measured sparsity
(`sparsity_measured`), not the requested one.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from secateur.core import records
from secateur.core.errors import SecateurError, UsageError
from secateur.core.names import named, shown
from secateur.core.records import Record
from secateur.methods import find_method
from secateur.predict.points import Point

_PROTOCOL = ("spec", "seqlen", "windows", "tokens", "bos", "tail", "join", "sha256")
_ALIKE = 0.02  # results whose shares of parameters removed differ by more than this are not compared
_CALIBRATION = ("spec", "samples", "seqlen", "sha256")


def points_of_records(
    found: list[Record], metric: str | None, where: dict[str, str]
) -> tuple[str, Point, list[Point], dict[str, Any], list[str]]:
    """Return the metric, the dense point, the pruned points, facts about the runs, and warnings."""
    where = {name: shown(value) if name == "model" else value for name, value in where.items()}
    measured = _evaluations(named(found))
    dense = [record for record in measured if _is_dense(record)]
    all_pruned = [record for record in measured if not _is_dense(record)]
    pruned = [record for record in all_pruned if all(_as_text(_field(record, k)) == v for k, v in where.items())]
    pruned, healed = _without_healed(pruned)
    if where and not pruned:
        raise _no_match(where, all_pruned)
    name, read = _reader([*dense, *pruned], metric)
    _same(
        pruned, {**_EVERY, **_PRUNED}, f"--where NAME=VALUE keeps one of them{_points_each(pruned, name, read, found)}"
    )
    measured_by = _protocol_fields() if name == "ppl" else _task_fields(name.partition(":")[0])
    if pruned:
        dense = _dense_of(pruned[0], dense, measured_by)
    _same([*dense, *pruned], {**_EVERY, **measured_by}, "give the records of one model, measured in one way")
    with_value = [record for record in dense if read(record) is not None]
    base = read(with_value[-1]) if with_value else _told(pruned, name)
    if base is None:
        model = _place_of(_model(pruned[0]), found) if pruned else "the model"
        raise SecateurError(
            f"the dense model's {name} is not among the records: run 'secateur eval {model}' under the same protocol"
        )
    points, skipped = _pruned_points(pruned, name, read)
    warnings = [*(f"{_place(record)}: was changed after pruning; left out" for record in healed), *skipped]
    about = (
        {key: pruned[0].get(key) for key in ("model", "method", "pattern", "options")}
        if pruned
        else {"model": dense[0].get("model")}
    )
    tasks = (with_value[-1].get("tasks") or {}) if with_value else {}
    about["chance"] = tasks.get(name.partition(":")[0], {}).get("chance")
    about["sweep"] = (
        _sweep(pruned[-1], found, _others(pruned[-1])) if pruned and not records.changed(pruned[-1]) else None
    )
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
    """The records without healed and reconstructed ones, and those; if all are, they stay, and none is left out.

    A law of pruning must not mix in recovery.
    """
    healed = [record for record in pruned if records.changed(record)]
    if len(healed) == len(pruned):
        return pruned, []
    return [record for record in pruned if not records.changed(record)], healed


def _points_each(pruned: list[Record], metric: str, read: Callable[[Record], Point | None], found: list[Record]) -> str:
    """What is missing too, if no method has the two points that most laws need; the advice names the best method."""
    methods = [str(record.get("method")) for record in pruned]
    if len(set(methods)) < 2 or len(set(methods)) < len(methods):
        return ""
    best = _best(pruned, metric, read)
    sweep = _sweep(best, found, "--params-removed R,R" if best.get("pruning_ratio") else "--sparsity S,S")
    return (
        "; each method has one point here, and a law needs two or more: first measure other sizes of one method with "
        f"'{sweep}' and the same options, and give DIR too"
    )


def _sweep(record: Record, found: list[Record], amount: str) -> str:
    """The command that measures other sizes of a record's model with its method."""
    model = shlex.quote(_place_of(_model(record), found))
    return f"secateur sweep {model} --method {record.get('method')} {amount} --out DIR"


def _others(record: Record) -> str:
    """Two other sizes than that of a record, one smaller and one larger, as options."""
    gone = record.get("pruning_ratio")
    share = float(gone or record.get("sparsity_measured") or record.get("sparsity") or 0.0)
    option = "--params-removed" if gone and gone > 0 else "--sparsity"
    sizes = (share / 2, min(1.5 * share, (1 + share) / 2)) if 0 < share < 1 else (0.1, 0.2)
    pattern = record.get("pattern")
    return " ".join(
        [
            *([] if pattern in (None, "unstructured") else [f"--pattern {pattern}"]),
            f"{option} {','.join(f'{size:.2g}' for size in sizes)}",
            *(f"--set {name}={shlex.quote(str(value))}" for name, value in _set(record).items()),
        ]
    )


def _set(record: Record) -> dict[str, Any]:
    """The options of a record that differ from the defaults of its method, where that is known."""
    try:
        defaults = asdict(find_method(str(record.get("method"))).options({}))
    except (SecateurError, UsageError):
        return {}
    given = record.get("options") or {}
    return {k: v for k, v in given.items() if k in defaults and k != "pattern" and defaults[k] != v}


def _told(pruned: list[Record], metric: str) -> Point | None:
    """The dense model's perplexity as `eval --against` kept it beside a result; None if no record tells."""
    told = [record["ppl_dense"] for record in pruned if isinstance(record.get("ppl_dense"), int | float)]
    return Point(0.0, float(told[-1]), None, "the dense model", 0.0) if told and metric == "ppl" else None


def _best(pruned: list[Record], metric: str, read: Callable[[Record], Point | None]) -> Record:
    """The record with the best value, among the most that removed about as much: 1% removed is no rival of 25%."""
    smaller = [record for record in pruned if record.get("pruning_ratio")] or pruned
    near = [[other for other in smaller if abs(_gone(other) - _gone(record)) <= _ALIKE] for record in smaller]
    alike = max(near, key=lambda group: len(group))
    sign = 1 if metric == "ppl" else -1
    values = [(sign * point.value, n) for n, record in enumerate(alike) if (point := read(record)) is not None]
    return alike[min(values)[1]] if values else alike[0]


def _gone(record: Record) -> float:
    return float(record.get("pruning_ratio") or 0.0)


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


def _place_of(model: str, found: list[Record]) -> str:
    """The path of a model among the records as they were read, for a command; its name if there is none."""
    paths = dict.fromkeys(str(record["model"]) for record in found if record.get("model"))
    return next((path for path in paths if shown(path) == shown(model) and Path(path).is_dir()), model)


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
