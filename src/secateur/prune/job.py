"""A job: a method with its options, the model, and how much to remove of each matrix or of the whole model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import SecateurError, UsageError
from secateur.methods import Method
from secateur.models.canonical import canonical_view
from secateur.models.view import ModelView
from secateur.plan.pattern import parse_pattern
from secateur.plan.quantity import Quantity
from secateur.plan.rates import ALLOCATIONS, Rates, check_allocation, resolve_rates


@dataclass(frozen=True)
class Job:
    """A method with its options, the model, and how much to remove.

    Attributes:
        view: the model as the method sees it: in canonical form if its residual stream will be rotated.
        rates: the sparsity of every matrix of every block; empty for a method that narrows the residual stream.
        sparsity: the sparsity of the residual stream, or of the parameters of the whole model.
        allocation: the way to choose the sparsity of each matrix, one of `rates.ALLOCATIONS`; None if `rates` is final.
            Until the choice is made, `rates` holds one sparsity for all, which sets the budget.
        seed: the seed of every random choice.
        device, dtype: where and in which dtype a plan for all blocks at once is computed.
        state_file, notes, spill, labels, at_least: see `plan.run.Run`.
    """

    view: ModelView
    method: Method
    options: Any
    rates: Rates
    sparsity: float | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    state_file: Path | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    spill: Path | None = None
    allocation: str | None = None
    labels: Tensor | None = None
    at_least: bool = False

    @property
    def quantity(self) -> Quantity:
        """The quantity that the sparsity is a fraction of."""
        return self.method.quantity(self.options)

    @property
    def whole_model(self) -> bool:
        """Whether the plan is made for all blocks at once."""
        return self.method.whole_model(self.options) and (bool(self.sparsity) or any(self.rates))

    @property
    def rotates(self) -> bool:
        """Whether the residual stream is rotated and narrowed."""
        return self.view.dims(0).residual is not None and self.method.says.plan_place is not None

    @property
    def streams(self) -> bool:
        """Whether calibration tokens must pass through the blocks."""
        return self.rotates or (self.method.says.STATISTICS is not None and not self.whole_model and any(self.rates))

    @property
    def calibrates(self) -> bool:
        """Whether calibration tokens are needed at all."""
        return (
            self.streams
            or self.allocation is not None
            or (self.whole_model and self.method.says.CALIBRATION is not None)
        )

    @property
    def last(self) -> int:
        """The last block that has a matrix to prune (-1: none); later blocks need no forward pass."""
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
    """Check the settings against the model, and make a job of them.

    Args:
        view: the model.
        dtype: the dtype of the new weights, for a method that computes new ones.
        method, options: the method and its options.
        sparsity, modules: as on the command line.
        seed: the seed of every random choice.

    Raises:
        UsageError: a sparsity outside its range, or modules that do not go with the method.
        SecateurError: the method cannot prune this model.
    """
    quantity = method.quantity(options)
    if quantity.shared is None:
        return _job_of_matrices(view, method, options, sparsity, modules, seed)
    sparsity = quantity.check(method.name, sparsity, modules)
    if sparsity and not method.says.WITHOUT_PARTS:
        _check_parts(view, method)
    if method.says.check is not None and (sparsity or quantity.required is None):
        method.says.check(view, sparsity, options)
    rotates = method.says.plan_place is not None and sparsity != 0
    nothing: Rates = tuple({} for _ in range(view.blocks))
    canonical = partial(canonical_view, view, dtype, tied=method.keeps_tied(view, options))
    return Job(canonical() if rotates else view, method, options, nothing, sparsity or 0.0, seed)


def _check_parts(view: ModelView, method: Method) -> None:
    """Refuse a model with blocks that have no attention or no MLP.

    Raises:
        SecateurError: a block has only one of the two; the message names the first.
    """
    for index in range(view.blocks):
        for part in view.dims(index).missing:
            raise SecateurError(
                f"{view.name}: block {index} has no {part}, and {method.name} does not prune such a model; prune the"
                " original with it, or set weights to zero"
            )


def _job_of_matrices(
    view: ModelView, method: Method, options: Any, sparsity: float | None, modules: str | None, seed: int
) -> Job:
    """Make a job in which each matrix has its own sparsity."""
    pattern = method.pattern(options) or parse_pattern("unstructured")
    allocation = modules if modules in ALLOCATIONS else None
    if allocation is not None:
        check_allocation(allocation, sparsity, pattern)
        if method.says.plan_block is None:
            raise UsageError(
                f"--modules {allocation} does not go with {method.name}: it chooses among all weights of the model; "
                "use --sparsity"
            )
    rates = resolve_rates(view, sparsity, None if allocation else modules, pattern)
    return Job(view, method, options, rates, seed=seed, allocation=allocation if sparsity else None)
