"""From records to rows: one row per checkpoint, with its `prune` record and its `eval` record.

Perplexities are comparable only under one protocol on one model, so rows are also sorted into groups of (model,
protocol); what a report plots and concludes is about its largest group alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.core.errors import SecateurError
from secateur.core.records import Record, to_json

PROTOCOL = ("name", "spec", "seqlen", "windows", "tokens", "bos", "tail", "join", "sha256")

# Fields of the pruning in both records of a folder. If they differ, the folder was pruned again after the measurement.
_IDENTITY = ("method", "sparsity", "sparsity_measured", "pattern", "modules", "options", "seed")

Protocol = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Row:
    """One checkpoint. Either record may be empty.

    Rows are compared by identity, since two runs can agree in every field.

    Attributes:
        pruning: the `prune` record.
        measuring: the `eval` record.
    """

    pruning: Record
    measuring: Record

    def get(self, name: str) -> Any:
        """A field of the pruning record, else of the measuring record, else None; "method" also names the healing."""
        value = self.pruning.get(name)
        value = self.measuring.get(name) if value is None else value
        return f"{value} + LoRA" if name == "method" and value and self.measuring.get("heal") else value

    def number(self, name: str) -> float | None:
        """A field that is a number; None otherwise."""
        return as_number(self.get(name))

    def part(self, name: str) -> Record:
        """A field that is an object; an empty object otherwise."""
        value = self.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def model(self) -> str:
        """The original model as a normal path, so that `./m/` and `m` are equal; hub names stay unchanged."""
        return os.path.normpath(str(self.get("model") or "unknown model"))

    @property
    def dense(self) -> bool:
        """Whether this is the unpruned model."""
        return self.get("method") is None and not self.number("sparsity")

    @property
    def sparsity(self) -> float | None:
        """The measured sparsity; the requested one if it was not measured."""
        measured = self.number("sparsity_measured")
        return self.number("sparsity") if measured is None else measured

    @property
    def ppl(self) -> float | None:
        """Perplexity; None if it was not measured, or is infinite."""
        return as_number(self.measuring.get("ppl"))

    @property
    def diverged(self) -> bool:
        """Whether perplexity was measured, but is infinite (null in JSON)."""
        return self.ppl is None and "ppl" in self.measuring and self.protocol is not None

    @property
    def protocol(self) -> Protocol | None:
        """The protocol of the perplexity, in a form that can be compared; None if it was not measured."""
        protocol = self.measuring.get("ppl_protocol")
        return tuple((name, protocol.get(name)) for name in PROTOCOL) if isinstance(protocol, dict) else None

    def task(self, task: str, metric: str) -> float | None:
        """A metric of a task; None if it was not measured."""
        measured = self.part("tasks").get(task)
        return as_number(measured.get(metric)) if isinstance(measured, dict) else None

    def accuracy(self, task: str) -> float | None:
        """`acc` of a task, or `acc_norm` if it has no `acc`."""
        plain = self.task(task, "acc")
        return self.task(task, "acc_norm") if plain is None else plain


@dataclass(frozen=True)
class Group:
    """Rows whose numbers can be compared: one model, one protocol (None if perplexity was not measured)."""

    model: str
    protocol: Protocol | None
    rows: tuple[Row, ...]

    @property
    def dense(self) -> Row | None:
        """The last row of the unpruned model."""
        return next((row for row in reversed(self.rows) if row.dense), None)


def as_number(value: Any) -> float | None:
    """The value as a float, if it is a number; else None (also for True and False)."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def seconds_of(record: Record) -> float | None:
    """The seconds of a run, including the runs at lower sparsities that it continued."""
    taken = as_number(record.get("seconds"))
    return None if taken is None else taken + (as_number(record.get("seconds_before")) or 0.0)


def collect(records: Sequence[Record]) -> list[Row]:
    """The rows of the `prune` and `eval` records, the dense ones first, then by method and sparsity.

    A later record replaces an earlier one of the same command and folder.

    Raises:
        SecateurError: no record is of `prune` or `eval`.
    """
    if not records:
        raise SecateurError(
            "no records to report: give a records.jsonl that 'secateur prune', 'eval' or 'sweep' wrote, or its folder"
        )
    last: dict[str, dict[str, Record]] = {"prune": {}, "eval": {}}
    for index, record in enumerate(records):
        if record.get("command") in last:
            plain: Record = json.loads(to_json(record))  # so that a record fresh from memory reads like one from a file
            last[record["command"]][str(Path(str(plain["out"])).resolve()) if plain.get("out") else f"#{index}"] = plain
    if not last["prune"] and not last["eval"]:
        commands = ", ".join(sorted({str(record.get("command") or "unnamed") for record in records}))
        raise SecateurError(
            f"nothing to report: of {len(records)} records none is of prune or eval (found: {commands}); "
            "run 'secateur eval DIR' first"
        )
    return sorted(_merge(last["prune"], last["eval"]), key=_order)


def _merge(pruned: dict[str, Record], measured: dict[str, Record]) -> list[Row]:
    rows = []
    for out in dict.fromkeys([*pruned, *measured]):
        pruning, measuring = pruned.get(out, {}), measured.get(out, {})
        if pruning and measuring and _disagree(pruning, measuring):
            rows += [Row(pruning, {}), Row({}, measuring)]
        else:
            rows.append(Row(pruning, measuring))
    return rows


def _disagree(a: Record, b: Record) -> bool:
    return any(a.get(name) is not None and b.get(name) is not None and a[name] != b[name] for name in _IDENTITY)


def _order(row: Row) -> tuple[bool, str, float, str, str]:
    return (
        not row.dense,
        str(row.get("method") or ""),
        row.sparsity or 0.0,
        str(row.get("pattern") or ""),
        str(row.get("out") or ""),
    )


def group(rows: Sequence[Row]) -> list[Group]:
    """The groups of the rows, the largest first; equal ones in the order of their first rows.

    A row without a measured perplexity joins the first group of its model.
    """
    keys: dict[tuple[str, Protocol | None], list[Row]] = {}
    for row in rows:
        if row.protocol is not None:
            keys.setdefault((row.model, row.protocol), []).append(row)
    largest = sorted(keys, key=lambda key: -len(keys[key]))
    for row in rows:
        if row.protocol is None:
            home = next((key for key in largest if key[0] == row.model), (row.model, None))
            keys.setdefault(home, []).append(row)
    groups = [Group(model, protocol, tuple(sorted(members, key=_order))) for (model, protocol), members in keys.items()]
    return sorted(
        groups, key=lambda g: (g.protocol is None, -len([row for row in g.rows if row.protocol == g.protocol]))
    )


def task_names(rows: Sequence[Row]) -> list[str]:
    """The names of the tasks that any row was measured on, sorted."""
    return sorted({task for row in rows for task in row.part("tasks") if row.accuracy(task) is not None})
