"""Numbers and findings in words, for the page and the titles of its plots."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.core.names import shown
from secateur.core.words import count_words, duration_words, perplexity_words, size_words
from secateur.core.words import plural as plural
from secateur.report.rows import Group, Row
from secateur.report.series import Comparison, Entry, base

Words = str | None

_ACCIDENT = 0.001  # a share of zeros below it: a model has some without pruning
_FEW_TOKENS = 16_384  # a perplexity of fewer tokens tells only large differences apart


def percent(value: float | None) -> Words:
    """A fraction as a percentage."""
    return None if value is None else f"{100 * value:.1f}%"


def gone(row: Row) -> str:
    """The share of all parameters that is removed or zeroed; the sparsity where the records do not tell it."""
    if row.gone is None:
        return "unknown sparsity" if row.sparsity is None else f"{percent(row.sparsity)} sparsity"
    removed, zeroed = bool(row.removed), (row.zeroed or 0.0) > _ACCIDENT
    noun = "removed and zeroed" if removed and zeroed else "removed" if removed or not zeroed else "zeroed"
    return f"{percent(row.gone)} {noun}"


def name(row: Row) -> str:
    """The name of a run: its method, and the share of all parameters that is gone."""
    if row.dense:
        return "dense"
    modules = f" ({row.get('modules')})" if row.get("modules") else ""
    return f"{base(row)}{modules}, {gone(row)}"


def perplexity(value: float | None) -> Words:
    """A perplexity in few digits; two decimals below 1000."""
    if value is None:
        return None
    return perplexity_words(value)


def ratio(value: float | None) -> Words:
    """A ratio with a multiplication sign."""
    return None if value is None else f"{perplexity(value)}\N{NO-BREAK SPACE}\N{MULTIPLICATION SIGN}"


def fixed(value: float | None) -> Words:
    """A number with four decimals."""
    return None if value is None else f"{value:.4f}"


def count(value: float | None) -> Words:
    """A number of parameters, to three digits."""
    return None if value is None else _unbroken(count_words(value))


def size(value: float | None) -> Words:
    """A number of bytes with its unit."""
    return None if value is None else _unbroken(size_words(value))


def duration(value: float | None, *, at_least: bool = False) -> Words:
    """A number of seconds as a duration; `at_least` where more passed than is known."""
    return None if value is None else _unbroken(f"{'at least ' if at_least else ''}{duration_words(value)}")


def _unbroken(text: str) -> str:
    """A number and its unit stay on one line of a page."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def perplexity_title(found: Comparison | None, dense: Row | None) -> str:
    """The title of the plot of perplexity: its main result."""
    if found is None:
        return "Perplexity against what is gone"
    best = found.entries[0]
    value = f"perplexity {perplexity(best.value)}" + (
        f" (dense {perplexity(dense.ppl)})" if dense and dense.ppl else ""
    )
    lead = f"{best.label} loses least" if len(found.entries) > 1 else best.label
    return f"At {found.where} {lead}: {value}"


def accuracy_title(task: str, found: Comparison | None, dense: float | None) -> str:
    """The title of the plot of a task's accuracy: its main result."""
    if found is None:
        return f"{task}: accuracy against what is gone"
    best = found.entries[0]
    reference = f" (dense {dense:.3f})" if dense is not None else ""
    if len(found.entries) == 1:
        return f"{task}: {best.label} has accuracy {best.value:.3f} at {found.where}{reference}"
    if not found.clear:
        return f"{task}: at {found.where} no run is clearly ahead, {best.value:.3f} at best{reference}"
    return f"{task}: at {found.where} {best.label} keeps most accuracy, {best.value:.3f}{reference}"


def finding(found: Comparison | None, group: Group) -> str:
    """The best result, which claims only what was measured, what it was measured on, and what is left open."""
    if found is None:
        return "No perplexities to compare yet: run 'secateur eval DIR' on the pruned folders and report again."
    best, rest, dense = found.entries[0], found.entries[1:], group.dense
    times = (
        f", {ratio(best.value / dense.ppl)} the dense model's {perplexity(dense.ppl)}" if dense and dense.ppl else ""
    )
    if not rest:
        alone = (
            f"At {found.where}, {best.label} has perplexity {_value(best)}{times}; "
            "nothing else was measured at that level to compare it with."
        )
        return " ".join([alone, *_measured_on(group), *_reservations(found)])
    said = [_value(entry) + ("" if found.equal else f" ({entry.reached:.1%})") for entry in found.entries]
    nearest = "; ".join(f"{entry.label} has {value}" for entry, value in zip(rest, said[1:], strict=True))
    first = (
        f"At {found.where}, {best.label} has the lowest perplexity of the {len(found.entries)} compared: "
        f"{said[0]}{times}; {nearest}."
    )
    return " ".join([first, *_measured_on(group), *_reservations(found)])


def _measured_on(group: Group) -> list[str]:
    """The text of the perplexities, with a warning if it is short; nothing if the records do not tell."""
    protocol = dict(group.protocol or ())
    if any(protocol.get(name) is None for name in ("spec", "windows", "seqlen", "tokens")):
        return []
    size = f"{protocol['windows']:,} windows of {protocol['seqlen']:,} tokens"
    few = ": too few to tell small differences" if protocol["tokens"] < _FEW_TOKENS else ""
    return [f"Measured on {shown(protocol['spec'])}, {size}{few}."]


def _reservations(found: Comparison) -> list[str]:
    """What the reader must know about a comparison of several."""
    best, noun = found.entries[0], "removed" if found.removed else "zeroed"
    said = []
    unhealed = [entry for entry in found.entries if not entry.changed]
    if best.changed and len(unhealed) > 1:
        said.append(f"Without recovery {unhealed[0].label} is the best, {perplexity(unhealed[0].value)}.")
    if len(found.entries) > 1 and not found.equal and best.reached == min(entry.reached for entry in found.entries):
        said.append(f"{best.label} also {noun} the least, which helps it.")
    if not found.asked and not found.equal:
        said.append(f"No ratio was asked for in common: what {noun} within two points of one another is compared.")
    if found.joined:
        said.append(
            f"Not asked for {100 * found.level:.3g}%, and compared since within two points: {', '.join(found.joined)}."
        )
    if found.astray:
        far = ", ".join(f"{label} ({reached:.1%})" for label, reached in found.astray)
        said.append(f"Asked for the same, and not compared since more than two points away: {far}.")
    return said


def levels(found: Sequence[Comparison]) -> list[str]:
    """One line for each level at which several were compared: the winner and the next."""
    lines = []
    for comparison in sorted((c for c in found if len(c.entries) > 1), key=lambda c: (not c.removed, c.level)):
        best, second = comparison.entries[:2]
        at = "" if comparison.equal else f" ({best.reached:.1%})"
        lines.append(
            f"At {comparison.where}: {best.label}, {_value(best)}{at}; then {second.label}, {_value(second)}"
            f"{'' if comparison.equal else f' ({second.reached:.1%})'}; {len(comparison.entries)} compared."
        )
    return lines


def _value(entry: Entry) -> str:
    return f"{perplexity(entry.value)}" + (f" (mean of {entry.runs} runs)" if entry.runs > 1 else "")
