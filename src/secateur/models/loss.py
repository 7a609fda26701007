"""The loss of the next token, computed without the logits of a whole window in memory.

Shape letters: B windows, T tokens, D residual, V vocabulary, N positions, n positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from secateur.core.numbers import at_least_float32
from secateur.models.family import find_family

Head = Callable[[Tensor], Tensor]
_LOGITS_BYTES = 64 * 2**20
# Positions per chunk in training, at most: enough for products at full speed, and logits of a small vocabulary stay in
# the cache.
TRAINED_POSITIONS = 1024


def hidden_states(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Return the hidden states that the head reads, [B, T, D]."""
    out: Tensor = model.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state
    return out


def head_of(model: PreTrainedModel) -> Head:
    """What turns a hidden state into logits: the output projection, and the soft-cap where the model has one."""
    family = find_family(model.config, str(model.name_or_path))
    return capped(model.get_output_embeddings(), family.cap_of(model.config))


def capped(head: Head, cap: float | None) -> Head:
    """The head with c tanh(logits / c) behind it, in the dtype of the logits as stock models do; None: as it is."""
    return head if cap is None else lambda hidden: torch.tanh(head(hidden) / cap) * cap


def positions_a_chunk(vocabulary: int) -> int:
    """Return how many positions fit into the memory for float32 logits."""
    return max(1, _LOGITS_BYTES // (4 * vocabulary))


def token_losses(model: PreTrainedModel, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Return the loss of each position in nats, [N]."""
    return torch.cat(list(_chunks(model, hidden_ND, targets_N)))


def _chunks(model: PreTrainedModel, hidden_ND: Tensor, targets_N: Tensor) -> Iterator[Tensor]:
    """Yield the loss of one chunk of positions after another, [n] each."""
    head, size = head_of(model), positions_a_chunk(model.config.vocab_size)
    for hidden_nD, targets_n in zip(hidden_ND.split(size), targets_N.split(size), strict=True):
        logits_nV = at_least_float32(head(hidden_nD))
        yield cross_entropy(logits_nV, targets_n, reduction="none")


def mean_loss(model: PreTrainedModel, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Return the mean loss in nats, float32 or better, with a gradient to `hidden_ND` only: the head is frozen."""
    loss: Tensor = _MeanLoss.apply(
        hidden_ND, targets_N, head_of(model), min(TRAINED_POSITIONS, positions_a_chunk(model.config.vocab_size))
    )  # type: ignore[no-untyped-call]
    return loss


class _MeanLoss(torch.autograd.Function):
    """The loss and its gradient, both computed by chunks in the forward pass: logits are never kept or recomputed."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, targets_N: Tensor, head: Head, size: int) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient_ND = torch.empty_like(hidden_ND) if needs_gradient else None
        total = torch.zeros((), device=hidden_ND.device, dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        for start in range(0, len(targets_N), size):
            rows = slice(start, start + size)
            with torch.set_grad_enabled(needs_gradient):
                hidden_nD = hidden_ND[rows].detach().requires_grad_(needs_gradient)
                logits_nV = head(hidden_nD)
            logp_nV, target_n1 = at_least_float32(logits_nV.detach()).log_softmax(1), targets_N[rows, None]
            total -= logp_nV.gather(1, target_n1).sum()
            if gradient_ND is not None:  # softmax minus one-hot
                logp_nV.exp_().scatter_add_(1, target_n1, logp_nV.new_full((1, 1), -1.0).expand_as(target_n1))
                (gradient_ND[rows],) = torch.autograd.grad(logits_nV, hidden_nD, logp_nV.to(logits_nV.dtype))
            del logits_nV, logp_nV  # free them before the next chunk
        ctx.save_for_backward(gradient_ND)
        ctx.count = len(targets_N)
        mean: Tensor = total / ctx.count
        return mean

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * (slopes[0] / ctx.count).to(gradient_ND.dtype), None, None, None
