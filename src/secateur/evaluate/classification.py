"""Precision, recall and F1 of a task whose choices are classes: for accuracy hides a model that always gives one answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def classification_scores(truth: Sequence[int], given: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """Scores of each class, and their unweighted means.

    Args:
        truth: the class of each item, as a place in `labels`.
        given: the answer to each item.
        labels: the names of the classes.

    Returns:
        `precision`, `recall`, `f1` (means over the classes; a class that was never given has precision 0), and `classes` with the same
        three and `n` for each.
    """
    classes = {}
    for place, label in enumerate(labels):
        hits = sum(t == place == g for t, g in zip(truth, given, strict=True))
        n, answered = sum(t == place for t in truth), sum(g == place for g in given)
        precision, recall = hits / answered if answered else 0.0, hits / n if n else 0.0
        f1 = 2 * hits / (n + answered) if n + answered else 0.0
        classes[label] = {"precision": precision, "recall": recall, "f1": f1, "n": n}
    means = {
        name: sum(scores[name] for scores in classes.values()) / len(classes) for name in ("precision", "recall", "f1")
    }
    return {**means, "classes": classes}
