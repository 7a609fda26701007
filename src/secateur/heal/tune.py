"""The training of adapters: AdamW on the loss of the next token, resumable, stopped where it diverges from the loss it began with or the best since.

Shape letters: S examples, B examples of a batch, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.core.errors import SecateurError
from secateur.core.progress import say, track
from secateur.heal.data import Examples
from secateur.models.loss import hidden_states, mean_loss
from secateur.text.windows import IGNORE
from secateur.train.state import load_state, save_state
from secateur.train.steps import all_finite, rows_of_step

LOOK_EVERY = 10  # steps between two looks at the loss
WORSE = 1.0  # nats above the best look: diverged
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class Tuning:
    """How adapters are trained; see `heal.HealRequest`."""

    steps: int
    batch: int
    lr: float
    schedule: str
    weight_decay: float
    save_every: int
    seed: int


def rate_at(step: int, how: Tuning) -> float:
    """The learning rate of a step, counted from 0: a rise over the first twentieth, then constant, or half a cosine to zero."""
    rise = min(1.0, (step + 1) / max(1, how.steps // 20))
    return how.lr * rise * (1.0 if how.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / how.steps)))


def tune(
    model: PreTrainedModel, trainable: nn.ParameterList, examples: Examples, how: Tuning, state: Path
) -> list[dict[str, float]]:
    """Train in place.

    Args:
        model: with adapters; its head has none.
        trainable: the parameters.
        examples: what to learn from.
        how: the settings.
        state: the file that an interrupted run goes on from, where it is there, and that this one writes.

    Returns:
        What was seen on the way: `step`, `loss` (nats a token, mean since the last look), `lr` (the setting it was reached with). The first look, of step 0, is
        the model as it came, on what the second one is the mean of.

    Raises:
        SecateurError: the loss or a parameter is not finite, or the loss has risen far above the best; `state` holds the last good ones.
    """
    optimizer = torch.optim.AdamW(trainable, lr=how.lr, weight_decay=how.weight_decay)
    seen: list[dict[str, float]] = []
    if state.is_file():
        seen = load_state(state, trainable, optimizer, None)[1]["seen"]
        say(f"heal: going on from step {seen[-1]['step']:.0f} of {how.steps}")
    else:
        begun = {"step": 0, "loss": _loss_before(model, examples, how), "lr": how.lr}
        _check(begun, seen, trainable, 0)
        seen.append(begun)
    device = model.device
    losses, since, saved = torch.zeros((), device=device), 0, int(seen[-1]["step"])
    for step in track(range(saved + 1, how.steps + 1), "heal: steps", status=lambda: f"loss {seen[-1]['loss']:.3f}"):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step - 1, how)
        rows = rows_of_step(step - 1, len(examples.ids_ST), how.batch, how.seed)
        loss = next_token_loss(model, examples.ids_ST[rows].to(device), examples.label_ST[rows].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        losses, since = losses + loss.detach(), since + 1
        save = step % how.save_every == 0 or step == how.steps
        if step % LOOK_EVERY == 0 or save:
            now = {"step": step, "loss": float(losses) / since, "lr": how.lr}
            _check(now, seen, trainable, saved)
            seen.append(now)
            losses, since = torch.zeros_like(losses), 0
        if save:
            save_state(state, trainable, optimizer, None, {}, {"seen": seen})
            saved = step
    return seen


@torch.no_grad()
def _loss_before(model: PreTrainedModel, examples: Examples, how: Tuning) -> float:
    """The mean loss, in nats, on the batches up to the first look at it; before any step the adapters change nothing."""
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
    """Mean cross-entropy of the tokens that count, nats, float32 or better."""
    counts_BT = label_BT[:, 1:] != IGNORE
    return mean_loss(model, hidden_states(model, ids_BT)[:, :-1][counts_BT], label_BT[:, 1:][counts_BT])


def _check(now: dict[str, float], seen: list[dict[str, float]], trainable: nn.ParameterList, saved: int) -> None:
    best = min((look["loss"] for look in seen), default=math.inf)
    finite = math.isfinite(now["loss"]) and all_finite(trainable)
    if finite and now["loss"] <= best + WORSE:
        return
    what = f"rose to {now['loss']:.3f} from {best:.3f}" if finite else "or an adapter is not finite (NaN or infinity)"
    kept = (
        f"the state of step {saved} is kept: go on from it with --resume and a smaller --lr"
        if saved
        else "use a smaller --lr, or --dtype float32"
    )
    raise SecateurError(f"heal: the loss {what} by step {now['step']:.0f}; {kept}")
