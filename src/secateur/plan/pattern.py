"""Patterns: which entries of a matrix may be removed together, and the selection of the lowest scores.

Exactly the requested number is removed. Of equal scores the entries with the lower index go first (the order of a
stable sort), so that a selection is the same on every machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from secateur.core.errors import UsageError

_PAIRWISE_UP_TO = 8
_PIECE = 1 << 16


@dataclass(frozen=True)
class Pattern:
    """`unstructured`; `N:M` (keep N of every M consecutive inputs of a row); `rows` or `columns` (whole units are
    removed).
    """

    kind: Literal["unstructured", "n:m", "rows", "columns"]
    keep: int = 0
    group: int = 0

    @property
    def structured(self) -> bool:
        """True if whole units are removed."""
        return self.kind in ("rows", "columns")

    @property
    def implied_sparsity(self) -> float | None:
        """The sparsity that N:M fixes."""
        return 1 - self.keep / self.group if self.kind == "n:m" else None

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}" if self.kind == "n:m" else self.kind


def parse_pattern(text: str) -> Pattern:
    """Read a pattern from its text.

    Raises:
        UsageError: the text is none of the patterns above, or N:M does not have 0 < N < M.
    """
    if text in ("unstructured", "rows", "columns"):
        return Pattern(text)  # type: ignore[arg-type]  # narrowed by the line above
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        keep, group = int(match[1]), int(match[2])
        if 0 < keep < group:
            return Pattern("n:m", keep, group)
        raise UsageError(f"pattern {text}: N:M keeps N of every M, so 0 < N < M is needed, as in 2:4")
    raise UsageError(f"unknown pattern '{text}' (known: unstructured, rows, columns, or N:M such as 2:4)")


def keep_highest_per_row(score_RC: Tensor, remove: int) -> Tensor:
    """The mask [R, C], True where kept, that removes the `remove` lowest scores of every row."""
    rows, columns = score_RC.shape
    if remove <= 0:
        return torch.ones(rows, columns, dtype=torch.bool, device=score_RC.device)
    if remove >= columns:
        return torch.zeros(rows, columns, dtype=torch.bool, device=score_RC.device)
    if score_RC.device.type == "cpu":
        keep_RC = torch.from_numpy(_above_kth_lowest(score_RC, remove))
        kept_count = int(np.count_nonzero(keep_RC.numpy()))
    else:
        keep_RC = score_RC > score_RC.kthvalue(remove, dim=1, keepdim=True).values
        kept_count = int(keep_RC.sum())
    if kept_count < rows * (columns - remove):  # rare: several scores of a row equal its threshold
        crowded = (keep_RC.sum(1) < columns - remove).nonzero().squeeze(1)
        keep_RC[crowded] = _by_sorting(score_RC[crowded], remove)
    return keep_RC


def _above_kth_lowest(score_RC: Tensor, k: int) -> np.ndarray:
    """The mask [R, C], True where a score is above the k-th lowest of its row.

    numpy's partition is a vectorised quickselect, many times faster than a sort or torch's kthvalue on a CPU. Floats
    that are not negative sort like the whole numbers of the same bits, which takes half the time on short rows.
    """
    rows, columns = score_RC.shape
    whole_RC = score_RC.contiguous().view(torch.int32 if score_RC.dtype == torch.float32 else score_RC.dtype).numpy()
    keep_RC = np.empty((rows, columns), np.bool_)
    few = max(1, _PIECE // columns)
    for start in range(0, rows, few):  # pieces that stay in the cache
        piece = whole_RC[start : start + few]
        np.greater(piece, np.partition(piece, k - 1, axis=1)[:, k - 1 : k], out=keep_RC[start : start + few])
    return keep_RC


def _by_sorting(score_RC: Tensor, remove: int) -> Tensor:
    order = score_RC.sort(dim=1, stable=True).indices[:, :remove]
    return torch.ones_like(score_RC, dtype=torch.bool).scatter_(1, order, False)


def keep_highest(score_OI: Tensor, remove: int) -> Tensor:
    """The mask [O, I] that removes the `remove` lowest scores of the whole matrix."""
    return keep_highest_per_row(score_OI.reshape(1, -1), remove).view(score_OI.shape)


def keep_n_of_m(score_OI: Tensor, keep: int, group: int) -> Tensor:
    """The mask [O, I] that keeps the `keep` highest of every `group` consecutive inputs; I must be a multiple of
    `group`.
    """
    if group > _PAIRWISE_UP_TO:
        return keep_highest_per_row(score_OI.reshape(-1, group), group - keep).view(score_OI.shape)
    if score_OI.device.type == "cpu":
        return torch.from_numpy(_keep_n_of_m_flat(score_OI.numpy().reshape(-1), keep, group)).view(score_OI.shape)
    # the rank of an entry is the number of entries that beat it; for small groups comparing all pairs beats any sort
    score_MG = score_OI.reshape(-1, group).t().contiguous()
    beaten_by_MG = torch.zeros(score_MG.shape, dtype=torch.int8, device=score_OI.device)
    for later in range(1, group):
        for earlier in range(later):
            later_wins_G = score_MG[later] >= score_MG[earlier]  # of equals, the earlier input is removed
            beaten_by_MG[earlier] += later_wins_G
            beaten_by_MG[later] += ~later_wins_G
    return (beaten_by_MG < keep).t().reshape(score_OI.shape)


def _keep_n_of_m_flat(score: np.ndarray, keep: int, group: int) -> np.ndarray:
    """The same on a flat array: each score against the one `apart` places later, in pieces that stay in the cache."""
    piece = _PIECE - _PIECE % group
    place, same_group = _places(piece, group)
    keep_mask = np.empty(len(score), np.bool_)
    for start in range(0, len(score), piece):
        part = score[start : start + piece]
        size = len(part)
        beaten_by = place[:size].copy()  # as if every earlier one of the group won
        for apart in range(1, group):
            later_wins = (part[apart:] >= part[:-apart]).view(np.int8)  # of equals, the earlier input is removed
            later_wins &= same_group[apart][: size - apart]
            beaten_by[: size - apart] += later_wins
            beaten_by[apart:] -= later_wins
        np.less(beaten_by, keep, out=keep_mask[start : start + size])
    return keep_mask


@cache
def _places(size: int, group: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The place of each of `size` entries in its group, and for every distance a mask: 1 where the entry at that
    distance is in the same group.
    """
    place = np.tile(np.arange(group, dtype=np.int8), size // group)
    return place, [(place < group - apart).view(np.int8) for apart in range(group)]
