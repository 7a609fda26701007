"""Read measured points from the records of a sweep, or from a CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.core.errors import UsageError
from secateur.predict.find import find_records
from secateur.predict.from_csv import points_of_csv
from secateur.predict.from_records import points_of_records
from secateur.predict.points import CHANCE, Points, make_points


def read_points(
    paths: Sequence[Path],
    metric: str | None = None,
    *,
    chance: float | None = None,
    where: dict[str, str] | None = None,
) -> Points:
    """Read points from records files and folders (see `find.find_records`), or from one CSV.

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
    recorded = sweep = None
    if csv_files:
        name, dense, points, notes = points_of_csv(csv_files[0], metric)
        about: dict[str, Any] = {}
    else:
        name, dense, points, about, notes = points_of_records(find_records(paths), metric, where or {})
        recorded, sweep = about.pop("chance", None), about.pop("sweep", None)
    if chance is None:
        chance = CHANCE.get(name.partition(":")[0], recorded)
    return replace(make_points(name, dense, points, chance=chance, about=about, notes=notes), sweep=sweep)


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
