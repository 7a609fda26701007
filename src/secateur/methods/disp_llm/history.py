"""What was seen while gates were learned, small enough for a plan and a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

POINTS = 128
FIELDS = ("loss", "budget", "left")


def history(seen: Sequence[Mapping[str, float]], total: int) -> dict[str, list[float]]:
    """The curves of a learning run.

    Args:
        seen: what `learn` returns.
        total: T_total, which the parameters left are a share of.

    Returns:
        At most `POINTS` values a column: `step`, and the means since the step before: `loss` (of the language model,
        nats a token), `budget` (the other term, without lambda), `left` (the share of the parameters).
    """
    size = -(-len(seen) // POINTS)
    groups = [seen[start : start + size] for start in range(0, len(seen), size)] if size else []
    scale = {"loss": 1.0, "budget": 1.0, "left": 1.0 / total}
    means = {
        name: [_short(sum(one[name] for one in group) / len(group) * scale[name]) for group in groups]
        for name in FIELDS
    }
    return {"step": [int(group[-1]["step"]) for group in groups], **means}


def _short(value: float) -> float:
    return float(f"{value:.5g}")
