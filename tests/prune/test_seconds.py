"""The seconds of a run that was interrupted and resumed are those of all its parts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from secateur import api
from secateur.cli.answer import answer
from secateur.report.compare import comparison, markdown
from secateur.report.rows import collect, group

Interrupted = Callable[..., AbstractContextManager[None]]


class Ticks:
    """A clock that goes on by one each time that it is read, from a number of its own, as in another process."""

    def __init__(self, start: float) -> None:
        self._ticks: Iterator[float] = itertools.count(start)
        self.start = self.now = start

    def __call__(self) -> float:
        self.now = next(self._ticks)
        return self.now

    @property
    def passed(self) -> float:
        """The time since the start."""
        return self.now - self.start


@pytest.fixture
def request_(saved: Callable[..., Path], ids_file: str) -> api.Request:
    return api.Request(str(saved("llama")), "wanda", sparsity=0.5, calibration=ids_file)


def _interrupted(request: api.Request, out: Path, interrupted_at: Interrupted) -> list[float]:
    """Interrupt a run twice; return the seconds of both parts."""
    passed = []
    for resume, part in ((False, "block-00001"), (True, "block-00002")):
        clock = Ticks(1000.0 * len(passed))
        with interrupted_at(part):
            api.prune(request, out, resume=resume, clock=clock)
        passed.append(clock.passed)
    return passed


def test_seconds_are_the_sum_of_all_parts(request_: api.Request, tmp_path: Path, interrupted_at: Interrupted) -> None:
    parts = _interrupted(request_, tmp_path / "out", interrupted_at)
    clock = Ticks(5.0)
    record = api.prune(request_, tmp_path / "out", resume=True, clock=clock)
    parts.append(clock.passed)
    assert min(parts) > 5
    assert record["seconds"] == pytest.approx(sum(parts), abs=1.0)
    assert sum(record["seconds_by"].values()) <= record["seconds"]
    assert sum(record["seconds_by"].values()) > parts[2]
    assert "seconds_at_least" not in record
    assert not list((tmp_path / "out").glob("journal*")), "the result has no trace of it"


@pytest.mark.parametrize("journal", ["killed", "of an earlier version", "damaged"])
def test_where_the_end_of_a_part_is_not_known_the_seconds_say_so(
    journal: str, request_: api.Request, tmp_path: Path, interrupted_at: Interrupted
) -> None:
    out = tmp_path / "out"
    first, second = _interrupted(request_, out, interrupted_at)
    file = tmp_path / "out.partial" / "journal.json"
    content = json.loads(file.read_text("utf-8"))
    assert content["seconds_spent"]["whole"] is True
    if journal == "killed":  # what a part of the checkpoint left behind, and nothing since
        content["seconds_spent"]["whole"] = False
    elif journal == "damaged":
        content["seconds_spent"] = {"seconds": "soon"}
    else:
        del content["seconds_spent"]
    file.write_text(json.dumps(content), "utf-8")
    clock = Ticks(0.0)
    record = api.prune(request_, out, resume=True, clock=clock)
    before = first + second if journal == "killed" else 0
    assert record["seconds"] == pytest.approx(before + clock.passed, abs=1.0)
    assert record["seconds_at_least"] is True
    assert "at least " in answer(record)[0]
    other = tmp_path / "other"
    found = [record, api.prune(api.Request(request_.model, "magnitude", sparsity=0.5), other)]
    for model in (request_.model, str(out), str(other)):
        asked = api.EvalRequest(model, text=request_.calibration)
        found.append(api.evaluate(asked, records_file=tmp_path / "r.jsonl"))
    table = comparison(group(collect(found))[0].rows, found)
    assert table is not None
    assert markdown(table).count("at\N{NO-BREAK SPACE}least") == 1


def test_a_part_that_is_killed_counts_until_its_last_file(
    request_: api.Request, tmp_path: Path, interrupted_at: Interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.models import save

    written = []
    whole = save._write_whole

    def noted(path: Path, content: str) -> None:
        whole(path, content)
        if path.name == save.JOURNAL:
            written.append(json.loads(content)["seconds_spent"])

    monkeypatch.setattr(save, "_write_whole", noted)
    with interrupted_at("block-00001"):
        api.prune(request_, tmp_path / "out", clock=Ticks(0.0))
    seconds = [spent["seconds"] for spent in written]
    assert [spent["whole"] for spent in written] == [False] * (len(written) - 1) + [True]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == len(seconds) > 3


def test_a_run_that_starts_again_forgets_the_parts_before(
    request_: api.Request, tmp_path: Path, interrupted_at: Interrupted
) -> None:
    _interrupted(request_, tmp_path / "out", interrupted_at)
    clock = Ticks(0.0)
    record = api.prune(request_, tmp_path / "out", overwrite=True, clock=clock)
    assert record["seconds"] == pytest.approx(clock.passed, abs=1.0)


def test_so_are_those_of_a_healing(request_: api.Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from secateur.heal import tune

    api.prune(request_, tmp_path / "pruned")
    asked = api.HealRequest(
        str(tmp_path / "pruned"),
        calibration=request_.calibration,
        text=request_.calibration,
        steps=4,
        batch=1,
        rank=2,
        samples=4,
        save_every=2,
    )
    count, step = [0], tune.train_step

    def stop(*args: object) -> object:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return step(*args)  # type: ignore[arg-type]

    first = Ticks(100.0)
    with monkeypatch.context() as patch:
        patch.setattr(tune, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            api.heal(asked, tmp_path / "healed", clock=first)
    second = Ticks(0.0)
    record = api.heal(asked, tmp_path / "healed", resume=True, clock=second)
    assert min(first.passed, second.passed) >= 2
    assert record["seconds"] == pytest.approx(first.passed + second.passed, abs=1.0)
