"""The tables, notes and warnings of a report, as plain cells for the template."""

from __future__ import annotations

import json
import shlex
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from secateur.core.names import shown
from secateur.core.records import Record
from secateur.plan.quantity import PARAMETERS, words_of
from secateur.report import words
from secateur.report.rows import (
    PROTOCOL,
    Group,
    Protocol,
    Row,
    as_number,
    changed,
    checkpoints,
    seconds_of,
    task_names,
    took_longer,
)

MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """The text of a cell, and the exact value if the text is rounded."""

    text: str
    exact: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table; an optional column is left out if no row has a value."""

    head: str
    cell: Callable[[Row], Cell | None]
    hint: str = ""
    optional: bool = False
    text: bool = False


@dataclass(frozen=True)
class Table:
    """Heads (text, hint, whether cells are text) and rows of cells; `marked` counts the dense rows at the top."""

    heads: tuple[tuple[str, str, bool], ...]
    rows: tuple[tuple[Cell, ...], ...]
    marked: int = 0


def inner(row: Row, name: str, key: str) -> float | None:
    """A number inside a field that is an object."""
    return as_number(row.part(name).get(key))


def table(columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """The table of the rows; a missing value is a dash."""
    filled = [(column, [column.cell(row) for row in rows]) for column in columns]
    shown = [(column, cells) for column, cells in filled if not column.optional or any(cells)]
    body = tuple(tuple(cells[n] or Cell(MISSING) for _, cells in shown) for n in range(len(rows)))
    return Table(
        tuple((column.head, column.hint, column.text) for column, _ in shown), body, sum(row.dense for row in rows)
    )


def runs(rows: Sequence[Row], groups: Sequence[Group]) -> Table:
    """The table of checkpoints, one line each: pruning, size, quality and cost."""
    home = {row: g for g in groups for row in g.rows}
    letters = {row: letter for letter, g in named(groups).items() for row in g.rows}
    before = {row.model: row.number("params_before") for row in rows if row.get("params_before")}

    def parameters(row: Row) -> float | None:
        """The parameters after pruning; those of a dense model may stand only in the records of its pruned runs."""
        after = row.number("params_after")
        return before.get(row.model) if after is None and row.dense else after

    def times_dense(row: Row) -> float | None:
        dense = home[row].dense
        return row.ppl / dense.ppl if row.ppl and dense is not None and dense.ppl and not row.dense else None

    columns = [
        Column("Method", lambda row: _text("dense" if row.dense else row.get("method"), _options(row)), text=True),
        Column(
            "Group", lambda row: _text(letters.get(row)), "rows of one group can be compared", optional=True, text=True
        ),
        Column("Pattern", lambda row: None if row.dense else _text(row.get("pattern")), text=True),
        Column(
            "Modules",
            lambda row: None if row.dense else _text(str(row.get("modules") or "all").replace(",", ", ")),
            "per-module sparsity",
            text=True,
        ),
        Column("Removed", lambda row: _number(words.percent, row.removed), "of all parameters"),
        Column("Zeroed", lambda row: _number(words.percent, row.zeroed), "of all parameters"),
        Column(
            "Sparsity",
            lambda row: _number(words.percent, row.sparsity),
            "measured: the fraction removed of what the method removes from",
        ),
        Column("Parameters", lambda row: _number(words.count, parameters(row)), "in the written checkpoint"),
        Column("PPL", _perplexity, "perplexity, lower is better"),
        Column(
            "PPL / dense", lambda row: _number(words.ratio, times_dense(row)), "perplexity over that of the dense model"
        ),
        Column("Bits / byte", lambda row: _number(words.fixed, row.number("bits_per_byte")), optional=True),
        *_task_columns(rows),
        Column(
            "KL",
            lambda row: _number(words.fixed, inner(row, "shift", "kl")),
            "nats per token, from the dense model",
            optional=True,
        ),
        Column(
            "Top-1 agreement",
            lambda row: _number(words.percent, inner(row, "shift", "top1_agreement")),
            "with the dense model",
            optional=True,
        ),
        Column("Pruning time", lambda row: _number(_duration(row.pruning), seconds_of(row.pruning))),
        Column(
            "Peak memory",
            lambda row: _number(words.size, as_number(row.pruning.get("peak_rss_bytes"))),
            "resident set of the pruning process",
        ),
        Column(
            "Loads as",
            lambda row: _loads(row),
            "stock: any transformers loads it; runtime: needs trust_remote_code or secateur",
            text=True,
        ),
    ]
    return table(columns, rows)


def _task_columns(rows: Sequence[Row]) -> list[Column]:
    columns = []
    for task in task_names(rows):

        def flipped(row: Row, task: str = task) -> Cell | None:
            return _number(words.percent, row.task(task, "flipped"))

        accuracy, normed = partial(_accuracy, task=task, metric="acc"), partial(_accuracy, task=task, metric="acc_norm")
        columns += [
            Column(f"{task} acc", accuracy, "accuracy ± standard error", optional=True),
            Column(f"{task} acc_norm", normed, "length-normalised", optional=True),
            Column(f"{task} flipped", flipped, "answers that differ", optional=True),
        ]
    return columns


def _accuracy(row: Row, task: str, metric: str) -> Cell | None:
    value, error = row.task(task, metric), row.task(task, "stderr" if metric == "acc" else "stderr_norm")
    if value is None:
        return None
    n = row.task(task, "n")
    return Cell(
        f"{value:.3f}" + (f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{error:.3f}" if error is not None else ""),
        f"n = {n:.0f}" if n is not None else "",
    )


def _perplexity(row: Row) -> Cell | None:
    return Cell("infinite") if row.diverged else _number(words.perplexity, row.ppl)


def _loads(row: Row) -> Cell | None:
    stock = True if row.dense else row.get("stock")
    return None if stock is None else Cell("stock" if stock else "runtime")


def _options(row: Row) -> str:
    return ", ".join(f"{name}={value}" for name, value in row.part("options").items())


def _text(value: Any, exact: str = "") -> Cell | None:
    return None if value is None else Cell(str(value), exact)


def _duration(record: Record) -> Callable[[float | None], str | None]:
    return partial(words.duration, at_least=took_longer(record))


def _number(say: Callable[[float | None], str | None], value: float | None) -> Cell | None:
    text = say(value)
    return (
        None
        if text is None or value is None
        else Cell(text, f"{value:,.0f}" if value == int(value) and value > 999 else f"{value!r}")
    )


def named(groups: Sequence[Group]) -> dict[str, Group]:
    """The groups by letter; empty if there is only one, which needs no letter."""
    letters = [*string.ascii_uppercase, *(f"A{letter}" for letter in string.ascii_uppercase)]
    return dict(zip(letters, groups, strict=False)) if len(groups) > 1 else {}


def _eval_command(group: Group) -> str:
    """The command that measures the dense model as the rows of a group were measured."""
    words = ["secateur", "eval", group.model]
    how = dict(group.protocol or ())
    options = {"--protocol": "name", "--text": "spec", "--eval-seqlen": "seqlen", "--limit": "windows"}
    for option, name in options.items():
        words += [option, str(how[name])] if how.get(name) is not None else []
    return shlex.join(words)


def warnings(groups: Sequence[Group]) -> dict[str, Any] | None:
    """The warning about groups that cannot be compared; None with a single group."""
    if len(groups) < 2:
        return None
    models, protocols = {g.model for g in groups}, {g.protocol for g in groups}
    differ = [
        name
        for name, mixed in (("models", len(models) > 1), ("perplexity protocols", len(protocols - {None}) > 1))
        if mixed
    ]
    known = [dict(g.protocol) for g in groups if g.protocol is not None]
    telling = [
        name
        for name in PROTOCOL
        if name in ("spec", "seqlen", "sha256") or any(protocol[name] != known[0][name] for protocol in known)
    ]
    members = [
        f"{letter}: {g.model}, {_protocol(g.protocol, telling)} ({words.plural(len(g.rows), 'row')})"
        for letter, g in named(groups).items()
    ]
    return {"differ": " and ".join(differ), "groups": members}


def _protocol(protocol: Protocol | None, telling: Sequence[str]) -> str:
    if protocol is None:
        return "perplexity not measured"
    return ", ".join(
        f"{name} {_as_text(value)[:12] if name == 'sha256' else _as_text(value)}"
        for name, value in protocol
        if name in telling and value is not None
    )


def _as_text(value: Any) -> str:
    """A setting as text; a string with outer white space is quoted, to make it visible."""
    if value is None or isinstance(value, bool):
        return {None: MISSING, True: "yes", False: "no"}[value]
    return json.dumps(value) if isinstance(value, str) and value.strip() != value else str(value)


def notes(rows: Sequence[Row], groups: Sequence[Group], others: str) -> list[str]:
    """The notes of the report: missing measurements, each with the next step."""
    lines = []
    pruned = [row for row in rows if not row.dense]
    unmeasured, diverged = [row for row in pruned if row.protocol is None], [row for row in rows if row.diverged]
    if unmeasured:
        folders = ", ".join(_folder(row) or "unnamed" for row in unmeasured[:3]) + (
            ", …" if len(unmeasured) > 3 else ""
        )
        lines.append(
            f"{words.plural(len(unmeasured), 'checkpoint')} without a perplexity ({folders}): run 'secateur eval DIR'."
        )
    if diverged:
        lines.append(
            f"{words.plural(len(diverged), 'checkpoint')} with an infinite perplexity: in the table, "
            "left out of plots and laws."
        )
    told = [row for row in groups[0].rows if row.told]
    if told and groups[0].dense in told:
        lines.append(
            "The dense model has no evaluation of its own in these records: its perplexity is the one that "
            "'secateur eval --against' kept with the results (ppl_dense)."
        )
    if groups[0].dense is None:
        lines.append(
            "The dense model was not measured under this protocol, so nothing is compared with it: "
            f"run '{_eval_command(groups[0])}'."
        )
    for task in task_names(groups[0].rows):
        items = {
            (row.task(task, "n"), row.part("tasks")[task].get("sha256"))
            for row in groups[0].rows
            if row.accuracy(task) is not None
        }
        if len(items) > 1:
            lines.append(
                f"{task} was not measured on the same items in every run: accuracies may differ by that alone."
            )
    return [*lines, f"Records of other commands are not shown: {others}."] if others else lines


def protocols(groups: Sequence[Group]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each protocol in use, field by field."""
    letters = {id(g): letter for letter, g in named(groups).items()}
    return [
        (letters.get(id(g), ""), [(name, _as_text(value)) for name, value in g.protocol])
        for g in groups
        if g.protocol is not None
    ]


def calibrations(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Each calibration set in use, and its number of runs."""
    used: dict[str, int] = {}
    for row in checkpoints(rows):
        if calibration := row.part("calibration"):
            spec, samples, seqlen, sha256 = (
                calibration.get(name, MISSING) for name in ("spec", "samples", "seqlen", "sha256")
            )
            form = ", in the chat template" if calibration.get("form") == "chat" else ""
            text = f"{spec}, {samples} \N{MULTIPLICATION SIGN} {seqlen} tokens{form}, SHA-256 {sha256}"
            used[text] = used.get(text, 0) + 1
    return [(text, words.plural(users, "run")) for text, users in used.items()]


def _folder(row: Row) -> str | None:
    """The name of the folder without its path: a report is shared, and must not show folders of this machine."""
    out = row.get("out")
    return shown(str(out)) if out else None


def settings(rows: Sequence[Row]) -> Table:
    """The table of settings: the folder of each run, and what else decided its result."""
    rows = [row for row in rows if not row.told]
    texts = {row: shown(str(dict(row.protocol).get("spec"))) for row in rows if row.protocol is not None}
    texts = texts if len(set(texts.values())) > 1 else {}
    columns = [
        Column("Run", lambda row: _text("dense" if row.dense else row.get("method")), text=True),
        Column("Asked", _asked, text=True),
        Column("Method's own measure", _own, "what the request came to", text=True, optional=True),
        Column("Folder", lambda row: _text(_folder(row)), text=True),
        Column("Model", lambda row: _text(row.model), text=True),
        Column("Options", lambda row: _text(_options(row) or None), text=True, optional=True),
        Column(
            "Weights updated",
            lambda row: _updated(row),
            "whether weights that stay were changed, by the pruning or by healing",
            text=True,
            optional=True,
        ),
        Column("Seed", lambda row: _text(row.get("seed"))),
        Column("Text", lambda row: _text(texts.get(row)), "of the perplexity", text=True, optional=True),
        Column("Pruned on", lambda row: _where(row.pruning), "device, dtype", text=True, optional=True),
        Column("Measured on", lambda row: _where(row.measuring), "device, dtype", text=True, optional=True),
        Column(
            "Measuring time",
            lambda row: _number(words.duration, as_number(row.measuring.get("seconds"))),
            optional=True,
        ),
    ]
    return table(columns, rows)


def _asked(row: Row) -> Cell | None:
    """What was asked for, in its own words."""
    asked, sparsity = row.number("params_removed"), row.number("sparsity")
    if row.dense or (asked is None and sparsity is None):
        return None
    if asked is not None:
        return _text(f"{words.percent(asked)} of all parameters", f"--params-removed {asked:g}")
    return _text(f"{words.percent(sparsity)} of {_measure(row)}", f"--sparsity {sparsity:g}")


def _own(row: Row) -> Cell | None:
    """The sparsity that a share of all parameters came to, where the method counts something else."""
    sparsity = row.number("sparsity")
    if row.number("params_removed") is None or sparsity is None or row.get("sparsity_of") == PARAMETERS.name:
        return None
    return _text(f"{row.get('sparsity_of') or 'sparsity'} {words.percent(sparsity)}", f"sparsity {sparsity!r}")


def _measure(row: Row) -> str:
    return words_of(row.get("sparsity_of"))


def _updated(row: Row) -> Cell | None:
    if row.dense:
        return None
    updated = True if changed(row) else row.get("updated")
    return None if updated is None else Cell(_as_text(updated))


def _where(record: Record) -> Cell | None:
    parts = [str(record[name]) for name in ("device", "dtype") if record.get(name) is not None]
    return Cell(", ".join(parts)) if parts else None


def versions(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The versions of secateur and of the libraries that the runs used."""
    records = [record for row in rows for record in (row.pruning, row.measuring)]
    by_library: dict[str, set[str]] = {"secateur": {str(r["version"]) for r in records if r.get("version") is not None}}
    for record in records:
        libraries = record.get("versions")
        for name, version in (libraries if isinstance(libraries, dict) else {}).items():
            by_library[name] = by_library.get(name, set()) | {str(version)}
    return [(name, " and ".join(sorted(several))) for name, several in by_library.items() if several]
