"""ShortGPT: remove the whole blocks that change the residual stream least.

From arXiv:2403.03853. The block influence (its equation 1) is one minus the cosine between what enters a block and what
leaves it, mean over tokens. The blocks of the lowest influence are dropped. All are chosen at once, from one pass of
the dense model. The sparsity is the fraction of blocks, rounded to whole blocks. The result is a stock model with fewer
blocks.

With `fit` the block before a dropped stretch makes up for it by least squares, as in ReplaceMe (arXiv:2505.02819);
`calibrate/making_up.py` says how. The result stays stock.

Differences from the paper's description: the calibration text may be any text (the paper's PG19 is a set of books). Of
blocks with equal influence the earlier one is dropped. Blocks at either end can be kept (`first`, `last`).

Shape letters: N tokens, D residual.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.calibrate.making_up import MakingUp, check_makes_up
from secateur.calibrate.statistics import check_damping
from secateur.calibrate.stream import Stream
from secateur.core.errors import NotFiniteError, UsageError
from secateur.core.memory import give_back
from secateur.core.numbers import at_least_float32
from secateur.core.progress import say, track
from secateur.cut.block import cut_block
from secateur.models.view import ModelView
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
        fit: set the last matrix of the block before a dropped stretch to make up for it. Nothing does where the model
            begins with the stretch.
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
        check_damping("shortgpt", self.damping, "a moment may be singular")


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
        check_makes_up(view, "shortgpt")
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
    outlines = [BlockPlan(index, dropped=index in dropped, influence=value) for index, value in enumerate(influence)]
    if not options.fit:
        return outlines
    return LaterPlans(outlines, MakingUp(view, data, outlines, cut_block, options.damping, "shortgpt", run))


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
