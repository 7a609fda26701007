"""Calibration on a task of the user's own: --include-path reaches the calibration of every command that prunes, and the
tasks to measure.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.cli import app
from secateur.core import records
from secateur.study import compare

MODEL = ("bundled", "--samples", "2", "--seqlen", "64", "--limit", "1")
COMMANDS = {
    "prune": ("prune", *MODEL[:-2], "--method", "wanda", "--sparsity", "0.5"),
    "sweep": ("sweep", *MODEL, "--method", "wanda", "--sparsity", "0.5"),
    "compare": ("compare", *MODEL, "--methods", "wanda", "--sparsity", "0.5"),
    "study modules": ("study", "modules", *MODEL, "--kinds", "q", "--sparsity", "0.5"),
    "study disp-llm": ("study", "disp-llm", *MODEL, "--parts", "ratios", "--sparsity", "0.1", "--set", "steps=1"),
}


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A task that lm-eval knows only from this folder."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"query": f"the sum of {i} and {i} is", "choices": ["odd", "even"], "gold": 1} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = dict.fromkeys(("train", "test"), str(folder / "rows.jsonl"))
    parts = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "training_split": "train",
        "test_split": "test",
    }
    words = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
    }
    measured = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    (folder / "mine.yaml").write_text(json.dumps({"task": "mine", **parts, **words, "metric_list": measured}))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_task_of_the_user_calibrates(
    command: str, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "in_own_process", lambda work, *given: work(*given))
    file = tmp_path / "out.jsonl"
    where = [
        "--calibration",
        "task:mine",
        "--include-path",
        str(task_folder),
        "--out",
        str(tmp_path / "out"),
        "--records",
        str(file),
    ]
    result = CliRunner().invoke(app, [*COMMANDS[command], *where])
    assert result.exit_code == 0, result.stderr
    pruned = [record for record in records.read([file]) if record.get("calibration")]
    assert pruned
    assert all("mine" in record["calibration"]["spec"] for record in pruned)


def test_the_same_folder_serves_the_tasks_to_measure(task_folder: Path, tmp_path: Path) -> None:
    where = ["--tasks", "mine", "--include-path", str(task_folder), "--json"]
    for name, calibration in (("builtin", []), ("task", ["--calibration", "task:mine"])):
        result = CliRunner().invoke(app, [*COMMANDS["sweep"], *calibration, *where, "--out", str(tmp_path / name)])
        assert result.exit_code == 0, result.stderr
        assert all("mine" in record["tasks"] for record in json.loads(result.stdout)["records"])
    result = CliRunner().invoke(
        app, [*COMMANDS["sweep"], "--include-path", str(task_folder), "--out", str(tmp_path / "none")]
    )
    assert (result.exit_code, "name the tasks too, as in --tasks a,b" in result.stderr) == (2, True)


def test_healing_takes_the_folder_too(task_folder: Path, tmp_path: Path) -> None:
    pruned, sizes = str(tmp_path / "pruned"), ["--steps", "1", "--samples", "2", "--seqlen", "32", "--limit", "1"]
    heal = ["heal", pruned, *sizes, "--include-path", str(task_folder), "--out", str(tmp_path / "healed")]
    made = ["prune", "bundled", "--method", "magnitude", "--sparsity", "0.5", "--out", pruned]
    assert CliRunner().invoke(app, made).exit_code == 0
    refused = CliRunner().invoke(app, [*heal, "--calibration", "builtin"])
    assert (refused.exit_code, "heal on a task too" in refused.stderr) == (2, True)
    result = CliRunner().invoke(app, [*heal, "--calibration", "task:mine"])
    assert result.exit_code == 0, result.stderr
