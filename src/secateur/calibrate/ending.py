"""What follows the blocks: the last norm, the head, and the loss of the next token.

Shape letters: S windows, T tokens, D residual, N tokens of several windows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from secateur.calibrate.stream import Stream
from secateur.core.errors import NotFiniteError, UsageError
from secateur.core.numbers import at_least_float32
from secateur.models.loss import Head, capped
from secateur.text.windows import IGNORE

_LOGITS = 1 << 23  # the most logits in memory at a time


def check_loss(loss: float) -> None:
    """Raise NotFiniteError if the loss of a model is NaN or infinite."""
    if not math.isfinite(loss):
        raise NotFiniteError(
            f"the loss is {loss:g}; the checkpoint is damaged, or its dtype is too narrow: try --dtype float32"
        )


class Ending:
    """The last norm and the head of a model, and what they should predict.

    Args:
        stream: a stream of the windows; it has the model, the device and the dtype.
        windows: token ids [S, T].
        labels: the token to predict at each position, [S, T], and `IGNORE` where there is nothing to predict; each
            position predicts the label of the next one. None takes the windows. Padding on the right needs only
            `IGNORE`, since no token sees what comes after it.

    Attributes:
        target_ST: what each position predicts.
        targets: the number of labels.

    Raises:
        UsageError: no position has a label to predict.
    """

    def __init__(self, stream: Stream, windows: Tensor, labels: Tensor | None = None) -> None:
        self._stream = stream
        self.target_ST = pad((windows if labels is None else labels)[:, 1:], (0, 1), value=IGNORE)
        self.targets = int((self.target_ST != IGNORE).sum())
        if not self.targets:
            raise UsageError(
                "no label is to be predicted, so the text has no loss; give windows of at least two tokens "
                "(--seqlen), or, for a task, more of them (--samples)"
            )

    @contextmanager
    def loaded(self) -> Iterator[tuple[nn.Module, Head]]:
        """Yield the last norm, and the head with its soft-cap if it has one, ready to run."""
        view = self._stream.view
        norm, projection = self._outer(view.family.final_norm), self._outer(view.family.head)
        yield norm, capped(projection, view.family.cap_of(view.config))
        for module in (norm, projection):
            module.to("meta")

    def chunks(self, hidden_BTD: Tensor, rows: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the hidden states of the windows `rows`, [n, D], some at a time, each with its targets [n]."""
        hidden_ND, target_N = hidden_BTD.flatten(0, 1), self.target_ST[rows].flatten().to(hidden_BTD.device)
        size = max(1, _LOGITS // int(self._stream.view.config.vocab_size))
        yield from zip(hidden_ND.split(size), target_N.split(size), strict=True)

    @torch.inference_mode()
    def losses(self, streams: Iterable[Tensor]) -> list[float]:
        """Return the mean loss of the next token in nats, for each of what may leave the last block, [S, T, D]."""
        stream, found = self._stream, []
        width = stream.view.dims(stream.view.blocks - 1).leaves
        with self.loaded() as (norm, head):
            for hidden_STD in streams:
                total = 0.0
                for rows in stream.slices():
                    for hidden_ND, target_N in self.chunks(hidden_STD[rows, :, :width].to(stream.device), rows):
                        logits_NV = at_least_float32(head(norm(hidden_ND)))
                        total += float(cross_entropy(logits_NV, target_N, ignore_index=IGNORE, reduction="sum"))
                found.append(total / self.targets)
        return found

    def _outer(self, path: str) -> nn.Module:
        """Load a module that comes after the blocks. The weight of a tied head is that of the embedding."""
        stream, view = self._stream, self._stream.view
        module, state = stream.skeleton.get_submodule(path), view.read_module(path)
        if path == view.family.head and "weight" not in state:
            state["weight"] = view.source.read(f"{view.family.embeddings[0]}.weight")
        module.load_state_dict({name: t.to(stream.device, stream.dtype) for name, t in state.items()}, assign=True)
        return module.requires_grad_(False)
