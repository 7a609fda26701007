"""`eval --dry-run`: the time on work that is counted, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.evaluate import estimate, perplexity
from tests.tiny import FAMILY_TYPES


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock in tokens: those that went through a block of a LLaMA so far. Trials without values take no time here."""
    passed, forward = [0], LlamaDecoderLayer.forward

    def counted(self: LlamaDecoderLayer, hidden_states: torch.Tensor, *args: Any, **more: Any) -> Any:
        passed[0] += 0 if hidden_states.is_meta else hidden_states.shape[0] * hidden_states.shape[1]
        return forward(self, hidden_states, *args, **more)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    return passed


@pytest.fixture
def ids(tmp_path: Path) -> str:
    np.save(tmp_path / "text.npy", np.random.default_rng(0).integers(0, 64, (11, 40)))
    return str(tmp_path / "text.npy")


@pytest.mark.parametrize("against", [False, True])
def test_passes_are_those_of_the_evaluation(
    against: bool, tokens: list[int], ids: str, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "_TOKENS_A_BATCH", 80)
    folder = str(saved("llama", num_hidden_layers=5))
    request = api.EvalRequest(folder, text=ids, against=folder if against else None)
    said = api.estimate_evaluate(request, lambda: float(tokens[0]))
    tokens[0] = 0
    api.evaluate(request)
    assert tokens[0] >= 5 * 11 * 40 * (4 if against else 1)
    assert said["seconds_estimated"] == pytest.approx(tokens[0])


def test_a_dense_model_that_was_measured_costs_less(tokens: list[int], ids: str, saved: Callable[..., Path]) -> None:
    request = api.EvalRequest(folder := str(saved("llama")), text=ids, against=folder)
    before = api.estimate_evaluate(request, lambda: float(tokens[0]))
    api.evaluate(request)
    after = api.estimate_evaluate(request, lambda: float(tokens[0]))
    assert after["seconds_estimated"] == before["seconds_estimated"] - 3 * 11 * 40


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_every_family_has_a_number(model_type: str, saved: Callable[..., Path], ids_file: str) -> None:
    said = api.estimate_evaluate(api.EvalRequest(str(saved(model_type)), text=ids_file))
    assert said["seconds_estimated"] is not None, said["seconds_unknown"]


@pytest.mark.parametrize("method", ["slicegpt", "llm_pruner"])
def test_so_has_a_result_with_widths_of_its_own(
    method: str, saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    api.prune(api.Request(str(saved("llama")), method, sparsity=0.25, calibration=ids_file), tmp_path / "out")
    said = api.estimate_evaluate(api.EvalRequest(str(tmp_path / "out"), text=ids_file))
    assert said["seconds_estimated"] is not None, said["seconds_unknown"]


def test_it_says_what_would_be_measured_and_writes_nothing(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("llama")
    before, state = sorted(tmp_path.rglob("*")), torch.random.get_rng_state().tolist()
    args = ["eval", str(folder), "--text", ids_file, "--dry-run"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert first == "Would measure perplexity on ids.npy, 6 windows of 20 tokens."
    assert second.startswith("Expected, about: ")
    assert second.endswith(" of memory. Nothing was written.")
    assert "measuring 2 blocks of 3 to estimate the time" in result.stderr
    record = json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout)
    assert (record["command"], record["dry_run"], record["evaluation_tokens"]) == ("eval", True, 120)
    assert (sorted(tmp_path.rglob("*")), torch.random.get_rng_state().tolist()) == (before, state)

    def fail(*_: Any) -> float:
        raise RuntimeError("no memory")

    monkeypatch.setattr(estimate, "perplexity_seconds", fail)
    said = CliRunner().invoke(app, args).stdout.splitlines()[1]
    assert said.endswith("Nothing was written. The time is not known: no memory.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "--limit 0: at least 1 is needed"),
        (["--tasks", "clozze"], "clozze"),
        (["--protocol", "none"], "none"),
        (["--against", "./nowhere"], "no folder './nowhere'"),
    ],
)
def test_wrong_settings_are_refused_as_in_an_evaluation(
    options: list[str], message: str, saved: Callable[..., Path], ids_file: str
) -> None:
    args = ["eval", str(saved("llama")), "--text", ids_file, *options]
    real, dry = (CliRunner().invoke(app, [*args, *more]) for more in ([], ["--dry-run"]))
    assert message in dry.stderr
    assert (real.exit_code, real.stderr) == (dry.exit_code, dry.stderr)


@pytest.mark.parametrize(("limit", "share"), [(1, 0.5), (3, 0.5), (11, 0.2)])
def test_a_small_evaluation_costs_more_than_its_dry_run(
    limit: int, share: float, tokens: list[int], ids: str, saved: Callable[..., Path]
) -> None:
    request = api.EvalRequest(str(saved("llama", num_hidden_layers=6)), text=ids, limit=limit)
    said = api.estimate_evaluate(request, lambda: float(tokens[0]))
    dry, tokens[0] = tokens[0], 0
    api.evaluate(request)
    assert dry <= share * tokens[0]
    assert said["seconds_estimated"] == tokens[0]
    assert said.get("seconds_rough", False) is (limit < 4)


def test_tasks_have_their_number_of_requests() -> None:
    said = api.estimate_evaluate(api.EvalRequest("bundled", tasks=["cloze"], limit=2))
    assert said["requests"] == {"cloze": 8}
    assert said["seconds_estimated"] > 0
