"""Records: strict JSON, one line each, also when several processes write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.core import records
from secateur.core.errors import SecateurError
from secateur.core.timing import Stopwatch


def test_lines_from_several_processes_do_not_mix(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "records.jsonl"
    program = """
import sys
from pathlib import Path
from secateur.core import records
for i in range(50):
    records.append(Path(sys.argv[1]), {'who': sys.argv[2], 'pad': 'x' * 9000, 'i': i})
"""
    processes = [subprocess.Popen([sys.executable, "-c", program, str(file), str(n)]) for n in range(3)]
    assert [p.wait() for p in processes] == [0, 0, 0]
    found = records.read([file])
    assert len(found) == 150
    for who in "012":
        assert [r["i"] for r in found if r["who"] == who] == list(range(50))


def test_numbers_that_are_not_finite_become_null() -> None:
    text = records.to_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}, "e": Path("x")})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": {"d": None}, "e": "x"}


def test_reading_names_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text('{"a": 1}\n\n[2]\n')
    with pytest.raises(SecateurError, match="line 3: a record is a JSON object, this is a list"):
        records.read([tmp_path])
    with pytest.raises(SecateurError, match="no records at"):
        records.read([tmp_path / "absent"])


def test_a_timed_span_inside_another_counts_once() -> None:
    watch = Stopwatch()
    with watch("outer"), watch("inner"):
        sum(range(1000))
    assert watch.seconds["outer"] < watch.seconds["inner"]
    assert watch.seconds.keys() == {"outer", "inner"}


def test_a_torn_line_does_not_swallow_the_next_record(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text('{"a": 1}\n{"b": ')
    assert records.read([file]) == [{"a": 1}]
    records.append(file, {"c": 3})
    assert file.read_text() == '{"a": 1}\n{"c": 3}\n'
    file.write_text('{"a": 1}')
    records.append(file, {"c": 3})
    assert records.read([file]) == [{"a": 1}, {"c": 3}]
