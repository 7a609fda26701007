"""One method for the terminal: its facts and its options."""

from __future__ import annotations

import json
from typing import Any

from rich.markup import escape
from rich.table import Table

from secateur.core.records import Record


def method_parts(record: Record) -> list[Table | str]:
    """Return what `methods NAME` prints: the summary, a table of facts, and the table of options."""
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    if record["paper"]:
        facts.add_row("paper", escape(record["paper"]))
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
