"""The paper-style table: methods side by side at one ratio, with published numbers of the same method and model.

A published number stands beside a run if their ratios are within three percentage points. It was measured under the
protocol of the paper, not under that of the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

from secateur.core.records import CHANGES, Record, source_of
from secateur.report import words
from secateur.report.published import PublishedTable, published
from secateur.report.rows import Group, Row, as_number, changed, seconds_of, task_names, took_longer
from secateur.report.series import NEAR, by_perplexity
from secateur.report.tables import Cell, Column, Table, table

_NEAR = 0.03
_STEP = 0.05  # ratios that round to the same multiple stand together
_SPREAD = 0.01


@dataclass(frozen=True)
class Comparison:
    """The table, and the notes below it."""

    table: Table
    notes: tuple[str, ...]


def winner(group: Group) -> str:
    """The result that loses least among those that can be compared, in words, as the page has it."""
    return words.finding(next(iter(by_perplexity(group.rows)), None), group)


def comparison(rows: Sequence[Row], records: Sequence[Record]) -> Comparison | None:
    """Compare the rows in a table.

    Args:
        rows: the rows of one model under one protocol.
        records: all records: those of `heal` have the cost of healing, those of `bench` the speed of results.

    Returns:
        The table with its notes; None if fewer than two methods were measured.
    """
    measured = _once(sorted((row for row in rows if row.dense or row.measuring), key=_order))
    if len({_method(row) for row in measured if not row.dense}) < 2:
        return None
    cost = {row: _cost(row, records) for row in measured}
    tasks = task_names(measured)
    columns = [
        Column("Method", lambda row: Cell("dense" if row.dense else _method(row)), text=True),
        Column(
            "W update",
            lambda row: None if row.dense else Cell("yes" if _updated(row) else "no"),
            "weights that stay were changed",
            text=True,
        ),
        Column(
            "Removed",
            _removed,
            "measured: of all parameters; what was asked for beside it, where that is more than a point away",
        ),
        Column("Zeroed", _zeroed, "measured: of all parameters", optional=True),
        Column(
            "PPL",
            lambda row: Cell("infinite") if row.diverged else _cell(words.perplexity(row.ppl), row.ppl),
            "lower is better",
        ),
        *(
            Column(
                task,
                partial(_accuracy, task=task),
                "per cent; length-normalised where the task has it",
            )
            for task in tasks
        ),
        Column("Mean", lambda row: _mean(row, tasks), "of the tasks", optional=True),
        Column(
            "Wall time",
            lambda row: _cell(words.duration(cost[row][0], at_least=cost[row][2]), cost[row][0]),
            "of pruning, and of healing",
        ),
        Column("Peak memory", lambda row: _cell(words.size(cost[row][1]), cost[row][1]), "resident set of the process"),
        Column("Parameters", lambda row: _cell(words.count(row.number("params_after")), row.number("params_after"))),
        Column(
            "Tokens/s",
            lambda row: _speed(row, records),
            "generated, at the largest batch; times the dense model's in turns with it",
            optional=True,
        ),
        Column(
            "Published",
            _published,
            "the same method on this model, under the paper's protocol",
            optional=True,
            text=True,
        ),
    ]
    return Comparison(table(columns, measured), tuple(_notes(measured)))


def markdown(found: Comparison) -> str:
    """The table for a README, and the notes below it."""
    heads = [head for head, _, _ in found.table.heads]
    lines = [
        heads,
        ["---" if text else "---:" for _, _, text in found.table.heads],
        *([cell.text for cell in row] for row in found.table.rows),
    ]
    body = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
    return body + "\n" + "".join(f"\n- {note}" for note in found.notes) + ("\n" if found.notes else "")


def cautions(rows: Sequence[Row]) -> list[str]:
    """What `prune` warned of, beside the names of the runs; one line for runs with the same warning."""
    runs: dict[str, list[str]] = {}
    for row in rows:
        for text in row.pruning.get("warnings") or []:
            runs.setdefault(str(text).removeprefix(f"{row.get('method')}: "), []).append(words.name(row))
    return [f"Warning, {'; '.join(dict.fromkeys(names))}: {text}." for text, names in runs.items()]


def asked_elsewhere(row: Row) -> float | None:
    """The requested pruning ratio, if the measured one is more than a percentage point away from it; else None."""
    requested, removed = row.number("params_removed"), row.number("pruning_ratio")
    return requested if requested is not None and removed is not None and abs(requested - removed) > _SPREAD else None


def _removed(row: Row) -> Cell | None:
    removed, requested = row.number("pruning_ratio"), asked_elsewhere(row)
    text = words.percent(removed)
    return _cell(f"{text} (asked {requested:.0%})" if text and requested is not None else text, removed)


def _order(row: Row) -> tuple[bool, bool, float, str]:
    removed = row.number("params_removed") or row.number("pruning_ratio") or 0.0
    level = removed or row.zeroed or 0.0
    return not row.dense, not removed, round(level / _STEP), _method(row)


def _once(rows: Sequence[Row]) -> list[Row]:
    """The rows without repeated results: two requested ratios may remove the same whole blocks."""
    return list(
        {
            (_method(row), row.number("pruning_ratio"), row.number("nonzero_after"), row.ppl): row
            for row in reversed(rows)
        }.values()
    )[::-1]


def _method(row: Row) -> str:
    name, plus, healed = str(row.get("method")).partition(" + ")
    return " ".join(filter(None, (name, row.get("pattern")))) + plus + healed


def _updated(row: Row) -> bool:
    return bool(row.get("updated") or changed(row))


def _zeroed(row: Row) -> Cell | None:
    share = row.zeroed
    return _cell(words.percent(share), share) if share is not None and share > 0.001 else None


def _accuracy(row: Row, task: str) -> Cell | None:
    value = _score(row, task)
    return None if value is None else Cell(f"{100 * value:.1f}", f"{value!r}")


def _score(row: Row, task: str) -> float | None:
    normed = row.task(task, "acc_norm")
    return row.task(task, "acc") if normed is None else normed


def _mean(row: Row, tasks: Sequence[str]) -> Cell | None:
    values = [_score(row, task) for task in tasks]
    known = [value for value in values if value is not None]
    if len(known) < 2 or len(known) < len(tasks):
        return None
    return Cell(f"{100 * sum(known) / len(known):.1f}")


def _cost(row: Row, records: Sequence[Record]) -> tuple[float | None, float | None, bool]:
    """Seconds, the largest resident set in bytes, and whether it took longer, with all that came before a change."""
    taken, place = list[Record](), row.get("out")
    places = {str(r["out"]) for r in records if r.get("out")}
    for command in [command for command in reversed(CHANGES) if row.get(command)]:  # from the last one back
        change = [r for r in records if r.get("command") == command and r.get("out") == place][-1:]
        taken += change
        place = source_of(change[0], places) if change else None
    if taken:
        taken += [r for r in records if r.get("command") == "prune" and r.get("out") == place][-1:]
    else:
        taken = [row.pruning]
    seconds, peaks = (
        [v for record in taken if (v := value(record)) is not None]
        for value in (seconds_of, lambda r: as_number(r.get("peak_rss_bytes")))
    )
    return (sum(seconds) if seconds else None), (max(peaks) if peaks else None), any(map(took_longer, taken))


def _speed(row: Row, records: Sequence[Record]) -> Cell | None:
    timed = [r for r in records if r.get("command") == "bench" and r.get("out") == row.get("out")]
    if not timed or row.dense:
        return None
    rate = timed[-1]["results"][0]["batches"][-1]["decode_tokens_per_second"]
    speedup = timed[-1].get("speedup")
    return Cell(f"{rate:,.0f}" + (f" ({words.ratio(speedup[-1]['decode'])})" if speedup else ""), f"{rate!r}")


def _cell(text: str | None, exact: float | None) -> Cell | None:
    return None if text is None else Cell(text, f"{exact!r}")


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """The notes below the table: warnings, unequal ratios that stand together, and the sources of published numbers."""
    yield from cautions(rows)
    away = [(row.number("pruning_ratio") or 0.0) - asked for row in rows if (asked := asked_elsewhere(row))]
    if away:
        yield (
            "A ratio with 'asked' beside it is more than a point away from it: whole units go, so it could not be had."
            + (" Do not compare a row that is more than two points away." if max(map(abs, away)) > NEAR else "")
        )
    levels: dict[float, list[Row]] = {}
    for row in rows:
        if asked_elsewhere(row) is None and (ratio := row.number("pruning_ratio")):
            levels.setdefault(round(ratio / _STEP) * _STEP, []).append(row)
    for level, members in levels.items():
        ratios = [row.number("pruning_ratio") or 0.0 for row in members]
        if max(ratios) - min(ratios) > _SPREAD:
            (least, first), (most, last) = min(both := list(zip(ratios, map(_method, members), strict=True))), max(both)
            spread = f"between {least:.1%} ({first}) and {most:.1%} ({last})"
            yield f"About {level:.0%}: the measured ratios lie {spread}; whole units go, so not every ratio can be had."
    sources = dict.fromkeys(source for row in rows for _, source in _beside(row))
    yield from (
        f"Published: {source.source}; {source.protocol}.{f' {source.note}.' if source.note else ''}"
        for source in sources
    )


# Published numbers


def _published(row: Row) -> Cell | None:
    values = [text for text, _ in _beside(row)]
    return Cell("; ".join(dict.fromkeys(values))) if values else None


def _beside(row: Row) -> list[tuple[str, PublishedTable]]:
    """Published numbers of the same model, method and ratio, each with its table."""
    method = "dense" if row.dense else _letters(str(row.get("method")).partition(" + ")[0])
    values = []
    for printed in _tables():
        for line in printed.rows:
            entry = dict(zip(printed.columns, line, strict=True))
            if not _same_method(str(entry.get("method", "")), method, healed=changed(row)) or not _same_ratio(
                entry, row
            ):
                continue
            values += [(text, printed) for text in _values(entry, row.model)]
    return values


def _tables() -> list[PublishedTable]:
    names = sorted(
        file.name.removesuffix(".json")
        for file in files("secateur.report").joinpath("published").iterdir()
        if file.name.endswith(".json")
    )
    return [table for name in names for table in published(name).values() if "method" in table.columns]


def _letters(text: str) -> str:
    """The lower-case letters, digits and points of a name: `LLaMA-2 7B` begins `Llama-2-7b-hf`; 1.3B is not 13B."""
    return re.sub(r"[^a-z0-9.]", "", text.lower())


def _same_method(published_name: str, method: str, *, healed: bool) -> bool:
    name, _, variant = published_name.partition(",")
    return (
        _letters(name).startswith(method)
        and bool(method)
        and (("tuned" in variant or "LoRA" in published_name) == healed)
    )


def _same_ratio(entry: dict[str, Any], row: Row) -> bool:
    if row.dense:
        return True
    if entry.get("pattern") is not None:
        return bool(entry["pattern"] == row.get("pattern"))
    removed, ratio = as_number(entry.get("removed")), row.number("pruning_ratio")
    return removed is not None and ratio is not None and abs(removed - ratio) <= _NEAR


def _values(entry: dict[str, Any], model: str) -> list[str]:
    """The values for a model in a line of a table.

    They are mean accuracies if each line is of one model, or perplexities if each column is of one model.
    """
    name = _letters(model.rpartition("/")[2])
    at = "" if entry.get("removed") in (None, 0) else f" at {entry['removed']:.0%}"
    if "model" in entry:
        return (
            [f"mean {entry['mean']:g}{at}"]
            if name.startswith(_letters(str(entry["model"]))) and as_number(entry.get("mean")) is not None
            else []
        )
    models = [column for column in entry if any(c.isdigit() for c in column) and name.startswith(_letters(column))]
    return [f"PPL {entry[column]:g}{at}" for column in models if as_number(entry[column]) is not None]
