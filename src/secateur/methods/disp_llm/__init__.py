"""DISP-LLM: blocks that read and write different parts of the residual stream, learned with the weights frozen.

From arXiv:2410.11988. Every block has five selections (`plan/structures.py`): the features of the residual that
attention and MLP read and write, and the units of the MLP's middle. The residual keeps its width, so blocks may differ
in what they select, and no adapters are needed. Binary gates (`gates.py`) are drawn from logits that a small network
gives (`hypernetwork.py`). Only that network is trained, on the language-model loss plus lambda |log(T(s) / (p
T_total))|. The sparsity is the fraction of the parameters of the whole model to remove.

Differences from the authors' code: ReinMax as its paper derives it (they draw one Gumbel and keep the gate soft); one
draw for the loss and the budget; the MLP's middle is masked once, so that a soft gate is not squared; T counts the
whole model, as in the paper, less what no gate removes, so that lambda pulls alike whatever the share of the
embeddings; what is kept is not a random draw but the gates with the highest logits, as many as the budget allows
(`cut=half`: those open as often as not); no selection is empty. Key-value heads shared by several query heads, biases
and fused weights are handled; heads are kept. The norm is over all features, then those are selected; `norm=selected`
is the paper's order. The constrained variant shares one selection in place of its four of the residual, in all blocks.

Beyond the paper, and off by default: `warm` chooses the first logits from the gradients of a few windows, so that
learning starts near the budget and needs far fewer steps. `scale` learns a scale beside each gate, and the cut folds it
into the weights: the number of parameters stays the same, but the weights are no longer those of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.core.distributed import size
from secateur.core.errors import SecateurError, UsageError
from secateur.core.progress import say
from secateur.methods.disp_llm.choose import choose, smallest
from secateur.methods.disp_llm.gates import GATES
from secateur.methods.disp_llm.history import history
from secateur.methods.disp_llm.hypernetwork import HYPERNETWORKS, Hypernetwork
from secateur.methods.disp_llm.learning import STEPS, Learning, learn
from secateur.methods.disp_llm.masked import MaskedModel
from secateur.methods.disp_llm.warm import WARM, begin, importance
from secateur.models.family import SELECT, check_can
from secateur.models.runtime import NORM_FIRST, SELECT_FIRST
from secateur.models.spaces import COLUMNS, OWN_COLUMNS, RESIDUAL_WRITERS, ROWS, SEPARATE_COLUMNS
from secateur.models.view import BlockView, ModelView
from secateur.plan.plan import BlockPlan
from secateur.plan.quantity import PARAMETERS
from secateur.plan.run import Run
from secateur.plan.structures import Structures, find_structures

CALIBRATION = "wikitext2"
REMOVES = PARAMETERS
TRAINS = True
SHARDS = True  # processes share windows and blocks, and all of them learn the same gates
DEMO: list[dict[str, object]] = [{"options": {"steps": 60, "warm": 16}, "sparsities": [0.3, 0.5]}]
MOST = 0.95
QUICK = {"steps": 2, "unmet": "cut"}
# Options that `--resume` may change: the learning rate is constant, so a run with more steps is the same run, longer.
MAY_CHANGE = ("steps", "unmet")
# The largest allowed distance from the budget after learning, as a share of the counted parameters.
UNMET = 0.02

_FORMS = {"full": NORM_FIRST, "selected": SELECT_FIRST}
_CHOICES = {
    "gate": GATES,
    "hypernetwork": HYPERNETWORKS,
    "norm": tuple(_FORMS),
    "budget": ("model", "blocks"),
    "cut": ("budget", "half"),
    "unmet": ("refuse", "cut"),
    "autocast": ("auto", "on", "off"),
}


@dataclass(frozen=True)
class DispLLM:
    """Options.

    Attributes:
        steps: the number of optimiser steps. 500 come within 2% of the paper's 10,000 on the bundled model: perplexity
            21.64 against 21.22 at 50% (docs/lab-log.md).
        batch: the number of windows in each step.
        accumulate: split the windows of a step into this many equal parts, which run one after the other or on
            different processes. This only saves memory.
        lr: the learning rate, constant.
        weight_decay: the weight decay of AdamW.
        checkpointing: compute every block a second time in the backward pass instead of storing its activations. This
            needs less memory and about a third more time.
        autocast: compute matrix products in bfloat16: `on`, `off`, or `auto` (on where an accelerator computes in
            float32).
        clip: the largest norm of a step's gradient; 0 turns clipping off.
        strength: lambda, the weight of the budget term. The paper uses 6 for a term that counts all parameters. The
            term here counts only parameters that gates can remove; with a quarter of the parameters in embeddings and
            head, 4 has the same effect.
        gate: the gradient estimator: `reinmax`, `reinmax-printed` (algorithm 2 exactly as printed),
            `straight-through`, or `gumbel` (soft).
        bias: c; at the start a gate is open with probability sigmoid(c).
        tau: the temperature of the gates.
        hypernetwork: `gru`, `linear` (without the Bi-GRU), or `none` (one logit for each gate).
        constrained: use one selection of the residual for all blocks, for reading and writing.
        separate: let q, k and v each select what they read. The paper's section 4.1 describes this and leaves it out,
            since it may be slow. `true` is ahead on the bundled model: perplexity 20.05 against 21.64 at 50%
            (docs/lab-log.md).
        norm: `full` (normalise all features, then select) or `selected` (select, then normalise the selected features,
            as in the paper).
        budget: count the parameters of the whole `model`, or only those of the `blocks`.
        warm: the number of windows whose gradients choose the gates that begin open, see `warm.py`. With 0, all gates
            begin likely open, as in the paper.
        scale: also learn a scale beside each gate. The cut folds the scales into the weights, and the record lists
            these weights as updated. `true` is ahead on the bundled model: perplexity 20.29 against 21.64 at 50%
            (docs/lab-log.md).
        cut: keep as much as the `budget` allows, or (`half`) the gates that are open more than half of the time.
        unmet: what to do if the learned gates miss the budget by more than 0.02: `refuse` the result, or let the `cut`
            remove the rest.
        round: make widths multiples of this.
        save_every: the number of steps between two saves of the state that `--resume` continues from.
    """

    steps: int = 10_000
    batch: int = 1
    accumulate: int = 1
    checkpointing: bool = False
    autocast: str = "auto"
    lr: float = 1e-3
    weight_decay: float = 0.05
    clip: float = 0.0
    strength: float = 4.0
    gate: str = "reinmax"
    bias: float = 3.0
    tau: float = 1.0
    hypernetwork: str = "gru"
    constrained: bool = False
    separate: bool = False
    norm: str = "full"
    warm: int = 0
    scale: bool = False
    budget: str = "model"
    cut: str = "budget"
    unmet: str = "refuse"
    round: int = 1
    save_every: int = 100

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"disp_llm: unknown {name} '{getattr(self, name)}' (allowed: {', '.join(allowed)})")
        if self.constrained and self.separate:
            raise UsageError(
                "disp_llm: constrained=true and separate=true do not go together: the first has one selection for "
                "everything, the second one for each of q, k and v; set only one of them"
            )
        for name in ("steps", "batch", "accumulate", "round", "save_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"disp_llm: {name} is {getattr(self, name)}; it is a count, at least 1")
        for name in ("lr", "tau"):
            if not getattr(self, name) > 0:
                raise UsageError(f"disp_llm: {name} is {getattr(self, name):g}; it must be above 0")
        if self.warm < 0:
            raise UsageError(f"disp_llm: warm is {self.warm}; it is a count, 0 for none")
        for name in ("weight_decay", "strength", "clip"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"disp_llm: {name} is {getattr(self, name):g}; it must be at least 0")
        if self.batch % self.accumulate:
            raise UsageError(
                f"disp_llm: batch={self.batch} windows cannot be split into accumulate={self.accumulate} equal parts"
            )


def check(view: ModelView, sparsity: float, options: DispLLM) -> None:
    """Check before the work starts that this model can be pruned at this sparsity.

    Raises:
        UsageError: the sparsity is too high for the method or for this model.
        SecateurError: the residual stream of the model was already pruned, or this family does not allow it.
    """
    check_can(view.family, SELECT, view.name)
    if view.dims(0).residual is not None:
        raise SecateurError(
            f"{view.name}: the residual stream of this model was pruned already; prune the original model, at a higher "
            "sparsity"
        )
    if sparsity >= MOST:
        raise UsageError(f"disp_llm: --sparsity {sparsity:g} leaves almost nothing; it must be below {MOST:g}")
    if options.batch % (parts := math.lcm(options.accumulate, size())):
        raise UsageError(
            f"disp_llm: batch={options.batch} windows a step cannot be shared equally among {size()} processes; use "
            f"--set batch={parts}, or a multiple"
        )
    structures = _structures(view, options)
    most = 1 - smallest(structures, options.round) / structures.total
    if sparsity > most:
        raise UsageError(
            f"disp_llm: --sparsity {sparsity:g} cannot be reached: at most {most:.4f} of the parameters can go, since "
            "no gate removes the embeddings, the head and some other parameters; use --sparsity "
            f"{int(most * 100) / 100:g} or less"
        )


def never_stock(options: DispLLM) -> str | None:
    """The reason why the result is not a stock model."""
    return "it gives every block its own widths"


def plan_model(view: ModelView, data: Tensor, options: DispLLM, run: Run) -> tuple[BlockPlan, ...]:
    """Learn the gates on windows `data` [S, T], and choose what each block keeps.

    Raises:
        NotFiniteError: a loss is NaN or infinite; the message names the step.
    """
    structures = _structures(view, options)
    target = (1 - run.sparsity) * structures.total
    masked = MaskedModel(
        view,
        structures,
        _FORMS[options.norm],
        device=run.device,
        dtype=run.dtype,
        autocast=options.autocast == "on"
        or (options.autocast == "auto" and run.device.type != "cpu" and run.dtype == torch.float32),
        checkpointing=options.checkpointing,
    )
    begin_N = begin(importance(masked, data[: options.warm]), masked, target) - options.bias if options.warm else None
    network = Hypernetwork(
        structures.widths, options.hypernetwork, seed=run.seed, begin_N=begin_N, scaled=options.scale
    ).to(run.device)
    how = Learning(
        steps=options.steps,
        batch=options.batch,
        lr=options.lr,
        weight_decay=options.weight_decay,
        strength=options.strength,
        gate=options.gate,
        bias=options.bias,
        temperature=options.tau,
        seed=run.seed,
        accumulate=options.accumulate,
        clip=options.clip,
        save_every=options.save_every,
    )
    looks = learn(network, masked, data, target, how, run.state_file)
    logit_N = network() + options.bias
    keep = choose(logit_N, structures, target=target, multiple=options.round, half=options.cut == "half")
    removed_half = _check_budget(logit_N, structures, keep, target, options)
    run.notes["learning"] = {**history(looks, structures.total), "removed_half": removed_half}
    scales = None if (scale_N := network.scales()) is None else structures.split(scale_N.detach().cpu())
    return tuple(
        _block_plan(view, structures, keep, scales, index, _FORMS[options.norm]) for index in range(view.blocks)
    )


def rehearsal(view: ModelView, options: DispLLM, sparsity: float) -> tuple[DispLLM, dict[str, int]]:
    """Two steps, and one window for the first logits; the first step is slower than the others."""
    short = replace(options, steps=2, warm=min(options.warm, 1), unmet="cut")
    return short, {STEPS: options.steps, WARM: options.warm}


def _structures(view: ModelView, options: DispLLM) -> Structures:
    return find_structures(
        view,
        constrained=options.constrained,
        form=_FORMS[options.norm],
        whole=options.budget == "model",
        separate=options.separate,
    )


def _check_budget(
    logit_N: Tensor, structures: Structures, keep: list[Tensor], target: float, options: DispLLM
) -> float:
    """Print how far the learned gates are from the budget, and check that distance.

    Returns:
        The share of the parameters that goes if every gate is kept that is open more than half of the time.

    Raises:
        SecateurError: the distance is above `UNMET`, and the option is `unmet=refuse`.
    """
    halves = [float((part > 0).sum()) for part in structures.split(logit_N)]
    learned, chosen = (
        1 - float(structures.parameters(counts)) / structures.total
        for counts in (halves, [float(len(indices)) for indices in keep])
    )
    say(
        f"disp_llm: {1 - target / structures.total:.4f} of the parameters are to be removed; keeping the gates that "
        f"are open more than half of the time removes {learned:.4f}, the final choice removes {chosen:.4f}"
    )
    # gates are drawn independently, so the mean of a product of counts is the product of their means
    drawn = float(structures.counter(logit_N.device)(torch.sigmoid(logit_N.detach())))
    requested, removed = 1 - target / structures.total, 1 - drawn / structures.total
    if abs(removed - requested) > UNMET:
        missed = (
            f"disp_llm: learning has not met its budget: the learned gates remove {removed:.4f} of the parameters on "
            f"average, not {requested:.4f}"
        )
        if options.unmet == "refuse":
            raise SecateurError(
                f"{missed}; continue with --resume and the option steps={2 * options.steps}, start again with "
                "--overwrite and warm=32 or a higher strength, or let the cut remove the lowest-ranked gates with "
                "--resume and unmet=cut"
            )
        say(f"{missed}; the cut removes the lowest-ranked gates")
    return learned


def _block_plan(
    view: ModelView, structures: Structures, keep: list[Tensor], scales: list[Tensor] | None, index: int, form: str
) -> BlockPlan:
    uses = structures.uses[index]
    # a choice that several selections share is written once for each
    plan = BlockPlan(
        index,
        keep={s: keep[n].clone() for s, n in uses.items()},
        of={s: structures.widths[n] for s, n in uses.items()},
        select=form,
    )
    return (
        plan
        if scales is None
        else replace(plan, updates=_folded(view.block(index), {s: scales[n] for s, n in uses.items()}))
    )


def _folded(block: BlockView, scale: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiply the scales into the weights [O, I]: columns that read a selection, rows that write to the residual."""
    columns = SEPARATE_COLUMNS if OWN_COLUMNS["q"] in scale else COLUMNS
    folded = {}
    for name in block.names:
        weight_OI = block.matrix(name)
        weight_OI = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))
        weight_OI = weight_OI * scale[columns[name]] if columns[name] in scale else weight_OI
        folded[name] = weight_OI * scale[ROWS[name]][:, None] if name in RESIDUAL_WRITERS else weight_OI
    return folded
