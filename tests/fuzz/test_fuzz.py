"""300 damaged inputs: each gives a right answer or one line.

SECATEUR_FUZZ=N tries N inputs, SECATEUR_FUZZ_FROM=N starts at number N.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Any

import pytest

from secateur.core.errors import SecateurError
from secateur.evaluate import evaluate
from tests.fuzz import world
from tests.fuzz.cases import WrongOutcome, as_stock, case, invoke, prune

FIRST, COUNT = int(os.environ.get("SECATEUR_FUZZ_FROM", "0")), int(os.environ.get("SECATEUR_FUZZ", "300"))


@pytest.mark.parametrize("number", range(FIRST, FIRST + COUNT))
def test_damage_gives_the_right_answer_or_one_line(number: int, tmp_path: Path) -> None:
    what, run = case(number, tmp_path)
    try:
        found = run()
    except WrongOutcome as wrong:
        pytest.fail(f"case {number}: {what}\n{wrong}", pytrace=False)
    print(f"{what} -> {found}")


def test_an_unexpected_exception_is_a_wrong_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr("secateur.prune.prepare.find_method", fail)
    with pytest.raises(WrongOutcome, match="unexpected"):
        invoke(prune(world.checkpoint("llama"), tmp_path / "out", world.ids()), tmp_path / "out")


def test_half_an_output_is_a_wrong_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(writer: Any, *_: Any) -> None:
        writer.out.mkdir()
        (writer.out / "config.json").write_text("{}")
        raise SecateurError("the disk is full")

    monkeypatch.setattr("secateur.models.save.CheckpointWriter.finish", half)
    with pytest.raises(WrongOutcome, match="half an output"):
        invoke(prune(world.checkpoint("llama"), tmp_path / "out", world.ids()), tmp_path / "out")


@pytest.mark.parametrize("seed", [0, 1])
def test_another_answer_than_that_of_transformers_is_caught(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once by its loss, once by its logits."""
    draw = Random(seed)
    evaluates = Random(seed).random() < 0.5
    if evaluates:
        load = evaluate.load_model
        monkeypatch.setattr(evaluate, "load_model", lambda *given, **how: _quieter(load(*given, **how)))
    else:
        monkeypatch.setattr("secateur.models.pruned_config.drop_blocks", lambda raw, *_: {**raw, "rms_norm_eps": 0.5})
        monkeypatch.setattr("secateur.prune.work.drop_blocks", lambda raw, *_: {**raw, "rms_norm_eps": 0.5})
    with pytest.raises(WrongOutcome, match="transformers has" if evaluates else "away from those of transformers"):
        as_stock(world.checkpoint("llama"), draw, tmp_path)


def _quieter(model: Any) -> Any:
    model.lm_head.weight.data *= 0.9
    return model
