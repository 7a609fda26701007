"""Selections against plain sorting, ties included."""

from __future__ import annotations

import pytest
import torch

from secateur.core.errors import UsageError
from secateur.plan.pattern import keep_highest, keep_highest_per_row, keep_n_of_m, parse_pattern


def by_sorting(score: torch.Tensor, remove: int) -> torch.Tensor:
    keep = torch.ones_like(score, dtype=torch.bool)
    for i, row in enumerate(score.tolist()):
        for j in sorted(range(len(row)), key=lambda j: row[j])[:remove]:
            keep[i, j] = False
    return keep


def scores(kind: str, rows: int, columns: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    if kind == "distinct":
        return torch.rand(rows, columns, generator=draw)
    if kind == "crowded":  # few values, so that most thresholds are ties
        return torch.randint(0, 3, (rows, columns), generator=draw).float()
    return torch.zeros(rows, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["distinct", "crowded", "equal"])
@pytest.mark.parametrize("remove", [0, 1, 7, 15, 16])
def test_rows_lose_exactly_the_lowest_and_of_equals_the_first(kind: str, remove: int, dtype: torch.dtype) -> None:
    score = scores(kind, 9, 16).to(dtype)
    assert torch.equal(keep_highest_per_row(score, remove), by_sorting(score, remove))


@pytest.mark.parametrize("kind", ["distinct", "crowded", "equal"])
def test_a_whole_matrix_is_one_long_row(kind: str) -> None:
    score = scores(kind, 6, 8)
    assert torch.equal(keep_highest(score, 17).flatten(), by_sorting(score.view(1, -1), 17)[0])


@pytest.mark.parametrize(
    ("keep", "group"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (5, 8), (3, 16), (15, 16), (1, 32)]
)
@pytest.mark.parametrize("kind", ["distinct", "crowded", "equal"])
def test_n_of_m_keeps_n_of_every_m_inputs(kind: str, keep: int, group: int) -> None:
    score = scores(kind, 5, 32)
    mask = keep_n_of_m(score, keep, group)
    assert (mask.view(5, -1, group).sum(-1) == keep).all()
    assert torch.equal(mask.view(-1, group), by_sorting(score.view(-1, group), group - keep))


def test_scores_are_left_as_they_are() -> None:
    score = scores("distinct", 4, 8)
    before = score.clone()
    keep_highest_per_row(score, 3)
    keep_n_of_m(score, 2, 4)
    assert torch.equal(score, before)


def test_patterns_are_read_and_written() -> None:
    for text in ("unstructured", "rows", "columns", "2:4", "4:8"):
        assert str(parse_pattern(text)) == text
    assert parse_pattern("1:4").implied_sparsity == 0.75
    assert parse_pattern("rows").structured
    for text in ("0:4", "4:4", "5:4", "2:", "2.0:4", ""):
        with pytest.raises(UsageError):
            parse_pattern(text)
