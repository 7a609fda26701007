"""Log-probabilities of continuations after contexts. Tasks with choices are scored by them.

Only the positions of the continuation reach the head. Equal inputs are run once: the choices of a task with one-token
answers share their input. Long sequences go first. A batch that does not fit into the memory of an accelerator is
halved.

Shape letters: B sequences, T tokens, D residual, V vocabulary, N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.core.errors import SecateurError
from secateur.core.numbers import at_least_float32
from secateur.core.progress import track
from secateur.models.loss import head_of, hidden_states, positions_a_chunk
from secateur.text.tokens import outside_vocabulary

_TOKENS_A_BATCH = {"cpu": 2048, "cuda": 2**17}  # at the start

Row = tuple[Sequence[int], Sequence[int]]
"""The token ids of a context and of its continuation. Neither is empty."""


class Score(NamedTuple):
    """The score of one continuation.

    Attributes:
        logp: its log-probability in nats, summed over its tokens.
        greedy: whether each of its tokens is the most likely one.
    """

    logp: float
    greedy: bool


def known_ids(
    ids: list[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, description: str
) -> list[int]:
    """Return the token ids unchanged, after a check that the vocabulary of the model holds them.

    Raises:
        SecateurError: an id is outside the vocabulary: the tokenizer is larger than the embedding.
    """
    if ids and max(ids) >= model.config.vocab_size:
        raise outside_vocabulary(max(ids), model.config.vocab_size, description, len(tokenizer))
    return ids


def score_continuations(
    model: PreTrainedModel,
    rows: Sequence[Row],
    description: str,
    *,
    done: Callable[[Sequence[int], list[Score]], None] | None = None,
) -> list[Score]:
    """Return the score of each row, in order.

    Args:
        model: on its device, in evaluation mode.
        rows: contexts and continuations; a row too long for the model loses its beginning, as in lm-eval.
        description: the words that the progress line shows.
        done: a function called after each batch, with the indices of its rows and their scores.

    Raises:
        SecateurError: a continuation is empty or longer than the model, or a score is not finite.
    """
    longest = int(model.config.max_position_embeddings)
    inputs: dict[tuple[int, ...], list[int]] = {}
    for place, (context, rest) in enumerate(rows):
        if not 0 < len(rest) <= longest or not context:
            raise SecateurError(
                f"{description}: a continuation of {len(rest)} tokens after {len(context)} tokens of context cannot be "
                f"scored; this model takes continuations of 1 to {longest} tokens, after at least one token of context"
            )
        inputs.setdefault((*context, *rest)[-(longest + 1) : -1], []).append(place)
    order = sorted(inputs, key=lambda ids: (-len(ids), ids))
    score_of_row: dict[int, Score] = {}

    def scored() -> Iterator[tuple[int, ...]]:
        for batch in _batches(model, order):
            places = [(b, place) for b, ids in enumerate(batch.inputs) for place in inputs[ids]]
            scores = _scores(
                model, batch.hidden_BTD, [(b, len(batch.inputs[b]), rows[place][1]) for b, place in places]
            )
            if any(score.logp != score.logp or abs(score.logp) == float("inf") for score in scores):
                raise SecateurError(f"{description}: the model's logits hold NaN or infinity; try --dtype float32")
            score_of_row.update(zip((place for _, place in places), scores, strict=True))
            if done is not None:
                done([place for _, place in places], scores)
            yield from batch.inputs

    for _ in track(scored(), f"{description}: sequences", total=len(order)):
        pass
    return [score_of_row[place] for place in range(len(rows))]


class _Batch(NamedTuple):
    inputs: Sequence[tuple[int, ...]]
    hidden_BTD: Tensor


@torch.inference_mode()
def _batches(model: PreTrainedModel, order: Sequence[tuple[int, ...]]) -> Iterator[_Batch]:
    """Run consecutive inputs in batches, and yield each with its last hidden state.

    A resumed run forms the same batches as one that was not interrupted.
    """
    budget = _TOKENS_A_BATCH.get(model.device.type, _TOKENS_A_BATCH["cpu"])
    start = 0
    while start < len(order):
        length = len(order[start])
        batch = order[start : start + max(1, budget // length)]
        # padding on the right needs no mask: causal attention does not look there
        ids_BT = torch.tensor([(*ids, *(0,) * (length - len(ids))) for ids in batch], device=model.device)
        try:
            hidden_BTD = hidden_states(model, ids_BT)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            budget = max(1, len(batch) // 2) * length
            continue
        start += len(batch)
        yield _Batch(batch, hidden_BTD)


@torch.inference_mode()
def _scores(
    model: PreTrainedModel, hidden_BTD: Tensor, queries: Sequence[tuple[int, int, Sequence[int]]]
) -> list[Score]:
    """Return the score of each query: (index of the sequence, length of its input, continuation).

    The last positions of the input predict the continuation.
    """
    hidden_ND = torch.cat([hidden_BTD[b, length - len(rest) : length] for b, length, rest in queries])
    targets_N = torch.tensor([i for _, _, rest in queries for i in rest], device=model.device)
    losses, hits = [], []
    head, size = head_of(model), positions_a_chunk(model.config.vocab_size)
    for hidden_nD, targets_n in zip(hidden_ND.split(size), targets_N.split(size), strict=True):
        logits_nV = at_least_float32(head(hidden_nD))
        losses.append(cross_entropy(logits_nV, targets_n, reduction="none"))
        hits.append(logits_nV.argmax(-1) == targets_n)
    sizes = [len(rest) for _, _, rest in queries]
    summed = [-float(loss.sum()) for loss in torch.cat(losses).double().cpu().split(sizes)]
    return [Score(logp, bool(hit.all())) for logp, hit in zip(summed, torch.cat(hits).cpu().split(sizes), strict=True)]
