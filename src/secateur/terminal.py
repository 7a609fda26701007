"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from secateur.core.records import Record

_NOT_SHOWN = ("versions", "ppl_protocol", "weights", "tasks_asked", "command", "version")


def record_table(record: Record) -> Table:
    """The fields of one record, a line each; what is null is left out."""
    table = Table(show_header=False)
    for key, value in record.items():
        if key not in _NOT_SHOWN and value is not None:
            table.add_row(key, _text(value))
    return table


def runs_table(found: Sequence[Record]) -> Table:
    """Evaluations, a line each."""
    with_tasks = any(record.get("tasks") for record in found)
    with_shift = any(record.get("shift") for record in found)
    headings = ["method", "pattern", "sparsity", "params M", "nonzero M", "PPL"]
    table = Table(*headings, *(["cloze"] if with_tasks else []), *(["KL", "top-1"] if with_shift else []))
    for record in found:
        row = [
            record.get("method") or "dense",
            _pattern(record),
            f"{record.get('sparsity_measured') or 0:.3f}",
            *(f"{record[key] / 1e6:.3f}" if record.get(key) else "" for key in ("params_after", "nonzero_after")),
            f"{record['ppl']:.2f}",
        ]
        if with_tasks:
            cloze = (record.get("tasks") or {}).get("cloze")
            row.append(f"{cloze['acc']:.3f}" if cloze else "")
        if with_shift:
            shift = record.get("shift")
            row += [f"{shift['kl']:.3f}", f"{shift['top1_agreement']:.3f}"] if shift else ["", ""]
        table.add_row(*row)
    return table


def _pattern(record: Record) -> str:
    """The pattern, and what was compared, in as few letters as tell two runs apart."""
    scope = (record.get("options") or {}).get("scope")
    pattern = record.get("pattern") or ""
    return {"unstructured": f"per {scope}", "rows": f"rows, {scope}", "columns": f"columns, {scope}"}.get(pattern, pattern) if scope else pattern


def inspect_table(record: Record) -> Table:
    """What `inspect` found, block by block."""
    names = list(record["blocks"][0]["matrices"])
    title = f"{record['model']}: {record['parameters']:,} parameters, {record['nonzero']:,} not zero, {record['bytes'] / 1e6:.1f} MB"
    table = Table("#", "heads", "kv", "ffn", "parameters", *names, title=title, caption="under the names of matrices: per cent of zeros", padding=(0, 0))
    for block in record["blocks"]:
        shares = (f"{100 * block['matrices'][name]['sparsity']:.0f}%" for name in names)
        table.add_row(str(block["index"]), str(block["heads"]), str(block["groups"]), str(block["ffn"]), f"{block['parameters']:,}", *shares)
    return table


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    return str(value)
