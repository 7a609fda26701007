"""The loss in a progress line is that of the last steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import api
from secateur.heal import tune as tuning
from secateur.methods.disp_llm import learning
from secateur.train.recent import RecentLoss


def test_the_mean_is_of_the_last_steps_and_says_of_how_many() -> None:
    recent = RecentLoss(3)
    assert recent.words() == ""
    said = []
    for loss in (9.0, 5.0, 4.0, 3.0, 2.0):
        recent.add(torch.tensor(loss, requires_grad=True))
        said.append(recent.words())
    assert said[0] == "loss 9.000 (last step)"
    assert said[1:] == [f"loss {mean:.3f} (last {n} steps)" for mean, n in ((7, 2), (6, 3), (4, 3), (3, 3))]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """What the progress line of a module says after each step."""

    def of(module: Any) -> list[str]:
        said: list[str] = []

        def track(items: Any, _: str, status: Callable[[], str] | None = None) -> Iterator[Any]:
            for item in items:
                yield item
                if status is not None:
                    said.append(status())

        monkeypatch.setattr(module, "track", track)
        return said

    return of


def test_healing_shows_the_steps_just_done(
    saved: Callable[..., Path],
    ids_file: str,
    tmp_path: Path,
    lines: Callable[[Any], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tmp_path / "out"
    api.prune(api.Request(str(saved("llama")), "wanda", sparsity=0.5, calibration=ids_file), model)
    losses: list[float] = []
    real = tuning.next_token_loss

    def noted(*given: Any) -> torch.Tensor:
        loss = real(*given)
        losses.append(float(loss.detach()))
        return loss

    said = lines(tuning)
    asked = api.HealRequest(str(model), ids_file, steps=13, batch=2, lr=1e-2, seqlen=20, evaluate=False, rank=2)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "next_token_loss", noted)
        api.heal(replace(asked, save_every=100), tmp_path / "healed")
    trained = losses[-23:-10]  # the rows of ten steps are looked at again after the training
    for step, line in enumerate(said, 1):
        last = trained[max(0, step - 10) : step]
        steps = f"{len(last)} steps" if step > 1 else "step"
        assert line == f"loss {sum(last) / len(last):.3f} (last {steps})"


def test_learning_shows_the_steps_just_done(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, lines: Callable[[Any], list[str]]
) -> None:
    said = lines(learning)
    options = {"steps": 3, "lr": 0.1, "unmet": "cut"}
    api.prune(
        api.Request(str(saved("llama")), "disp_llm", sparsity=0.3, calibration=ids_file, options=options),
        tmp_path / "o",
    )
    assert [line.split(", budget")[0].partition("(")[2] for line in said] == [
        "last step)",
        "last 2 steps)",
        "last 3 steps)",
    ]
    assert len({line.partition("budget ")[2] for line in said}) == 3, "each is of its own step"
