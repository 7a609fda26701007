"""Blocks that make up for what is gone: the last matrix of each is fitted to what the dense model has behind the gap.

A block adds to the residual stream what its last matrix W writes: `down`, or `o` where the MLP is gone. Where a part of
the block is removed, or the blocks after it are dropped, W + D takes its place, with the least

    sum |x D^T - (target - y)|^2 + damping mean(sum x^2) |D|^2

with sums over all tokens and the mean over the features of x. Here x is the input of the matrix and y the output of the
block, both where the dense model's stream enters it, and the target is what leaves the last dropped block in the dense
model. ReplaceMe (arXiv:2505.02819, its equation 5) fits a D x D matrix behind the MLP and multiplies the two; here all
of W is fitted.

Shape letters: S windows, T tokens, B windows of a batch, N tokens, D residual, F inputs of the last matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from secateur.calibrate.statistics import SecondMoment, damped
from secateur.calibrate.stream import Stream
from secateur.core.errors import HopelessError, SecateurError
from secateur.core.memory import give_back
from secateur.core.numbers import at_least_float32
from secateur.core.progress import say
from secateur.models.family import ROTATE
from secateur.models.view import BlockView, ModelView
from secateur.plan.plan import BlockPlan
from secateur.plan.run import Run


def check_makes_up(view: ModelView, method: str) -> None:
    """Refuse a model whose blocks cannot make up for others.

    Raises:
        SecateurError: a norm stands between the MLP and the residual stream, or blocks write parts of it.
    """
    why = None
    if view.family.post_norms:
        why = f"{view.family.why_not(ROTATE)}, so what a block adds is linear in no matrix"
    elif view.dims(0).residual is not None:
        why = "its blocks write parts of the residual stream, so one cannot make up for another"
    if why is not None:
        raise SecateurError(f"{view.name}: {method}: fit: {why}; leave out fit, or reconstruct the result")


class MakingUp:
    """The plans of blocks, with new weights where something is gone in a block or right after it.

    Args:
        view: the dense model.
        windows: token ids [S, T].
        outlines: the plans of all blocks, which remove parts or whole blocks.
        cut: returns a block after its plan.
        damping: see above.
        method: the name of the method, for messages.
        run: device, dtype and spill file.
    """

    def __init__(
        self,
        view: ModelView,
        windows: Tensor,
        outlines: Sequence[BlockPlan],
        cut: Callable[[BlockView, BlockPlan], BlockView],
        damping: float,
        method: str,
        run: Run,
    ) -> None:
        self._view, self._windows, self._outlines, self._cut = view, windows, outlines, cut
        self._damping, self._method, self._run = damping, method, run
        self._stream: Stream | None = None
        self._next = 0
        if outlines[0].dropped:
            say(f"{method}: fit: no block stays before the first ones, so nothing makes up for them")

    def __call__(self, index: int) -> BlockPlan:
        """Return the plan of a block with its new weights; quickest in order.

        Raises:
            HopelessError: the dtype cannot hold the new weights.
        """
        plan, end = self._outlines[index], index + 1
        while end < len(self._outlines) and self._outlines[end].dropped:
            end += 1
        if plan.dropped or not (plan.keep or end > index + 1):
            return plan
        if self._stream is None or index < self._next:
            run, self._stream, self._next = self._run, None, 0  # the old one goes before a new one is made
            self._stream = Stream(self._view, self._windows, device=run.device, dtype=run.dtype, spill=run.spill)
        self._advance(self._stream, index)
        entering_STD = self._stream.hidden_STD.clone()
        self._advance(self._stream, end)
        block = self._cut(self._view.block(index), plan)
        name = "o" if "mlp" in block.dims.missing else "down"
        weight_DF = _fitted(block, name, self._stream, entering_STD, self._damping)
        if not torch.isfinite(weight_DF).all():
            raise HopelessError(
                f"{self._method}: fit: the new weights of {name} in block {index} are not finite in {weight_DF.dtype};"
                " more damping may help: --set damping=0.1"
            )
        say(f"{self._method}: block {index} makes up for what is gone up to block {end - 1}")
        give_back()
        return replace(plan, updates={name: weight_DF})

    def _advance(self, stream: Stream, index: int) -> None:
        """Carry the stream to where block `index` begins."""
        while self._next < index:
            stream.advance(self._view.block(self._next))
            self._next += 1
            give_back()


@torch.inference_mode()
def _fitted(block: BlockView, name: str, target: Stream, entering_STD: Tensor, damping: float) -> Tensor:
    """Return W + D [D, F], for the matrix `name` of a block that `entering_STD` enters and `target` should leave."""
    weight_DF = block.matrix(name)
    moment = SecondMoment(weight_DF.shape[1], target.device)
    cross_DF = torch.zeros(weight_DF.shape, dtype=torch.float64, device=target.device)
    inputs: list[Tensor] = []
    with target.loaded(block) as module:
        matrix = module.get_submodule(block.family.matrices[name])
        hook = matrix.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for rows, arguments in target.batches(block.index):
            leaving_BTD = module(entering_STD[rows].to(target.device), **arguments)
            x_NF = inputs.pop().flatten(0, -2)
            missing_BTD = target.hidden(rows, leaving_BTD.shape[-1]) - leaving_BTD
            moment.update(x_NF)
            cross_DF += at_least_float32(missing_BTD).flatten(0, -2).t() @ at_least_float32(x_NF)
        hook.remove()
    change_FD = torch.linalg.solve(damped(moment.sum_II, damping), cross_DF.cpu().t())
    made_DF: Tensor = (weight_DF.double().cpu() + change_FD.t()).to(block.dtype or weight_DF.dtype)
    return made_DF.contiguous()
