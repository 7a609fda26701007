"""Dry runs of sweep and compare: every run that the command would make, nothing written, the sums at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.study.estimate import start_seconds as _real_start_seconds


def test_a_dry_sweep_names_the_runs_that_the_sweep_makes(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(saved("llama"))
    request = api.Request(model, "magnitude", pattern="rows")
    measure = api.EvalRequest(model, text=ids_file)
    there = sorted(tmp_path.rglob("*"))
    dense, *runs, together = api.estimate_sweep(request, [0.5, 0.0], measure, ratios=[0.1])
    assert dense["run"] == "dense"
    assert not (tmp_path / "out").exists()
    assert sorted(tmp_path.rglob("*")) == there, "nothing is written"
    done = list(api.sweep(request, [0.5, 0.0], tmp_path / "out", measure, ratios=[0.1]))
    assert [run["run"] for run in runs] == [Path(record["out"]).name for record in done[1:]]
    assert [run["params_after"] for run in runs] == [record["params_after"] for record in done[1:]]
    assert (together["runs"], together["dry_run"]) == (2, True)
    pruning = sum(run["seconds_estimated"] for run in runs)
    assert together["seconds_estimated"] == pytest.approx(pruning + 3 * dense["seconds_estimated"], abs=0.1)
    assert together["memory_bytes"] >= max(run["memory_bytes"] for run in runs)


def test_of_a_gradual_method_the_longest_run_counts(saved: Callable[..., Path], ids_file: str) -> None:
    model = str(saved("llama"))
    request = api.Request(model, "llm_surgeon", calibration=ids_file)
    *runs, together = api.estimate_sweep(request, [0.02, 0.03], api.EvalRequest(model, text=ids_file))
    longest = max(run["seconds_estimated"] for run in runs[1:])
    assert together["seconds_estimated"] == pytest.approx(longest + together["seconds_measuring"], abs=0.1)


def test_a_dry_compare_says_what_it_leaves_out(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    common = ["--params-removed", "0.1", "--calibration", ids_file, "--text", ids_file]
    asked = ["compare", str(saved("llama")), "--methods", "magnitude,llm_pruner", *common]
    result = CliRunner().invoke(app, [*asked, "--dry-run", "--heal"])
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.strip("│").split("│")[0].strip() for line in lines if line.startswith("│")] == [
        "dense",
        "magnitude rows",
        "llm_pruner",
        "all",
    ]
    assert max(len(line) for line in lines if line[0] in "┏┃┡│├└") <= 80
    assert "10.0% removed" in lines[4]
    assert lines[-1].startswith("2 runs in all, each measured. They would take ")
    assert lines[-1].endswith(" of disk. Nothing was written.")
    assert "The last line counts 20 s for starting 4 processes: of the command, the dense model and each run." in lines
    told = CliRunner().invoke(app, [*asked, "--dry-run", "--verbose"]).stdout.splitlines()
    assert [line for line in told if line in ("dense", "magnitude-rows-0.1-params", "llm_pruner-0.1-params")]
    assert sum(line.startswith("  Expected, about: ") for line in told) == 3
    assert len(told) > len(lines)
    assert "healing and timing have no estimate" in result.stderr
    for command in (asked, ["sweep", str(saved("llama")), "--method", "magnitude", "--sparsity", "0.5"]):
        refused = CliRunner().invoke(app, command)
        assert (refused.exit_code, "--out DIR is missing" in refused.stderr) == (2, True)


@pytest.fixture(autouse=True)
def starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is started: it would take seconds."""
    monkeypatch.setattr("secateur.study.estimate.start_seconds", lambda *_: 5.0)


def test_starting_the_process_of_each_run_is_in_the_sum(saved: Callable[..., Path], ids_file: str) -> None:
    model = str(saved("llama"))
    asked = api.CompareRequest(api.Request(model, ""), ["magnitude"], sparsities=[0.5, 0.6])
    *_, known = api.estimate_compare(asked, api.EvalRequest(model, text=ids_file), starting=lambda *_: 7.0)
    assert known["seconds_starting"] == 28.0
    assert known["seconds_estimated"] > 28.0
    *_, unknown = api.estimate_compare(asked, api.EvalRequest(model, text=ids_file), starting=lambda *_: None)
    assert "seconds_starting" not in unknown
    assert unknown["seconds_estimated"] < known["seconds_estimated"]


def test_a_process_that_cannot_start_tells_no_time() -> None:
    assert _real_start_seconds("no such model", None) is None


def test_what_is_not_known_has_its_reason_below_the_table(saved: Callable[..., Path], ids_file: str) -> None:
    common = ["--patterns", "2:4", "--calibration", ids_file, "--text", ids_file, "--dry-run"]
    asked = ["compare", str(saved("llama")), "--methods", "magnitude,llm_surgeon", *common]
    lines = CliRunner().invoke(app, asked).stdout.splitlines()
    unknown = next(line for line in lines if "llm_surgeon 2:4" in line)
    assert unknown.count("unknown") == 2
    assert "over " in next(line for line in lines if "all " in line)
    assert any(
        line.startswith("llm_surgeon-2of4-0.5: The time and the memory are not known: with pattern 2:4 llm_surgeon")
        for line in lines
    )
