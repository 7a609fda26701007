"""`heal --dry-run`: the time on work that is counted, and what it leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from typer.testing import CliRunner

from secateur import api
from secateur.cli import app
from secateur.heal import tune
from secateur.models.load import open_checkpoint

pytest.importorskip("peft")


@pytest.fixture
def pruned(saved: Callable[..., Path], tmp_path: Path) -> Path:
    request = api.Request(str(saved("llama", num_hidden_layers=6)), "magnitude", sparsity=0.5)
    api.prune(request, tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.fixture
def ids(tmp_path: Path) -> str:
    np.save(tmp_path / "text.npy", np.random.default_rng(0).integers(0, 64, (8, 60)))
    return str(tmp_path / "text.npy")


def _asked(pruned: Path, ids: str, **more: Any) -> api.HealRequest:
    return api.HealRequest(str(pruned), calibration=ids, text=ids, steps=5, batch=2, samples=8, rank=2, **more)


@pytest.mark.parametrize("more", [{}, {"checkpointing": False}, {"keep_adapter": True}, {"targets": ["q", "down"]}])
def test_passes_are_those_of_the_healing(
    more: dict[str, Any], pruned: Path, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only tokens that pass through a block advance the clock."""
    passed, forward = [0], LlamaDecoderLayer.forward

    def counted(self: LlamaDecoderLayer, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        passed[0] += hidden_states.shape[0] * hidden_states.shape[1]
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    said = api.estimate_heal(_asked(pruned, ids, **more), clock=lambda: float(passed[0]))
    assert "seconds_unknown" not in said
    passed[0] = 0
    done = api.heal(_asked(pruned, ids, **more), tmp_path / "healed")
    assert said["seconds_estimated"] == pytest.approx(passed[0], rel=1e-3)
    assert said["trainable"] == done["heal"]["trainable"]


def test_it_says_what_would_be_trained_and_writes_nothing(pruned: Path, ids: str, tmp_path: Path) -> None:
    before, state = sorted(tmp_path.rglob("*")), torch.random.get_rng_state().tolist()
    args = ["heal", str(pruned), "--calibration", ids, "--text", ids, "--steps", "5", "--samples", "8", "--dry-run"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    first, second, third = result.stdout.splitlines()
    assert first.startswith("Would train ")
    assert first.endswith(" parameters in 42 adapters on text.npy: 5 steps of 4 x 60 tokens.")
    assert second == "Would measure perplexity before and after on text.npy, 8 windows of 60 tokens."
    assert third.endswith(" of disk while it runs. Nothing was written.")
    record = json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout)
    assert (record["command"], record["dry_run"], record["training_tokens"]) == ("heal", True, 5 * 4 * 60)
    assert (sorted(tmp_path.rglob("*")), torch.random.get_rng_state().tolist()) == (before, state)


def test_memory_has_masks_only_where_pruning_zeroed(saved: Callable[..., Path], ids: str, tmp_path: Path) -> None:
    """Of a block, `down` alone was pruned: its update and its mask are in float32, 8 bytes a weight."""
    folder = str(saved("llama"))
    api.prune(api.Request(folder, "magnitude", modules="down=0.5"), tmp_path / "zeroed")
    api.prune(api.Request(folder, "magnitude", pattern="rows", sparsity=0.25), tmp_path / "removed")
    checkpoint = open_checkpoint(folder)
    down = math.prod(checkpoint.view().matrix_shapes(0)["down"])

    def memory(name: str, **more: Any) -> int:
        asked = replace(_asked(tmp_path / name, ids, **more), text=None, evaluate=False)  # measuring needs more here
        return int(api.estimate_heal(asked)["memory_bytes"])

    for more, masked in (({}, 1), ({"checkpointing": False}, 3)):  # in one block at a time, or in all three
        assert memory("zeroed", **more) - memory("zeroed", **more, keep_adapter=True) == masked * 8 * down
        assert memory("removed", **more) == memory("removed", **more, keep_adapter=True)


def test_memory_is_that_of_the_part_that_takes_most(pruned: Path, ids: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short windows of training beside long ones of measuring, and the other way round."""
    asked = replace(_asked(pruned, ids), batch=1, seqlen=2, text=None, evaluate=False)
    training = api.estimate_heal(asked)["memory_bytes"]
    measured = replace(asked, evaluate=True, text=ids)
    assert api.estimate_heal(measured)["memory_bytes"] > training
    monkeypatch.setattr("secateur.heal.estimate.perplexity_memory", lambda *_: 0)
    assert api.estimate_heal(measured)["memory_bytes"] == training


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--steps", "0"], "--steps 0"), (["--rank", "999"], "--rank 999"), (["--targets", "zz"], "'zz' matches no")],
)
def test_wrong_settings_are_refused_as_in_a_healing(
    options: list[str], message: str, pruned: Path, ids: str, tmp_path: Path
) -> None:
    args = ["heal", str(pruned), "--calibration", ids, "--text", ids, *options]
    real, dry = (CliRunner().invoke(app, [*args, *more]) for more in (["--out", str(tmp_path / "out")], ["--dry-run"]))
    assert message in dry.stderr
    assert real.stderr.splitlines()[-1] == dry.stderr.splitlines()[-1]
    assert real.exit_code == dry.exit_code == 2


def test_without_a_folder_nothing_is_healed(pruned: Path) -> None:
    result = CliRunner().invoke(app, ["heal", str(pruned)])
    assert result.exit_code == 2
    assert "--out DIR is missing" in result.stderr


def test_a_long_healing_says_how_long_after_two_steps(
    pruned: Path, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    with api.progress_to(lines.append):
        api.heal(_asked(pruned, ids), tmp_path / "short")
    assert not any("steps of" in line for line in lines)
    monkeypatch.setattr(tune, "_LONG", 0.0)
    with api.progress_to(lines.append):
        api.heal(_asked(pruned, ids), tmp_path / "long")
    assert [line for line in lines if "steps of" in line] == ["heal: 5 steps of 2 x 60 tokens, about 1 s"]
