"""From records to rows: one row per checkpoint and protocol, with its `prune` record and its `eval` record.

A `heal` record measures two checkpoints: the one that was healed, before, and the result. Each is a row where no `eval`
record says the same. A checkpoint that was measured on several texts has a row for each.

Perplexities are comparable only under one protocol on one model, so rows are also sorted into groups of (model,
protocol); what a report plots and concludes is about its largest group alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.core.errors import SecateurError
from secateur.core.records import CHANGES as CHANGES
from secateur.core.records import Record, model_of, to_json, zeroes
from secateur.core.records import changed as changed_record
from secateur.core.records import source_of as source_of

PROTOCOL = ("name", "spec", "seqlen", "windows", "tokens", "bos", "tail", "join", "sha256")

# Fields of the pruning in both records of a folder. If they differ, the folder was pruned again after the measurement.
_IDENTITY = ("method", "sparsity", "sparsity_measured", "pattern", "modules", "options", "seed")

_MADE = (*_IDENTITY, *CHANGES)  # if two measurements of a folder differ in one of them, it was made again between them

_ADDED = {"reconstruct": "reconstruction", "heal": "LoRA"}  # how a row names what followed the pruning

Protocol = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Row:
    """One checkpoint. Either record may be empty.

    Rows are compared by identity, since two runs can agree in every field.

    Attributes:
        pruning: the `prune` record.
        measuring: the `eval` record, or what another record says about the perplexity.
    """

    pruning: Record
    measuring: Record

    def get(self, name: str) -> Any:
        """A field of the pruning record, else of the measuring record, else None; "method" also names what followed."""
        value = self.pruning.get(name)
        value = self.measuring.get(name) if value is None else value
        if name != "method" or not value:
            return value
        added = [words for command, words in _ADDED.items() if self.measuring.get(command)]
        return " + ".join([str(value), *added])

    def number(self, name: str) -> float | None:
        """A field that is a number; None otherwise."""
        return as_number(self.get(name))

    def part(self, name: str) -> Record:
        """A field that is an object; an empty object otherwise."""
        value = self.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def model(self) -> str:
        """The original model, see `model_of`."""
        return model_of(self.get("model"))

    @property
    def dense(self) -> bool:
        """Whether this is the unpruned model."""
        return self.get("method") is None and not self.number("sparsity")

    @property
    def told(self) -> bool:
        """Whether this is a dense model that only records of pruned ones tell of."""
        return self.measuring.get("from") == "ppl_dense"

    @property
    def sparsity(self) -> float | None:
        """The measured sparsity; the requested one if it was not measured."""
        measured = self.number("sparsity_measured")
        return self.number("sparsity") if measured is None else measured

    @property
    def removed(self) -> float | None:
        """The share of the parameters that was removed."""
        return self.number("pruning_ratio")

    @property
    def zeroed(self) -> float | None:
        """The share of zeros in the result, of all parameters that there were: with `removed` it makes `gone`.

        Zeros that a model has by accident count only beside those of a method that zeroes weights.
        """
        if self.dense or not self._zeroes:
            return 0.0
        after, nonzero = self.number("params_after"), self.number("nonzero_after")
        before = self.number("params_before") or after
        return (after - nonzero) / before if after is not None and before and nonzero is not None else None

    @property
    def _zeroes(self) -> bool:
        return zeroes({"sparsity_of": self.get("sparsity_of")})

    @property
    def gone(self) -> float | None:
        """The share of the parameters that was removed or zeroed, of all that there were."""
        if not self._zeroes:
            return self.removed
        before, nonzero = self.number("params_before"), self.number("nonzero_after")
        return 1 - nonzero / before if before and nonzero is not None else None

    @property
    def ppl(self) -> float | None:
        """Perplexity; None if it was not measured, or is infinite."""
        return as_number(self.measuring.get("ppl"))

    @property
    def cost(self) -> float | None:
        """Perplexity, also where it is infinite; None if it was not measured."""
        return math.inf if self.diverged else self.ppl

    @property
    def diverged(self) -> bool:
        """Whether perplexity was measured, but is infinite (null in JSON)."""
        return self.ppl is None and "ppl" in self.measuring and self.protocol is not None

    @property
    def protocol(self) -> Protocol | None:
        """The protocol of the perplexity, in a form that can be compared; None if it was not measured."""
        return _protocol_of(self.measuring)

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


def _protocol_of(measuring: Record) -> Protocol | None:
    protocol = measuring.get("ppl_protocol")
    return tuple((name, protocol.get(name)) for name in PROTOCOL) if isinstance(protocol, dict) else None


def changed(row: Row) -> bool:
    """Whether the model was changed after it was pruned (healed)."""
    return changed_record(row.measuring)


def as_number(value: Any) -> float | None:
    """The value as a float, if it is a number; else None (also for True and False)."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def seconds_of(record: Record) -> float | None:
    """The seconds of a run, including the runs at lower sparsities that it continued."""
    taken = as_number(record.get("seconds"))
    return None if taken is None else taken + (as_number(record.get("seconds_before")) or 0.0)


def took_longer(record: Record) -> bool:
    """Whether a run took more than its seconds say: it went on with one that was killed, whose end is not known."""
    return record.get("seconds_at_least") is True


def collect(records: Sequence[Record]) -> list[Row]:
    """The rows of the `prune`, `eval` and `heal` records, the dense ones first, then by method and sparsity.

    A folder has a row for each protocol that it was measured under. A later record replaces an earlier one of the same
    command, folder and protocol. A dense model without a record of its own has a row from the `ppl_dense` of others.

    Raises:
        SecateurError: no record is of `prune`, `eval` or `heal`.
    """
    if not records:
        raise SecateurError(
            "no records to report: give a records.jsonl that 'secateur prune', 'eval' or 'sweep' wrote, or its folder"
        )
    pruned: dict[str, Record] = {}
    measured: _Measured = {}
    changed: list[Record] = []
    places = {str(record["out"]) for record in records if record.get("out")}
    for index, record in enumerate(records):
        if (command := record.get("command")) not in ("prune", "eval", *CHANGES):
            continue
        plain: Record = json.loads(to_json(record))  # so that a record fresh from memory reads like one from a file
        place = _place(str(plain["out"])) if plain.get("out") else f"#{index}"
        if command in CHANGES:
            changed.append(plain | {"out": place})
            _keep(measured, place, plain, (str(command),))
        elif command == "prune":
            pruned[place] = plain
        else:
            _keep(measured, place, plain, _MADE)
            measured.setdefault(place, {})[_protocol_of(plain)] = plain
    _add_changes(changed, measured, places)
    if not pruned and not measured:
        commands = ", ".join(sorted({str(record.get("command") or "unnamed") for record in records}))
        raise SecateurError(
            f"nothing to report: of {len(records)} records none is of prune, eval or heal (found: {commands}); "
            "run 'secateur eval DIR' first"
        )
    rows = _merge(pruned, measured)
    return sorted([*rows, *_told_dense(rows)], key=_order)


_Measured = dict[str, dict[Protocol | None, Record]]  # folder -> protocol -> the record of that measurement


def _keep(measured: _Measured, place: str, new: Record, fields: Iterable[str]) -> None:
    """Drop the measurements of a folder that are of what it held before: those that differ from `new` in the fields."""
    if place in measured:
        known = measured[place].items()
        measured[place] = {protocol: old for protocol, old in known if _alike(old, new, fields)}


def _alike(old: Record, new: Record, fields: Iterable[str]) -> bool:
    """Whether two measurements of one folder are of the same model, by these fields."""
    names = set(fields)
    return not _disagree(old, new, names & set(_IDENTITY)) and all(
        old.get(command) == new.get(command) for command in names & set(CHANGES)
    )


def _add_changes(changed: Sequence[Record], measured: _Measured, places: Iterable[str]) -> None:
    """Add to `measured` what the records of CHANGES say of folders, where `eval` did not measure the same."""
    for record in changed:
        for place, found in _measurements(record, places):
            protocol, before = _protocol_of(found), measured.get(place, {})
            known = {
                key: old
                for key, old in before.items()
                if "from" not in old or _alike(old, found, (*_IDENTITY, *CHANGES))
            }
            measured[place] = known
            if "from" in known.get(protocol, found) and (protocol is not None or not known):
                known[protocol] = found


def checkpoints(rows: Iterable[Row]) -> list[Row]:
    """One row for each checkpoint, the first, of rows that may have it under several protocols."""
    found: dict[Any, Row] = {}
    for row in rows:
        place = _place(str(row.get("out"))) if row.get("out") else row.model if row.dense else row
        found.setdefault((place, row.sparsity, row.get("method")), row)
    return list(found.values())


def _told_dense(rows: Sequence[Row]) -> list[Row]:
    """Rows of dense models that have no measurement of their own under a protocol, from `ppl_dense` of other records.

    `eval --against` writes it: measured under the protocol of the record, or kept from such a measurement.
    """
    own = {(row.model, row.protocol) for row in rows if row.dense and row.protocol is not None}
    told: dict[tuple[str, Protocol], Row] = {}
    for row in rows:
        ppl, key = as_number(row.measuring.get("ppl_dense")), (row.model, row.protocol)
        if ppl is not None and row.protocol is not None and not row.dense and key not in own:
            protocol = row.measuring["ppl_protocol"]
            measuring = {"command": "eval", "from": "ppl_dense", "model": row.get("model"), "sparsity": 0.0}
            told[row.model, row.protocol] = Row({}, measuring | {"ppl": ppl, "ppl_protocol": protocol})
    return list(told.values())


def _place(out: str) -> str:
    return str(Path(out).resolve())


def _measurements(record: Record, places: Iterable[str]) -> Iterator[tuple[str, Record]]:
    """What a record of CHANGES says about two folders, as records of `eval`: its source's first, then its result's."""
    command = str(record["command"])
    # Time and memory are those of the healing. An adapter that is kept apart lies beside the weights.
    shared = {name: value for name, value in record.items() if name not in ("seconds", "peak_rss_bytes", "loss", "ppl")}
    shared |= {"command": "eval", "from": command}
    if not isinstance(record.get("ppl_protocol"), dict):  # the result is there, and was not measured
        yield str(record["out"]), {name: value for name, value in shared.items() if not name.startswith("ppl")}
        return
    if (source := source_of(record, places)) is not None and "ppl_before" in record:
        earlier = record[command].get("before") if isinstance(record.get(command), dict) else None
        unknown = {name: value for name, value in shared.items() if name != "nonzero_after"}
        yield (
            _place(source),
            unknown | {"ppl": record["ppl_before"], "loss": record.get("loss_before"), "out": source, command: earlier},
        )
    if "ppl" in record:
        yield str(record["out"]), shared | {"ppl": record["ppl"], "loss": record.get("loss")}


def _merge(pruned: dict[str, Record], measured: _Measured) -> list[Row]:
    rows = []
    for out in dict.fromkeys([*pruned, *measured]):
        pruning, several = pruned.get(out, {}), list(measured.get(out, {}).values())
        if pruning and all(_disagree(pruning, measuring) for measuring in several):
            rows.append(Row(pruning, {}))
        rows += [Row({} if _disagree(pruning, measuring) else pruning, measuring) for measuring in several]
    return rows


def _disagree(a: Record, b: Record, names: Iterable[str] = _IDENTITY) -> bool:
    return any(a.get(name) is not None and b.get(name) is not None and a[name] != b[name] for name in names)


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
