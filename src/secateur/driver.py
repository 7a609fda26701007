"""The flow from blocks to pruned blocks, for any method: read, calibrate, plan, cut, one block at a time.

What happens to the results is the caller's: `prune` writes them, `make_plan` keeps the plans alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibrate.statistics import Statistics
from secateur.calibrate.stream import Stream
from secateur.core.errors import NotFiniteError, UsageError
from secateur.core.memory import give_back
from secateur.core.progress import say
from secateur.core.timing import Stopwatch
from secateur.cut import cut_block
from secateur.methods import Method
from secateur.models.canonical import canonical_view
from secateur.models.view import BlockView, ModelView
from secateur.plan.pattern import parse_pattern
from secateur.plan.plan import BlockPlan, Place
from secateur.plan.rates import ALLOCATIONS, Rates, check_allocation, check_sparsity, resolve_rates
from secateur.plan.run import Run

_HALVES = {1: (("attention_half", "leave"),), 2: (("attention_half", "between"), ("mlp_half", "leave"))}
_LARGE_BYTES = 1 << 25
Finished = Callable[[int], tuple[BlockView, BlockPlan] | None]


@dataclass(frozen=True)
class Job:
    """What to do: a method with its options, and how much it is to remove.

    Attributes:
        view: the model as the method sees it: in canonical form where its residual stream is to be rotated.
        rates: the sparsity of every matrix of every block; empty for a method that narrows the residual stream.
        sparsity: of the residual stream, or of the parameters of the whole model.
        allocation: how the sparsity of each matrix is still to be chosen, from `rates.ALLOCATIONS`; the rates then hold one for all, which sets the budget.
        seed: of every random choice.
        device, dtype: of the computation of a plan for all blocks at once.
        checkpoint, notes, spill, labels: see `plan.run.Run`.
    """

    view: ModelView
    method: Method
    options: Any
    rates: Rates
    sparsity: float | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    checkpoint: Path | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    spill: Path | None = None
    allocation: str | None = None
    labels: Tensor | None = None

    @property
    def learns(self) -> bool:
        """Whether parameters of the whole model are to be removed, wherever they are."""
        return self.method.counts_parameters(self.options) and bool(self.sparsity)

    @property
    def whole_model(self) -> bool:
        """Whether the plan is made for all blocks at once."""
        return self.method.whole_model(self.options) and (bool(self.sparsity) or any(self.rates))

    @property
    def rotates(self) -> bool:
        """Whether the residual stream is rotated and narrowed."""
        return self.view.dims(0).residual is not None and self.method.plan_place is not None

    @property
    def streams(self) -> bool:
        """Whether calibration tokens have to pass through the blocks."""
        return self.rotates or (self.method.statistics is not None and not self.whole_model and any(self.rates))

    @property
    def calibrates(self) -> bool:
        """Whether calibration tokens are needed at all."""
        return self.streams or self.allocation is not None or (self.whole_model and self.method.module.CALIBRATION is not None)

    @property
    def last(self) -> int:
        """The last block that anything is asked of (-1: none); what lies behind it need not be run."""
        return max((index for index, rates in enumerate(self.rates) if rates), default=-1)


def make_job(
    view: ModelView,
    dtype: torch.dtype,
    method: Method,
    options: Any,
    sparsity: float | None,
    modules: str | None,
    seed: int = 0,
) -> Job:
    """Check what is asked against the model.

    Args:
        view: the model.
        dtype: of the weights that are to come out, where a method computes new ones.
        method, options: what to do.
        sparsity, modules: as on the command line.
        seed: of every random choice.

    Raises:
        UsageError: a sparsity outside its range, or modules that do not go with the method.
        SecateurError: the method cannot do this model.
    """
    if method.counts_parameters(options):
        return _whole_job(view, method, options, sparsity, modules, seed)
    if method.plan_place is None:
        pattern = method.pattern(options) or parse_pattern("unstructured")
        allocation = modules if modules in ALLOCATIONS else None
        if allocation is not None:
            check_allocation(allocation, sparsity, pattern)
            if method.plan_block is None:
                raise UsageError(f"--modules {allocation} does not go with {method.name}: it chooses among all weights of the model; use --sparsity")
        rates = resolve_rates(view, sparsity, None if allocation else modules, pattern)
        return Job(view, method, options, rates, seed=seed, allocation=allocation if sparsity else None)
    if modules is not None:
        raise UsageError(f"--modules does not go with {method.name}: it narrows the residual stream, which all matrices share; use --sparsity")
    if options.implied_sparsity:
        if sparsity is not None:
            raise UsageError(f"--sparsity does not go with --set energy={options.energy:g}: the widths follow from the spectrum; give one of them")
    elif sparsity is None:
        raise UsageError(f"{method.name} needs --sparsity S, --params-removed R, or --set energy=E")
    sparsity = check_sparsity(sparsity or 0.0)
    nothing: Rates = tuple({} for _ in range(view.blocks))
    if sparsity == 0 and not options.implied_sparsity:
        return Job(view, method, options, nothing, sparsity, seed)
    method.module.width_after(view.config.hidden_size, sparsity, options)  # a width of 0 shows before the work
    return Job(canonical_view(view, dtype), method, options, nothing, sparsity, seed)


def _whole_job(view: ModelView, method: Method, options: Any, sparsity: float | None, modules: str | None, seed: int) -> Job:
    """Of a method whose sparsity is of the parameters of the whole model."""
    if modules is not None:
        raise UsageError(f"--modules does not go with {method.name}: it chooses among all parameters of the model; use --sparsity")
    if sparsity is None:
        raise UsageError(f"{method.name} needs --sparsity S, the fraction of the parameters of the whole model to remove")
    if sparsity := check_sparsity(sparsity):
        method.module.check(view, sparsity, options)
    return Job(view, method, options, tuple({} for _ in range(view.blocks)), sparsity, seed)


def pruned_blocks(
    job: Job, windows: Tensor | None, stream: Stream | None, watch: Stopwatch, finished: Finished = lambda _: None
) -> Iterator[tuple[BlockView, BlockPlan]]:
    """Every block after its cut, with its plan, in order. A plan of the whole model is made before this returns.

    Args:
        job: what to do.
        windows: the calibration token ids [S, T]; None where the method needs none.
        stream: the same on their way through the blocks; None where `job.streams` is false.
        watch: receives the seconds of `files`, `forward`, `statistics` and `selection`.
        finished: gives blocks that an interrupted run has already done: they are run, not pruned again.

    Raises:
        NotFiniteError: a weight or an input is not finite; the block and the matrix are named.
    """
    if job.rotates:
        assert stream is not None
        return _rotated_blocks(job, stream, watch, finished)
    return _cut_blocks(job, whole_model_plan(job, windows, watch) if job.whole_model else None, stream, watch, finished)


def _cut_blocks(
    job: Job, plans: Sequence[BlockPlan] | None, stream: Stream | None, watch: Stopwatch, finished: Finished
) -> Iterator[tuple[BlockView, BlockPlan]]:
    for index in range(job.view.blocks):
        done = finished(index)
        if done is None:
            with watch("files"):
                block = job.view.block(index, job.rates[index])
            _check_weights(block)
            plan = plans[index] if plans else _plan_one(job, block, stream, watch)
            with watch("selection"):
                done = cut_block(block, plan), plan
            del block  # the uncut weights
            give_back()
        if stream is not None and index < job.last:
            with watch("forward"):
                stream.advance(done[0])
            give_back()
        yield done
        del done  # the caller has finished with it
        give_back()


def _rotated_blocks(job: Job, stream: Stream, watch: Stopwatch, finished: Finished) -> Iterator[tuple[BlockView, BlockPlan]]:
    """As `pruned_blocks`, for a method that narrows the residual stream.

    The stream keeps the full width: what is sliced off is projected away, which is the same function as the narrow network's. So
    each half of a block runs once, and its second moment is summed as it goes by.
    """
    view, halves = job.view, len(job.view.family.norms)
    if notice := job.method.module.rounding_notice(view.config.hidden_size, job.sparsity, job.options):
        say(notice)
    enter: Place | None = None
    for index in range(view.blocks):
        done = finished(index)
        plan = None if done is None else done[1]
        with watch("files"):
            block = view.block(index)
        _check_weights(block)
        if enter is None:
            enter = plan.places["enter"] if plan else _choose(job, None, stream.show, "the embeddings", watch)
        places, run = {"enter": enter}, None
        at_end = index == view.blocks - 1 and not job.options.slice_head
        for half, name in _HALVES[halves]:
            before = places["between"] if name == "leave" and halves == 2 else enter
            if at_end and name == "leave":
                places[name] = plan.places[name] if plan else job.method.module.last_place(before, job.options)
                continue
            run = partial(stream.advance_half, block, half, _projection(before, stream))
            if plan:
                with watch("forward"):
                    run(None)
                places[name] = plan.places[name]
            else:
                places[name] = _choose(job, before, run, f"block {index}, after {'attention' if name == 'between' else 'the block'}", watch)
        if done is None:
            plan = BlockPlan(index, places=places)
            give_back()
            with watch("rotation"):
                done = cut_block(block, plan), plan
        enter = places["leave"]
        del block, places, plan
        run = None  # it held the block
        give_back()
        yield done
        del done
        give_back()  # before the next block is read


def _choose(job: Job, before: Place | None, run: Callable[[Callable[[Tensor], None]], None], where: str, watch: Stopwatch) -> Place:
    """Run a part of the network, sum the second moment of the residual behind it, and let the method choose its directions."""
    moment = job.method.module.new_moment(job.view.config.hidden_size, torch.device("cpu"), job.options)

    def listen(x_ND: Tensor) -> None:
        with watch("statistics"):
            moment.update(x_ND)

    with watch("forward"):
        run(listen)
    give_back()  # what the forward needed, before the eigenproblem needs as much
    if not moment.finite():
        raise NotFiniteError(
            f"{where}: the residual stream is not finite (NaN or infinity); the checkpoint is damaged, or its dtype is too narrow: try --dtype float32"
        )
    assert job.method.plan_place is not None
    with watch("eigenproblems"):
        place: Place = job.method.plan_place(moment, before, job.sparsity, job.options, job.seed)
    assert place.basis_DW is not None
    return replace(place, basis_DW=place.basis_DW.contiguous())


def _projection(place: Place, stream: Stream) -> Tensor | None:
    """B B^T: onto the directions that are kept."""
    assert place.basis_DW is not None
    basis_DW = place.basis_DW.clone(memory_format=torch.contiguous_format)  # one that was read from a file is aligned otherwise, and products tell
    return (basis_DW @ basis_DW.t()).to(stream.device, stream.dtype)


def whole_model_plan(job: Job, windows: Tensor | None, watch: Stopwatch) -> Sequence[BlockPlan]:
    """The plans of all blocks, made at once."""
    assert job.method.plan_model is not None
    run = Run(job.sparsity or 0.0, job.seed, job.device, job.dtype, job.checkpoint, job.notes, job.spill, job.labels)
    with watch("selection"):
        plans: Sequence[BlockPlan] = job.method.plan_model(replace(job.view, rates=job.rates), windows, job.options, run)
    return plans


def _plan_one(job: Job, block: BlockView, stream: Stream | None, watch: Stopwatch) -> BlockPlan:
    if not block.rates:  # nor does a sparsity of 0 ask anything of a method that plans the whole model
        return BlockPlan(block.index)
    statistics = None if stream is None else collect(job, block, stream, watch)
    if sum(tensor.nbytes for tensor in block.tensors.values()) > _LARGE_BYTES:
        give_back()  # what the forward freed is of sizes that the plan cannot use; a small block is planned faster in warm memory
    assert job.method.plan_block is not None
    with watch("selection"):
        plan: BlockPlan = job.method.plan_block(block, statistics, job.options)
    return plan


def collect(job: Job, block: BlockView, stream: Stream, watch: Stopwatch) -> Statistics:
    """The statistics of the matrices of a block that anything is asked of; the stream stays where it is."""
    assert job.method.statistics is not None
    family = block.family
    apart = block.dims.residual is not None and block.dims.residual.selected
    inputs = sorted({family.input_of(name, apart=apart) for name in block.rates})
    collected = {name: job.method.statistics(block.dims.shape(name)[1], stream.device) for name in inputs}

    def listener(name: str) -> Callable[[Tensor], None]:
        def listen(x_NI: Tensor) -> None:
            with watch("statistics"):
                collected[name].update(x_NI)

        return listen

    with watch("forward"):
        stream.observe(block, {family.matrices[name]: listener(name) for name in inputs})
    statistics = Statistics(family, collected, apart)
    statistics.check_finite(block.index)
    return statistics


def _check_weights(block: BlockView) -> None:
    for name in block.names:
        check_finite(block.matrix(name), f"block {block.index}: matrix {name}")
    matrices = {f"{path}.weight" for path in block.family.matrices.values()}
    for name, tensor in block.tensors.items():
        if name not in matrices and tensor.is_floating_point():
            check_finite(tensor, f"block {block.index}: {name}")


def check_finite(weight: Tensor, what: str) -> None:
    """Raises NotFiniteError where a weight holds NaN or infinity."""
    # a sum is one cheap pass and is not finite where an entry is not; it may also overflow, so the entries decide
    # (in the weight's own dtype: torch would first copy all of it to another)
    if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
        raise NotFiniteError(f"{what} has weights that are not finite (NaN or infinity); the checkpoint is damaged")
