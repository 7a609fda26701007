"""Tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from secateur.cli.answer import removed_share, too_wide, zeroed_share
from secateur.core.records import Record
from secateur.core.words import perplexity_words, plural
from secateur.evaluate.flow import ranges
from secateur.models.runtime import SELECT_FORMS
from secateur.report.modules import Study, rows
from secateur.report.tables import Table as Cells

_SHIFT = {
    "against": "shift from",
    "kl": "KL, nats a token",
    "top1_agreement": "top-1 agreement",
    "repetition": "repetition",
    "repetition_dense": "repetition, dense",
}  # fmt: skip
_ROUNDING = 1e-12  # an error of a fit below this is that of floating point
_NOT_SHOWN = ("versions", "ppl_protocol", "weights", "tasks_asked", "command", "version", "allocation")


def record_table(record: Record) -> Table:
    """Return a table of the fields of one record, one line per field; null fields are left out."""
    table = Table(show_header=False)
    for key, value in record.items():
        if key == "tasks":
            for task, result in value.items():
                table.add_row(task, _task(result))
        elif key == "shift" and value is not None:
            for name in _SHIFT:
                if value.get(name) is not None:
                    table.add_row(_SHIFT[name], escape(_text(value[name])))
        elif key not in _NOT_SHOWN and value is not None:
            table.add_row(key, escape(_text(value)))
    return table


def _task(result: Record) -> str:
    """Return every figure of a task, with its standard error if known."""
    errors = {"acc": "stderr", "acc_norm": "stderr_norm"}
    figures = {name: result.get(name) for name in (*errors, "precision", "recall", "f1", "flipped", "n")} | result.get(
        "metrics", {}
    )
    shown = {name: value for name, value in figures.items() if value is not None}
    return ", ".join(f"{name} {_small_text(value, result.get(errors.get(name, '')))}" for name, value in shown.items())


def _small_text(value: float, error: float | None) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
    return text if error is None else f"{text} ± {error:.2g}"


def runs_table(found: Sequence[Record]) -> Table:
    """Return a table of evaluations, one line per record."""
    tasks = list(dict.fromkeys(task for record in found for task in record.get("tasks") or {}))
    with_shift = any(record.get("shift") for record in found)
    headings = ["method", "pattern", "removed", "zeroed", "sparsity", "PPL"]
    table = Table(*headings, *tasks, *(["KL", "top-1"] if with_shift else []))
    for record in found:
        row = [
            f"{record.get('method') or 'dense'}{' + LoRA' if record.get('heal') else ''}",
            _pattern(record),
            *(f"{share:.1%}" for share in (removed_share(record), zeroed_share(record))),
            f"{record.get('sparsity_measured') or 0:.3f}",
            perplexity_words(record["ppl"]),
        ]
        accuracies = [((record.get("tasks") or {}).get(task) or {}).get("acc") for task in tasks]
        row += ["" if acc is None else f"{acc:.3f}" for acc in accuracies]
        if with_shift:
            shift = record.get("shift")
            row += [f"{shift['kl']:.3f}", f"{shift['top1_agreement']:.3f}"] if shift else ["", ""]
        table.add_row(*row)
    return table


def cells_table(found: Cells) -> Table:
    """Return a table of the report for the terminal."""
    table = Table(padding=(0, 0))
    for head, _, text in found.heads:
        table.add_column(head, justify="left" if text else "right", overflow="fold", no_wrap=head in ("Method", "PPL"))
    for row in found.rows:
        table.add_row(*(escape(cell.text) for cell in row))
    return table


def _pattern(record: Record) -> str:
    """Return a short name for the pattern and its scope."""
    scope = (record.get("options") or {}).get("scope")
    pattern = record.get("pattern") or ""
    if not scope:
        return pattern
    words = {"unstructured": f"per {scope}", "rows": f"rows, {scope}", "columns": f"columns, {scope}"}
    return words.get(pattern, pattern)


def study_table(entries: Sequence[Record], dense_ppl: float) -> Table:
    """Return the perplexities of a study of variants: one line per variant, one column per sparsity."""
    sparsities = sorted({entry["sparsity"] for entry in entries})
    table = Table(
        "part",
        "variant",
        *(f"{s:.0%} removed" for s in sparsities),
        title=f"perplexity, dense {perplexity_words(dense_ppl)}",
    )
    for part, variant in dict.fromkeys((entry["part"], entry["variant"]) for entry in entries):
        own = {entry["sparsity"]: entry for entry in entries if (entry["part"], entry["variant"]) == (part, variant)}
        table.add_row(part, variant, *(_mean(own[s]) if s in own else "" for s in sparsities))
    return table


def _mean(entry: Record) -> str:
    spread = "" if entry["sd"] is None else f" ± {entry['sd']:.2f} ({entry['runs']} runs)"
    return perplexity_words(entry["ppl"]) + spread


_CAPTION = """'{law}' is {formula}, y = {y}; in brackets: 95% intervals. ln: errors in the logarithm of the value, where
laws can be compared; held out: each point predicted from the others. The best comes first."""


def law_tables(record: Record) -> list[Table]:
    """Return the tables of `predict`: the laws, the answers, and for slicegpt the published fits."""
    value = "ppl" if record["metric"] == "ppl" else "acc"
    laws = Table(
        "law",
        "constants",
        "RMSE in y",
        "RMSE in ln",
        "held out, ln",
        title=_law_title(record),
        caption=_CAPTION.format(**record),
    )
    for rival in record["rivals"]:
        constants = (
            ", ".join(f"{name} {_interval(record, rival, name)}" for name in rival["constants"] or {})
            or "not fitted: too few points"
        )
        name = f"[bold]{rival['law']}[/]" if rival["law"] == record["law"] else rival["law"]
        laws.add_row(name, constants, *_errors_of_fit(record, rival), _small(rival["heldout_rmse"]))
    laws.add_row("no law", "straight lines between neighbours", "", "", _small(record["interpolation_rmse"]))
    tables = [laws]
    if record["predictions"] and not record["asked"]:  # what was asked for is answered in lines
        measured = {point["sparsity"]: point[value] for point in record["measured"]}
        answers = Table(
            "sparsity", f"predicted {value}", "95% interval", "measured", "", title=f"law '{record['law']}'"
        )
        for entry in record["predictions"]:
            ends = "" if entry["low"] is None else f"{_small(entry['low'])} to {_small(entry['high'])}"
            if value == "ppl" and entry["low"] is not None and too_wide(entry["low"], entry["high"]):
                ends = f"{_small(entry['low'])} or more"
            note = "extrapolated" if entry["extrapolated"] else ""
            answers.add_row(
                f"{entry['sparsity']:.4g}", _small(entry[value]), ends, _small(measured.get(entry["sparsity"])), note
            )
        tables.append(answers)
    tables += _target_table(record, value)
    if record.get("method") != "slicegpt":
        return tables
    published = Table(
        "model",
        "data",
        "a",
        "b",
        "RMSE in y",
        title="published fits of the paper's law, SliceGPT (arXiv:2503.04377, table 3)",
    )
    for row in record["published"]:
        published.add_row(row["model"], row["dataset"], *(f"{row[key]:.2f}" for key in ("a", "b", "rmse")))
    return [*tables, published]


def _target_table(record: Record, value: str) -> list[Table]:
    if (aim := record["target"]) is None:
        return []
    table = Table(title=f"largest sparsity that keeps {value} {aim[value]:g}", show_header=False)
    note = " (extrapolated)" if aim["extrapolated"] else ""
    table.add_row("by the law", "none" if aim["sparsity"] is None else f"{aim['sparsity']:.4f}{note}")
    table.add_row("at the worse end of the interval", "none" if aim["cautious"] is None else f"{aim['cautious']:.4f}")
    return [table]


def spectrum_tables(record: Record) -> list[Table]:
    """Return the tables of `predict --spectrum`."""
    value = "ppl" if record["dense"] is not None else "ppl_ratio"
    dense = "" if record["dense"] is None else f", dense {record['dense']:.4g}"
    scale = (
        f"c = {record['a']:.3g}, fitted to {record['points']} measured"
        if record["points"]
        else f"c = {record['a']:.3g}, not fitted"
    )
    held_out = "" if record.get("heldout_rmse") is None else f"; held out, ln: {record['heldout_rmse']:.4g}"
    answers = Table(
        "sparsity",
        "predicted PPL" if value == "ppl" else "PPL / dense",
        "range",
        title=f"{record['model']} slicegpt: ppl from the spectrum{dense}",
        caption=f"{record['formula']}, {scale}{held_out}",
    )
    for entry in record["predictions"]:
        ends = "" if entry["low"] is None else f"{_small(entry['low'])} to {_small(entry['high'])}"
        answers.add_row(f"{entry['sparsity']:.4g}", _small(entry[value]), ends)
    return [answers, *_target_table(record, value)]


def _law_title(record: Record) -> str:
    about = " ".join(str(record[key]) for key in ("model", "method") if record.get(key))
    points = f"{record['metric']}, {plural(record['points'], 'pruned point')}, dense {record['dense']:.4g}"
    return f"{about}: {points}" if about else points


def _interval(record: Record, rival: Record, name: str) -> str:
    value = f"{rival['constants'][name]:.3f}"
    ends = record["intervals"].get(name) if rival["law"] == record["law"] else None
    return f"{value} ({ends[0]:.3f} to {ends[1]:.3f})" if ends else value


def _errors_of_fit(record: Record, rival: Record) -> tuple[str, str]:
    """The errors of a fit in y and in ln; a law that goes through its points has only rounding, which is no error."""
    if rival["rmse"] is None or rival["rmse"] > _ROUNDING:
        return _small(rival["rmse"]), _small(rival["rmse_ln"])
    number = record["points"] + bool(record["dense_in_fit"])
    return f"goes through {'both' if number == 2 else 'all'} points", ""


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if math.isfinite(value) else "none"


def inspect_table(record: Record) -> Table:
    """Return the table of `inspect`, one line per block."""
    names = list(record["blocks"][0]["matrices"])
    sizes = f"{record['parameters']:,} parameters, {record['nonzero']:,} not zero, {record['bytes'] / 1e6:.1f} MB"
    title = f"{record['model']}: {sizes}"
    caption = "under the names of matrices: per cent of zeros"
    if record["zero_rows"]:
        caption += (
            f"; {record['zero_rows']:,} rows are all zero, which float8 weights with one scale per row turn into NaN"
        )
    sliced = ["residual"] if any(block["residual"] for block in record["blocks"]) else []
    table = Table(
        "#",
        "heads",
        "kv",
        "ffn",
        *sliced,
        "parameters",
        *names,
        title=title,
        caption=caption,
        padding=(0, 0),
    )
    for block in record["blocks"]:
        shares = (f"{100 * block['matrices'][name]['sparsity']:.0f}%" for name in names)
        widths = (str(block[key]) for key in ("index", "heads", "groups", "ffn"))
        table.add_row(*widths, *(_residual(block["residual"]) for _ in sliced), f"{block['parameters']:,}", *shares)
    return table


def _residual(residual: Record | None) -> str:
    """Return the widths of the residual stream in a block: at its start, between attention and MLP, and at its end.

    If the stream itself stays whole, return how much of it attention and MLP read and write.
    """
    if residual is None:
        return ""
    if residual["skips"][0] in SELECT_FORMS:
        reads = ["+".join(str(width) for width in residual["readers"] or residual["attention"][:1]), residual["mlp"][0]]
        return ", ".join(
            f"{read} to {writes}"
            for read, writes in zip(reads, (residual["attention"][1], residual["mlp"][1]), strict=True)
        )
    between = residual["attention"][1:] if len(residual["skips"]) > 1 else []
    return ", ".join(str(width) for width in (residual["attention"][0], *between, residual["mlp"][1]))


def bench_tables(record: Record) -> list[Table | str]:
    """Return the table of `bench`, one line per model and batch, and lines on memory and the limits of the machine."""
    threads = f", {record['threads']} threads" if record["threads"] else ""
    title = (
        f"{record['prompt']} tokens of prompt, {record['new']} new, {record['dtype']} on {record['device']}{threads}"
    )
    table = Table(
        "model",
        "batch",
        title=escape(title),
        caption="the best times; over floor: how many times what the machine allows",
        padding=(0, 0),
    )
    _number_columns(
        table,
        "prefill\ntokens/s",
        "first\ntoken ms",
        "over\nfloor",
        "decode\ntokens/s",
        "each\ntoken ms",
        "over\nfloor",
    )
    for result in record["results"]:
        for row in result["batches"]:
            cells = [escape(Path(result["model"]).name), str(row["batch"])]
            for part in ("prefill", "decode"):
                cells += [
                    f"{row[f'{part}_tokens_per_second']:,.1f}",
                    f"{1e3 * row[f'{part}_seconds']:.2f}",
                    f"{row[f'{part}_over_floor']:.2f}",
                ]
            table.add_row(*cells)
    about: list[Table | str] = [table]
    for speedup in record["speedup"] or []:
        prefill, decode = f"{speedup['prefill']:.2f} times as fast", f"{speedup['decode']:.2f} times"
        about.append(f"batch {speedup['batch']}: {prefill} as the dense model in prefill, {decode} in decode")
    for result in record["results"]:
        peak = "unknown" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 1e6:,.1f} MB"
        size = f"{result['parameters']:,} parameters, {result['parameter_bytes'] / 1e6:,.1f} MB"
        about.append(f"{result['model']}: {size}; peak memory with its cache {peak}")
    rate, bandwidth = record["flops_per_second"] / 1e9, record["bytes_per_second"] / 1e9
    return [*about, f"This machine, now: {bandwidth:,.1f} GB/s of weights read, {rate:,.0f} GFLOP/s of large products."]


def flow_tables(record: Record) -> list[Table | str]:
    """Return the tables of `inspect --flow`: linear maps, the share that depends on the residual width, sizes by s."""
    touched, attention, total, flops = (
        record[key] for key in ("touched", "attention", "parameters", "flops_per_token")
    )
    keys = ", ".join(f"{product['keys']:,}" for product in attention["products"])
    by_d, flops_by_d = (
        f"{touched['parameters']:,} of {total:,} parameters",
        f"{touched['flops_per_token']:,} of {flops:,} FLOPs per token",
    )
    about: list[Table | str] = [
        _maps_table(record),
        f"d touches {by_d} ({touched['parameters_share']:.2%}) and {flops_by_d} ({touched['flops_share']:.2%}).",
        f"Attention's products at {attention['context']:,} positions (keys: {keys}) are "
        f"{attention['flops_per_token']:,} FLOPs per token more, which d does not touch: "
        f"with them its share is {touched['flops_share_with_attention']:.2%}.",
    ]
    if (formula := record["formula"]) is None:
        if (sliced := record["sliced"]) is not None:
            widths = ", ".join(str(width) for width in sliced["widths"])
            about.append(f"d of the places of the residual stream, of {sliced['hidden']} each: {widths}.")
        return [*about, record["why_no_by_sparsity"] + "."]
    return [
        *about,
        _sparsities_table(record, "parameters", ("adapter_parameters", "untied_parameters")),
        f"parameters = {formula['parameters']}, adapters = {formula['adapter_parameters']}",
        _sparsities_table(record, "flops_per_token", ("adapter_flops_per_token",)),
        f"FLOPs = {formula['flops_per_token']}, adapters = {formula['adapter_flops_per_token']}",
        "sliced: with what SliceGPT adds, as its authors store it. "
        "Formulas hold where (1 - s)d is whole; it is rounded down.",
    ]


def _maps_table(record: Record) -> Table:
    widths = ", ".join(f"{letter} {_range(value)}" for letter, value in record["symbols"].items())
    caption = "inputs x outputs; all blocks together; by s: what weights are multiplied by where d becomes (1 - s)d"
    table = Table(title=escape(f"{record['model']}: {widths}"), caption=caption, padding=(0, 0))
    for heading in ("map", "in the model", "shape", "size", "blocks"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "map")
    _number_columns(table, "parameters", "FLOPs/token", "by s")
    for linear in record["flow"]:
        rows = f" [{linear['rows'][0]}:{linear['rows'][1]}]" if linear["rows"] else ""
        module = escape(linear["module"].rpartition(".")[2] + rows)
        size = " x ".join(str(side) for side in linear["size"])
        parameters = "tied" if linear["tied"] and not linear["parameters"] else f"{linear['parameters']:,}"
        place = (linear["name"], module, linear["shape"], size, ranges(linear["blocks"]))
        table.add_row(*place, parameters, f"{linear['flops_per_token']:,}", linear["scales"])
    return table


def _range(value: int | list[int]) -> str:
    values = [value] if isinstance(value, int) else value
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def _sparsities_table(record: Record, quantity: str, added: Sequence[str]) -> Table:
    """Return how much of `quantity` is left by sparsity, without and with the additions of SliceGPT.

    A column of additions that are all zero is left out.
    """
    added = [key for key in added if any(point[key] for point in record["by_sparsity"])]
    words = {
        "adapter_parameters": "adapters",
        "adapter_flops_per_token": "adapters",
        "untied_parameters": "untied head",
    }
    table = Table(title=f"{quantity.replace('flops_per_token', 'FLOPs per token')} by s", padding=(0, 0))
    _number_columns(table, "s", "d", "model", "left", *(words[key] for key in added), "sliced", "left")
    for point in record["by_sparsity"]:
        plain, sliced, whole = point[quantity], point[f"sliced_{quantity}"], record[quantity]
        table.add_row(
            f"{point['sparsity']:g}",
            str(point["width"]),
            f"{plain:,}",
            f"{plain / whole:.1%}",
            *(f"{point[key]:,}" for key in added),
            f"{sliced:,}",
            f"{sliced / whole:.1%}",
        )
    return table


def _number_columns(table: Table, *headings: str) -> None:
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)


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


def modules_table(study: Study) -> Table:
    """Return the perplexities of a study of modules: one line per kind, one column per sparsity."""
    heads, body = rows(study)
    table = Table(title=f"{study.about}: perplexity, dense {perplexity_words(study.dense)}", padding=(0, 0))
    _number_columns(table, *heads)
    for line in body:
        table.add_row(*line)
    return table
