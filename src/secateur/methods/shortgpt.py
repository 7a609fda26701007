"""ShortGPT: remove the whole blocks that change the residual stream least.

From arXiv:2403.03853. The block influence (its equation 1) is one minus the cosine between what enters a block and what
leaves it, mean over tokens. The blocks of the lowest influence are dropped. All are chosen at once, from one pass of
the dense model. The sparsity is the fraction of blocks, rounded to whole blocks. The result is a stock model with fewer
blocks.

With `fit` the MLP of the block before a dropped stretch makes up for it: the matrix that writes its output becomes the
least-squares best for what leaves the stretch in the dense model, which is linear in it. ReplaceMe (arXiv:2505.02819,
its equation 5) fits a matrix behind that one and multiplies the two; here all of it is fitted. The result stays stock.

Differences from the paper's description: the calibration text may be any text (the paper's PG19 is a set of books). Of
blocks with equal influence the earlier one is dropped. Blocks at either end can be kept (`first`, `last`).

Shape letters: N tokens, D residual, F feed-forward units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.calibrate.statistics import SecondMoment, damped
from secateur.calibrate.stream import Stream
from secateur.core.errors import HopelessError, NotFiniteError, SecateurError, UsageError
from secateur.core.memory import give_back
from secateur.core.numbers import at_least_float32
from secateur.core.progress import say, track
from secateur.models.family import ROTATE
from secateur.models.view import BlockView, ModelView
from secateur.plan.counts import removed_blocks
from secateur.plan.plan import BlockPlan, LaterPlans
from secateur.plan.quantity import BLOCKS, check_droppable
from secateur.plan.run import Run

CALIBRATION = "wikitext2"
REMOVES = BLOCKS
WITHOUT_PARTS = True
ADVICE = (
    "--set fit=true: the result stays stock and loses far less, perplexity 57.89 against 110.34 with 21% of"
    " SmolLM2-135M removed"
)
DEMO = [{"sparsities": [0.17]}]


@dataclass(frozen=True)
class ShortGPT:
    """Options.

    Attributes:
        first: the number of blocks at the beginning that are never removed.
        last: the number of blocks at the end that are never removed.
        fit: set the matrix at the end of the MLP before a dropped stretch to make up for it. Where no block stays
            before the stretch, or the block has no MLP, nothing does.
        damping: with `fit`, added to the diagonal of the second moment, in units of its mean.
    """

    first: int = 0
    last: int = 0
    fit: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            if getattr(self, name) < 0:
                raise UsageError(f"shortgpt: {name} is {getattr(self, name)}; it is a number of blocks, at least 0")
        if not self.damping > 0:
            raise UsageError(
                f"shortgpt: damping is {self.damping:g}; it must be above 0, since a moment may be singular"
            )


def _streams(options: ShortGPT) -> int:
    return 2 if options.fit else 1  # that of the dense model, and what entered the block that is fitted


STREAMS = _streams


def check(view: ModelView, sparsity: float, options: ShortGPT) -> None:
    """Refuse impossible requests before the work begins.

    Raises:
        UsageError: the sparsity is less than half a block, or more blocks than may be removed.
        SecateurError: the residual stream of the model is rotated, so that a block fits only its neighbours; or `fit`
            is asked of a family with a norm between the MLP and the residual stream, or of blocks that write parts
            of it.
    """
    check_droppable(view)
    if options.fit:
        _check_fit(view)
    remove, free = removed_blocks(sparsity, view.blocks), view.blocks - options.first - options.last
    if not remove:
        raise UsageError(
            f"shortgpt: --sparsity {sparsity:g} of {view.blocks} blocks is less than half a block; the least is"
            f" {0.5 / view.blocks:.4g}"
        )
    if remove == view.blocks:
        raise UsageError(
            f"shortgpt: --sparsity {sparsity:g} of {view.blocks} blocks would leave nothing; use less than"
            f" {1 - 0.5 / view.blocks:.4g}"
        )
    if remove > free:
        raise UsageError(
            f"shortgpt: --sparsity {sparsity:g} removes {remove} of {view.blocks} blocks, but first={options.first} and"
            f" last={options.last} allow {max(0, free)}; use a smaller --sparsity, first or last"
        )


def _check_fit(view: ModelView) -> None:
    why = None
    if view.family.post_norms:
        why = f"{view.family.why_not(ROTATE)}, so what a block adds is linear in no matrix"
    elif view.dims(0).residual is not None:
        why = "its blocks write parts of the residual stream, so one cannot make up for another"
    if why is not None:
        raise SecateurError(f"{view.name}: shortgpt: fit: {why}; leave out fit, or reconstruct the result")


def rehearsal(view: ModelView, options: ShortGPT, sparsity: float) -> tuple[ShortGPT, dict[str, int]]:
    """The same work on a model of two blocks, which all may lose something."""
    return replace(options, first=0, last=0), {}


def gradual(options: ShortGPT) -> bool:
    """Return True: the influences of one run serve the next."""
    return True


def plan_model(view: ModelView, data: Tensor, options: ShortGPT, run: Run) -> Sequence[BlockPlan]:
    """Measure the influence of every block on windows `data` [S, T], drop the blocks of the lowest, and fit others.

    Raises:
        NotFiniteError: the residual stream holds NaN or infinity; the block is named.
    """
    measured = run.once(lambda: {"influence": torch.tensor(block_influence(view, data, run), dtype=torch.float64)})
    influence: list[float] = measured["influence"].tolist()
    candidates = influence[options.first : view.blocks - options.last]
    lowest = sorted(range(len(candidates)), key=lambda number: (candidates[number], number))[
        : removed_blocks(run.sparsity, view.blocks)
    ]
    dropped = {options.first + number for number in lowest}
    say(f"shortgpt: dropping {', '.join(map(str, sorted(dropped)))} of blocks 0 to {view.blocks - 1}")
    if options.fit and 0 in dropped:
        say("shortgpt: fit: no block stays before the first ones, so nothing makes up for them")
    outlines = [BlockPlan(index, dropped=index in dropped, influence=value) for index, value in enumerate(influence)]
    return LaterPlans(outlines, _Fit(view, data, outlines, options, run)) if options.fit else outlines


class _Fit:
    """The fit of the blocks that stay before a dropped stretch, on the stream of the dense model."""

    def __init__(
        self, view: ModelView, windows: Tensor, outlines: Sequence[BlockPlan], options: ShortGPT, run: Run
    ) -> None:
        self._view, self._windows, self._outlines, self._options, self._run = view, windows, outlines, options, run
        self._stream: Stream | None = None
        self._next = 0

    def __call__(self, index: int) -> BlockPlan:
        """Return the plan of a block, with a new weight where the blocks after it go; quickest in order."""
        plan, end = self._outlines[index], index + 1
        while end < len(self._outlines) and self._outlines[end].dropped:
            end += 1
        if plan.dropped or end == index + 1 or "mlp" in self._view.dims(index).missing:
            return plan
        if self._stream is None or index < self._next:
            run, self._stream, self._next = self._run, None, 0  # the old one goes before a new one is made
            self._stream = Stream(self._view, self._windows, device=run.device, dtype=run.dtype, spill=run.spill)
        self._advance(self._stream, index)
        entering_STD = self._stream.hidden_STD.clone()
        self._advance(self._stream, end)
        weight_DF = _fitted(self._view.block(index), self._stream, entering_STD, self._options.damping)
        say(f"shortgpt: block {index} makes up for {', '.join(map(str, range(index + 1, end)))}")
        give_back()
        return replace(plan, updates={"down": weight_DF})

    def _advance(self, stream: Stream, index: int) -> None:
        """Carry the stream to where block `index` begins."""
        while self._next < index:
            stream.advance(self._view.block(self._next))
            self._next += 1
            give_back()


@torch.inference_mode()
def _fitted(block: BlockView, target: Stream, entering_STD: Tensor, damping: float) -> Tensor:
    """Return W + D with the least |x D^T - (target - y)|^2 + damping |D|^2 over all tokens.

    Args:
        block: the block; x is the input of its matrix `down`, W, and y its output.
        target: the stream at the place that the block should reach, [S, T, D].
        entering_STD: what enters the block.
        damping: in units of the mean diagonal of the second moment of x.

    Raises:
        HopelessError: the dtype cannot hold the new weights.
    """
    weight_DF = block.matrix("down")
    moment = SecondMoment(weight_DF.shape[1], target.device)
    cross_DF = torch.zeros(weight_DF.shape, dtype=torch.float64, device=target.device)
    inputs: list[Tensor] = []
    with target.loaded(block) as module:
        path = block.family.matrices["down"]
        hook = module.get_submodule(path).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for rows, arguments in target.batches(block.index):
            leaving_BTD = module(entering_STD[rows].to(target.device), **arguments)
            x_NF = inputs.pop().flatten(0, -2)
            missing_BTD = target.hidden(rows, leaving_BTD.shape[-1]) - leaving_BTD
            moment.update(x_NF)
            cross_DF += at_least_float32(missing_BTD).flatten(0, -2).t() @ at_least_float32(x_NF)
        hook.remove()
    change_DF = torch.linalg.solve(damped(moment.sum_II, damping), cross_DF.cpu().t()).t()
    made_DF: Tensor = (weight_DF.double().cpu() + change_DF).to(block.dtype or weight_DF.dtype)
    if not torch.isfinite(made_DF).all():
        raise HopelessError(
            f"shortgpt: fit: the new weights of block {block.index} are not finite in {made_DF.dtype}; more damping may"
            " help: --set damping=0.1"
        )
    return made_DF.contiguous()


def block_influence(view: ModelView, windows: Tensor, run: Run) -> list[float]:
    """Return 1 - E[cos(x_l, x_(l+1))] of every block, mean over all tokens of the windows [S, T], summed in float64.

    One block is in memory at a time.

    Raises:
        NotFiniteError: the output of a block holds NaN or infinity.
    """
    stream = Stream(view, windows, device=run.device, dtype=run.dtype, spill=run.spill)
    influence = []
    for block in track(view.iterate(), "shortgpt: blocks", view.blocks):
        total = torch.zeros((), dtype=torch.float64, device=run.device)

        def listen(before_ND: Tensor, after_ND: Tensor, total: Tensor = total) -> None:
            total += torch.nn.functional.cosine_similarity(
                at_least_float32(before_ND), at_least_float32(after_ND), dim=-1
            ).sum(dtype=torch.float64)

        stream.advance(block, listen)
        influence.append(1 - float(total) / windows.numel())
        if not math.isfinite(influence[-1]):
            raise NotFiniteError(
                f"block {block.index}: its output is not finite (NaN or infinity); the checkpoint is damaged, or try"
                " --dtype float32"
            )
        del block
        give_back()
    return influence
