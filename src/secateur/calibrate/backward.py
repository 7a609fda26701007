"""Gradients of the language-model loss, one block at a time: forward through all blocks, then back.

    x_0 -> block 0 -> x_1 -> ... -> x_L -> norm, head -> loss        x_l, the inputs of the blocks, are stored
    dL/dx_l  <-  block l is run again on x_l, with its graph  <-  dL/dx_(l+1)

Only one block's weights are in memory at a time, and each block is read twice. A graph spans one block and one batch of
windows. No weight has a `.grad`. Instead, every linear module passes its input, and the gradient of its output, to a
listener. The gradients of weights follow from these (`weight_gradient`), and so do the gradients of masks on the inputs
of a matrix, such as heads and feed-forward units (`mask_gradient`).

Shape letters: S windows, B windows of a batch, T tokens, D residual, L blocks, O outputs, I inputs of a matrix, N
tokens of several windows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.calibrate.ending import Ending, check_loss
from secateur.calibrate.stream import Stream, new_buffer
from secateur.core.errors import HopelessError, NotFiniteError
from secateur.core.memory import give_back
from secateur.core.numbers import at_least_float32
from secateur.core.progress import track
from secateur.models.loss import Head
from secateur.models.save import disk
from secateur.models.view import BlockView, ModelView
from secateur.text.windows import IGNORE

PairListener = Callable[[Tensor, Tensor], None]
"""A function of x_BTI, the input of a matrix, and g_BTO, the gradient of the loss with respect to its output."""


class Backward:
    """The gradients of the loss of some windows, block by block.

    The loss is the sum of -ln p over all labels, so every pair (x, g) is the share of its own token. Divide by
    `targets` for the gradient of the mean; sum over the rows of a window for the gradient of that window. The
    constructor runs the forward pass. Then, for each block from the last to the first:

        backward = Backward(view, windows, device=device, dtype=dtype)
        for block in backward.blocks():
            backward.retreat(block, {"q": listener, "down": another})

    Args:
        view: the model.
        windows: token ids [S, T].
        device, dtype: where and in which dtype blocks run.
        labels: the token to predict at each position, [S, T], see `Ending`. None takes the windows.
        first: the first block whose gradients are needed; the inputs of earlier blocks are not stored.
        spill: a file for the inputs of the blocks; None stores them in memory.

    Attributes:
        loss: the mean over all labels, nats.
        targets: the number of labels.
        gradient_STD: the gradient of the loss with respect to the residual at the current block.

    Raises:
        UsageError: no position has a label to predict.
        NotFiniteError: the loss is NaN or infinite.
    """

    def __init__(
        self,
        view: ModelView,
        windows: Tensor,
        *,
        device: torch.device,
        dtype: torch.dtype,
        labels: Tensor | None = None,
        first: int = 0,
        spill: Path | None = None,
    ) -> None:
        self.view, self._first, self._next = view, first, view.blocks - 1
        self._stream = Stream(view, windows, device=device, dtype=dtype)
        self._ending = Ending(self._stream, windows, labels)
        self.targets = self._ending.targets
        self.gradient_STD = self._stream.hidden_STD  # first the residual; from the loss on its gradient
        with nullcontext() if spill is None else disk(spill.parent):
            self._inputs_LSTD = new_buffer((view.blocks - first, *self.gradient_STD.shape), dtype, spill)
        for index in track(range(view.blocks), "gradients: blocks forward"):
            if index >= first:
                self._inputs_LSTD[index - first] = self._stream.hidden_STD
            self._stream.advance(view.block(index))
            give_back()
        self.loss = self._loss()
        give_back()

    def blocks(self) -> Iterator[BlockView]:
        """Read and yield the blocks, one at a time, from the last to `first`."""
        for index in track(range(self.view.blocks - 1, self._first - 1, -1), "gradients: blocks backward"):
            yield self.view.block(index)
            give_back()

    def retreat(self, block: BlockView, listeners: Mapping[str, PairListener]) -> None:
        """Carry the gradient of the residual back through a block.

        Args:
            block: the next block on the way back.
            listeners: canonical matrix name -> a function called once per batch of windows; batches come in no fixed
                order.

        Raises:
            NotFiniteError: the gradient at the input of the block holds NaN or infinity.
        """
        assert block.index == self._next, "blocks are passed from the last to the first"
        inputs_STD = self._inputs_LSTD[block.index - self._first]
        with self._stream.loaded(block, forward_only=False) as module, torch.enable_grad():
            module.requires_grad_(False)
            for rows, arguments in self._stream.batches(block.index):
                entering_BTD = (
                    inputs_STD[rows, :, : block.dims.enters].detach().to(self._stream.device).requires_grad_()
                )
                hooks = _listen(module, block, listeners, entering_BTD.shape[:2])
                leaving_BTD = module(entering_BTD, **arguments)
                gradient_BTD = self._stream.hidden(rows, block.dims.leaves)
                self.gradient_STD[rows, :, : block.dims.enters] = torch.autograd.grad(
                    leaving_BTD, entering_BTD, gradient_BTD
                )[0]
                for hook in hooks:
                    hook.remove()
                del leaving_BTD
        self._next -= 1
        if not self.gradient_STD[..., : block.dims.enters].isfinite().all():
            raise NotFiniteError(
                f"block {block.index}: the gradient of the loss is not finite (NaN or infinity); "
                "the checkpoint is damaged, or its dtype is too narrow: try --dtype float32"
            )

    def _loss(self) -> float:
        """Turn the last hidden state into the gradient of the loss, in place, some tokens at a time; returns the mean
        loss.
        """
        width, total = self.view.dims(self.view.blocks - 1).leaves, 0.0
        with self._ending.loaded() as (norm, head):
            for rows in track(list(self._stream.slices()), "gradients: head"):
                chunks = self._ending.chunks(self._stream.hidden(rows, width), rows)
                parts = [_head_gradient(norm, head, *chunk) for chunk in chunks]
                total += sum(loss for loss, _ in parts)
                gradient_ND = torch.cat([gradient for _, gradient in parts])
                self.gradient_STD[rows, :, :width] = gradient_ND.unflatten(0, (rows.stop - rows.start, -1)).to("cpu")
        check_loss(total)
        return total / self.targets


@torch.enable_grad()
def _head_gradient(norm: nn.Module, head: Head, hidden_ND: Tensor, target_N: Tensor) -> tuple[float, Tensor]:
    """The summed loss of some tokens, and its gradient with respect to their last hidden state."""
    leaf_ND = hidden_ND.detach().requires_grad_()
    logits_NV = at_least_float32(head(norm(leaf_ND)))
    loss = nn.functional.cross_entropy(logits_NV, target_N, ignore_index=IGNORE, reduction="sum")
    return float(loss.detach()), torch.autograd.grad(loss, leaf_ND)[0]


def _listen(
    module: nn.Module, block: BlockView, listeners: Mapping[str, PairListener], batch: torch.Size
) -> list[RemovableHandle]:
    """Set hooks on the linear modules that hold the matrices. Each part of a fused module gets its own rows."""

    def tell(names: tuple[str, ...], x: Tensor, g: Tensor) -> None:
        parts = g.reshape(*batch, -1).split([block.dims.shape(name)[0] for name in names], dim=-1)
        for name, part in zip(names, parts, strict=True):
            if name in listeners:
                listeners[name](x.reshape(*batch, -1), part)  # the MLP of OPT flattens windows

    def after(names: tuple[str, ...], _: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        output.register_hook(partial(tell, names, inputs[0].detach()))

    fused = {block.family.matrices[name]: block.family.fused(name) for name in listeners}
    return [module.get_submodule(path).register_forward_hook(partial(after, names)) for path, names in fused.items()]


def check_reacts(method: str, scores: Iterable[Tensor]) -> None:
    """Raise HopelessError if all scores are zero, because all gradients are zero."""
    if not any(score.any() for score in scores):
        raise HopelessError(
            f"{method}: all gradients are zero, so no part is more important than another; give other text, "
            "or check the model with `secateur eval`"
        )


def weight_gradient(x_NI: Tensor, g_NO: Tensor) -> Tensor:
    """Return dL/dW [O, I] of y = x W^T, from the pairs (x, g) of N tokens, in float32 or better."""
    return at_least_float32(g_NO).t() @ at_least_float32(x_NI)


def mask_gradient(x_BTI: Tensor, g_BTO: Tensor, weight_OI: Tensor) -> Tensor:
    """Return dL/dm of y = (m * x) W^T at m = 1, for each window: [B, I], float32 or better.

    A unit that spans several inputs of the matrix, such as a head before `o`, has one mask. Its gradient is the sum
    over these inputs.
    """
    back_BTI = at_least_float32(g_BTO) @ at_least_float32(weight_OI).to(g_BTO.device)
    return (back_BTI * at_least_float32(x_BTI)).sum(1)
