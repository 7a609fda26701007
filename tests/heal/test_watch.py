"""The watch over a training: what is a divergence, and what is only another batch."""

from __future__ import annotations

import torch

from secateur.heal.watch import Watch, steps_watched


def watch_of(losses: list[float], before: list[float], tokens: list[int] | None = None) -> int | None:
    """The number of steps after which a run is stopped, looked at after each; None if it is not."""
    tokens = tokens or [1] * len(losses)
    watch = Watch(before, tokens[: len(before)])
    for step, (loss, count) in enumerate(zip(losses, tokens, strict=True), 1):
        watch.add(torch.tensor(loss), count)
        if watch.risen():
            return step
    return None


def noise(steps: int) -> list[float]:
    """Losses of rows that differ much, as answers of few tokens do."""
    return (2.0 + 1.2 * torch.randn(steps, generator=torch.Generator().manual_seed(0))).tolist()


def test_a_mean_is_of_enough_examples() -> None:
    assert [steps_watched(batch) for batch in (1, 2, 4, 64)] == [64, 32, 16, 10]


def test_rows_that_differ_are_no_divergence() -> None:
    assert watch_of(noise(2000), noise(2000)[:64]) is None


def test_a_rise_is_caught_within_tens_of_steps() -> None:
    for start in (0, 30, 500):
        losses = [loss + (3.0 if step >= start else 0.0) for step, loss in enumerate(noise(700))]
        stopped = watch_of(losses, noise(700)[:64])
        assert stopped is not None
        assert start < stopped <= start + 50, start


def test_a_loss_that_fell_is_what_a_later_one_is_compared_with() -> None:
    losses = [5.0 - step * 0.01 for step in range(300)] + [4.0] * 100
    stopped = watch_of(losses, [5.0] * 64)
    assert stopped is not None
    assert stopped > 300


def test_short_answers_count_little() -> None:
    """Of 80 steps each second one has an answer of one token, with a loss that rises by 8 nats."""
    tokens = [100, 1] * 40
    losses = [2.0, 10.0] * 40
    assert watch_of(losses, [2.0] * 64, tokens) is None
    assert watch_of(losses, [2.0] * 64) is not None
