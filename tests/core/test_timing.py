"""Clocks that tell the work of this process from that of others."""

from __future__ import annotations

from secateur.core.timing import WorkClock


def test_a_work_clock_stands_still_while_others_have_the_machine() -> None:
    wall, work = iter([0.0, 2.0, 10.0, 11.0]), iter([0.0, 4.0, 5.0, 5.5])
    clock = WorkClock(lambda: next(wall), lambda: next(work))
    assert clock() == 2.0, "two processors worked for two seconds"
    assert clock() == 3.0, "for seven seconds of eight, others had the machine"
    assert clock() == 3.5
