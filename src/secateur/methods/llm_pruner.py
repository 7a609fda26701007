"""LLM-Pruner: coupled units go whole, those whose removal changes the loss least by its Taylor expansion.

From arXiv:2305.11627 (NeurIPS 2023), equations 3 to 5. A group is what must go together: a key-value head with the query heads that use it and their
part of the output projection; a feed-forward unit with its rows of gate and up and its column of down. With g the gradient of the mean loss of a few
windows and g_j that of window j, removing a weight w changes the loss by

    first     -w g
    second    w^2 F / 2, with F the mean of g_j^2 (the diagonal of the empirical Fisher)
    mixed     their sum

The importance of a group's part of one matrix, biases with it, is |sum of the changes of its weights| (granularity `vector`, equation 3) or the sum
of their sizes (`parameter`, equation 5); that of the group is the sum, mean, largest or product over its matrices, or that of the last alone. Blocks at
both ends stay whole. Weights that stay are unchanged. The sparsity is the fraction of the parameters of the whole model to remove.

With `mode=channel` the groups are the features of the residual stream: one choice for all blocks, which then neither read nor write the others (the rows and
columns of all their matrices, and gains of norms, go; norms are over the features that are left). Embeddings, final norm and head keep all features,
where the authors narrow them too: a feature that no block uses carries the token it began with.

Differences from the authors' code: gradients are reduced to scores block by block on the way back (`calibrate/backward.py`; they keep one for every
weight); with shared key-value heads the query heads of a group are those that use it (they fold head h onto h modulo the number of groups); the part
of a head in a matrix is one structure (they take sizes channel by channel); biases count; global ranking is by importance a parameter; the blocks left
out scale with the depth. Any text will do in place of BookCorpus, which can no longer be loaded; of that of a task (`--calibration task:NAME`) the loss is
on the right answers alone. Ties: the unit with the lower index is removed first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.calibrate.backward import Backward, check_reacts, weight_gradient
from secateur.core.errors import HopelessError, SecateurError, UsageError
from secateur.core.numbers import at_least_float32
from secateur.models.family import HEADS, SELECT, check_can
from secateur.models.runtime import SELECT_FIRST
from secateur.models.spaces import INNER, MEMBERS, RESIDUAL_WRITERS
from secateur.models.view import BlockView, ModelView
from secateur.plan.allocate import keep_units
from secateur.plan.budget import unit_parameters
from secateur.plan.plan import BlockPlan
from secateur.plan.quantity import PARAMETERS
from secateur.plan.run import Run
from secateur.plan.structures import SELECTIONS, Structures, find_structures

CALIBRATION = "c4"
SAMPLES, SEQLEN = 10, 128
REMOVES = PARAMETERS
GRADIENTS = True  # what a dry run is to count
DEMO = [{"options": {"ranking": "global"}, "sparsities": [0.2]}]

Scores = list[dict[str, Tensor]]
"""One entry a block: space -> score_U, float64; empty for a block that stays whole."""

_REDUCE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda score_MU: score_MU.sum(0),
    "mean": lambda score_MU: score_MU.mean(0),
    "max": lambda score_MU: score_MU.amax(0),
    "product": lambda score_MU: (
        score_MU.log().mean(0).exp()
    ),  # its root, which does not underflow and is of one size with the others
    "last": lambda score_MU: score_MU[-1],
}
_CHOICES = {
    "mode": ("block", "channel"),
    "order": ("first", "second", "mixed"),
    "granularity": ("parameter", "vector"),
    "reduce": tuple(_REDUCE),
    "ranking": ("local", "global"),
}


@dataclass(frozen=True)
class LLMPruner:
    """Options.

    Attributes:
        mode: what goes: units of each `block`, or each `channel` of the residual stream in all blocks.
        order: of the Taylor expansion: `first`, `second`, or `mixed`.
        granularity: what the size of the change is taken of, before sizes are summed: every `parameter`, or the `vector` of a group's weights in one matrix.
        reduce: from the matrices of a group to the group: `sum`, `mean`, `max`, `product` (its root), or `last` (the matrix that reads the unit).
        ranking: of units: `local` (the same share of every space of every block, to a unit) or `global` (all blocks compete, by importance a parameter).
        keep_first: how many blocks stay whole at the beginning (default: 4 of 32, in proportion, rounded down).
        keep_last: the same at the end (default: 2 of 32).
    """

    mode: str = "block"
    order: str = "first"
    granularity: str = "parameter"
    reduce: str = "sum"
    ranking: str = "local"
    keep_first: int | None = None
    keep_last: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"llm_pruner: unknown {name} '{getattr(self, name)}' (allowed: {', '.join(allowed)})")
        for name in ("keep_first", "keep_last"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise UsageError(f"llm_pruner: {name} is {value}; it is a number of blocks, 0 or more")
            if value is not None and self.mode == "channel":
                raise UsageError(f"llm_pruner: {name} does not go with mode=channel: all blocks share the channels")

    def pruned_blocks(self, blocks: int) -> range:
        """The blocks that may lose units."""
        first = blocks * 4 // 32 if self.keep_first is None else self.keep_first
        last = blocks * 2 // 32 if self.keep_last is None else self.keep_last
        return range(first, blocks - last)


def check(view: ModelView, sparsity: float | None, options: LLMPruner) -> None:
    """Refuse before the work what cannot be done.

    Raises:
        UsageError: there is no sparsity, no block is left to prune, or the sparsity would empty one.
        SecateurError: the channels are no longer those of a stock model, or the family cannot lose channels or heads.
    """
    if sparsity is None:
        raise UsageError("llm_pruner needs --sparsity S, the fraction of the parameters of the whole model to remove")
    if sparsity == 0:
        return
    if options.mode == "channel":
        check_can(view.family, SELECT, view.name)
        _check_channels(view, sparsity)
        return
    check_can(view.family, HEADS, view.name)
    inside = options.pruned_blocks(view.blocks)
    if not inside:
        raise UsageError(
            f"llm_pruner: keep_first and keep_last leave none of {view.blocks} blocks to prune; lower them"
        )
    most = sum(_most(view, index) for index in inside) / view.parameters()
    if sparsity > most:
        raise UsageError(
            f"llm_pruner: --sparsity {sparsity:g} would empty a block: with a key-value head and a feed-forward unit left in each of blocks "
            f"{inside.start} to {inside.stop - 1}, at most {most:.4f} of the parameters go; use --sparsity {int(most * 100) / 100:g} or less"
        )


def never_stock(options: LLMPruner) -> str | None:
    """Why the result is no stock model, with `mode=channel`."""
    return "its blocks read and write parts of the residual stream" if options.mode == "channel" else None


def plan_model(view: ModelView, data: Tensor, options: LLMPruner, run: Run) -> tuple[BlockPlan, ...]:
    """Score the units on windows `data` [S, T], and choose.

    Raises:
        HopelessError: one window is too few for an empirical Fisher, or all gradients are zero.
        NotFiniteError: a loss or a gradient is NaN or infinite.
    """
    if options.mode == "channel":
        kept = run.once(lambda: {"channels": channel_scores(view, data, options, run)})
        keep_W = keep_units(kept["channels"], view.config.hidden_size - _channels(view, run.sparsity))
        spaces = [selection for selection in SELECTIONS if selection not in INNER]
        of = dict.fromkeys(spaces, int(view.config.hidden_size))
        return tuple(
            BlockPlan(index, keep={space: keep_W.clone() for space in spaces}, of=of, select=SELECT_FIRST)
            for index in range(view.blocks)
        )
    kept = run.once(
        lambda: {
            _name(index, space): score_U
            for index, score in enumerate(group_scores(view, data, options, run))
            for space, score_U in score.items()
        }
    )
    scores: Scores = [
        {space: kept[name] for space in MEMBERS if (name := _name(index, space)) in kept}
        for index in range(view.blocks)
    ]
    keep = _choose(view, scores, options.ranking, run.sparsity)
    return tuple(
        BlockPlan(index, keep=keep[index], of={space: len(score_U) for space, score_U in scores[index].items()})
        for index in range(view.blocks)
    )


def _name(index: int, space: str) -> str:
    """Of a score that is kept."""
    return f"{index}.{space}"


def group_scores(view: ModelView, windows: Tensor, options: LLMPruner, run: Run) -> Scores:
    """The importance of each unit."""
    scores: Scores = [{} for _ in range(view.blocks)]
    for block, sums in _gradients(view, windows, options, run, options.pruned_blocks(view.blocks)):
        scores[block.index] = _unit_scores(block, sums, options)
    check_reacts("llm_pruner", (score_U for score in scores for score_U in score.values()))
    return scores


def channel_scores(view: ModelView, windows: Tensor, options: LLMPruner, run: Run) -> Tensor:
    """The importance of each feature of the residual stream, float64 [D]: over the matrices of all blocks, the last one's `down` last."""
    change_MD = channel_changes(view, windows, options, run)
    check_reacts("llm_pruner", change_MD)
    return _REDUCE[options.reduce](torch.stack(change_MD).abs())


def channel_changes(view: ModelView, windows: Tensor, options: LLMPruner, run: Run) -> list[Tensor]:
    """For each matrix of all blocks, how the loss would change without each feature's part of it, float64 [D]; signed with granularity `vector`."""
    change_MD: list[Tensor] = []
    for block, sums in _gradients(view, windows, options, run, range(view.blocks)):
        here = []
        for name in block.names:
            change_OI = sums[name].of(block.matrix(name), options.order)
            across = 1 if name in RESIDUAL_WRITERS else 0  # these write channels, by rows; the others read them
            here.append(_of_units(change_OI, options, across, change_OI.shape[1 - across]))
        change_MD = here + change_MD
    return change_MD


def _gradients(
    view: ModelView, windows: Tensor, options: LLMPruner, run: Run, inside: range
) -> Iterator[tuple[BlockView, dict[str, _Gradient]]]:
    """The gradients of the matrices of these blocks, from the last block."""
    if options.order != "first" and len(windows) < 2:
        raise HopelessError(
            f"llm_pruner: order={options.order} needs 2 windows or more, since the square of one gradient ranks as the first order does; got 1"
        )
    backward = Backward(
        view, windows, device=run.device, dtype=run.dtype, labels=run.labels, first=inside.start, spill=run.spill
    )
    predicted = backward.targets / len(windows)
    for block in backward.blocks():
        names = block.names if block.index in inside else ()
        # where a unit is a row, its bias goes with it
        with_rows = [name for name in names if (options.mode == "channel") == (name in RESIDUAL_WRITERS)]
        biases = {name: block.bias(name) if name in with_rows else None for name in names}
        sums = {
            name: _Gradient(bias_O, fisher=options.order != "first", predicted=predicted)
            for name, bias_O in biases.items()
        }
        backward.retreat(block, {name: gradient.update for name, gradient in sums.items()})
        if names:
            yield block, sums


class _Gradient:
    """The sum over windows of the gradient of one matrix and of its square, [O, I], float32 or better. A bias that goes with a row is one more input.

    `predicted` is how many tokens a window is to predict, on average.
    """

    def __init__(self, bias_O: Tensor | None, *, fisher: bool, predicted: float) -> None:
        self.bias_O, self.fisher, self.predicted = bias_O, fisher, predicted
        self.first_OI, self.second_OI = torch.zeros(()), torch.zeros(())
        self.windows = 0

    def update(self, x_BTI: Tensor, g_BTO: Tensor) -> None:
        """Add some windows."""
        if self.bias_O is not None:
            x_BTI = torch.nn.functional.pad(x_BTI, (0, 1), value=1)
        if not self.windows:
            shape = (g_BTO.shape[-1], x_BTI.shape[-1])
            self.first_OI = torch.zeros(shape, dtype=at_least_float32(x_BTI[:0]).dtype, device=x_BTI.device)
            self.second_OI = torch.zeros_like(self.first_OI) if self.fisher else self.second_OI
        self.windows += len(x_BTI)
        if not self.fisher:
            self.first_OI += weight_gradient(x_BTI.flatten(0, 1), g_BTO.flatten(0, 1)).div_(self.predicted)
            return
        for x_TI, g_TO in zip(x_BTI, g_BTO, strict=True):
            gradient_OI = weight_gradient(x_TI, g_TO).div_(self.predicted)
            self.first_OI += gradient_OI
            self.second_OI += gradient_OI.square_()

    def of(self, weight_OI: Tensor, order: str) -> Tensor:
        """How the loss would change without each weight (and bias)."""
        weight_OI = weight_OI.to(self.first_OI)
        if self.bias_O is not None:
            weight_OI = torch.cat([weight_OI, self.bias_O[:, None].to(weight_OI)], dim=1)
        if order == "first":
            return (weight_OI * self.first_OI).div_(-self.windows)
        change_OI = weight_OI.square().mul_(self.second_OI).div_(2 * self.windows)
        return change_OI if order == "second" else change_OI.sub_(weight_OI * self.first_OI / self.windows)


def _unit_scores(block: BlockView, sums: Mapping[str, _Gradient], options: LLMPruner) -> dict[str, Tensor]:
    changes = {space: unit_changes(block, sums, options, space) for space in MEMBERS}
    return {
        space: _REDUCE[options.reduce](torch.stack(list(change.values())).abs()) for space, change in changes.items()
    }


def unit_changes(block: BlockView, sums: Mapping[str, _Gradient], options: LLMPruner, space: str) -> dict[str, Tensor]:
    """Matrix -> how the loss would change without each unit's part of it, float64 [U]; signed with granularity `vector`."""
    members, units = MEMBERS[space], block.dims.units()[space]
    return {
        name: _of_units(
            sums[name].of(block.matrix(name), options.order), options, 0 if name == members.reader else 1, units
        )
        for name in (*members.writers, members.reader)
        if name in sums
    }


def _of_units(change_OI: Tensor, options: LLMPruner, along: int, units: int) -> Tensor:
    """The change of each unit in one matrix, float64 [U]: the rows of a unit are neighbours, and so are the query heads of a group."""
    if options.granularity == "parameter":
        change_OI = change_OI.abs()
    return change_OI.sum(along, dtype=torch.float64).view(units, -1).sum(1).cpu()


def _channels(view: ModelView, sparsity: float) -> int:
    """How many channels stay: the most that remove enough, 0 where none do."""
    structures = _structures(view)
    return next(
        (
            width
            for width in range(view.config.hidden_size - 1, 0, -1)
            if _left(view, structures, width) <= (1 - sparsity) * structures.total
        ),
        0,
    )


def _structures(view: ModelView) -> Structures:
    return find_structures(view, constrained=True, form=SELECT_FIRST, whole=True)


def _left(view: ModelView, structures: Structures, width: int) -> float:
    """The parameters left with so many channels."""
    return float(structures.parameters([float(width), *(float(ffn) for ffn in structures.widths[1:])]))


def _check_channels(view: ModelView, sparsity: float) -> None:
    if view.dims(0).residual is not None:
        raise SecateurError(
            f"{view.name}: what its blocks read and write of the residual stream was pruned already; prune the original model with mode=channel"
        )
    if not _channels(view, sparsity):
        structures = _structures(view)
        most = 1 - _left(view, structures, 1) / structures.total
        raise UsageError(
            f"llm_pruner: --sparsity {sparsity:g} would empty the blocks: with one channel left at most {most:.4f} of the parameters go, since embeddings and "
            f"head keep all; use --sparsity {int(most * 100) / 100:g} or less"
        )


def _most(view: ModelView, index: int) -> int:
    """The parameters that go with all units of a block but one of each space."""
    units = view.dims(index).units()
    return sum(unit_parameters(view, index, space) * (units[space] - 1) for space in MEMBERS)


def _choose(view: ModelView, scores: Scores, ranking: str, sparsity: float) -> list[dict[str, Tensor]]:
    """The kept units: the others are the first of an order, as many as it takes. The best unit of each space of a block stays."""
    places = [(index, space) for index, score in enumerate(scores) for space in score]
    values, shares, sizes = (
        [],
        [],
        [],
    )  # importance a parameter; the share of its space that has gone when the unit goes; parameters
    for index, space in places:
        score_U, size = scores[index][space], unit_parameters(view, index, space)
        rank_U = score_U.sort(stable=True).indices.argsort() + 1
        values.append(score_U / size)
        shares.append(torch.where(rank_U == len(rank_U), torch.inf, rank_U / len(rank_U)))
        sizes += [size] * len(score_U)
    value_N, share_N = torch.cat(values), torch.cat(shares)
    order_N = value_N.sort(stable=True).indices
    first_N = share_N if ranking == "local" else share_N.isinf().float()
    order_N = order_N[first_N[order_N].sort(stable=True).indices]
    gone = _first(order_N.tolist(), sizes, sparsity * view.parameters())
    keep_N = torch.ones(len(order_N), dtype=torch.bool).index_fill_(0, torch.tensor(gone), False)
    keep: list[dict[str, Tensor]] = [{} for _ in scores]
    for (index, space), keep_U in zip(places, keep_N.split([len(value_U) for value_U in values]), strict=True):
        keep[index][space] = keep_U.nonzero().squeeze(1).to(torch.int32)
    return keep


def _first(order: list[int], sizes: list[int], wanted: float) -> list[int]:
    """The first units that together have the wanted size, without those, from the last on, that are not needed for it."""
    gone, removed = [], 0
    for unit in order:
        if removed >= wanted:
            break
        gone.append(unit)
        removed += sizes[unit]
    needed = []
    for unit in reversed(gone):
        if removed - sizes[unit] >= wanted:
            removed -= sizes[unit]
        else:
            needed.append(unit)
    return needed
