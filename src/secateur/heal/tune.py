"""Train adapters with AdamW on the next-token loss.

Training can be resumed, and stops if the mean loss of some steps rises too far (see `watch.py`).

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
from secateur.core.words import plural, rough_duration_words
from secateur.heal.data import Examples
from secateur.heal.watch import Watch, steps_watched
from secateur.models.loss import hidden_states, mean_loss
from secateur.text.windows import IGNORE
from secateur.train.recent import RecentLoss
from secateur.train.state import load_state, save_state
from secateur.train.steps import all_finite, rows_of_step

LOOK_EVERY = 10  # steps between two readings of the loss
_LONG = 60.0  # seconds of training that are said beforehand
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
        SecateurError: the loss or a parameter is not finite, or the mean loss has risen far; `state` holds the last
            good parameters.
    """
    optimizer = torch.optim.AdamW(trainable, lr=how.lr, weight_decay=how.weight_decay)
    readings: list[dict[str, float]] = []
    if state.is_file():
        readings = load_state(state, trainable, optimizer, None)[1]["seen"]
        say(f"heal: going on from step {readings[-1]['step']:.0f} of {how.steps}")
    start = int(readings[-1]["step"]) if readings else 0
    before = _losses_before(model, examples, how, start)
    if not readings:
        count = first_steps(how)
        readings.append({"step": 0, "loss": sum(before[:count]) / count, "lr": how.lr})
        say(f"heal: loss {readings[0]['loss']:.3f} before training, on the rows of the first {plural(count, 'step')}")
        _check_finite(readings[0], trainable, 0)
    watch = Watch(before, [_tokens(examples, how, start + number) for number in range(len(before))])
    device, pace = model.device, _Pace(how, examples)
    recent = RecentLoss()
    losses, since, saved = torch.zeros((), device=device), 0, start
    for step in track(range(saved + 1, how.steps + 1), "heal: steps", status=recent.words):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step - 1, how)
        rows = rows_of_step(step - 1, len(examples.ids_ST), how.batch, how.seed)
        loss = train_step(
            model, trainable, optimizer, examples.ids_ST[rows].to(device), examples.label_ST[rows].to(device)
        )
        losses, since = losses + loss, since + 1
        recent.add(loss)
        watch.add(loss, _tokens(examples, how, step - 1))
        pace.step(step)
        save = step % how.save_every == 0 or step == how.steps
        if step % LOOK_EVERY == 0 or save:
            reading = {"step": step, "loss": float(losses) / since, "lr": how.lr}
            _check_finite(reading, trainable, saved)
            _check_risen(watch, step, saved)
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


def first_steps(how: Tuning) -> int:
    """Return the number of steps whose rows the first reading is of, and `loss_after` too."""
    return min(LOOK_EVERY, how.save_every, how.steps)


def loss_after(model: PreTrainedModel, examples: Examples, how: Tuning) -> float:
    """Return the loss of the trained model in nats a token, on the rows of the first reading."""
    losses = _losses(model, examples, how, range(first_steps(how)), "heal: loss after")
    return sum(losses) / len(losses)


def _losses_before(model: PreTrainedModel, examples: Examples, how: Tuning, start: int) -> list[float]:
    """The losses in nats of the batches of the next steps, as many as are watched, before any of these steps."""
    steps = range(start, min(how.steps, start + steps_watched(how.batch)))
    return _losses(model, examples, how, steps, "heal: loss before")


@torch.no_grad()
def _losses(model: PreTrainedModel, examples: Examples, how: Tuning, steps: range, what: str) -> list[float]:
    losses = []
    for step in track(steps, what):
        rows = rows_of_step(step, len(examples.ids_ST), how.batch, how.seed)
        losses.append(
            next_token_loss(model, examples.ids_ST[rows].to(model.device), examples.label_ST[rows].to(model.device))
        )
    return torch.stack(losses).tolist() if losses else []


def _tokens(examples: Examples, how: Tuning, step: int) -> int:
    """The number of tokens that count in the loss of a step, counted from 0."""
    rows = rows_of_step(step, len(examples.ids_ST), how.batch, how.seed)
    return int((examples.label_ST[rows, 1:] != IGNORE).sum())


def next_token_loss(model: PreTrainedModel, ids_BT: Tensor, label_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens that count, in nats, float32 or better."""
    counts_BT = label_BT[:, 1:] != IGNORE
    return mean_loss(model, hidden_states(model, ids_BT)[:, :-1][counts_BT], label_BT[:, 1:][counts_BT])


def _check_finite(reading: dict[str, float], trainable: nn.ParameterList, saved: int) -> None:
    if not (math.isfinite(reading["loss"]) and all_finite(trainable)):
        raise _diverged(f"the loss or an adapter is not finite (NaN or infinity) by step {reading['step']:.0f}", saved)


def _check_risen(watch: Watch, step: int, saved: int) -> None:
    if (risen := watch.risen()) is not None:
        count, mean, near = risen
        raise _diverged(
            f"the mean loss of {plural(count, 'step')} rose to {mean:.3f} from {near:.3f} by step {step}", saved
        )


def _diverged(problem: str, saved: int) -> SecateurError:
    next_step = (
        f"the state of step {saved} is kept: go on from it with --resume and a smaller --lr"
        if saved
        else "use a smaller --lr, or --dtype float32"
    )
    return SecateurError(f"heal: {problem}; {next_step}")
