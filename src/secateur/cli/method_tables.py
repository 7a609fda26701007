"""Methods for the terminal: the list of all, and one with its facts and its options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from secateur.core.records import Record


def methods_table(summaries: Mapping[str, str], facts: Mapping[str, Record]) -> Table:
    """Return what `methods` prints: every method with its result, what it needs, and its summary.

    A method without facts is one whose file breaks the contract; its summary says how.
    """
    table = Table("method", "result", "needs", "what it does", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[:3]:
        column.no_wrap = True
    for name, summary in summaries.items():
        found = facts.get(name)
        table.add_row(name, *(("", "") if found is None else (results(found), found["needs"])), escape(summary))
    return table


def method_parts(record: Record) -> list[Table | str]:
    """Return what `methods NAME` prints: the summary, a table of facts, and the table of options."""
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    if record["advice"]:
        facts.add_row("advice", escape(record["advice"]))
    if record["paper"]:
        facts.add_row("paper", escape(record["paper"]))
    facts.add_row("result", result_words(record))
    facts.add_row("sparsity", f"a fraction of {record['sparsity_of']}")
    if record["patterns"]:
        facts.add_row("patterns", "\n".join(_patterns(record)))
    facts.add_row("calibration", _calibration(record))
    if record["torchrun"]:
        facts.add_row("torchrun", "several processes can share its work")
    use = f"secateur prune MODEL --method {record['method']} --sparsity 0.3 --out DIR"
    facts.add_row("use", f"{use} [--set OPTION=VALUE]".replace("[", "\\["))
    return [f"[bold]{escape(record['summary'])}[/]", "", facts, "", *option_parts(record)]


def option_parts(record: Record) -> list[Table | str]:
    """Return the table of options of a method, or a line that it has none."""
    return [options_table(record)] if record["options"] else [f"{record['method']} has no options of its own."]


def options_table(record: Record) -> Table:
    """Return the options of a method with their defaults and meanings."""
    table = Table("option", "default", "meaning", title=f"options of {escape(record['method'])}: --set OPTION=VALUE")
    for option in record["options"]:
        table.add_row(
            option["name"], escape(option_words(option["default"])), escape(option["meaning"].replace("`", ""))
        )
    return table


def option_words(value: Any) -> str:
    """Return the value of an option as `--set` takes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def result_words(record: Record) -> str:
    """Return whether the result of a method is smaller or has zeros, with the patterns that decide it."""
    meanings = {"smaller": "smaller: parameters are removed", "zeros": "zeros: the same size, weights are set to zero"}
    by_kind = {kind: [name for name, of in record["results"].items() if of == kind] for kind in meanings}
    kinds = [record["result"], *(kind for kind in meanings if by_kind[kind] and kind != record["result"])]
    if len(kinds) == 1:
        return meanings[kinds[0]]
    return "; ".join(f"{meanings[kind]} (--pattern {', '.join(by_kind[kind])})" for kind in kinds)


def results(record: Record) -> str:
    """Return the results that a method can have, the one of its default options first."""
    return " or ".join(dict.fromkeys([record["result"], *record["results"].values()]))


def _patterns(record: Record) -> list[str]:
    """Return the patterns of a method, one text each, with what a sparsity is a fraction of where that differs."""
    return [
        name
        + (" (default)" if name == record["pattern"] else "")
        + (f": a fraction of {words}" if words != record["sparsity_of"] else "")
        for name, words in record["patterns"].items()
    ]


def _calibration(record: Record) -> str:
    """Return which text a method calibrates with by default, and what it does with it."""
    if (text := record["calibration"]) is None:
        return "none: it needs no text"
    windows = f"{text['samples']:,} windows of {text['seqlen']:,} tokens of {text['spec']}"
    given = f"{windows} (--samples, --seqlen, --calibration)"
    if record["gradients"]:
        return f"{given}, for gradients of the loss"
    return f"{given}, to learn from" if record["trains"] else given
