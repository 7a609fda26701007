"""Running sums over calibration tokens.

Each distinct input has one statistic: q, k, v share one; gate and up share one.

Shape letters: N tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from secateur.core.errors import NotFiniteError, UsageError
from secateur.core.numbers import at_least_float32
from secateur.models.family import Family

_PANELS = 4  # more panels save little work, and their products are too narrow to be fast


class Statistic(Protocol):
    """A sum over tokens. `update` adds a batch x_NI; `finite` checks the sum for NaN and infinity."""

    def update(self, x_NI: Tensor) -> None:
        """Add a batch of tokens."""

    def finite(self) -> bool:
        """Return True if no NaN or infinity has been added."""


S = TypeVar("S", bound=Statistic)


class InputNorm:
    """The Euclidean norm of every input feature over all tokens, ||X_j||_2 of Wanda (arXiv:2306.11695, section 3).

    Batches are summed in the dtype of the activations (float32 or better), batch sums in float64.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.square_I = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, x_NI: Tensor) -> None:
        """Add a batch of tokens."""
        # many times faster than vector_norm along the first dimension
        self.square_I += at_least_float32(x_NI).square().sum(0)
        self.tokens += len(x_NI)

    def finite(self) -> bool:
        """Return True if no NaN or infinity has been added."""
        return bool(torch.isfinite(self.square_I).all())

    @property
    def norm_I(self) -> Tensor:
        """The norms, float64 [I]."""
        return self.square_I.sqrt()


_NOTHING = 1e-30  # on a diagonal: positive definite still
TOKENS_A_DIRECTION = 10  # are enough for the second moment of a residual stream


class SecondMoment:
    """The sum of x^T x over all tokens, [I, I]: products of whole batches in float32 or better, summed in float64.

    The sum is symmetric. So its columns are cut into four panels, and each panel is multiplied only with itself and the
    panels after it. This takes five eighths of the work.

    Args:
        inputs: I.
        device: the device that holds the sum.
        normed: divide every token by its root mean square first, so that all tokens have equal weight.
    """

    def __init__(self, inputs: int, device: torch.device, *, normed: bool = False) -> None:
        self._sum_II = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        edges = [round(inputs * part / _PANELS) for part in range(_PANELS + 1)]
        self._panels = list(pairwise(edges))
        self.tokens = 0
        self.normed = normed

    def update(self, x_NI: Tensor) -> None:
        """Add a batch of tokens."""
        x_NI = at_least_float32(x_NI)
        if self.normed:
            x_NI = rms_norm(x_NI, x_NI.shape[-1:])
        for start, end in self._panels:
            self._sum_II[start:end, start:] += (x_NI[:, start:end].t() @ x_NI[:, start:]).to(self._sum_II.device)
        self.tokens += len(x_NI)

    def join(self, other: SecondMoment, weight: float) -> None:
        """Add another moment, scaled so that its trace is `weight` times the trace here."""
        scale = weight * float(self._sum_II.trace() / other._sum_II.trace())
        self._sum_II += scale * other._sum_II.to(self._sum_II.device)

    def finite(self) -> bool:
        """Return True if no NaN or infinity has been added."""
        return bool(torch.isfinite(self._sum_II).all())

    @property
    def sum_II(self) -> Tensor:
        """The sum, float64 [I, I]."""
        for start, end in self._panels:
            self._sum_II[end:, start:end] = self._sum_II[start:end, end:].t()
        return self._sum_II


def check_damping(method: str, damping: float, why: str) -> None:
    """Refuse a damping of 0 or less, or one that is no number, in the options of a method.

    Args:
        method: its name.
        damping: the value.
        why: what would go wrong, for the message: `moments may be singular`.

    Raises:
        UsageError: it is not above 0.
    """
    if not damping > 0:
        raise UsageError(f"{method}: damping is {damping:g}; it must be above 0, since {why}")


def damped(moment_II: Tensor, damping: float) -> Tensor:
    """Return a second moment in float64 on the CPU, with `damping` times its mean diagonal added to its diagonal.

    One that is all zero becomes tiny, so that what it weighs costs nothing. What is given may be changed.
    """
    moment_II = moment_II.double().cpu()
    level = float(moment_II.diagonal().mean())
    moment_II.diagonal().add_(damping * level if level > 0 else _NOTHING)
    return moment_II


@dataclass(frozen=True)
class Statistics(Generic[S]):
    """The statistics of one block. `statistics["k"]` is the statistic of the input of k, which q and v share.

    Attributes:
        family: the family, which says which matrices share an input.
        of_input: the statistic of each distinct input.
        apart: whether attention and MLP read different tensors; see `Family.input_of`.
    """

    family: Family
    of_input: Mapping[str, S]
    apart: bool = False

    def __getitem__(self, name: str) -> S:
        return self.of_input[self.family.input_of(name, apart=self.apart)]

    def check_finite(self, block: int) -> None:
        """Raise NotFiniteError if a statistic holds NaN or infinity; the message names the block and the matrix."""
        for name, statistic in self.of_input.items():
            if not statistic.finite():
                raise NotFiniteError(
                    f"block {block}: the input of matrix {name} is not finite (NaN or infinity); "
                    "the checkpoint is damaged, or its dtype is too narrow: try --dtype float32"
                )


NewStatistic = Callable[[int, torch.device], Statistic]
