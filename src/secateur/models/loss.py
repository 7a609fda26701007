"""The loss of the next token, without ever holding the logits of a whole window.

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
TRAINED_POSITIONS = 1024  # of a chunk that is trained on, at most: enough for products at full rate, and logits of a small vocabulary stay in a cache


def hidden_states(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """What the head reads, [B, T, D]."""
    out: Tensor = model.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state
    return out


def head_of(model: PreTrainedModel) -> Head:
    """What turns a hidden state into logits: the output projection, and the soft-cap behind it where the model has one."""
    return capped(
        model.get_output_embeddings(), find_family(model.config, str(model.name_or_path)).cap_of(model.config)
    )


def capped(head: Head, cap: float | None) -> Head:
    """The head with c tanh(logits / c) behind it, computed in the dtype of the logits as stock models do; c None: as it is."""
    return head if cap is None else lambda hidden: torch.tanh(head(hidden) / cap) * cap


def positions_a_chunk(vocabulary: int) -> int:
    """How many positions' float32 logits fit the memory set aside for them."""
    return max(1, _LOGITS_BYTES // (4 * vocabulary))


def token_losses(model: PreTrainedModel, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """The loss of each position in nats, [N]."""
    return torch.cat(list(_chunks(model, hidden_ND, targets_N)))


def _chunks(model: PreTrainedModel, hidden_ND: Tensor, targets_N: Tensor) -> Iterator[Tensor]:
    """The loss of a few positions at a time, [n]."""
    head, size = head_of(model), positions_a_chunk(model.config.vocab_size)
    for hidden_nD, targets_n in zip(hidden_ND.split(size), targets_N.split(size), strict=True):
        logits_nV = at_least_float32(head(hidden_nD))
        yield cross_entropy(logits_nV, targets_n, reduction="none")


def mean_loss(model: PreTrainedModel, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """The mean loss in nats, with gradients to `hidden_ND` alone: the head is taken as frozen. Float32 or better."""
    loss: Tensor = _MeanLoss.apply(
        hidden_ND, targets_N, head_of(model), min(TRAINED_POSITIONS, positions_a_chunk(model.config.vocab_size))
    )  # type: ignore[no-untyped-call]
    return loss


class _MeanLoss(torch.autograd.Function):
    """Loss and gradient of a chunk together, on the way forward: logits are neither kept nor made a second time."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, targets_N: Tensor, head: Head, size: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient_ND = torch.empty_like(hidden_ND) if wanted else None
        total = torch.zeros((), device=hidden_ND.device, dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        for start in range(0, len(targets_N), size):
            rows = slice(start, start + size)
            with torch.set_grad_enabled(wanted):
                hidden_nD = hidden_ND[rows].detach().requires_grad_(wanted)
                logits_nV = head(hidden_nD)
            logp_nV, target_n1 = at_least_float32(logits_nV.detach()).log_softmax(1), targets_N[rows, None]
            total -= logp_nV.gather(1, target_n1).sum()
            if gradient_ND is not None:  # softmax minus one-hot
                logp_nV.exp_().scatter_add_(1, target_n1, logp_nV.new_full((1, 1), -1.0).expand_as(target_n1))
                (gradient_ND[rows],) = torch.autograd.grad(logits_nV, hidden_nD, logp_nV.to(logits_nV.dtype))
            del logits_nV, logp_nV  # before those of the next chunk are made
        ctx.save_for_backward(gradient_ND)
        ctx.count = len(targets_N)
        mean: Tensor = total / ctx.count
        return mean

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * (slopes[0] / ctx.count).to(gradient_ND.dtype), None, None, None
