"""Train adapters with AdamW on the next-token loss.

Training can be resumed, and stops if the loss rises too far above its best value so far.

Shape letters: S examples, B examples of a batch, T tokens.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.core.errors import SecateurError
from secateur.core.progress import say, track
from secateur.core.words import rough_duration_words
from secateur.heal.data import Examples
from secateur.models.loss import hidden_states, mean_loss
from secateur.text.windows import IGNORE
from secateur.train.recent import RecentLoss
from secateur.train.state import load_state, save_state
from secateur.train.steps import all_finite, rows_of_step

LOOK_EVERY = 10  # steps between two readings of the loss
_LONG = 60.0  # seconds of training that are said beforehand
WORSE = 1.0  # nats above the best reading: the training has diverged
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class Tuning:
    """The settings of the training; see `heal.HealRequest`."""

    steps: int
    batch: int
    lr: float
    schedule: str
    weight_decay: float
    save_every: int
    seed: int


def rate_at(step: int, how: Tuning) -> float:
    """The learning rate of a step, counted from 0.

    It rises over the first twentieth of the steps, and is then constant, or follows half a cosine to zero.
    """
    rise = min(1.0, (step + 1) / max(1, how.steps // 20))
    return how.lr * rise * (1.0 if how.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / how.steps)))


def tune(
    model: PreTrainedModel, trainable: nn.ParameterList, examples: Examples, how: Tuning, state: Path
) -> list[dict[str, float]]:
    """Train the adapters in place.

    Args:
        model: the model with adapters; its head has none.
        trainable: the parameters of the adapters.
        examples: the training data.
        how: the settings.
        state: the file with the state of the training; an existing one is resumed.

    Returns:
        The readings of the loss: `step`, `loss` (nats per token, mean since the last reading), `lr` (the setting). The
        first reading, at step 0, is the loss of the model before training, on the same batches as the second reading.

    Raises:
        SecateurError: the loss or a parameter is not finite, or the loss has risen far above the best; `state` holds
            the last good parameters.
    """
    optimizer = torch.optim.AdamW(trainable, lr=how.lr, weight_decay=how.weight_decay)
    readings: list[dict[str, float]] = []
    if state.is_file():
        readings = load_state(state, trainable, optimizer, None)[1]["seen"]
        say(f"heal: going on from step {readings[-1]['step']:.0f} of {how.steps}")
    else:
        first = {"step": 0, "loss": _loss_before(model, examples, how), "lr": how.lr}
        _check(first, readings, trainable, 0)
        readings.append(first)
    device, pace = model.device, _Pace(how, examples)
    recent = RecentLoss()
    losses, since, saved = torch.zeros((), device=device), 0, int(readings[-1]["step"])
    for step in track(range(saved + 1, how.steps + 1), "heal: steps", status=recent.words):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step - 1, how)
        rows = rows_of_step(step - 1, len(examples.ids_ST), how.batch, how.seed)
        loss = train_step(
            model, trainable, optimizer, examples.ids_ST[rows].to(device), examples.label_ST[rows].to(device)
        )
        losses, since = losses + loss, since + 1
        recent.add(loss)
        pace.step(step)
        save = step % how.save_every == 0 or step == how.steps
        if step % LOOK_EVERY == 0 or save:
            reading = {"step": step, "loss": float(losses) / since, "lr": how.lr}
            _check(reading, readings, trainable, saved)
            readings.append(reading)
            losses, since = torch.zeros_like(losses), 0
        if save:
            save_state(state, trainable, optimizer, None, {}, {"seen": readings})
            saved = step
    return readings


def train_step(
    model: PreTrainedModel,
    trainable: nn.ParameterList,
    optimizer: torch.optim.Optimizer,
    ids_BT: Tensor,
    label_BT: Tensor,
) -> Tensor:
    """Take one step of the optimiser; return the loss before it."""
    loss = next_token_loss(model, ids_BT, label_BT)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()
    return loss.detach()


class _Pace:
    """Says how long the training takes, as soon as two steps are done; a short one needs no word."""

    def __init__(self, how: Tuning, examples: Examples) -> None:
        self._how, self._tokens = how, examples.ids_ST.shape[1]
        self._ends: list[float] = []

    def step(self, step: int) -> None:
        """Note the end of a step."""
        if len(self._ends) == 2:
            return
        self._ends.append(time.monotonic())
        if len(self._ends) == 2:
            left = (self._ends[1] - self._ends[0]) * (self._how.steps - step)  # the first step is slower
            if left > _LONG:
                size = f"{self._how.steps:,} steps of {self._how.batch} x {self._tokens:,} tokens"
                say(f"heal: {size}, about {rough_duration_words(left)}")


@torch.no_grad()
def _loss_before(model: PreTrainedModel, examples: Examples, how: Tuning) -> float:
    """The mean loss before training, in nats, on the batches up to the first reading; fresh adapters change nothing."""
    batches = [
        rows_of_step(step, len(examples.ids_ST), how.batch, how.seed)
        for step in range(min(LOOK_EVERY, how.save_every, how.steps))
    ]
    losses = [
        next_token_loss(model, examples.ids_ST[rows].to(model.device), examples.label_ST[rows].to(model.device))
        for rows in batches
    ]
    return float(torch.stack(losses).mean())


def next_token_loss(model: PreTrainedModel, ids_BT: Tensor, label_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens that count, in nats, float32 or better."""
    counts_BT = label_BT[:, 1:] != IGNORE
    return mean_loss(model, hidden_states(model, ids_BT)[:, :-1][counts_BT], label_BT[:, 1:][counts_BT])


def _check(
    reading: dict[str, float], readings: list[dict[str, float]], trainable: nn.ParameterList, saved: int
) -> None:
    best = min((earlier["loss"] for earlier in readings), default=math.inf)
    finite = math.isfinite(reading["loss"]) and all_finite(trainable)
    if finite and reading["loss"] <= best + WORSE:
        return
    problem = (
        f"rose to {reading['loss']:.3f} from {best:.3f}" if finite else "or an adapter is not finite (NaN or infinity)"
    )
    next_step = (
        f"the state of step {saved} is kept: go on from it with --resume and a smaller --lr"
        if saved
        else "use a smaller --lr, or --dtype float32"
    )
    raise SecateurError(f"heal: the loss {problem} by step {reading['step']:.0f}; {next_step}")
