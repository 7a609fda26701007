"""Where progress and notes go."""

from __future__ import annotations

import multiprocessing

import pytest

from secateur.core import progress
from secateur.core.progress import progress_to, say, track
from secateur.core.timing import Expected, Phases


def _work() -> list[int]:
    say("a note")
    return list(track(range(3), "items"))


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", -1.0)


@pytest.mark.usefixtures("often")
def test_an_item_may_be_worth_several() -> None:
    lines: list[str] = []
    with progress_to(lines.append):
        assert list(track([[7, 8], [9]], "windows", 3, worth=len)) == [[7, 8], [9]]
    assert [line.split(",")[0] for line in lines] == ["windows: 2 of 3", "windows: 3 of 3"]


@pytest.mark.usefixtures("often")
def test_lines_go_to_stderr_or_where_they_are_sent(capsys: pytest.CaptureFixture[str]) -> None:
    assert _work() == [0, 1, 2]
    before = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in before] == ["a note", "items: 1 of 3", "items: 2 of 3", "items: 3 of 3"]
    lines: list[str] = []
    with progress_to(lines.append):
        assert _work() == [0, 1, 2]
    assert [line.split(",")[0] for line in lines] == [line.split(",")[0] for line in before]
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("often")
def test_none_drops_them_until_the_end_also_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with progress_to(None):
            _work()
            with progress_to(print):
                say("inside")
            _work()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert tuple(capsys.readouterr()) == ("inside\n", "")
    say("again")
    assert capsys.readouterr().err == "again\n"


def test_on_a_terminal_no_bar_is_drawn_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "_bar", lambda *_: pytest.fail("a bar"))
    with progress_to(None):
        assert _work() == [0, 1, 2]


def test_worker_processes_print_nothing_meanwhile(capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("spawn")
    with progress_to(None):
        worker = context.Process(target=say, args=("from a worker",))
        worker.start()
        worker.join()
    assert "from a worker" not in capfd.readouterr().err
    worker = context.Process(target=say, args=("from a worker",))
    worker.start()
    worker.join()
    assert "from a worker" in capfd.readouterr().err


@pytest.mark.usefixtures("often")
def test_lines_tell_what_is_left_of_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tracks of 100 and 300 seconds; the work takes twice as long as expected."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    expected = Expected(40.0, {"gradients": 100.0, "blocks": 300.0}, {"gradients": 2.0, "blocks": 1.0})
    lines: list[str] = []
    with progress_to(lines.append), progress.expecting(expected):
        for _ in range(2):
            for _ in track(range(10), "gradients"):
                clock[0] += 10.0
        for _ in track(range(10), "blocks"):
            clock[0] += 60.0
    left = [line.split("about ")[1] for line in lines]
    assert left[0] == "9 min left", "at first, the expectation of 440 s counts most"
    assert lines[19] == "gradients: 10 of 10, 100 s, about 10 min left"
    assert left[-1] == "1 s left"
    lines.clear()
    with progress_to(lines.append):
        for _ in track(range(2), "gradients"):
            clock[0] += 10.0
    assert lines[0] == "gradients: 1 of 2, 10 s, about 10 s left"


@pytest.mark.usefixtures("often")
def test_a_rehearsal_prints_nothing_and_times_each_track_without_those_inside(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = [0.0]
    phases = Phases(lambda: clock[0])
    with progress.observed(phases), phases.whole():
        say("a note")
        clock[0] += 1
        for _ in track(range(2), "outer"):
            clock[0] += 10
            for _ in track(range(3), "inner"):
                clock[0] += 100
            clock[0] += 20
        clock[0] += 2
    assert capsys.readouterr().err == ""
    assert phases.outside == 3
    assert phases.phases["outer"].runs == [[30, 30]]
    assert (phases.phases["inner"].runs, phases.phases["inner"].parent) == ([[100] * 3] * 2, "outer")


def test_a_loop_that_stops_early_is_timed_as_far_as_it_went() -> None:
    clock = [0.0]
    phases = Phases(lambda: clock[0])
    with progress.observed(phases), phases.whole():
        for number in track(range(9), "items"):
            clock[0] += 1
            if number == 2:
                break
        clock[0] += 5
    assert phases.phases["items"].runs == [[1, 1]]
    assert phases.outside == 6
