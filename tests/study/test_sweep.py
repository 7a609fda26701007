"""A sweep, or a comparison: what its points share, and how an interrupted point goes on under new options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.plan import run as run_module
from secateur.study import compare

FEW, MORE = "steps=2", "steps=80"


def run(*args: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stderr


def whole(dense: Path, ids_file: str, out: Path) -> bytes:
    options = {"steps": 80, "lr": 3e-3, "save_every": 1}
    api.prune(api.Request(str(dense), "disp_llm", sparsity=0.3, calibration=ids_file, options=options), out)
    return (out / "model.safetensors").read_bytes()


def test_a_sweep_goes_on_with_more_steps(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    dense = saved("llama")
    args = ["sweep", dense, "--method", "disp_llm", "--sparsity", 0.3, "--calibration", ids_file, "--text", ids_file]
    args += ["--set", "lr=3e-3", "--set", "save_every=1", "--out", tmp_path / "s"]
    status, stderr = run(*args, "--set", FEW)
    assert (status, "continue with --resume and the option steps=4" in stderr) == (1, True), stderr
    assert (tmp_path / "s" / "disp_llm-lr=3e-3-save_every=1-steps=2-0.3.partial").is_dir()
    status, stderr = run(*args, "--set", MORE, "--resume")
    assert (status, "continuing from step 2 of 80" in stderr) == (0, True), stderr
    assert not list((tmp_path / "s").glob("*.partial"))
    (result,) = (tmp_path / "s").glob("disp_llm-*-steps=80-0.3")
    assert (result / "model.safetensors").read_bytes() == whole(dense, ids_file, tmp_path / "whole")


def test_a_comparison_goes_on_with_more_steps(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "in_own_process", lambda work, *given: work(*given))
    args = ["compare", saved("llama"), "--methods", "disp_llm,magnitude", "--params-removed", 0.3]
    args += ["--calibration", ids_file, "--text", ids_file, "--set", "disp_llm.lr=3e-3", "--out", tmp_path / "c"]
    _, stderr = run(*args, "--set", f"disp_llm.{FEW}")
    assert "continue with --resume and the option steps=4" in stderr
    status, stderr = run(*args, "--set", f"disp_llm.{MORE}", "--resume")
    assert (status, "continuing from step 2 of 80" in stderr) == (0, True), stderr
    assert not list((tmp_path / "c").glob("*.partial"))


def test_other_options_start_a_run_of_their_own(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    args = ["sweep", saved("llama"), "--method", "disp_llm", "--sparsity", 0.3, "--calibration", ids_file]
    args += ["--text", ids_file, "--set", "save_every=1", "--out", tmp_path / "s"]
    run(*args, "--set", FEW, "--set", "lr=1e-4")
    status, stderr = run(*args, "--set", MORE, "--set", "lr=3e-3", "--resume")
    assert (status, "continuing" in stderr) == (0, False), stderr
    assert (tmp_path / "s" / "disp_llm-lr=1e-4-save_every=1-steps=2-0.3.partial").is_dir()


def test_a_sweep_over_shares_of_the_parameters(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    args = ["sweep", saved("llama"), "--method", "magnitude", "--pattern", "columns", "--text", ids_file]
    status, stderr = run(*args, "--params-removed", "0.1,0.2", "--out", tmp_path / "s")
    assert status == 0, stderr
    folders = sorted(path.name for path in (tmp_path / "s").iterdir() if path.is_dir())
    assert folders == ["magnitude-columns-0.1-params", "magnitude-columns-0.2-params"]
    assert " removed: ppl " in stderr
    status, stderr = run(*args, "--params-removed", "0.1,0.2", "--out", tmp_path / "s", "--resume")
    assert (status, stderr.count("already there")) == (0, 2)
    status, stderr = run(*args, "--out", tmp_path / "t")
    assert (status, "give --sparsity S,S,... or --params-removed R,R,..." in stderr) == (2, True)
    status, stderr = run(*args, "--sparsity", 0.3, "--at-least", "--out", tmp_path / "t")
    assert (status, "--at-least belongs to --params-removed" in stderr) == (2, True)


@pytest.mark.parametrize("command", ["sweep", "compare", "study modules"])
def test_what_is_measured_is_said_once_and_first(
    command: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "in_own_process", lambda work, *given: work(*given))
    args = [*command.split(), saved("llama"), "--calibration", ids_file, "--text", ids_file, "--limit", 2]
    args += ["--samples", 2, "--seqlen", 10] if "study" in command else []
    args += {
        "sweep": ["--method", "wanda"],
        "compare": ["--methods", "wanda,magnitude"],
        "study modules": ["--kinds", "q,k"],
    }[command]
    status, stderr = run(*args, "--sparsity", 0.5, "--out", tmp_path / "out")
    assert status == 0, stderr
    told = "measuring perplexity on ids.npy (protocol text, 2 windows of 20 tokens); --text, --protocol, --eval-seqlen"
    assert [line.startswith(told) for line in stderr.splitlines()] == [True] + [False] * stderr.rstrip().count("\n")


@pytest.mark.parametrize("by", ["sparsities", "ratios"])
@pytest.mark.parametrize(
    ("method", "sizes"),
    [("search", [0.1, 0.3]), ("llm_pruner", [0.1, 0.2]), ("heads", [0.2, 0.4]), ("shortgpt", [0.3, 0.5])],
)
def test_what_is_measured_once_serves_every_point(
    method: str,
    sizes: list[float],
    by: str,
    saved: Callable[..., Path],
    ids_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured, save = [], run_module.save_whole
    monkeypatch.setattr(run_module, "save_whole", lambda *given: measured.append(given[0]) or save(*given))
    if method == "heads" and by == "ratios":
        sizes = [size / 10 for size in sizes]
    request = api.Request(str(saved("llama", blocks=4)), method, calibration=ids_file)
    given = {"sparsities": [], "ratios": [], by: sizes}
    found = list(
        api.sweep(
            request, given["sparsities"], tmp_path / "s", api.EvalRequest("", text=ids_file), ratios=given["ratios"]
        )
    )
    assert len(measured) == 1
    assert not (tmp_path / "s" / "gradual").exists()
    asked = {"sparsity" if by == "sparsities" else "params_removed": sizes[-1]}
    api.prune(api.Request(request.model, method, calibration=ids_file, **asked), tmp_path / "alone")
    alone, last = (folder / "model.safetensors" for folder in (tmp_path / "alone", Path(found[-1]["out"])))
    assert alone.read_bytes() == last.read_bytes()
