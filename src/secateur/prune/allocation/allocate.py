"""`--modules auto` and `--modules owl`: choose the sparsity of each matrix of each block.

Both remove as many weights in total as one sparsity for all matrices would remove.

`auto` measures. It prunes each matrix alone at a few levels, from the dense weights and with the statistics of the
dense model, and measures the added loss on a part of the calibration text. `curves.cheapest` then spends the budget
where it costs least. Losses of matrices that are pruned together do not quite add up. So the result is compared with
one sparsity for all on the same text, and the better of the two is taken. The report that proposes module-specific
pruning (section 4.2) does not say how to choose the sparsities.

`owl` is the baseline of the literature (arXiv:2310.05175, section 3.2): blocks with more outliers keep more weights. An
outlier is an entry of |W_ij| ||X_j||_2 above M times the mean of its block. The density of a block differs from the
mean density by up to lambda, in proportion to its share of outliers. M = 5 and lambda = 0.08 are the values of the
paper for LLaMA. A rate that would fall below 0, or leave almost nothing of a block, is clamped. The other rates then
move together until the budget is met.

Shape letters: S windows, T tokens, B windows of a batch, L blocks, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.calibrate.stream import TOKENS_A_BATCH, Stream
from secateur.core.numbers import at_least_float32
from secateur.core.progress import say, track
from secateur.core.timing import Stopwatch
from secateur.methods import find_method
from secateur.models.view import ModelView
from secateur.plan.counts import removed_from_matrix
from secateur.plan.rates import Rates
from secateur.prune.allocation.curves import HIGHEST, Curve, cheapest
from secateur.prune.allocation.dense import DenseModel
from secateur.prune.driver import collect
from secateur.prune.job import Job

LEVELS = (0.35, 0.5, 0.7, 0.9)
TOKENS = 4096  # tokens of the calibration text on which losses are measured
WORST = 100.0  # nats per token, used in place of a loss that is not finite
OUTLIER, SPREAD = 5.0, 0.08  # M and lambda of OWL


@dataclass(frozen=True)
class Allocation:
    """The chosen sparsities.

    Attributes:
        rates: the sparsity of each matrix.
        facts: the measurements behind the choice; they go into plan.json.
    """

    rates: Rates
    facts: dict[str, Any]

    @staticmethod
    def read(facts: dict[str, Any]) -> Allocation:
        """Rebuild an allocation from its facts."""
        return Allocation(tuple(dict(rates) for rates in facts["rates"]), facts)


def allocate(job: Job, load: Callable[[], PreTrainedModel], windows: Tensor) -> Allocation:
    """Decide the sparsity of each matrix.

    Args:
        job: `job.allocation` names the way to choose; `job.rates` hold the one sparsity that sets the budget.
        load: returns the whole model on the device of the job, which may be changed in place; called only if needed.
        windows: calibration token ids [S, T].

    Raises:
        NotFiniteError: an input is not finite; the message names the block and the matrix.
    """
    if job.allocation == "owl":
        return _by_outliers(job, windows)
    return _measured(job, DenseModel(job, load(), windows), windows)


def measuring_seconds(
    small: Job, whole: Job, model: PreTrainedModel, windows: tuple[int, int], clock: Callable[[], float]
) -> float:
    """Return the seconds that the measurements of `auto` take, from a few of them on a model with some of the blocks.

    Args:
        small: the job on the small model, for the statistics of its blocks.
        whole: the job whose matrices are measured.
        model: the small model.
        windows: the number of windows of the whole run, and their tokens.
        clock: returns seconds.
    """
    samples, seqlen = windows
    count = min(samples, math.ceil(TOKENS / seqlen))
    together = max(1, TOKENS_A_BATCH // seqlen)
    draw = torch.Generator().manual_seed(0)
    ids_ST = torch.randint(0, int(small.view.config.vocab_size), (min(samples, 3 * together), seqlen), generator=draw)
    last = small.view.blocks - 1

    def seconds(work: Callable[[], object]) -> float:
        started = clock()
        work()
        return clock() - started

    def prune_each() -> None:
        for name in small.rates[last]:
            with dense.pruned(tuple({name: LEVELS[1]} if n == last else {} for n in range(last + 1))):
                pass

    dense = DenseModel(small, model, ids_ST)
    statistics = seconds(lambda: dense.statistics) / small.view.blocks / len(ids_ST)
    batch = [ids_ST[:together].to(small.device)]
    dense.loss(batch)  # the first one is slower
    entering = dense.leaving(last - 1, batch) if last else None
    whole_loss, from_last = seconds(lambda: dense.loss(batch)), seconds(lambda: dense.loss(batch, last, entering))
    block = (whole_loss - from_last) / last if last else from_last
    head = max(0.0, from_last - block)
    prune_each()
    cut = seconds(prune_each)
    batches, blocks = math.ceil(count / together), whole.view.blocks
    names = sum(len(rates) for rates in whole.rates) / blocks
    losses = batches * (3 * (head + blocks * block))  # of the dense model, of one sparsity for all, of the choice
    losses += batches * len(LEVELS) * names * sum(head + (blocks - index) * block for index in range(blocks))
    return losses + (len(LEVELS) + 2) * blocks * cut + statistics * samples * blocks


def _measured(job: Job, dense: DenseModel, windows: Tensor) -> Allocation:
    sample_ST = spread_over(windows, TOKENS)
    batches = list(sample_ST.to(job.device).split(max(1, TOKENS_A_BATCH // sample_ST.shape[1])))
    loss, curves = sensitivities(dense, batches, LEVELS)
    losses = {}
    with dense.pruned(job.rates) as budget:  # the number of weights that the method removes at one sparsity for all
        losses["uniform"] = dense.loss(batches)
    chosen = cheapest(LEVELS, curves, budget)
    rates: Rates = tuple({} for _ in range(job.view.blocks))
    for curve, rate in zip(curves, chosen, strict=True):
        rates[curve.block][curve.name] = rate
    with dense.pruned(rates):
        losses["auto"] = dense.loss(batches)
    ends = f"from {loss:.4f} to {losses['auto']:.4f}, at one sparsity for all to {losses['uniform']:.4f}"
    say(f"auto: on {sample_ST.numel():,} calibration tokens the loss goes {ends}")
    if not losses["auto"] < losses["uniform"]:  # written so that a loss that is NaN also takes this branch
        say("auto: one sparsity for all is no worse, and is taken")
        rates = job.rates
    increase = [
        {c.name: [round(value, 7) for value in c.increase_L] for c in curves if c.block == index}
        for index in range(job.view.blocks)
    ]
    measured = {
        "tokens": sample_ST.numel(),
        "dense_loss": loss,
        "loss": losses,
        "levels": list(LEVELS),
        "increase": increase,
    }
    return Allocation(rates, {"name": "auto", "rates": [dict(r) for r in rates], **measured})


def spread_over(windows: Tensor, tokens: int) -> Tensor:
    """Return windows spread evenly over the text, with about `tokens` tokens in total."""
    count = min(len(windows), math.ceil(tokens / windows.shape[1]))
    return windows[:: len(windows) // count][:count]


def sensitivities(dense: DenseModel, batches: list[Tensor], levels: Sequence[float]) -> tuple[float, list[Curve]]:
    """Measure the loss that pruning each matrix alone adds.

    Args:
        dense: the model; the rates of its job list the matrices to measure.
        batches: token ids [B, T] each.
        levels: the sparsities to try.

    Returns:
        The dense loss in nats per token, and one curve per matrix.
    """
    view, _ = dense.job.view, dense.statistics  # collect the statistics now, before the progress bar below starts
    loss, entering = dense.loss(batches), None
    curves = []
    for index in track(range(view.blocks), "auto: blocks measured"):
        for name in dense.job.rates[index]:
            increase = []
            for level in levels:
                with dense.pruned(tuple({name: level} if n == index else {} for n in range(view.blocks))):
                    more = dense.loss(batches, index, entering) - loss
                    increase.append(more if math.isfinite(more) else WORST)
            curves.append(Curve(index, name, *view.dims(index).shape(name), tuple(increase)))
        if index < view.blocks - 1:
            entering = dense.leaving(index, batches, entering)
    return loss, curves


def _by_outliers(job: Job, windows: Tensor) -> Allocation:
    """Allocate by the share of outliers in each block: OWL (arXiv:2310.05175, section 3.2)."""
    view, wanda = job.view, replace(job, method=find_method("wanda"))
    stream, watch = Stream(view, windows, device=job.device, dtype=job.dtype), Stopwatch()
    share_L = torch.zeros(view.blocks, dtype=torch.float64)
    for index in track(range(view.blocks), "owl: blocks"):
        block = view.block(index, job.rates[index])
        statistics = collect(wanda, block, stream, watch)
        scores = [
            (at_least_float32(block.matrix(n)).abs() * statistics[n].norm_I.to(torch.float32).cpu()).flatten()
            for n in block.rates
        ]
        score_N = torch.cat(scores)
        share_L[index] = (score_N > OUTLIER * score_N.mean()).double().mean()
        stream.advance(block)
    span = share_L.max() - share_L.min()
    above_L = 2 * SPREAD * (share_L - share_L.min()) / span if span > 0 else torch.zeros_like(share_L)
    change = (above_L - above_L.mean()).tolist()
    rates = balanced(view, job.rates, change, by_rows=job.method.by_rows(job.options))
    return Allocation(
        rates,
        {
            "name": "owl",
            "rates": [dict(r) for r in rates],
            "outliers": share_L.tolist(),
            "threshold": OUTLIER,
            "spread": SPREAD,
        },
    )


def balanced(view: ModelView, rates: Rates, change: Sequence[float], *, by_rows: bool) -> Rates:
    """Return rates lowered by the `change` of their block, then all raised by one amount that meets the budget.

    A rate stays within [0, `HIGHEST`]. The upper limit is halfway from the given rate to 1 if that is above `HIGHEST`.

    Args:
        view: the model.
        rates: the rates at one sparsity for all, which set the number of weights to remove.
        change: the amount to subtract, for each block.
        by_rows: whether the method rounds down to whole weights in each row, or else in each matrix.
    """
    shapes = [{name: view.dims(index).shape(name) for name in rate} for index, rate in enumerate(rates)]

    def moved(by: float) -> Rates:
        return tuple(
            {n: min(max(HIGHEST, (1 + r) / 2), max(0.0, r - less + by)) for n, r in rate.items()}
            for rate, less in zip(rates, change, strict=True)
        )

    def removed(candidate: Rates) -> int:
        pairs = ((*shapes[index][n], r) for index, rate in enumerate(candidate) for n, r in rate.items())
        return sum(removed_from_matrix(r, outputs, inputs, by_rows=by_rows) for outputs, inputs, r in pairs)

    # bisection for the smallest amount that removes at least the budget; 60 halvings reach float precision
    budget, low, high = removed(rates), -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if removed(moved(middle)) >= budget else (middle, high)
    return moved(high)
