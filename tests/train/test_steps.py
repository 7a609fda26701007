"""The windows of each training step."""

from __future__ import annotations

from secateur.train.steps import rows_of_step


def test_every_window_is_seen_once_an_epoch() -> None:
    rows = [row for step in range(9) for row in rows_of_step(step, 6, 2, seed=5).tolist()]
    assert [sorted(rows[start : start + 6]) for start in (0, 6, 12)] == [list(range(6))] * 3
    assert rows[:6] != rows[6:12]
