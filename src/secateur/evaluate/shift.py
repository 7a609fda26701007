"""How the behaviour of a pruned model shifted from that of the dense model. Perplexity alone does not show it.

Measured are the KL divergence per token and the top-1 agreement on the same windows, and repetition in greedy
generations; a sample of text is kept to read. This is the functionality shift from which the study of the
representation dimension (arXiv:2503.04377) starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.core.errors import SecateurError
from secateur.core.progress import track
from secateur.evaluate.generate import write_on
from secateur.evaluate.perplexity import equal_batches
from secateur.models.loss import head_of, hidden_states, positions_a_chunk

SHIFT_WINDOWS = 32  # of an evaluation
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 64
_GRAM = 4


def functionality_shift(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    windows: Sequence[Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, Any]:
    """Compare two models on the same windows.

    Args:
        dense, pruned: the models, with one vocabulary.
        windows: token ids, int64 [T] each.
        tokenizer: the tokenizer that turns a sample into text; None leaves the sample out.

    Returns:
        `kl` (nats per token, KL(dense || pruned)), `top1_agreement`, `repetition` and `repetition_dense` (the share
        of 4-grams that occurred before in the same greedy continuation), `prompt`, `sample`, `sample_dense`.

    Raises:
        SecateurError: the vocabularies differ.
    """
    if dense.config.vocab_size != pruned.config.vocab_size:
        raise SecateurError(
            f"--against: the dense model has a vocabulary of {dense.config.vocab_size} tokens, this model one of "
            f"{pruned.config.vocab_size}; they cannot be compared; give the model that this one was pruned from"
        )
    kl, agreement, tokens = compare(dense, pruned, windows)
    prompts_BT = prompts_of(windows)
    ours, theirs = continuations(pruned, prompts_BT), continuations(dense, prompts_BT)
    shift: dict[str, Any] = {
        "kl": kl / tokens,
        "top1_agreement": agreement / tokens,
        "repetition": repetition_rate(ours),
        "repetition_dense": repetition_rate(theirs),
    }
    if tokenizer is not None:
        texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompts_BT[0], ours[0], theirs[0]))
        shift |= dict(zip(("prompt", "sample", "sample_dense"), texts, strict=True))
    return shift


def prompts_of(windows: Sequence[Tensor]) -> Tensor:
    """Return the beginnings of the first windows, [B, T], which the models go on from."""
    return torch.stack([w[:PROMPT_TOKENS] for w in windows[:PROMPTS] if len(w) >= PROMPT_TOKENS] or [windows[0][:2]])


@torch.inference_mode()
def compare(dense: PreTrainedModel, pruned: PreTrainedModel, windows: Sequence[Tensor]) -> tuple[float, int, int]:
    """Return the summed KL divergence, the number of equal most likely tokens, and the number of tokens."""
    kl, agreement, tokens = [], 0, 0
    size = positions_a_chunk(dense.config.vocab_size)
    for batch_BT in track(equal_batches(windows), "shift: windows", len(windows), worth=len):
        ids_BT = batch_BT.to(dense.device)
        hidden = [hidden_states(model, ids_BT)[:, :-1].flatten(0, 1).split(size) for model in (dense, pruned)]
        for dense_nD, pruned_nD in zip(*hidden, strict=True):
            logp_nV = log_softmax(head_of(dense)(dense_nD).float(), dim=-1)
            logq_nV = log_softmax(head_of(pruned)(pruned_nD).float(), dim=-1)
            kl.append(float((logp_nV.exp() * (logp_nV - logq_nV)).sum(dtype=torch.float64)))
            agreement += int((logp_nV.argmax(-1) == logq_nV.argmax(-1)).sum())
            tokens += len(logp_nV)
    return math.fsum(kl), agreement, tokens


def continuations(model: PreTrainedModel, prompts_BT: Tensor) -> Tensor:
    """Return greedy continuations, [B, new]. Generation does not stop at an end of text, so all are equally long."""
    new = min(NEW_TOKENS, model.config.max_position_embeddings - prompts_BT.shape[1])
    return write_on(model, prompts_BT, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)


def repetition_rate(ids_BT: Tensor) -> float:
    """Return the share of 4-grams that occurred before in the same row."""
    repeated = total = 0
    for row in ids_BT.tolist():
        grams = [tuple(row[i : i + _GRAM]) for i in range(len(row) - _GRAM + 1)]
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated / total if total else 0.0
