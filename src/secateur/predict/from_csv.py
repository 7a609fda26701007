"""Points from a CSV with the columns sparsity and ppl, acc or the name of a task."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from secateur.core.errors import SecateurError, UsageError
from secateur.predict.points import Point, distinct_points


def points_of_csv(path: Path, metric: str | None) -> tuple[str, Point, list[Point], list[str]]:
    """Return the metric, the dense point, the pruned points, and warnings."""
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
    dense = distinct_points([point for point in points if point.s == 0], warnings)
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
