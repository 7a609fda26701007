"""Windows of token ids: draw them from a text, and hash them. `tokens.py` makes and checks token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.text.files import file_hash
from secateur.text.specs import Text

# Tokens read per token needed: windows come from all over a large text, without reading all of it.
_READ_AHEAD = 4
IGNORE = -100  # the label of a token that is not predicted, as in transformers


def labelled_windows(
    text: Text, tokenize: Callable[[str], list[int]], *, samples: int, seqlen: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Draw windows of calibration text, int64 [S, T], and for questions with answers their labels, int64 [S, T].

    Labels are the token ids, with `IGNORE` in the questions. Rows are shuffled and tokenised one after the other (each
    with the tokenizer's own start token) until there are enough tokens. The stream is cut into windows that do not
    overlap, and `samples` of them are drawn. Token ids are used as given, in order.

    Raises:
        SecateurError: the text has fewer windows than asked for.
    """
    if text.ids is not None:
        return text.ids, None
    order = np.random.default_rng(seed)
    needed = samples * seqlen
    stream: list[int] = []
    labels: list[int] = []
    for number in order.permutation(len(text.rows)):
        if (row := text.rows[number]).strip():
            ids = tokenize(row)
            stream += ids
            if text.questions:
                known = common_length(ids, tokenize(text.questions[number])) if text.questions[number] else 0
                labels += [IGNORE] * known + ids[known:]
        if len(stream) >= _READ_AHEAD * needed:
            break
    available = len(stream) // seqlen
    if available < samples:
        raise SecateurError(
            f"{text.spec}: has {len(stream):,} tokens, {available} windows of {seqlen}, but {samples} are asked for; "
            "lower --samples or --seqlen, or give more text"
        )
    drawn = torch.from_numpy(np.sort(order.choice(available, samples, replace=False)))
    windows, labelled = (
        torch.tensor(tokens[: available * seqlen], dtype=torch.int64).view(-1, seqlen) for tokens in (stream, labels)
    )
    return windows[drawn], labelled[drawn] if text.questions else None


def common_length(ids: Sequence[int], begin: Sequence[int]) -> int:
    """The number of tokens that both begin with.

    A token that joins the end of a question to its answer counts as the answer's.
    """
    return next((n for n, (a, b) in enumerate(zip(ids, begin, strict=False)) if a != b), min(len(ids), len(begin)))


def calibration_facts(spec: str, windows: Tensor, form: str | None = None) -> dict[str, Any]:
    """`calibration` of a record: the SPEC, the size of the windows [S, T], their hash and, for a file, its own hash.

    `form` is that of instructions, `chat` or `plain`; None for other texts.
    """
    facts = {"spec": spec, "samples": len(windows), "seqlen": windows.shape[1], "sha256": ids_hash(windows)}
    facts |= {} if form is None else {"form": form}
    return facts if (file_sha256 := file_hash(spec)) is None else {**facts, "file_sha256": file_sha256}


def ids_hash(ids: Tensor) -> str:
    """SHA-256 of token ids as little-endian int64."""
    return hashlib.sha256(ids.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()
