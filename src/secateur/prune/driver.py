"""The loop over blocks, for any method: read, calibrate, plan and cut, one block at a time.

The caller decides what happens to the results: `run.prune` writes them, and `api.plan` keeps only the plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from secateur.calibrate.statistics import TOKENS_A_DIRECTION, Statistics
from secateur.calibrate.stream import Stream
from secateur.core.errors import NotFiniteError
from secateur.core.memory import give_back
from secateur.core.progress import say, track
from secateur.core.timing import Stopwatch
from secateur.cut import cut_block
from secateur.models.view import BlockView
from secateur.plan.plan import BlockPlan, Place
from secateur.plan.run import Run
from secateur.prune.job import Job

_HALVES = {1: (("attention_half", "leave"),), 2: (("attention_half", "between"), ("mlp_half", "leave"))}
_LARGE_BYTES = 1 << 25
Finished = Callable[[int], tuple[BlockView, BlockPlan] | None]


def pruned_blocks(
    job: Job,
    stream: Stream | None,
    watch: Stopwatch,
    finished: Finished = lambda _: None,
    plans: Sequence[BlockPlan] | None = None,
) -> Iterator[tuple[BlockView, BlockPlan]]:
    """Yield every block after its cut, with its plan, in order.

    Args:
        job: the method, the model and how much to remove.
        stream: the calibration tokens on their way through the blocks; None if `job.streams` is false.
        watch: receives the seconds of `files`, `forward`, `statistics` and `selection`.
        finished: returns a block that an interrupted run has pruned already; it is run, but not pruned again.
        plans: the result of `whole_model_plan` if `job.whole_model`, otherwise None.

    Raises:
        NotFiniteError: a weight or an input is not finite; the message names the block and the matrix.
    """
    if (
        (notice := job.method.says.notice) is not None
        and job.sparsity
        and (line := notice(job.view, job.sparsity, job.options))
    ):
        say(line)
    if stream is not None:
        warn_of_few_tokens(job, len(stream.hidden_STD) * stream.hidden_STD.shape[1])
    if job.rotates:
        assert stream is not None
        return _rotated_blocks(job, stream, watch, finished)
    assert (plans is not None) == job.whole_model, "a method for the whole model has planned it"
    return _cut_blocks(job, plans, stream, watch, finished)


def warn_of_few_tokens(job: Job, tokens: int) -> None:
    """Warn if the method says that these calibration tokens are too few for a good result."""
    if line := few_tokens(job, tokens):
        say(f"warning: {line}")


def few_tokens(job: Job, tokens: int) -> str | None:
    """Return what the method says where calibration tokens are too few for a good result; None where they are not."""
    says = job.method.says.few_tokens
    return says(job.view, tokens, job.options) if says is not None and job.calibrates else None


def _cut_blocks(
    job: Job, plans: Sequence[BlockPlan] | None, stream: Stream | None, watch: Stopwatch, finished: Finished
) -> Iterator[tuple[BlockView, BlockPlan]]:
    for index in range(job.view.blocks):
        done = finished(index)
        if done is None:
            plan = None if plans is None else _planned(plans, index, watch)
            with watch("files"):
                block = job.view.block(index, job.rates[index])
            _check_weights(block)
            plan = plan or _plan_one(job, block, stream, watch)
            with watch("selection"):
                done = cut_block(block, plan), plan
            del block, plan  # free the uncut weights
            give_back()
        if stream is not None and index < job.last:
            with watch("forward"):
                stream.advance(done[0])
            give_back()
        yield done
        del done  # the caller no longer needs it: free it before the next block
        give_back()


def _rotated_blocks(
    job: Job, stream: Stream, watch: Stopwatch, finished: Finished
) -> Iterator[tuple[BlockView, BlockPlan]]:
    """Yield the same as `pruned_blocks`, for a method that narrows the residual stream.

    The calibration stream keeps the full width. The directions that are sliced off are projected away, which gives the
    same function as the narrow network. So each half of a block runs once, and its second moment is summed during that
    run.
    """
    view, halves = job.view, len(job.view.family.norms)
    enter: Place | None = None
    for index in range(view.blocks):
        done = finished(index)
        plan = None if done is None else done[1]
        with watch("files"):
            block = view.block(index)
        _check_weights(block)
        # the place before the first block follows the embeddings; later it is where the block before ended
        if enter is None:
            leaving = partial(_leaving, job, stream, watch) if job.method.keeps_tied(view, job.options) else None
            enter = plan.places["enter"] if plan else _choose(job, None, stream.show, "the embeddings", watch, leaving)
        places, run = {"enter": enter}, None
        for half, name in _HALVES[halves]:
            before = places["between"] if name == "leave" and halves == 2 else enter
            # the method may choose the place after the last block without calibration
            if name == "leave" and index == view.blocks - 1 and (last := _last_place(job, before)) is not None:
                places[name] = plan.places[name] if plan else last
                continue
            run = partial(stream.advance_half, block, half, _projection(before, stream))
            if plan:  # done by an interrupted run: only move the stream on
                with watch("forward"):
                    run(None)
                places[name] = plan.places[name]
            else:
                where = f"block {index}, after {'attention' if name == 'between' else 'the block'}"
                places[name] = _choose(job, before, run, where, watch)
        if done is None:
            plan = BlockPlan(index, places=places)
            give_back()
            with watch("rotation"):
                done = cut_block(block, plan), plan
        enter = places["leave"]
        del block, places, plan
        run = None  # it holds the block
        give_back()
        yield done
        del done
        give_back()  # before the next block is read


def _last_place(job: Job, before: Place) -> Place | None:
    """Return the place after the last block, or None if the method chooses it like the others."""
    assert job.method.says.last_place is not None
    return job.method.says.last_place(before, job.options)


def _leaving(job: Job, stream: Stream, watch: Stopwatch) -> Any:
    """Return the second moment of what a tied head reads in the dense model, from some of the windows."""
    assert job.method.says.new_moment is not None
    view, (windows, seqlen, hidden) = job.view, stream.hidden_STD.shape
    moment = job.method.says.new_moment(hidden, torch.device("cpu"), job.options)
    few = stream.of_first(min(windows, -(-TOKENS_A_DIRECTION * hidden // seqlen)))
    for index in track(range(view.blocks), f"{job.method.name}: blocks on the way to the head"):
        with watch("forward"):
            few.advance(view.block(index))
        give_back()
    map_DD = view.source.read(f"{view.family.tied_map}.weight").to(stream.device, stream.dtype)
    epsilon = view.family.norm.epsilon_of(view.config)
    few.show(lambda x_ND: moment.update(rms_norm(x_ND, x_ND.shape[-1:], eps=epsilon) @ map_DD.t()))
    return moment


def _choose(
    job: Job,
    before: Place | None,
    run: Callable[[Callable[[Tensor], None]], None],
    where: str,
    watch: Stopwatch,
    leaving: Callable[[], Any] | None = None,
) -> Place:
    """Run a part of the network, sum the second moment of the residual after it, and let the method choose a place.

    `leaving` returns the second moment of what a tied head reads, which then counts too.
    """
    says = job.method.says
    assert says.plan_place is not None
    assert says.new_moment is not None
    moment = says.new_moment(job.view.config.hidden_size, torch.device("cpu"), job.options)

    def listen(x_ND: Tensor) -> None:
        with watch("statistics"):
            moment.update(x_ND)

    with watch("forward"):
        run(listen)
    give_back()  # free the memory of the forward pass before the eigenproblem needs as much
    if not moment.finite():
        raise NotFiniteError(
            f"{where}: the residual stream is not finite (NaN or infinity); the checkpoint is damaged, "
            "or its dtype is too narrow: try --dtype float32"
        )
    if leaving is not None:
        assert says.join_ends is not None
        says.join_ends(moment, leaving(), job.options)
    with watch("eigenproblems"):
        place = says.plan_place(moment, before, job.sparsity or 0.0, job.options, job.seed)
    assert place.basis_DW is not None
    return replace(place, basis_DW=place.basis_DW.contiguous())


def _projection(place: Place, stream: Stream) -> Tensor | None:
    """Return B B^T, the projection onto the directions that stay."""
    assert place.basis_DW is not None
    # a basis read from a file has another alignment in memory, which changes the last bits of products: copy it
    basis_DW = place.basis_DW.clone(memory_format=torch.contiguous_format)
    return (basis_DW @ basis_DW.t()).to(stream.device, stream.dtype)


def whole_model_plan(job: Job, windows: Tensor | None, watch: Stopwatch) -> Sequence[BlockPlan]:
    """Return the plans of all blocks, made at once."""
    assert job.method.says.plan_model is not None
    run = Run(
        job.sparsity or 0.0,
        job.seed,
        job.device,
        job.dtype,
        job.state_file,
        job.notes,
        job.spill,
        job.labels,
        job.at_least,
    )
    with watch("selection"):
        return job.method.says.plan_model(replace(job.view, rates=job.rates), windows, job.options, run)


def _planned(plans: Sequence[BlockPlan], index: int, watch: Stopwatch) -> BlockPlan:
    """Return a plan, which may be made only now."""
    with watch("selection"):
        return plans[index]


def _plan_one(job: Job, block: BlockView, stream: Stream | None, watch: Stopwatch) -> BlockPlan:
    if not block.rates:  # also at sparsity 0 of a method that plans the whole model
        return BlockPlan(block.index)
    statistics = None if stream is None else collect(job, block, stream, watch)
    if sum(tensor.nbytes for tensor in block.tensors.values()) > _LARGE_BYTES:
        # the forward pass freed pieces of memory that the plan cannot reuse; for a small block, reuse is faster
        give_back()
    assert job.method.says.plan_block is not None
    with watch("selection"):
        return job.method.says.plan_block(block, statistics, job.options)


def collect(job: Job, block: BlockView, stream: Stream, watch: Stopwatch) -> Statistics[Any]:
    """Collect the statistics of the matrices of a block that have a rate. The stream does not advance."""
    new_statistic = job.method.says.STATISTICS
    assert new_statistic is not None
    family = block.family
    apart = block.dims.apart
    inputs = sorted({family.input_of(name, apart=apart) for name in block.rates})
    collected = {name: new_statistic(block.dims.shape(name)[1], stream.device) for name in inputs}

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
    """Raise NotFiniteError if a weight holds NaN or infinity."""
    # A sum is one cheap pass, and is not finite if an entry is not. It may also overflow, so the entries decide.
    # The sum is in the dtype of the weight: another dtype would first copy all of it.
    if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
        raise NotFiniteError(f"{what} has weights that are not finite (NaN or infinity); the checkpoint is damaged")
