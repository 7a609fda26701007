"""The answer of a command: a few lines that say what came out, before or instead of the whole record."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from secateur.core.names import shown
from secateur.core.records import Record
from secateur.core.words import (
    below_words,
    count_words,
    duration_words,
    perplexity_words,
    rough_duration_words,
    size_words,
)
from secateur.report.rows import Row
from secateur.requests import HealRequest

NEXT, NOTE = "Next: ", "      "  # how the lines about the next command begin
_WIDE = 100  # an upper end that many times the lower one says nothing
_ROUGHLY = 2  # times a rough estimate: the work stays below
_SEEN = 0.0005  # a share below this is shown as none
_TEXT_FILE = "TEXT_FILE"  # stands for the name of a file that the user has to choose


def answer(record: Record) -> list[str]:
    """Return the lines for the record of `prune`, `eval`, `heal` or `predict`, or of a dry run; none for others."""
    kind = record["command"]
    if record.get("dry_run"):
        kind = f"dry run of {kind}"
    lines = _ANSWERS.get(kind)
    try:
        return [] if lines is None else list(lines(record))
    except (KeyError, TypeError):  # a record of an earlier version, or without numbers: its table says what there is
        return []


def how_much(record: Record) -> str:
    """Return how much of a model is gone, for one line: `18.7% removed` of its parameters, `37.5% zeroed`, or both."""
    gone = {"removed": removed_share(record), "zeroed": zeroed_share(record)}
    return ", ".join(f"{_percent(share)} {word}" for word, share in gone.items() if abs(share) >= _SEEN)


def asked_words(record: Record) -> str:
    """Return how much a dry run of `prune` was asked to remove, for one cell: `10.0% removed`, `50.0% zeroed`."""
    if record.get("params_removed") is not None:
        return f"{_percent(record['params_removed'])} removed"
    if record.get("sparsity") is None:
        return ""
    quantity = record.get("sparsity_of")
    return f"{_percent(record['sparsity'])} zeroed" if quantity == "weights" else _of(record["sparsity"], quantity)


def removed_share(record: Record) -> float:
    """Return the share of the parameters of the original that the result no longer has; below 0 if it has more."""
    return float(1 - record["params_after"] / record["params_before"]) if record.get("params_before") else 0.0


def zeroed_share(record: Record) -> float:
    """Return the share of zeros, of the parameters of the original."""
    return Row(record, {}).zeroed or 0.0


def _prune(record: Record) -> Iterator[str]:
    yield f"{_size(record)}, {_time(record)}"
    yield f"{_how(record)}. {_loading(record)}"
    yield from _next_eval(record)


def _dry_prune(record: Record) -> Iterator[str]:
    if record.get("params_after") is None:
        what = "on times measured here" if record.get("sparsity_of") in ("prefill", "decode") else "on the text"
        yield f"The size of the result depends {what}, so it is not known before the run."
    elif "params_before" in record:
        yield _size(record)
    if record.get("sparsity") and record.get("sparsity_of") not in (None, "parameters"):
        word = "zero" if record["sparsity_of"] == "weights" else "remove"
        why = f" ({record['size_note']})" if record.get("size_note") else ""
        yield f"{record['method']} would {word} {_of(record['sparsity'], record['sparsity_of'])}{why}."
    yield _expected(record)


def _dry_eval(record: Record) -> Iterator[str]:
    tasks = [f"{name} ({number:,} requests)" for name, number in record["requests"].items()]
    dense = f", beside {shown(record['against'])}" if record.get("against") else ""
    yield (
        "; tasks: ".join(filter(None, (f"Would measure perplexity on {_text(record)}", ", ".join(tasks)))) + dense + "."
    )
    yield _expected(record)
    if record.get("shift"):
        yield "The shift takes more time than the perplexities; --no-shift leaves it out."


def _dry_heal(record: Record) -> Iterator[str]:
    size = f"{record['steps']:,} steps of {record['batch']} x {record['seqlen']:,} tokens"
    adapters = f"{count_words(record['trainable'])} parameters in {record['adapters']:,} adapters"
    yield f"Would train {adapters} on {shown(record['calibration'])}: {size}."
    if record.get("ppl_protocol") is not None:
        yield f"Would measure perplexity before and after on {_text(record)}."
    yield _expected(record)


def _dry_reconstruct(record: Record) -> Iterator[str]:
    size = f"{record['steps']:,} steps of {record['batch']:,} tokens"
    text = f"{record['calibration_tokens']:,} tokens of {shown(record['calibration'])}"
    yield f"Would train each of {record['blocks']} blocks for {size}, on {text}."
    yield _expected(record)


def _expected(record: Record) -> str:
    """What the work would take; what is not known has its reason on the same line."""
    memory, disk = record.get("memory_bytes"), record.get("disk_bytes")
    time = time_words(record)
    parts = [
        f"{time} on an idle machine" if time else "",
        "" if memory is None else f"{size_words(memory + record.get('resident_bytes', 0))} of memory",
        f"{size_words(disk)} of disk while it runs" if disk else "",
    ]
    why = " ".join(f" {word} not known: {reason}." for word, reason in unknown(record).items())
    known = f"Expected, about: {', '.join(filter(None, parts))}. " if any(parts) else ""
    return f"{known}Nothing was written.{why}"


def time_words(record: Record) -> str:
    """Return the time of a dry run; nothing where it is not known."""
    seconds = record.get("seconds_estimated")
    if seconds is None:
        return ""
    return below_words(_ROUGHLY * seconds) if record.get("seconds_rough") else rough_duration_words(seconds)


def unknown(record: Record) -> dict[str, str]:
    """Return what a dry run does not know, such as `The time is`, with the reason; both at once if it is the same."""
    time, memory = record.get("seconds_unknown"), record.get("memory_unknown")
    if time and time == memory:
        return {"The time and the memory are": time}
    return {word: why for word, why in (("The time is", time), ("The memory is", memory)) if why}


def _eval(record: Record) -> Iterator[str]:
    yield f"perplexity {_perplexities(record.get('ppl_dense'), record['ppl'])} ({_text(record)}), {_time(record)}"
    if record.get("method"):
        yield f"{_size(record)}. {_how(record)}."
    for task, result in (record.get("tasks") or {}).items():
        metric = "acc" if result.get("acc") is not None else "acc_norm"
        if result.get(metric) is not None:
            error = result.get("stderr" if metric == "acc" else "stderr_norm")
            yield f"{task}: accuracy {result[metric]:.3f}" + (f" \N{PLUS-MINUS SIGN} {error:.3f}" if error else "")
    if shift := record.get("shift"):
        yield (
            f"Behaviour: the most likely token is the dense model's at {shift['top1_agreement']:.1%} of positions; KL "
            f"divergence {shift['kl']:.3f} nats a token"
        )
    if record.get("method") and not record.get("heal"):
        yield f"{NEXT}{_next('heal', record['out'], *_file_text(record), '--out', record['out'] + '-healed')}"
        yield f"{NOTE}it trains for {HealRequest.steps:,} steps; with --dry-run it only says how long that takes."


def _heal(record: Record) -> Iterator[str]:
    if record.get("ppl_protocol") is None:
        yield f"healed, perplexity not measured, {_time(record)}"
    else:
        change = _perplexities(record.get("ppl_before"), record["ppl"])
        yield f"perplexity {change} by healing ({_text(record)}), {_time(record)}"
    if (learned := record["heal"].get("training_loss")) is not None:
        before, after = learned
        yield f"training loss {before:.2f} -> {after:.2f} on the same rows, in nats a token"
    yield f"{_size(record)}. {_how(record)}."
    if not record["heal"].get("keep_adapter"):  # an adapter alone is no model
        yield from _next_eval(record)


def _reconstruct(record: Record) -> Iterator[str]:
    blocks = record["reconstruct"]["blocks"]
    before, after = (sum(block[name] for block in blocks) / len(blocks) for name in ("before", "after"))
    mended = sum(block["step"] > 0 for block in blocks)
    yield (
        f"{mended} of {len(blocks)} blocks mended: their mean error on held-out text {before:.4f} -> {after:.4f}, "
        f"{_time(record)}"
    )
    yield f"{_size(record)}. {_how(record)}."
    yield from _next_eval(record)


def _predict(record: Record) -> Iterator[str]:
    what = "perplexity" if record["metric"] == "ppl" else f"accuracy on {record['metric']}"
    value = "ppl" if record["metric"] == "ppl" else "acc"
    for entry in record["predictions"] if record.get("asked") else []:
        share = entry.get("params_removed")
        amount = f"sparsity {entry['sparsity']:.3g}"
        if share:
            amount = f"{_percent(share)} of the parameters removed ({amount})"
        ends = "" if entry["low"] is None else _ends(entry, value, record["dense"])
        others = _others(entry, lambda number: _value(number, value))
        spread = "; ".join(filter(None, (ends, others)))
        doubt = _beyond(record) if entry["extrapolated"] else ""
        yield f"{amount}: {what} {_value(entry[value], value)}{f' ({spread})' if spread else ''}{doubt}"
    if (target := record.get("target")) is not None and target.get(value) is not None:
        s, share = target["sparsity"], target.get("params_removed")
        limit = f"{what} {_value(target[value], value)} or {'less' if value == 'ppl' else 'more'}"
        amount = "nothing can be removed" if s is None else f"sparsity {s:.3g} at most"
        amount = f"{_percent(share)} of the parameters removed at most ({amount})" if share and s else amount
        others = _others(target, lambda s: f"{s:.3g}").replace(": ", ": sparsity ")
        doubt = _beyond(record) if target["extrapolated"] else ""
        yield f"{limit}: {amount}{f'; {others}' if others else ''}{doubt}"


def _import(record: Record) -> Iterator[str]:
    stored = ", ".join(record["stored"])
    yield (
        f"{record['model_type']} model of {count_words(record['params'])} parameters: {stored} -> {record['dtype']}, "
        f"{_change(record['bytes_before'], record['bytes_after'])}, {_time(record)}"
    )
    if record["dequantised"]:
        yield "The weights were dequantised: compare pruned models with this one, not with the original's figures."
    yield f"{NEXT}{_next('inspect', record['out'])}"


_ANSWERS = {
    "import": _import,
    "prune": _prune,
    "eval": _eval,
    "reconstruct": _reconstruct,
    "heal": _heal,
    "predict": _predict,
    "dry run of prune": _dry_prune,
    "dry run of eval": _dry_eval,
    "dry run of reconstruct": _dry_reconstruct,
    "dry run of heal": _dry_heal,
}


def _ends(entry: Record, kind: str, dense: float | None) -> str:
    """The 95% interval of a prediction, or what is left of one that is too wide to be of use."""
    low, high = entry["low"], entry["high"]
    if kind == "acc" or not too_wide(low, high):
        return f"95%: {_value(low, kind)} to {_value(high, kind)}"
    return f"95%: {_value(low, kind)} or more" if low > (dense or 1) else "too few points for an interval"


def _others(entry: Record, words: Callable[[float], str]) -> str:
    """What the other laws say, from the least to the most; no words without other laws."""
    if not entry.get("other_laws"):
        return ""
    low, high = map(words, entry["other_laws"])
    return f"other laws: {low}" + ("" if low == high else f" to {high}")


def _beyond(record: Record) -> str:
    """That a question lies outside what was measured, and what that is."""
    low, high = record.get("fitted_range") or (None, None)
    return "; nothing was measured" if low is None else f"; outside what was measured, sparsity {low:.3g} to {high:.3g}"


def too_wide(low: float, high: float | None) -> bool:
    """Return True for an interval of perplexities that tells no upper end; None is an infinite one."""
    return high is None or high > _WIDE * low


def _value(number: float, kind: str) -> str:
    return perplexity_words(number) if kind == "ppl" else f"{number:.3f}"


def _text(record: Record) -> str:
    """The text that perplexity was measured on."""
    protocol = record["ppl_protocol"]
    return f"{shown(protocol['spec'])}, {protocol['windows']:,} windows of {protocol['seqlen']:,} tokens"


def _size(record: Record) -> str:
    """Parameters before and after, the shares removed and zeroed, and the bytes of the weights."""
    before, after = record["params_before"], record["params_after"]
    removed, zeroed = removed_share(record), zeroed_share(record)
    parts = [
        f"{count_words(before)} -> {count_words(after)} parameters ({_removed(removed)})"
        if abs(removed) >= _SEEN
        else f"{count_words(after)} parameters",
        f"{_percent(zeroed)} zeroed" if zeroed >= _SEEN else "",
        _change(record["bytes_before"], record["bytes_after"]) if record.get("bytes_after") else "",
    ]
    return ", ".join(filter(None, parts))


def _removed(share: float) -> str:
    return f"{_percent(share)} removed" if share >= 0 else f"{_percent(-share)} added"


def _how(record: Record) -> str:
    """The method, and how much it was told to remove of what it removes from."""
    share, quantity = record.get("sparsity_measured"), record.get("sparsity_of")
    healed = ", reconstructed" if record.get("reconstruct") else ""
    healed += ", then healed with LoRA" if record.get("heal") else ""
    done = "zeroed" if quantity == "weights" else "removed"
    return f"{record['method']}{'' if share is None else f' {done} {_of(share, quantity)}'}{healed}"


def _of(share: float, quantity: str | None) -> str:
    """A share of what a method removes from, by its name."""
    from secateur.plan.quantity import words_of  # imported here: torch takes seconds, which --help need not wait for

    return f"{_percent(share)} of {words_of(quantity)}"


def _loading(record: Record) -> str:
    if record["stock"]:
        return "A stock model: it loads as the original does."
    return "Model and tokenizer load with trust_remote_code=True, or after import secateur."


def _perplexities(before: float | None, after: float) -> str:
    return perplexity_words(after) if before is None else f"{perplexity_words(before)} -> {perplexity_words(after)}"


def _next(command: str, *words: str) -> str:
    return shlex.join(["secateur", command, *words])


def _next_eval(record: Record) -> Iterator[str]:
    """The command that measures a result on the text in use, and what its placeholder stands for if it has one.

    Without a text in use, a file as calibration text tells that the hub may be out of reach, where the default is.
    """
    heal = record.get("heal") or {}
    given = record.get("measured_with") or {}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    learned = record.get("reconstruct") or {}
    calibration = heal.get("calibration") or learned.get("calibration") or record.get("calibration") or {}
    from_file = calibration.get("file_sha256") and record["model"] != "bundled"
    wanted = not record.get("ppl_protocol") and bool(from_file)
    if wanted:
        options = ["--text", _TEXT_FILE]
    yield f"{NEXT}{_next('eval', record['out'], *options, *_dense(record))}"
    if wanted:
        yield f"{NOTE}{_TEXT_FILE}: text that was not used for calibration{' or healing' if heal else ''}."


def _file_text(record: Record) -> list[str]:
    """The option that measures on the same text, where that is a file."""
    spec = record["ppl_protocol"]["spec"]
    return ["--text", spec] if Path(spec).expanduser().is_file() else []


def _change(before: float, after: float) -> str:
    old, new = size_words(before), size_words(after)
    return new if old == new else f"{old} -> {new}"


def _dense(record: Record) -> list[str]:
    """The options that compare perplexity with that of the original.

    There are none if only the name of its folder is known, and not where it is.
    """
    model, revision = record["model"], record.get("model_revision")
    if revision is None and "/" not in model and model != "bundled" and not Path(model).is_dir():
        return []
    return ["--no-shift", "--against", model, *([] if revision is None else ["--against-revision", revision])]


def _time(record: Record) -> str:
    taken = duration_words(record["seconds"] + (record.get("seconds_before") or 0.0))
    return f"at least {taken}" if record.get("seconds_at_least") else taken


def _percent(share: float) -> str:
    return f"{share:.1%}"
