"""`--modules auto` and `--modules owl`: the sparsity of each matrix of each block, with as many weights removed in all as at one sparsity for all.

`auto` measures. Each matrix is pruned alone, from the dense weights and by the dense model's statistics, at a few levels, and the loss it adds is
taken on a part of the calibration text; `curves.cheapest` then spends the budget where it costs least. Losses of matrices pruned together do not quite add
up, so the result is held against one sparsity for all on the same text, and the better of the two is taken. The report that asks for this (module-specific
pruning, section 4.2) does not say how.

`owl` is the baseline of the literature (arXiv:2310.05175, section 3.2): blocks with more outliers keep more. An outlier is an entry of |W_ij| ||X_j||_2 above M
times the mean of its block; a block's density departs from the mean one by up to lambda, in proportion to its share of outliers. M = 5 and lambda = 0.08 are
the paper's for LLaMA. A rate that would fall below 0, or leave next to nothing of a block, is held, and the others move together until as much goes as asked.

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
from secateur.plan.rates import Rates
from secateur.prune.allocation.curves import HIGHEST, Curve, cheapest
from secateur.prune.allocation.dense import DenseModel
from secateur.prune.driver import Job, collect

LEVELS = (0.35, 0.5, 0.7, 0.9)
TOKENS = 4096  # of calibration text that losses are measured on
WORST = 100.0  # nats a token, in place of a loss that is not finite
OUTLIER, SPREAD = 5.0, 0.08  # M and lambda of OWL


@dataclass(frozen=True)
class Allocation:
    """What was decided.

    Attributes:
        rates: the sparsity of each matrix.
        facts: what the decision rests on; goes into plan.json.
    """

    rates: Rates
    facts: dict[str, Any]

    @staticmethod
    def read(facts: dict[str, Any]) -> Allocation:
        """From the facts alone."""
        return Allocation(tuple(dict(rates) for rates in facts["rates"]), facts)


def allocate(job: Job, load: Callable[[], PreTrainedModel], windows: Tensor) -> Allocation:
    """Decide the sparsity of each matrix.

    Args:
        job: its `allocation` says how, its rates hold the one sparsity that sets the budget.
        load: gives the whole model on the device of the job, to be changed in place; called where it is needed.
        windows: calibration token ids [S, T].

    Raises:
        NotFiniteError: an input is not finite; the block and the matrix are named.
    """
    if job.allocation == "owl":
        return _by_outliers(job, windows)
    return _measured(job, DenseModel(job, load(), windows), windows)


def cells_to_measure(job: Job) -> float:
    """How many forwards of all blocks over `TOKENS` tokens the measurements cost."""
    count, blocks = sum(len(rates) for rates in job.rates), job.view.blocks
    return 3 + count * len(LEVELS) * (blocks + 1) / (2 * blocks) if job.allocation == "auto" else 0.0


def _measured(job: Job, dense: DenseModel, windows: Tensor) -> Allocation:
    some_ST = spread_over(windows, TOKENS)
    batches = list(some_ST.to(job.device).split(max(1, TOKENS_A_BATCH // some_ST.shape[1])))
    loss, curves = sensitivities(dense, batches, LEVELS)
    losses = {}
    with dense.pruned(job.rates) as budget:  # as the method counts
        losses["uniform"] = dense.loss(batches)
    found = cheapest(LEVELS, curves, budget)
    rates: Rates = tuple({} for _ in range(job.view.blocks))
    for curve, rate in zip(curves, found, strict=True):
        rates[curve.block][curve.name] = rate
    with dense.pruned(rates):
        losses["auto"] = dense.loss(batches)
    ends = f"from {loss:.4f} to {losses['auto']:.4f}, at one sparsity for all to {losses['uniform']:.4f}"
    say(f"auto: on {some_ST.numel():,} calibration tokens the loss goes {ends}")
    if not losses["auto"] < losses["uniform"]:  # also where one of them is not finite
        say("auto: one sparsity for all is no worse, and is taken")
        rates = job.rates
    increase = [
        {c.name: [round(value, 7) for value in c.increase_L] for c in curves if c.block == index}
        for index in range(job.view.blocks)
    ]
    measured = {
        "tokens": some_ST.numel(),
        "dense_loss": loss,
        "loss": losses,
        "levels": list(LEVELS),
        "increase": increase,
    }
    return Allocation(rates, {"name": "auto", "rates": [dict(r) for r in rates], **measured})


def spread_over(windows: Tensor, tokens: int) -> Tensor:
    """Windows from all over the text, with about so many tokens."""
    wanted = min(len(windows), math.ceil(tokens / windows.shape[1]))
    return windows[:: len(windows) // wanted][:wanted]


def sensitivities(dense: DenseModel, batches: list[Tensor], levels: Sequence[float]) -> tuple[float, list[Curve]]:
    """What pruning each matrix alone adds to the loss.

    Args:
        dense: the model; the rates of its job say which matrices are meant.
        batches: token ids [B, T] each.
        levels: the sparsities to try.

    Returns:
        The dense loss, nats a token, and a curve for each matrix.
    """
    view, _ = dense.job.view, dense.statistics  # collected before the bar below, not inside it
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
    """OWL (arXiv:2310.05175, section 3.2)."""
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
    by_rows = job.method.says.by_rows
    rates = balanced(view, job.rates, change, by_rows=by_rows is not None and by_rows(job.options))
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
    """Rates that depart by `-change` of their block, all moved by one amount such that as many weights go.

    They stay within [0, `HIGHEST`], or go halfway from the given rate to 1 where that is more.

    Args:
        view: the model.
        rates: at one sparsity, which sets how many weights go.
        change: of each block.
        by_rows: whether the method takes whole numbers of weights from each row, or from each matrix.
    """
    shapes = [{name: view.dims(index).shape(name) for name in rate} for index, rate in enumerate(rates)]

    def moved(by: float) -> Rates:
        return tuple(
            {n: min(max(HIGHEST, (1 + r) / 2), max(0.0, r - less + by)) for n, r in rate.items()}
            for rate, less in zip(rates, change, strict=True)
        )

    def removed(found: Rates) -> int:
        pairs = ((*shapes[index][n], r) for index, rate in enumerate(found) for n, r in rate.items())
        return sum(
            outputs * math.floor(inputs * r) if by_rows else math.floor(outputs * inputs * r)
            for outputs, inputs, r in pairs
        )

    budget, low, high = removed(rates), -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if removed(moved(middle)) >= budget else (middle, high)
    return moved(high)
