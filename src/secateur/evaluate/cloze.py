"""The built-in task: which of four continuations really follows?

Its text is the held-out part of the built-in text, so it needs no network. An item is a piece of a file, the lines that
follow it, and three pieces of the same length from elsewhere in the same file. Chance is 0.25. `acc` takes the
continuation of the highest log-probability, `acc_norm` the highest per character, as lm-eval defines them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.core.errors import SecateurError
from secateur.evaluate.answers import Answers, remembered_scores
from secateur.evaluate.continuations import known_ids
from secateur.text.builtin import Part, documents

CLOZE = "cloze"
ITEMS = 300
CHANCE = 0.25
_CONTEXT, _CONTINUATION = 320, 64  # characters
_SHORTEST = 8 * (_CONTEXT + _CONTINUATION)


@dataclass(frozen=True)
class Item:
    """A context, four continuations, and the index of the real one."""

    context: str
    choices: tuple[str, ...]
    answer: int


def cloze_items(count: int = ITEMS, seed: int = 0, part: Part = "test") -> list[Item]:
    """Draw the items, the same for the same seed and the same Python version.

    Items of part `train` are for calibration.

    Raises:
        SecateurError: this Python's standard library is installed without sources.
    """
    texts = [d.text for d in documents(part) if len(d.text) >= _SHORTEST]
    if not texts:
        raise SecateurError(
            "the built-in task needs the sources of Python's standard library, which this Python does not have; "
            "install Python with its sources, or choose other --tasks"
        )
    draw = np.random.default_rng(seed)
    sizes = np.array([len(text) for text in texts], dtype=np.float64)
    return [_item(texts[draw.choice(len(texts), p=sizes / sizes.sum())], draw) for _ in range(count)]


def _item(text: str, draw: np.random.Generator) -> Item:
    while True:  # until the four pieces differ, none is nearly empty, and the real one has enough context
        starts = [_line_start(text, int(p)) for p in draw.integers(_CONTEXT, len(text) - 2 * _CONTINUATION, size=4)]
        pieces = [text[s : s + _CONTINUATION] for s in starts]
        if (
            len({p.strip() for p in pieces}) == 4
            and all(len(p.strip()) > _CONTINUATION // 2 for p in pieces)
            and starts[0] >= _CONTEXT // 2
        ):
            break
    order = draw.permutation(4)
    return Item(
        text[max(0, starts[0] - _CONTEXT) : starts[0]],
        tuple(pieces[i] for i in order),
        int(np.flatnonzero(order == 0)[0]),
    )


def _line_start(text: str, position: int) -> int:
    return text.rfind("\n", 0, position) + 1


def items_hash(items: Sequence[Item]) -> str:
    """Return the SHA-256 of the items, which vary with the Python version."""
    return hashlib.sha256(repr([(i.context, i.choices, i.answer) for i in items]).encode()).hexdigest()


def evaluate_cloze(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], answers: Answers | None = None
) -> tuple[dict[str, Any], list[int]]:
    """Return the accuracy with its standard error, and the choice on each item.

    The choice is that of `acc`, for a comparison with another model. Requests whose answer is in `answers` are not run
    again.
    """

    def ids(text: str, **how: bool) -> list[int]:
        return known_ids(tokenizer(text, **how)["input_ids"], model, tokenizer, CLOZE)

    rows = [(ids(item.context), ids(choice, add_special_tokens=False)) for item in items for choice in item.choices]
    scores_I4 = torch.tensor(
        [score.logp for score in remembered_scores(model, rows, CLOZE, answers or Answers())]
    ).view(len(items), 4)
    characters_I4 = torch.tensor([[len(c) for c in item.choices] for item in items])
    truth_I = torch.tensor([item.answer for item in items])
    answers_I, normed_I = scores_I4.argmax(1), (scores_I4 / characters_I4).argmax(1)
    n = len(items)
    acc, acc_norm = ((choice_I == truth_I).double().mean().item() for choice_I in (answers_I, normed_I))
    stderr, stderr_norm = (math.sqrt(value * (1 - value) / max(1, n - 1)) for value in (acc, acc_norm))
    result = {
        "acc": acc,
        "acc_norm": acc_norm,
        "stderr": stderr,
        "stderr_norm": stderr_norm,
        "n": n,
        "sha256": items_hash(items),
    }
    return result, answers_I.tolist()
