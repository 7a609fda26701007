"""The dry run of several runs (`sweep`, `compare`) as one table of 80 columns, and what has to be said below it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from secateur.cli.answer import asked_words, how_much, time_words, unknown
from secateur.core.records import Record
from secateur.core.words import plural, rough_duration_words, size_words

_UNKNOWN = "unknown"


def estimates_table(found: Sequence[Record]) -> Table:
    """Return one line for each run with its measuring, and a last one: the sum of the times, and the largest memory.

    Args:
        found: the records of `api.estimate_compare` or `api.estimate_sweep`.
    """
    dense, *runs, together = found
    table = Table(padding=(0, 0))
    for head in ("method", "asked", "would give", "time", "memory"):
        table.add_column(head, justify="right" if head in ("time", "memory") else "left", overflow="fold")
    times = [dense, *(_with_measuring(run, _each(dense, runs, together)) for run in runs)]
    memories = [_bytes(record) for record in found[:-1]]
    for number, (record, timed) in enumerate(zip(found[:-1], times, strict=True)):
        known = memories[number]
        memory = _UNKNOWN if known is None else size_words(max(known, memories[0] or 0))
        asked = ("", "") if record is dense else (asked_words(record), _result(record))
        table.add_row(escape(_name(record)), *asked, time_words(timed) or _UNKNOWN, memory)
    table.add_section()
    table.add_row("all", "", "", _sum(times, together), _largest(memories))
    return table


def estimates_notes(found: Sequence[Record]) -> Iterator[str]:
    """Yield what the table cannot hold: what a time is of, and why something is not known; the disk comes last."""
    dense, *runs, together = found
    yield "Each time is that of a run and of measuring its result, on an idle machine."
    if starting := together.get("seconds_starting"):
        words = f"{rough_duration_words(starting)} for starting {len(runs) + 2} processes"
        yield f"The last line counts {words}: of the command, the dense model and each run."
    reasons: dict[str, list[str]] = {}
    for record in (dense, *runs):
        for what, why in unknown(record).items():
            reasons.setdefault(f"{what} not known: {why}", []).append(str(record["run"]))
    for line, names in reasons.items():
        yield f"{', '.join(names)}: {line}."
    alone = [run["seconds_estimated"] for run in runs]
    if together["seconds_estimated"] is not None and None not in alone:
        pruning = together["seconds_estimated"] - together["seconds_measuring"] - together.get("seconds_starting", 0.0)
        if sum(alone) > pruning + 1:  # seconds; they are rounded
            yield "A gradual method does its work once for all sizes, so the last line counts its longest run."
    disk = "" if together["disk_bytes"] is None else f" They would take {size_words(together['disk_bytes'])} of disk."
    yield f"{plural(len(runs), 'run')} in all, each measured.{disk} Nothing was written."


def _name(record: Record) -> str:
    return " ".join(filter(None, (record.get("method") or "dense", record.get("pattern"))))


def _result(record: Record) -> str:
    if record.get("params_after") is None:
        return "known at the end"
    return how_much(record) or "nothing"


def _each(dense: Record, runs: Sequence[Record], together: Record) -> float | None:
    """Return the seconds of measuring one result."""
    measuring = together["seconds_measuring"]
    return None if measuring is None or not runs else (measuring - dense["seconds_estimated"]) / len(runs)


def _with_measuring(run: Record, measuring: float | None) -> Record:
    if run["seconds_estimated"] is None or measuring is None:
        return {"seconds_estimated": None}
    return {**run, "seconds_estimated": run["seconds_estimated"] + measuring}


def _bytes(record: Record) -> int | None:
    """Return the memory of the whole process."""
    memory = record.get("memory_bytes")
    return None if memory is None else int(memory) + int(record.get("resident_bytes", 0))


def _sum(times: Sequence[Record], together: Record) -> str:
    known = [record["seconds_estimated"] for record in times if record["seconds_estimated"] is not None]
    if together["seconds_estimated"] is None:
        over = sum(known) + together.get("seconds_starting", 0.0)
        return f"over {time_words({'seconds_estimated': over})}" if known else _UNKNOWN
    rough = all(record.get("seconds_rough") for record in times)
    return time_words({**together, "seconds_rough": rough})


def _largest(memories: Sequence[int | None]) -> str:
    known = [memory for memory in memories if memory is not None]
    if not known:
        return _UNKNOWN
    return f"{'over ' if None in memories else ''}{size_words(max(known))}"
