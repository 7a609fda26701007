"""Precision, recall and F1 of a task whose choices are classes.

Accuracy alone hides a model that always gives the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def classification_scores(truth: Sequence[int], given: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """Return the scores of each class, and their unweighted means.

    Args:
        truth: the right class of each item, as an index into `labels`.
        given: the class that the model chose for each item, as an index into `labels`.
        labels: the names of the classes.

    Returns:
        `precision`, `recall`, `f1` (means over the classes; a class that was never chosen has precision 0), and
        `classes`, which holds the same three and `n` for each class.
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
