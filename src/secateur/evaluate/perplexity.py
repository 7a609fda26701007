"""Perplexity: exp of the mean loss per predicted token, summed in float64.

The logits of a whole window are never in memory at once.

Shape letters: B windows, T tokens, D residual, N positions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.core.errors import SecateurError
from secateur.core.progress import track
from secateur.core.words import exp
from secateur.models.loss import hidden_states, token_losses

_TOKENS_A_BATCH = 2048


@dataclass(frozen=True)
class Perplexity:
    """A measured loss, and the amount of text it was measured on.

    Attributes:
        loss: the mean loss of a predicted token, in nats.
        windows: the number of windows.
        tokens: the number of predicted tokens.
    """

    loss: float
    windows: int
    tokens: int

    @property
    def ppl(self) -> float:
        """exp(loss), or infinity where a float cannot hold it."""
        return exp(self.loss)

    @property
    def facts(self) -> dict[str, float]:
        """The fields of a record. JSON cannot write an infinite perplexity, so the loss stands beside it."""
        return {"ppl": self.ppl, "loss": self.loss}


def perplexity(model: PreTrainedModel, windows: Sequence[Tensor], *, progress: Path | None = None) -> Perplexity:
    """Measure perplexity over windows. Each window predicts all its tokens except the first.

    Args:
        model: on its device, in evaluation mode.
        windows: token ids, int64 [T] each.
        progress: a file for the losses of finished windows, so that an interrupted run can go on; the caller removes
            it.

    Raises:
        SecateurError: a loss is not finite; the message names the window.
    """
    losses: list[float] = json.loads(progress.read_text()) if progress is not None and progress.is_file() else []
    left = windows[len(losses) :]
    for batch_BT in track(equal_batches(left), "perplexity: windows", len(left), worth=len):
        sums_B = window_losses(model, batch_BT.to(model.device))
        if not torch.isfinite(sums_B).all():
            bad = len(losses) + int((~torch.isfinite(sums_B)).nonzero()[0])
            raise SecateurError(
                f"the loss of window {bad} is not finite: the model's logits hold NaN or infinity; try --dtype float32"
            )
        losses += sums_B.tolist()
        if progress is not None:
            _save(progress, losses)
    tokens = sum(len(window) - 1 for window in windows)
    return Perplexity(math.fsum(losses) / tokens, len(windows), tokens)


@torch.inference_mode()
def window_losses(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Return the summed loss of each window in nats, float64 [B]."""
    hidden_BTD = hidden_states(model, ids_BT)
    losses_N = token_losses(model, hidden_BTD[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    return losses_N.double().view(len(ids_BT), -1).sum(1)


def equal_batches(windows: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield consecutive windows of equal length as batches [B, T], in order."""
    start = 0
    while start < len(windows):
        length = len(windows[start])
        stop = start
        limit = start + max(1, _TOKENS_A_BATCH // length)
        while stop < len(windows) and len(windows[stop]) == length and stop < limit:
            stop += 1
        yield torch.stack(list(windows[start:stop]))
        start = stop


def _save(file: Path, losses: list[float]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(losses))
    temporary.rename(file)
