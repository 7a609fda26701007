"""Log-probabilities of continuations after contexts. Tasks with choices are scored by them.

Only the positions of the continuation reach the head. Equal inputs are run once: the choices of a task with one-token
answers share their input. Inputs that share their context share its run too: the choices of a question continue from
one cache of keys and values. A batch that does not fit into the memory of an accelerator is halved.

Shape letters: B sequences, T tokens, D residual, V vocabulary, N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
CACHED_TOKENS = {"cpu": 2048, "cuda": 2**14}  # at most, at the start: their keys and values are in memory
_STEP = 4  # the length of a shared beginning is a multiple: more of them have equal lengths, and run together

Ids = tuple[int, ...]
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


def cached_tokens(device: torch.device) -> int:
    """Return the most tokens whose keys and values are in memory on a device."""
    return _of_device(CACHED_TOKENS, device)


def _of_device(budgets: Mapping[str, int], device: torch.device) -> int:
    return budgets.get(device.type, budgets["cpu"])


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
    inputs: dict[Ids, list[int]] = {}
    contexts: dict[Ids, dict[Ids, None]] = {}  # what is before the first prediction -> its inputs
    for place, (context, rest) in enumerate(rows):
        if not 0 < len(rest) <= longest or not context:
            raise SecateurError(
                f"{description}: a continuation of {len(rest)} tokens after {len(context)} tokens of context cannot be "
                f"scored; this model takes continuations of 1 to {longest} tokens, after at least one token of context"
            )
        ids = (*context, *rest)[-(longest + 1) : -1]
        if ids not in inputs:
            contexts.setdefault(ids[: -len(rest)], {})[ids] = None
        inputs.setdefault(ids, []).append(place)
    score_of_row: dict[int, Score] = {}

    def scored() -> Iterator[Ids]:
        for batch in _batches(model, _groups(contexts, inputs, rows)):
            places = [(b, place) for b, ids in enumerate(batch.inputs) for place in inputs[ids]]
            queries = [(b, len(batch.inputs[b]) - batch.shared, rows[place][1]) for b, place in places]
            scores = _scores(model, batch.hidden_BTD, queries)
            if any(score.logp != score.logp or abs(score.logp) == float("inf") for score in scores):
                raise SecateurError(f"{description}: the model's logits hold NaN or infinity; try --dtype float32")
            score_of_row.update(zip((place for _, place in places), scores, strict=True))
            if done is not None:
                done([place for _, place in places], scores)
            yield from batch.inputs

    for _ in track(scored(), f"{description}: sequences", total=len(inputs)):
        pass
    return [score_of_row[place] for place in range(len(rows))]


class _Group(NamedTuple):
    """Inputs that are run together, and the number of tokens at their beginning that they share."""

    inputs: tuple[Ids, ...]
    shared: int

    @property
    def longest(self) -> int:
        """The most tokens of an input that are not shared."""
        return max(map(len, self.inputs)) - self.shared


def _groups(
    contexts: Mapping[Ids, Iterable[Ids]], inputs: Mapping[Ids, Sequence[int]], rows: Sequence[Row]
) -> list[_Group]:
    """Group the inputs by context, long ones first; an input alone shares nothing."""
    groups = []
    for context, members in contexts.items():
        same = tuple(sorted(members, key=lambda ids: (-len(ids), ids)))
        # an input may be scored from an earlier position than the one that it came with first
        first = min(len(ids) - len(rows[place][1]) for ids in same for place in inputs[ids])
        shared = min(first, len(context)) // _STEP * _STEP
        if len(same) > 1 and shared:
            groups.append(_Group(same, shared))
        else:
            groups += [_Group((ids,), 0) for ids in same]
    return sorted(groups, key=lambda group: (group.shared > 0, -group.shared, -group.longest, group.inputs))


class _Batch(NamedTuple):
    """Inputs, and the last hidden state after the tokens that are shared."""

    inputs: Sequence[Ids]
    shared: int
    hidden_BTD: Tensor


@torch.inference_mode()
def _batches(model: PreTrainedModel, order: Sequence[_Group]) -> Iterator[_Batch]:
    """Run consecutive groups that share equally many tokens in batches.

    A resumed run forms the same batches as one that was not interrupted.
    """
    limits = {False: _of_device(_TOKENS_A_BATCH, model.device), True: cached_tokens(model.device)}
    start = 0
    while start < len(order):
        shared = order[start].shared
        groups = _first_batch(order[start:], limits[shared > 0])
        try:
            hidden_BTD = _hidden(model, groups)
        except torch.OutOfMemoryError:
            if len(groups) == 1:
                raise
            # as many tokens as half of these groups have
            limits[shared > 0] = _tokens(groups[: len(groups) // 2])
            continue
        start += len(groups)
        yield _Batch([ids for group in groups for ids in group.inputs], shared, hidden_BTD)


def _first_batch(order: Sequence[_Group], limit: int) -> Sequence[_Group]:
    """Return the first groups that share equally many tokens and have no more than `limit` in all; at least one."""
    count, sequences = 1, len(order[0].inputs)
    width = order[0].shared + order[0].longest
    while count < len(order) and order[count].shared == order[0].shared:
        sequences += len(order[count].inputs)
        if sequences * width > limit:
            break
        count += 1
    return order[:count]


def _tokens(groups: Sequence[_Group]) -> int:
    return sum(len(group.inputs) for group in groups) * (groups[0].shared + groups[0].longest)


def _hidden(model: PreTrainedModel, groups: Sequence[_Group]) -> Tensor:
    """Return the last hidden state of all inputs after their shared tokens, [B, T, D]."""
    shared, length = groups[0].shared, groups[0].longest
    # padding on the right needs no mask: causal attention does not look there
    rest_BT = torch.tensor(
        [(*ids[shared:], *(0,) * (shared + length - len(ids))) for group in groups for ids in group.inputs],
        device=model.device,
    )
    if not shared:
        return hidden_states(model, rest_BT)
    first = torch.tensor([group.inputs[0][:shared] for group in groups], device=model.device)
    cache = model.get_decoder()(input_ids=first, use_cache=True).past_key_values
    cache.batch_select_indices(
        torch.tensor([g for g, group in enumerate(groups) for _ in group.inputs], device=model.device)
    )
    out: Tensor = model.get_decoder()(input_ids=rest_BT, past_key_values=cache, use_cache=True).last_hidden_state
    return out


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
