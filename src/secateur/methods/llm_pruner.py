"""LLM-Pruner: remove whole coupled units, those whose removal changes the loss least by its Taylor expansion.

From arXiv:2305.11627 (NeurIPS 2023), equations 3 to 5. A group is a set of weights that must be removed together: a
key-value head with the query heads that use it and their part of the output projection; or a feed-forward unit with its
rows of gate and up and its column of down. Let g be the gradient of the mean loss of a few windows, and g_j that of
window j. To remove a weight w changes the loss by

    first     -w g
    second    w^2 F / 2, with F the mean of g_j^2 (the diagonal of the empirical Fisher)
    mixed     their sum

The importance of a group's part of one matrix, with its biases, is |sum of the changes of its weights| (granularity
`vector`, equation 3) or the sum of their absolute values (`parameter`, equation 5). The importance of the group is the
sum, mean, maximum or product over its matrices, or the importance in the last matrix alone. The blocks at both ends
stay whole. Weights that stay are unchanged. The sparsity is the fraction of the parameters of the whole model to
remove.

With `mode=channel` the groups are the features of the residual stream. One choice serves all blocks: they no longer
read or write the removed features. The rows and columns of all their matrices and the gains of norms are removed, and
norms are computed over the features that are left. Embeddings, final norm and head keep all features, where the authors
narrow them too: a feature that no block uses keeps its value from the embedding.

Differences from the authors' code:
- Gradients are reduced to scores block by block in the backward pass (`calibrate/backward.py`; the authors keep a
  gradient for every weight).
- With shared key-value heads, the query heads of a group are those that use it (theirs folds head h onto h modulo the
  number of groups).
- The part of a head in a matrix is one structure (theirs takes absolute values channel by channel).
- Biases count.
- Global ranking is by importance divided by the number of parameters.
- The number of blocks that stay whole scales with the depth.
- Any text may replace BookCorpus, which can no longer be loaded. With the text of a task (`--calibration task:NAME`)
  the loss counts the right answers alone.
- Ties: the unit with the lower index is removed first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.calibrate.backward import Backward, check_reacts, weight_gradient
from secateur.core.errors import HopelessError, SecateurError, UsageError
from secateur.core.numbers import at_least_float32
from secateur.models.family import HEADS, SELECT, check_can
from secateur.models.parameters import unit_parameters
from secateur.models.runtime import SELECT_FIRST
from secateur.models.spaces import INNER, MEMBERS, RESIDUAL_WRITERS
from secateur.models.view import BlockView, ModelView
from secateur.plan.plan import BlockPlan
from secateur.plan.quantity import PARAMETERS, check_removable
from secateur.plan.run import Run
from secateur.plan.selection import keep_units
from secateur.plan.structures import SELECTIONS, Structures, find_structures

CALIBRATION = "c4"
SAMPLES, SEQLEN = 10, 128
REMOVES = PARAMETERS
GRADIENTS = True  # a dry run counts their memory
ADVICE = (
    "--set ranking=global: far ahead of the paper's local ranking, perplexity 28.21 against 66.15 at 50% of the bundled"
    " model"
)
DEMO = [{"options": {"ranking": "global"}, "sparsities": [0.2]}]

Scores = list[dict[str, Tensor]]
"""One entry for each block: space -> score_U, float64; empty for a block that stays whole."""

_REDUCE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda score_MU: score_MU.sum(0),
    "mean": lambda score_MU: score_MU.mean(0),
    "max": lambda score_MU: score_MU.amax(0),
    # the root of the product does not underflow, and has the same scale as the other choices
    "product": lambda score_MU: score_MU.log().mean(0).exp(),
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
        mode: what is removed: units of each `block`, or each `channel` of the residual stream from all blocks at once.
        order: the terms of the Taylor expansion: `first`, `second`, or `mixed` (both).
        granularity: how changes of the loss are summed: `parameter` sums the absolute change of each weight, `vector`
            takes the absolute value of the summed change of a group's weights in one matrix.
        reduce: how the importances in the matrices of a group become one number: `sum`, `mean`, `max`, `product` (the
            root of the product), or `last` (the matrix that reads the unit).
        ranking: how units are compared: `local` (every space of every block loses the same share, to within one unit),
            or `global` (all blocks compete, by importance divided by the number of parameters). `global` is far ahead
            of the paper's `local`: perplexity 28.21 against 66.15 at 50% of the bundled model (docs/lab-log.md).
        keep_first: the number of blocks at the beginning that stay whole (default: 4 of 32, in proportion to the depth,
            rounded down).
        keep_last: the number of blocks at the end that stay whole (default: 2 of 32, likewise).
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
        """Return the indices of the blocks that may lose units, of a model with `blocks` blocks."""
        first = blocks * 4 // 32 if self.keep_first is None else self.keep_first
        last = blocks * 2 // 32 if self.keep_last is None else self.keep_last
        return range(first, blocks - last)


def check(view: ModelView, sparsity: float, options: LLMPruner) -> None:
    """Refuse impossible requests before the work begins.

    Raises:
        UsageError: no block is left to prune, or the sparsity would empty a block.
        SecateurError: the channels were pruned already, or channels or heads of this family cannot be removed.
    """
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
    blocks = f"each of blocks {inside.start} to {inside.stop - 1}"
    check_removable("llm_pruner", sparsity, most, f"{blocks} keeps a key-value head and a feed-forward unit, so")


def never_stock(options: LLMPruner) -> str | None:
    """Say why the result is not a stock model with `mode=channel`; None with `mode=block`."""
    return "its blocks read and write parts of the residual stream" if options.mode == "channel" else None


def rehearsal(view: ModelView, options: LLMPruner, sparsity: float) -> tuple[LLMPruner, dict[str, int]]:
    """The same work on a model of two blocks, which all may lose something."""
    return replace(options, keep_first=0, keep_last=0), {}


def gradual(options: LLMPruner) -> bool:
    """Return True: the scores of one run serve the next."""
    return True


def plan_model(view: ModelView, data: Tensor, options: LLMPruner, run: Run) -> tuple[BlockPlan, ...]:
    """Score the units on windows `data` [S, T], and choose those to remove.

    Raises:
        HopelessError: one window is too few for an empirical Fisher, or all gradients are zero.
        NotFiniteError: a loss or a gradient is NaN or infinite.
    """
    if options.mode == "channel":
        measured = run.once(lambda: {"channels": channel_scores(view, data, options, run)})
        keep_W = keep_units(measured["channels"], view.config.hidden_size - _channels(view, run.sparsity))
        spaces = [selection for selection in SELECTIONS if selection not in INNER]
        of = dict.fromkeys(spaces, int(view.config.hidden_size))
        return tuple(
            BlockPlan(index, keep={space: keep_W.clone() for space in spaces}, of=of, select=SELECT_FIRST)
            for index in range(view.blocks)
        )
    measured = run.once(
        lambda: {
            _name(index, space): score_U
            for index, score in enumerate(group_scores(view, data, options, run))
            for space, score_U in score.items()
        }
    )
    scores: Scores = [
        {space: measured[name] for space in MEMBERS if (name := _name(index, space)) in measured}
        for index in range(view.blocks)
    ]
    keep = _choose(view, scores, options.ranking, run.sparsity)
    return tuple(
        BlockPlan(index, keep=keep[index], of={space: len(score_U) for space, score_U in scores[index].items()})
        for index in range(view.blocks)
    )


def _name(index: int, space: str) -> str:
    """Return the name under which `run.once` stores the scores of a space of a block."""
    return f"{index}.{space}"


def group_scores(view: ModelView, windows: Tensor, options: LLMPruner, run: Run) -> Scores:
    """Return the importance of each unit, on windows [S, T]."""
    scores: Scores = [{} for _ in range(view.blocks)]
    for block, sums in _gradients(view, windows, options, run, options.pruned_blocks(view.blocks)):
        scores[block.index] = _unit_scores(block, sums, options)
    check_reacts("llm_pruner", (score_U for score in scores for score_U in score.values()))
    return scores


def channel_scores(view: ModelView, windows: Tensor, options: LLMPruner, run: Run) -> Tensor:
    """Return the importance of each feature of the residual stream, float64 [D].

    It is reduced over the matrices of all blocks, in order; `down` of the last block comes last.
    """
    change_MD = channel_changes(view, windows, options, run)
    check_reacts("llm_pruner", change_MD)
    return _REDUCE[options.reduce](torch.stack(change_MD).abs())


def channel_changes(view: ModelView, windows: Tensor, options: LLMPruner, run: Run) -> list[Tensor]:
    """Return how the loss would change without each feature's part of a matrix.

    Returns:
        For each matrix of all blocks a tensor, float64 [D]; signed with granularity `vector`.
    """
    change_MD: list[Tensor] = []
    for block, sums in _gradients(view, windows, options, run, range(view.blocks)):
        of_block = []
        for name in block.names:
            change_OI = sums[name].of(block.matrix(name), options.order)
            across = (
                1 if name in RESIDUAL_WRITERS else 0
            )  # rows of these matrices write channels; columns of the others read them
            of_block.append(_of_units(change_OI, options, across, change_OI.shape[1 - across]))
        change_MD = of_block + change_MD
    return change_MD


def _gradients(
    view: ModelView, windows: Tensor, options: LLMPruner, run: Run, inside: range
) -> Iterator[tuple[BlockView, dict[str, _Gradient]]]:
    """Yield each of the blocks `inside` with the gradients of its matrices by name, from the last block to the first.

    Raises:
        HopelessError: the order is not `first`, and there is only one window.
    """
    if options.order != "first" and len(windows) < 2:
        raise HopelessError(
            f"llm_pruner: order={options.order} needs 2 windows or more, since the square of one gradient ranks units"
            " as order=first does; got 1 (--samples 2 or more)"
        )
    backward = Backward(
        view, windows, device=run.device, dtype=run.dtype, labels=run.labels, first=inside.start, spill=run.spill
    )
    predicted = backward.targets / len(windows)
    for block in backward.blocks():
        names = block.names if block.index in inside else ()
        # where a unit is a row, its bias is removed with it
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
    """The sum over windows of the gradient of one matrix and of its square, [O, I], in float32 or float64.

    A bias that is removed with its row counts as one more input.

    Args:
        bias_O: the bias, or None.
        fisher: whether squares are summed too.
        predicted: the mean number of tokens that are predicted in a window.
    """

    def __init__(self, bias_O: Tensor | None, *, fisher: bool, predicted: float) -> None:
        self.bias_O, self.fisher, self.predicted = bias_O, fisher, predicted
        self.first_OI, self.second_OI = torch.zeros(()), torch.zeros(())
        self.windows = 0

    def update(self, x_BTI: Tensor, g_BTO: Tensor) -> None:
        """Add windows, from the input [B, T, I] of the matrix and the gradient [B, T, O] of its output."""
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
        """Return how the loss would change without each weight and bias, [O, I] or [O, I + 1] with a bias."""
        weight_OI = weight_OI.to(self.first_OI)
        if self.bias_O is not None:
            weight_OI = torch.cat([weight_OI, self.bias_O[:, None].to(weight_OI)], dim=1)
        if order == "first":
            return (weight_OI * self.first_OI).div_(-self.windows)
        change_OI = weight_OI.square().mul_(self.second_OI).div_(2 * self.windows)
        return change_OI if order == "second" else change_OI.sub_(weight_OI * self.first_OI / self.windows)


def _unit_scores(block: BlockView, sums: Mapping[str, _Gradient], options: LLMPruner) -> dict[str, Tensor]:
    """Return the importance of each unit of one block, by space, float64 [U]."""
    changes = {space: unit_changes(block, sums, options, space) for space in MEMBERS}
    return {
        space: _REDUCE[options.reduce](torch.stack(list(change.values())).abs()) for space, change in changes.items()
    }


def unit_changes(block: BlockView, sums: Mapping[str, _Gradient], options: LLMPruner, space: str) -> dict[str, Tensor]:
    """Return how the loss would change without each unit's part of a matrix.

    Returns:
        Name of the matrix -> change, float64 [U]; signed with granularity `vector`.
    """
    members, units = MEMBERS[space], block.dims.units()[space]
    return {
        name: _of_units(
            sums[name].of(block.matrix(name), options.order), options, 0 if name == members.reader else 1, units
        )
        for name in (*members.writers, members.reader)
        if name in sums
    }


def _of_units(change_OI: Tensor, options: LLMPruner, along: int, units: int) -> Tensor:
    """Sum the changes of the weights of each unit in one matrix, float64 [U].

    The rows of a unit are neighbours, and so are the query heads of a group.
    """
    if options.granularity == "parameter":
        change_OI = change_OI.abs()
    return change_OI.sum(along, dtype=torch.float64).view(units, -1).sum(1).cpu()


def _channels(view: ModelView, sparsity: float) -> int:
    """Return the largest number of channels that can stay at this sparsity; 0 where not even one can."""
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
    """Return what counts the parameters of the model after channels are removed."""
    return find_structures(view, constrained=True, form=SELECT_FIRST, whole=True)


def _left(view: ModelView, structures: Structures, width: int) -> float:
    """Return the number of parameters left with `width` channels."""
    return float(structures.parameters([float(width), *(float(ffn) for ffn in structures.widths[1:])]))


def _check_channels(view: ModelView, sparsity: float) -> None:
    """Refuse a residual stream that was pruned already, and a sparsity that leaves no channel."""
    if view.dims(0).residual is not None:
        raise SecateurError(
            f"{view.name}: the residual stream of its blocks was pruned already; prune the original model with"
            " mode=channel"
        )
    if not _channels(view, sparsity):
        structures = _structures(view)
        most = 1 - _left(view, structures, 1) / structures.total
        raise UsageError(
            f"llm_pruner: --sparsity {sparsity:g} would empty the blocks: with one channel left, at most {most:.4f} of"
            " the parameters can be removed, since embeddings and head keep all channels; use --sparsity"
            f" {int(most * 100) / 100:g} or less"
        )


def _most(view: ModelView, index: int) -> int:
    """Return the number of parameters removed when a block keeps one unit of each space."""
    units = view.dims(index).units()
    return sum(unit_parameters(view, index, space) * (units[space] - 1) for space in MEMBERS)


def _choose(view: ModelView, scores: Scores, ranking: str, sparsity: float) -> list[dict[str, Tensor]]:
    """Return the units to keep, for each block by space, int32 indices.

    Units are ordered by importance, and the first ones that reach the sparsity are removed. The best unit of each space
    of a block stays.
    """
    places = [(index, space) for index, score in enumerate(scores) for space in score]
    # for each unit: importance a parameter; the share of its space removed up to this unit; its number of parameters
    values, shares, sizes = [], [], []
    for index, space in places:
        score_U, size = scores[index][space], unit_parameters(view, index, space)
        rank_U = score_U.sort(stable=True).indices.argsort() + 1
        values.append(score_U / size)
        shares.append(torch.where(rank_U == len(rank_U), torch.inf, rank_U / len(rank_U)))
        sizes += [size] * len(score_U)
    value_N, share_N = torch.cat(values), torch.cat(shares)
    # order by value; then `local` by share, `global` only moves the best units (share inf) to the end
    order_N = value_N.sort(stable=True).indices
    first_N = share_N if ranking == "local" else share_N.isinf().float()
    order_N = order_N[first_N[order_N].sort(stable=True).indices]
    removed = _first(order_N.tolist(), sizes, sparsity * view.parameters())
    keep_N = torch.ones(len(order_N), dtype=torch.bool).index_fill_(0, torch.tensor(removed), False)
    keep: list[dict[str, Tensor]] = [{} for _ in scores]
    for (index, space), keep_U in zip(places, keep_N.split([len(value_U) for value_U in values]), strict=True):
        keep[index][space] = keep_U.nonzero().squeeze(1).to(torch.int32)
    return keep


def _first(order: list[int], sizes: list[int], target: float) -> list[int]:
    """Return the first units of an order whose parameters add up to `target` or more.

    A second pass, from the last of them, drops each unit whose parameters are not needed to reach it.
    """
    units, removed = [], 0
    for unit in order:
        if removed >= target:
            break
        units.append(unit)
        removed += sizes[unit]
    needed = []
    for unit in reversed(units):
        if removed - sizes[unit] >= target:
            removed -= sizes[unit]
        else:
            needed.append(unit)
    return needed
