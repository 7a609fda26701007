"""Windows of token ids: drawn from a text, held against a model, and named by their hash."""

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

# Tokens read for each token wanted, so that windows come from all over a large text without reading all of it.
_READ_AHEAD = 4
IGNORE = -100  # a label that is not to be predicted, as in transformers


def calibration_windows(
    text: Text, tokenize: Callable[[str], list[int]], *, samples: int, seqlen: int, seed: int
) -> Tensor:
    """The windows of `labelled_windows`."""
    return labelled_windows(text, tokenize, samples=samples, seqlen=seqlen, seed=seed)[0]


def labelled_windows(
    text: Text, tokenize: Callable[[str], list[int]], *, samples: int, seqlen: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Windows of calibration text, int64 [S, T], and of questions with answers what is to be predicted: the same, with `IGNORE` in the questions.

    The rows are shuffled and tokenised one after the other (each with what the tokenizer adds at its start) until there is enough; the
    stream is cut into windows that do not overlap, of which `samples` are drawn. Token ids are used as given, in order.

    Raises:
        SecateurError: the text has fewer windows than asked for.
    """
    if text.ids is not None:
        return text.ids, None
    order = np.random.default_rng(seed)
    wanted = samples * seqlen
    stream: list[int] = []
    labels: list[int] = []
    for number in order.permutation(len(text.rows)):
        if text.rows[number].strip():
            ids = tokenize(text.rows[number])
            stream += ids
            if text.questions:
                given = _common(ids, tokenize(text.questions[number])) if text.questions[number] else 0
                labels += [IGNORE] * given + ids[given:]
        if len(stream) >= _READ_AHEAD * wanted:
            break
    there = len(stream) // seqlen
    if there < samples:
        raise SecateurError(
            f"{text.spec}: has {len(stream):,} tokens, {there} windows of {seqlen}, but {samples} are asked for; "
            "lower --samples or --seqlen, or give more text"
        )
    drawn = torch.from_numpy(np.sort(order.choice(there, samples, replace=False)))
    windows, labelled = (
        torch.tensor(tokens[: there * seqlen], dtype=torch.int64).view(-1, seqlen) for tokens in (stream, labels)
    )
    return windows[drawn], labelled[drawn] if text.questions else None


def _common(ids: Sequence[int], begin: Sequence[int]) -> int:
    """With how many tokens both begin; one that joins the end of a question to its answer is the answer's."""
    return next(
        (n for n, (one, other) in enumerate(zip(ids, begin, strict=False)) if one != other), min(len(ids), len(begin))
    )


def check_ids(windows: Tensor, vocabulary: int, longest: int, spec: str, tokens: int | None = None) -> None:
    """Hold token ids against what a model takes.

    Args:
        windows: token ids, of any shape; the last dimension is a window.
        vocabulary: rows of its embedding.
        longest: positions it knows.
        spec: where the ids come from.
        tokens: how many its tokenizer knows, where it gave them; None where they were given.

    Raises:
        SecateurError: a window is longer, or an id outside the vocabulary.
    """
    if windows.shape[-1] > longest:
        raise SecateurError(
            f"{spec}: windows of {windows.shape[-1]} tokens, but this model knows at most {longest}; cut them shorter"
        )
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocabulary:
        raise outside_vocabulary(low if low < 0 else high, vocabulary, spec, tokens)


def outside_vocabulary(token: int, vocabulary: int, spec: str, tokens: int | None) -> SecateurError:
    """The error for a token id that the embedding has no row for; arguments as for `check_ids`."""
    if tokens is None:
        return SecateurError(
            f"{spec}: token id {token} is outside the vocabulary of the model (0 to {vocabulary - 1}); "
            "tokenise with its own tokenizer"
        )
    return SecateurError(
        f"{spec}: the tokenizer gives id {token}, and the embedding of the model has {vocabulary} rows (ids 0 to "
        f"{vocabulary - 1}; the tokenizer has {tokens} "
        f"tokens): give the model rows for them (model.resize_token_embeddings({max(tokens, token + 1)}), "
        "then save_pretrained), or use the tokenizer it was "
        "trained with"
    )


def calibration_facts(spec: str, windows: Tensor) -> dict[str, Any]:
    """`calibration` of a record: the SPEC, the windows [S, T], the hash of their token ids and, of a file, that of its bytes."""
    facts = {"spec": spec, "samples": len(windows), "seqlen": windows.shape[1], "sha256": ids_hash(windows)}
    return facts if (found := file_hash(spec)) is None else {**facts, "file_sha256": found}


def ids_hash(ids: Tensor) -> str:
    """SHA-256 of token ids as little-endian int64."""
    return hashlib.sha256(ids.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()
