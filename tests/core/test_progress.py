"""Where progress and notes go."""

from __future__ import annotations

import multiprocessing

import pytest

from secateur.core import progress
from secateur.core.progress import progress_to, say, track


def _work() -> list[int]:
    say("a note")
    return list(track(range(3), "items"))


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", -1.0)


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
