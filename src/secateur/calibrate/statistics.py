"""Streaming sums over calibration tokens. One statistic for each distinct input: q, k, v share one; gate and up share one.

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

from secateur.core.errors import NotFiniteError
from secateur.core.numbers import at_least_float32
from secateur.models.family import Family

_PANELS = 4  # more save little work, and their products are too narrow to be fast


class Statistic(Protocol):
    """A sum over tokens. `update` adds a batch x_NI; `finite` says whether everything in it is a number."""

    def update(self, x_NI: Tensor) -> None:
        """Add a batch of tokens."""

    def finite(self) -> bool:
        """Whether no NaN or infinity has been added."""


S = TypeVar("S", bound=Statistic)


class InputNorm:
    """The Euclidean norm of every input over all tokens, ||X_j||_2 of Wanda (arXiv:2306.11695, section 3).

    Batches are summed in the dtype of the activations (float32 or better), batch sums in float64.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.square_I = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, x_NI: Tensor) -> None:
        """Add a batch of tokens."""
        self.square_I += (
            at_least_float32(x_NI).square().sum(0)
        )  # many times faster than vector_norm along the first dimension
        self.tokens += len(x_NI)

    def finite(self) -> bool:
        """Whether no NaN or infinity has been added."""
        return bool(torch.isfinite(self.square_I).all())

    @property
    def norm_I(self) -> Tensor:
        """float64 [I]."""
        return self.square_I.sqrt()


class SecondMoment:
    """The sum of x^T x over all tokens, [I, I]: products of whole batches, float32 or better, summed in float64.

    It is symmetric: in four panels of columns, each multiplied with itself and those behind it, five eighths of the work are enough.

    Args:
        inputs: I.
        device: where the sum is kept.
        normed: divide every token by its root mean square first, so that all tokens weigh the same.
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

    def finite(self) -> bool:
        """Whether no NaN or infinity has been added."""
        return bool(torch.isfinite(self._sum_II).all())

    @property
    def sum_II(self) -> Tensor:
        """float64 [I, I]."""
        for start, end in self._panels:
            self._sum_II[end:, start:end] = self._sum_II[start:end, end:].t()
        return self._sum_II


@dataclass(frozen=True)
class Statistics(Generic[S]):
    """The statistics of one block. `statistics["k"]` is that of the input of k, which q and v share. `apart`: see `Family.input_of`."""

    family: Family
    of_input: Mapping[str, S]
    apart: bool = False

    def __getitem__(self, name: str) -> S:
        return self.of_input[self.family.input_of(name, apart=self.apart)]

    def check_finite(self, block: int) -> None:
        """Raises NotFiniteError that names the block and the matrix whose input holds NaN or infinity."""
        for name, statistic in self.of_input.items():
            if not statistic.finite():
                raise NotFiniteError(
                    f"block {block}: the input of matrix {name} is not finite (NaN or infinity); "
                    "the checkpoint is damaged, or its dtype is too narrow: try --dtype float32"
                )


NewStatistic = Callable[[int, torch.device], Statistic]
