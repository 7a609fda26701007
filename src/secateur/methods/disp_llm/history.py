"""The curves of learning the gates, short enough for a plan and a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

POINTS = 128
FIELDS = ("loss", "budget", "left")


def history(seen: Sequence[Mapping[str, float]], total: int) -> dict[str, list[float]]:
    """The curves of a learning run.

    Args:
        seen: the looks that `learn` returns.
        total: T_total, the number of all counted parameters.

    Returns:
        At most `POINTS` values a column: `step`, and the means since the step before: `loss` (of the language model,
        nats a token), `budget` (the other term, without lambda), `left` (the share of the parameters that is left).
    """
    size = -(-len(seen) // POINTS)
    groups = [seen[start : start + size] for start in range(0, len(seen), size)] if size else []
    scale = {"loss": 1.0, "budget": 1.0, "left": 1.0 / total}
    means = {
        name: [_short(sum(look[name] for look in group) / len(group) * scale[name]) for group in groups]
        for name in FIELDS
    }
    return {"step": [int(group[-1]["step"]) for group in groups], **means}


def _short(value: float) -> float:
    return float(f"{value:.5g}")
