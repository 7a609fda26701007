"""The answers of a model to requests, saved in a file as they come, so that no request is run twice.

Each batch is one line, a JSON object. A line that an interruption cut short is ignored. Several processes may write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from secateur.core import records
from secateur.evaluate.continuations import Row, Score, score_continuations


def request_key(*parts: Any) -> str:
    """Return a name for a request: the hash of its parts."""
    return hashlib.blake2b(json.dumps(parts, default=list).encode(), digest_size=12).hexdigest()


class Answers:
    """A mapping from the key of a request to its answer."""

    def __init__(self, file: Path | None = None, *, resume: bool = True) -> None:
        """Args:
        file: the file to save answers in; None keeps them in memory only.
        resume: use the answers that the file holds; otherwise the file is removed.
        """
        self._file = file
        self._known: dict[str, Any] = {}
        if file is not None and file.is_file():
            if resume:
                self._known = _read(file)
            else:
                file.unlink()

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Store the answers of one batch."""
        self._known |= answers
        if self._file is not None:
            records.append(self._file, dict(answers))


def remembered_scores(model: PreTrainedModel, rows: Sequence[Row], description: str, answers: Answers) -> list[Score]:
    """Return the scores of all rows, in order.

    Rows without a stored answer are scored first, and their scores stored.
    """
    keys = [request_key("logp", context, rest) for context, rest in rows]
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in answers}
    names = list(missing)

    def store(places: Sequence[int], scores: list[Score]) -> None:
        answers.add({names[place]: score for place, score in zip(places, scores, strict=True)})

    score_continuations(model, list(missing.values()), description, done=store)
    return [Score(*answers[key]) for key in keys]


def _read(file: Path) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for line in file.read_text("utf-8").splitlines():
        try:
            known |= json.loads(line)
        except (ValueError, TypeError):
            continue
    return known
