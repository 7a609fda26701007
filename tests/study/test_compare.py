"""Methods side by side: what is run and what is refused, one protocol, own processes, resuming, the table and the
published numbers beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.core import records
from secateur.core.errors import SecateurError, UsageError
from secateur.core.progress import say
from secateur.requests import BenchRequest, CompareRequest
from secateur.study import compare


@pytest.fixture
def dense(saved: Callable[..., Path]) -> Path:
    return saved("llama")


@pytest.fixture(autouse=True)
def _in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new process imports torch for seconds; one test has it."""
    if "own_process" not in request.node.name:
        monkeypatch.setattr(compare, "in_own_process", lambda work, *given: work(*given))


def invoke(*args: Any) -> tuple[int, str, list[str]]:
    result = CliRunner().invoke(app, ["compare", *map(str, args)])
    assert "Traceback" not in result.output
    return result.exit_code, result.stdout, result.stderr.strip().splitlines()


def asked(model: Path, ids: str, *methods: str, **more: Any) -> CompareRequest:
    return CompareRequest(api.Request(str(model), "", calibration=ids), methods, **more)


def test_cells_follow_from_what_methods_are(dense: Path, ids_file: str) -> None:
    found = compare.cells(
        asked(dense, ids_file, "slicegpt", "magnitude", "sparsegpt", ratios=[0.2, 0.3], sparsities=[0.5])
    )
    assert set(found.runs) == {
        "slicegpt-0.2-params",
        "slicegpt-0.3-params",
        "magnitude-unstructured-0.5",
        "magnitude-rows-0.2-params",
        "magnitude-rows-0.3-params",
        "sparsegpt-unstructured-0.5",
    }
    assert not found.refused, "that sparsegpt removes no rows goes without saying: it was not asked for"
    assert found.runs["magnitude-rows-0.2-params"].params_removed == 0.2
    found = compare.cells(asked(dense, ids_file, "magnitude", "sparsegpt", ratios=[0.2], patterns=["2:4", "columns"]))
    assert set(found.runs) == {"magnitude-2of4-0.5", "magnitude-columns-0.2-params", "sparsegpt-2of4-0.5"}
    assert list(found.refused) == ["sparsegpt-columns-0.2-params"]
    assert found.notes()[0].startswith(
        "Not run: sparsegpt-columns-0.2-params: sparsegpt: pattern columns removes whole units"
    )
    found = compare.cells(
        asked(dense, ids_file, "slicegpt", "magnitude", ratios=[0.2], options={"slicegpt": {"round": "1"}})
    )
    assert found.runs["slicegpt-round=1-0.2-params"].options == {"round": "1"}
    found = compare.cells(asked(dense, ids_file, "llm_surgeon", ratios=[0.2], sparsities=[0.5]))
    assert set(found.runs) == {"llm_surgeon-rows-0.2-params", "llm_surgeon-unstructured-0.5"}
    assert set(compare.cells(asked(dense, ids_file, "llm_surgeon", patterns=["2:4"])).runs) == {"llm_surgeon-2of4-0.5"}


def test_what_failed_after_the_pruning_is_named_for_what_it_is(
    dense: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timing that fails does not keep the healing from being tried, and the row is not said to be not run."""

    def here(work: Any, *given: Any) -> Any:
        if work in (compare._time, compare._heal):
            raise SecateurError(work.__name__)
        return {"out": str(given[0])}

    monkeypatch.setattr(compare, "in_own_process", here)
    what = replace(
        asked(dense, ids_file, "magnitude", patterns=["2:4"]),
        heal=api.HealRequest(""),
        bench=BenchRequest("", prompt=8),
    )
    todo = compare.cells(what)
    assert len(list(compare.run(what, todo, tmp_path / "out", api.EvalRequest("")))) == 2
    assert todo.notes() == ["Not timed: magnitude-2of4-0.5: _time", "Not healed: magnitude-2of4-0.5: _heal"]
    assert (todo.failed, todo.incomplete()) == ({}, ["magnitude-2of4-0.5"])


def test_one_command_writes_the_table_and_goes_on(
    dense: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    args = [
        dense,
        "--methods",
        "slicegpt,magnitude",
        "--params-removed",
        "0.2",
        "--patterns",
        "rows,2:4",
        "--set",
        "slicegpt.round=1",
    ]
    args += [
        "--calibration",
        ids_file,
        "--text",
        ids_file,
        "--out",
        out,
        "--heal",
        "--heal-steps",
        2,
        "--bench",
        "--json",
    ]
    time = compare._time
    quick = {"prompt": 8, "new": 2, "batches": (2,), "repeats": 1}
    monkeypatch.setattr(compare, "_time", lambda request, file: time(replace(request, **quick), file))
    real, calls = compare._prune, []

    def fail(request: api.Request, *given: Any) -> Any:
        calls.append(request.method)
        if request.pattern == "2:4":
            raise SecateurError("no luck")
        return real(request, *given)

    monkeypatch.setattr(compare, "_prune", fail)
    status, stdout, stderr = invoke(*args)
    assert (status, "1 of 3 runs failed, first magnitude-2of4-0.5" in stderr[-1]) == (1, True)
    assert len(json.loads(stdout.splitlines()[-1])["records"]) == 1 + 2 * 2, "the others went on, each healed too"
    calls.clear()
    monkeypatch.setattr(
        compare, "_prune", lambda request, *given: (calls.append(request.method), real(request, *given))[1]
    )
    status, stdout, stderr = invoke(*args, "--resume")
    assert status == 0, stderr
    result = json.loads(stdout.splitlines()[-1])
    assert result["failed"] == {}
    assert len(result["records"]) == 1 + 2 * 3
    (timed,) = [r for r in records.read([out]) if r["command"] == "bench" and r["out"].endswith("magnitude-2of4-0.5")]
    assert timed["results"][1]["role"] == "dense"
    protocols = {json.dumps(record["ppl_protocol"]) for record in result["records"]}
    assert len(protocols) == 1
    page = (out / "compare.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 7
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["dense", "magnitude rows", "magnitude rows + LoRA"]
    assert "Methods side by side" in (out / "report.html").read_text()
    written = records.read([out])
    pruned = {record["out"]: record for record in written if record["command"] == "prune"}
    assert all(0.14 <= record["pruning_ratio"] < 0.26 for place, record in pruned.items() if place.endswith("params"))
    status, _, stderr = invoke(*args)
    assert (status, "exists and is not empty" in stderr[-1]) == (2, True)
    assert len(records.read([out])) == len(written)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "--methods is empty"),
        (["--methods", "slicegtp", "--params-removed", "0.2"], "unknown method 'slicegtp'; did you mean slicegpt"),
        (["--methods", "wanda"], "nothing to compare at"),
        (["--methods", "sparsegpt", "--params-removed", "0.2"], "pattern rows removes whole units"),
        (["--methods", "slicegpt", "--sparsity", "0.5", "--params-removed", "0.999"], "--params-removed 0.999"),
        (["--methods", "magnitude", "--patterns", "2:5"], "not a multiple of 5"),
        (["--methods", "slicegpt", "--params-removed", "0.2", "--patterns", "9:4"], "9:4"),
        (["--methods", "slicegpt", "--sparsity", "0.5"], "it removes parameters: give --params-removed R"),
        (["--methods", "wanda", "--params-removed", "1.2"], "outside [0, 1)"),
        (
            ["--methods", "wanda", "--sparsity", "0.5", "--set", "scope=row"],
            "--set scope=row: METHOD.OPTION=VALUE is expected, as in --set wanda.scope=row",
        ),
        (
            ["--methods", "slicegpt,wanda", "--sparsity", "0.5", "--set", "foo=1"],
            "METHOD.OPTION=VALUE is expected, as in --set slicegpt.",
        ),
        (["--methods", "wanda", "--sparsity", "0.5", "--set", "wanda.scope"], "as in --set wanda.scope=row"),
        (
            ["--methods", "wanda", "--sparsity", "0.5", "--set", "slicegpt.round=8"],
            "'slicegpt' is not among --methods wanda",
        ),
        (
            ["--methods", "wanda", "--sparsity", "0.5", "--set", "wanda.scpe=row"],
            "unknown option of wanda 'scpe'; did you mean scope?",
        ),
        (["--methods", "wanda", "--sparsity", "0.5", "--heal-steps", "3"], "belongs to --heal"),
    ],
)
def test_wrong_usage(dense: Path, tmp_path: Path, ids_file: str, more: list[str], words: str) -> None:
    status, _, stderr = invoke(dense, "--out", tmp_path / "out", "--calibration", ids_file, *more)
    assert (status, words in stderr[-1]) == (2, True), stderr
    assert not (tmp_path / "out").exists()


def test_the_winner_comes_first_and_no_name_is_cut_at_80_columns(
    dense: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    args = [dense, "--methods", "magnitude,llm_pruner", "--params-removed", "0.2", "--calibration", ids_file]
    status, stdout, _ = invoke(*args, "--text", ids_file, "--out", tmp_path / "out")
    assert status == 0
    first, *table = stdout.splitlines()
    assert first.startswith("At ")
    assert "has the lowest perplexity of the 2 compared" in first
    assert "\N{HORIZONTAL ELLIPSIS}" not in stdout
    assert any("magnitude rows" in line for line in table)
    assert first in (tmp_path / "out" / "compare.md").read_text().splitlines()


def test_lines_of_an_own_process_go_where_progress_goes(capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    with api.progress_to(lines.append):
        assert compare.in_own_process(_told, "measuring perplexity") == 2
    with api.progress_to(None):
        compare.in_own_process(_told, "nobody listens")
    assert lines == ["measuring perplexity", "and more"]
    assert not any(line in capfd.readouterr().err for line in (*lines, "nobody listens"))


def _told(line: str) -> int:
    say(line)
    say("and more")
    return 2


def test_own_process_has_its_own_peak_and_its_errors_come_back() -> None:
    ballast = torch.ones(100 * 2**18)  # 100 MB
    here = records.peak_rss_bytes()
    assert compare.in_own_process(records.peak_rss_bytes) < here - ballast.nbytes
    with pytest.raises(UsageError, match="unknown method 'no'"):
        compare.in_own_process(api.find_method, "no")
    with pytest.raises(SecateurError, match="its process died"):
        compare.in_own_process(os._exit, 9)
