"""Judge whether a training has diverged: by the mean loss of enough steps, never by that of a single batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

WORSE = 1.0  # nats above the lowest mean: the training has diverged
_STEPS, _EXAMPLES = 10, 64  # a mean is of at least so many, both: the losses of single rows differ by nats


def steps_watched(batch: int) -> int:
    """Return the number of steps that a mean is taken over."""
    return max(_STEPS, -(-_EXAMPLES // batch))


class Watch:
    """The losses of the last steps, beside what they are compared with.

    Up to `len(before)` steps, that is the loss of the model before training on the same batches, so that it does not
    matter which rows a step reads. Later it is the lowest mean of as many steps so far.

    Args:
        before: the loss of the batches of the next steps before any of these, in nats, one for each.
        tokens: the number of tokens that count in each of these batches.
    """

    def __init__(self, before: Sequence[float], tokens: Sequence[int]) -> None:
        self._before, self._tokens = list(before), list(tokens)
        self._last: deque[tuple[Tensor, int]] = deque(maxlen=len(self._before))
        self._steps, self._lowest = 0, _mean(self._before, self._tokens)

    def add(self, loss: Tensor, tokens: int) -> None:
        """Add the loss of a step, a scalar, and its number of tokens. The host does not wait for the device."""
        self._last.append((loss.detach(), tokens))
        self._steps += 1

    def risen(self) -> tuple[int, float, float] | None:
        """Return the number of steps, their mean loss and what it should be near, if it is far above; else None."""
        count = len(self._last)
        losses = torch.stack([loss for loss, _ in self._last]).tolist()
        mean = _mean(losses, [tokens for _, tokens in self._last])
        early = self._steps <= count  # no step has left the window yet
        near = _mean(self._before[:count], self._tokens[:count]) if early else self._lowest
        if mean > near + WORSE:
            return count, mean, near
        if self._steps >= len(self._before):
            self._lowest = min(self._lowest, mean)
        return None


def _mean(losses: Sequence[float], tokens: Sequence[int]) -> float:
    return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / max(1, sum(tokens))
