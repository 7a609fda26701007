"""The ablations of DISP-LLM.

Cells are data, shared cells are run once, an interrupted study goes on, and seeds become a mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import pytest
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.core import records
from secateur.study import disp_llm


def test_every_part_is_the_full_method_with_something_varied() -> None:
    base = api.Request("model", "", options={"steps": "5"}, seed=3)
    found = disp_llm.cells(base, [0.5, 0.0, 0.3])
    assert {cell.part for cell in found} == set(disp_llm.VARIANTS)
    for cell in found:
        assert cell.request.method == "disp_llm"
        assert api.find_method("disp_llm").options(cell.request.options).steps == 5
    seeds = [cell.request.seed for cell in found if cell.part == "seeds" and cell.request.sparsity == 0.3]
    assert seeds == [3, 4, 5, 6, 7]
    assert {cell.request.sparsity for cell in found if cell.part == "lambda"} == {0.5}


def test_a_dry_run_names_the_runs(saved: Callable[..., Path], ids_file: str) -> None:
    args = [
        "study",
        "disp-llm",
        str(saved("llama")),
        "--calibration",
        ids_file,
        "--sparsity",
        "0.4",
        "--set",
        "steps=7",
        "--parts",
        "norm,constrained",
    ]
    said = json.loads(CliRunner().invoke(app, [*args, "--dry-run", "--json"]).stdout)
    assert said["runs"] == [
        "disp_llm-steps=7-0.4",
        "disp_llm-norm=selected-steps=7-0.4",
        "disp_llm-constrained=True-steps=7-0.4",
    ]
    assert said["steps"] == 21


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--parts", "gates"], "unknown part of the study 'gates'"),
        (["--set", "gate=gumbel"], "--set gate is what part 'estimator' varies"),
        (["--sparsity", "0"], "at least one value above 0"),
    ],
)
def test_bad_input_is_refused_before_the_work(
    asked: list[str], words: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["study", "disp-llm", str(saved("llama")), "--out", str(tmp_path / "out"), *asked])
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_study_makes_each_cell_once_and_goes_on(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        disp_llm, "VARIANTS", {**disp_llm.VARIANTS, "seeds": (disp_llm.Variant("2 seeds", {}, seeds=2),)}
    )
    out = tmp_path / "out"
    args = [
        "study",
        "disp-llm",
        str(saved("llama")),
        "--sparsity",
        "0.4",
        "--set",
        "steps=1",
        "--calibration",
        ids_file,
        "--text",
        ids_file,
        "--out",
        str(out),
    ]

    def run(parts: str) -> list[dict[str, object]]:
        result = CliRunner().invoke(app, [*args, "--parts", parts, "--resume", "--json"])
        assert result.exit_code == 0, result.stderr
        table: list[dict[str, object]] = json.loads(result.stdout)["study"]
        return table

    first = run("constrained")
    assert [(entry["part"], entry["variant"]) for entry in first] == [
        ("constrained", "full"),
        ("constrained", "constrained"),
    ]
    assert first[0]["ppl"] != first[1]["ppl"]
    table = run("constrained,seeds")
    assert table[:2] == first
    written = [r for r in records.read([out]) if r["command"] == "prune"]
    assert len(written) == 1 + 2
    values = [
        r["ppl"]
        for r in records.read([out])
        if r["command"] == "eval" and r["method"] and not r["options"]["constrained"]
    ]
    assert [table[2]["ppl"], table[2]["sd"], table[2]["runs"]] == [
        pytest.approx(fmean(values)),
        pytest.approx(stdev(values)),
        2,
    ]
    shown = CliRunner().invoke(app, [*args, "--parts", "seeds", "--resume"])
    assert "(2 runs)" in shown.stdout
