"""DISP-LLM: blocks that read and write different parts of the residual stream, learned with the weights frozen.

From arXiv:2410.11988. Every block has five selections (`plan/structures.py`): the features of the residual that
attention and MLP read and write, and the units of the MLP's middle. The residual keeps its width, so blocks may differ
in what they select, and no adapters are needed. Binary gates (`gates.py`) are drawn from logits that a small network
gives (`hypernetwork.py`), which alone is trained, on the language-model loss plus lambda |log(T(s) / (p T_total))|. The
sparsity is the fraction of the parameters of the whole model to remove.

Differences from the authors' code: ReinMax as its paper derives it (they draw one Gumbel and keep the gate soft); one
draw for the loss and the budget; the MLP's middle is masked once, so that a soft gate is not squared; T counts the
whole model, as in the paper, less what no gate removes, so that lambda pulls alike whatever the share of the
embeddings; what is kept is not a random draw but the gates with the highest logits, as many as the budget allows
(`cut=half`: those open as often as not); no selection is empty. Key-value heads shared by several query heads, biases
and fused weights are handled; heads are kept. The norm is over all features, then those are selected; `norm=selected`
is the paper's order. The constrained variant shares one selection in place of its four of the residual, in all blocks.

Beyond the paper, and off by default: `warm` begins where the gradients of a few windows say (near the budget, so that
far fewer steps do), and `scale` learns a scale beside each gate, which the cut folds into the weights: no parameter
more, but the weights are no longer those of the model.
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
from secateur.methods.disp_llm.learning import Learning, learn
from secateur.methods.disp_llm.masked import MaskedModel
from secateur.methods.disp_llm.warm import begin, importance
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
TRAINS = True  # a dry run does not know for how long
SHARDS = True  # windows and blocks are shared among processes, and all learn the same
DEMO: list[dict[str, object]] = [{"options": {"steps": 60, "warm": 16}, "sparsities": [0.3, 0.5]}]
MOST = 0.95
QUICK = {"steps": 2, "unmet": "cut"}
MAY_CHANGE = (
    "steps",
    "unmet",
)  # where an interrupted run goes on: the rate is constant, so more steps are the same run, longer
UNMET = (
    0.02  # of all parameters that are counted: learning that ends further from its budget has not done what was asked
)

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
        steps: of the optimiser.
        batch: windows a step.
        accumulate: the equal parts a step's windows go through the model in, one after the other, or shared among
            processes; it saves memory alone.
        lr: the learning rate, constant.
        weight_decay: of AdamW.
        checkpointing: run every block a second time on the way back instead of keeping what it computed: less memory,
            about a third more time.
        autocast: products in bfloat16: `auto` where an accelerator computes in float32, `on` or `off`.
        clip: the largest norm of a step's gradient; 0 lets any pass.
        strength: lambda, the weight of the budget term. The paper has 6, of a term that counts all parameters. This
            term counts what gates can remove, and 4 pulls as much on a model that has a quarter of its parameters in
            embeddings and head.
        gate: the estimator: `reinmax`, `reinmax-printed` (algorithm 2 to the letter), `straight-through`, or `gumbel`
            (soft).
        bias: c; gates begin open with probability sigmoid(c).
        tau: the temperature of the gates.
        hypernetwork: `gru`, `linear` (without the Bi-GRU), or `none` (one logit a gate).
        constrained: one selection of the residual for all blocks, reading and writing.
        separate: q, k and v choose for themselves what they read (the paper's section 4.1, which fears for the speed
            and leaves it out).
        norm: `full` (norm all features, then select) or `selected` (select, then norm those; the paper's).
        budget: count the parameters of the whole `model`, or of the `blocks` alone.
        warm: windows whose gradients say which gates begin open, see `warm.py`; 0 begins with all of them likely open,
            as the paper does.
        scale: also learn a scale beside each gate, which is folded into the weights after the cut. Weights are updated
            then, as the record says.
        cut: keep what the `budget` allows, or what is open `half` of the time.
        unmet: where draws of the learned gates are more than 0.02 away from the budget, `refuse` the result, or let the
            `cut` do the rest all the same.
        round: widths are multiples of this.
        save_every: steps between two saves of the state that `--resume` goes on from.
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
                "disp_llm: constrained=true has one selection for everything, separate=true one for each of q, k and "
                "v; set one of them"
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


def check(view: ModelView, sparsity: float | None, options: DispLLM) -> None:
    """Refuse before the work what cannot be done.

    Raises:
        UsageError: there is no sparsity, or it is too high, for the method or for this model.
        SecateurError: the residual stream of the model is rotated or selected from already, or the family's cannot be.
    """
    if sparsity is None:
        raise UsageError("disp_llm needs --sparsity S, the fraction of the parameters of the whole model to remove")
    if sparsity == 0:
        return
    check_can(view.family, SELECT, view.name)
    if view.dims(0).residual is not None:
        raise SecateurError(
            f"{view.name}: what its blocks read and write of the residual stream was pruned already; prune the "
            "original model, at a higher sparsity"
        )
    if sparsity >= MOST:
        raise UsageError(f"disp_llm: --sparsity {sparsity:g} leaves next to nothing; it must be below {MOST:g}")
    if options.batch % (parts := math.lcm(options.accumulate, size())):
        raise UsageError(
            f"disp_llm: batch={options.batch} windows a step cannot be shared equally among {size()} processes; use "
            f"--set batch={parts}, or a multiple"
        )
    structures = _structures(view, options)
    most = 1 - smallest(structures, options.round) / structures.total
    if sparsity > most:
        raise UsageError(
            f"disp_llm: --sparsity {sparsity:g} cannot be reached: embeddings, head and the rest that no gate "
            f"removes leave at most {most:.4f}; "
            f"use --sparsity {int(most * 100) / 100:g} or less"
        )


def never_stock(options: DispLLM) -> str | None:
    """Why the result is no stock model."""
    return "it gives every block its own widths"


def plan_model(view: ModelView, data: Tensor, options: DispLLM, run: Run) -> tuple[BlockPlan, ...]:
    """Learn the gates on windows `data` [S, T], and choose.

    Raises:
        NotFiniteError: a loss is NaN or infinite; the step is named.
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
    seen = learn(network, masked, data, target, how, run.checkpoint)
    logit_N = network() + options.bias
    keep = choose(logit_N, structures, target=target, multiple=options.round, half=options.cut == "half")
    half = _tell(logit_N, structures, keep, target, options)
    run.notes["learning"] = {**history(seen, structures.total), "removed_half": half}
    scales = None if (scale_N := network.scales()) is None else structures.split(scale_N.detach().cpu())
    return tuple(
        _block_plan(view, structures, keep, scales, index, _FORMS[options.norm]) for index in range(view.blocks)
    )


def _structures(view: ModelView, options: DispLLM) -> Structures:
    return find_structures(
        view,
        constrained=options.constrained,
        form=_FORMS[options.norm],
        whole=options.budget == "model",
        separate=options.separate,
    )


def _tell(logit_N: Tensor, structures: Structures, keep: list[Tensor], target: float, options: DispLLM) -> float:
    """Say how far the learned gates were from the budget, and what the choice removes; returns what gates open half of
    the time would remove.

    Raises:
        SecateurError: too far, and `unmet=refuse`.
    """
    halves = [float((part > 0).sum()) for part in structures.split(logit_N)]
    learned, chosen = (
        1 - float(structures.parameters(kept)) / structures.total
        for kept in (halves, [float(len(indices)) for indices in keep])
    )
    say(
        f"disp_llm: asked to remove {1 - target / structures.total:.4f}; gates open half of the time remove "
        f"{learned:.4f}, those kept {chosen:.4f}"
    )
    drawn = float(
        structures.counter(logit_N.device)(torch.sigmoid(logit_N.detach()))
    )  # draws are independent: of products of counts, too
    asked, removed = 1 - target / structures.total, 1 - drawn / structures.total
    if abs(removed - asked) > UNMET:
        missed = (
            f"disp_llm: learning has not met its budget: draws of its gates remove {removed:.4f} of the parameters, "
            f"asked {asked:.4f}"
        )
        if options.unmet == "refuse":
            raise SecateurError(
                f"{missed}; go on with --resume --set steps={2 * options.steps}, start again with --overwrite and "
                "--set warm=32 or a higher "
                f"--set strength=..., or take what ranks lowest as it is with --resume --set unmet=cut"
            )
        say(f"{missed}; the cut removes what ranks lowest")
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
    """The weights [O, I] with the scales in them: columns that read a selection, rows that write to the residual."""
    columns = SEPARATE_COLUMNS if OWN_COLUMNS["q"] in scale else COLUMNS
    folded = {}
    for name in block.names:
        weight_OI = block.matrix(name)
        weight_OI = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))
        weight_OI = weight_OI * scale[columns[name]] if columns[name] in scale else weight_OI
        folded[name] = weight_OI * scale[ROWS[name]][:, None] if name in RESIDUAL_WRITERS else weight_OI
    return folded
