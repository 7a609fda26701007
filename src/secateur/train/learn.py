"""Learning the gates of a frozen model (arXiv:2410.11988, equations 4 to 6): AdamW at a constant rate on the hypernetwork alone.

    loss = cross-entropy + lambda |log(T(s) / (p T_total))|

One draw of the gates serves both terms (the authors' code draws twice). Noise comes from a seeded generator on the device. The host waits for the device
when progress is shown, and not between.

Shape letters: S windows, B windows of a batch, T tokens, N gates.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur.core.errors import NotFiniteError
from secateur.core.progress import say, track
from secateur.train.gates import draw_gates
from secateur.train.hypernetwork import Hypernetwork
from secateur.train.masked import MaskedModel
from secateur.train.state import load_state, save_state

LOOK_EVERY = 20  # steps between two looks at the losses
SAVE_EVERY = 100  # steps between two saves; a multiple of the other, so that no sum of losses has to be kept


@dataclass(frozen=True)
class Learning:
    """How the gates are learned; see the options of `methods/disp_llm.py`."""

    steps: int
    batch: int
    lr: float
    weight_decay: float
    strength: float
    gate: str
    bias: float
    temperature: float
    seed: int


def budget_term(left: Tensor | float, target: float) -> Tensor:
    """|log(T(s) / (p T_total))|, equation 6."""
    return torch.log(torch.as_tensor(left) / target).abs()


def learn(network: Hypernetwork, masked: MaskedModel, windows: Tensor, target: float, how: Learning, checkpoint: Path | None = None) -> list[dict[str, float]]:
    """Train the network in place.

    Args:
        network: gives the logits of the gates.
        masked: the frozen model, on the device of the network.
        windows: token ids [S, T].
        target: p T_total, the parameters to keep.
        how: the settings.
        checkpoint: the file that an interrupted run goes on from, where it is there, and that this one writes; None keeps none.

    Returns:
        What was seen on the way: `step`, `loss` (of the language model, mean since the last look), `budget` (the other term, without lambda),
        `left` (T(s), the last draw).

    Raises:
        NotFiniteError: a loss is NaN or infinite; the step is named.
    """
    device = next(network.parameters()).device
    noise = torch.Generator(device).manual_seed(how.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=how.lr, weight_decay=how.weight_decay)
    seen: list[dict[str, float]] = []
    if checkpoint is not None and checkpoint.is_file():
        seen = load_state(checkpoint, network, optimizer, noise)["seen"]
    losses = torch.zeros((), device=device)
    since = 0
    done = int(seen[-1]["step"]) if seen else 0
    if done:
        say(f"disp_llm: going on from step {done} of {how.steps}")
    for step in track(range(done + 1, how.steps + 1), "disp_llm: steps", status=lambda: _status(seen, masked)):
        logit_N = network()
        noise_N = torch.rand(logit_N.shape, generator=noise, device=device)
        gate_N = draw_gates(logit_N, noise_N, how.gate, bias=how.bias, temperature=how.temperature)
        left = masked.structures.parameters([part.sum() for part in masked.structures.split(gate_N)])
        budget = budget_term(left, target)
        loss = masked.loss(windows[rows_of_step(step - 1, len(windows), how.batch, how.seed)].to(device), gate_N)
        optimizer.zero_grad(set_to_none=True)
        (loss + how.strength * budget).backward()
        optimizer.step()
        losses, since = losses + loss.detach(), since + 1
        if step % LOOK_EVERY == 0 or step == how.steps:
            seen.append({"step": step, "loss": float(losses) / since, "budget": float(budget.detach()), "left": float(torch.as_tensor(left).detach())})
            losses, since = torch.zeros_like(losses), 0
            _check(seen[-1])
            if checkpoint is not None and (step % SAVE_EVERY == 0 or step == how.steps):
                save_state(checkpoint, network, optimizer, noise, {"seen": seen})
    return seen


def rows_of_step(step: int, windows: int, batch: int, seed: int) -> list[int]:
    """The windows of a step: every window once an epoch, in an order that follows from the step and the seed alone."""
    return [_order(position // windows, windows, seed)[position % windows] for position in range(step * batch, (step + 1) * batch)]


def _order(epoch: int, windows: int, seed: int) -> list[int]:
    found: list[int] = torch.randperm(windows, generator=torch.Generator().manual_seed((seed << 20) + epoch)).tolist()
    return found


def _check(seen: dict[str, float]) -> None:
    if not all(torch.isfinite(torch.tensor([seen["loss"], seen["left"]]))):
        raise NotFiniteError(
            f"disp_llm: the loss is {seen['loss']:g} by step {seen['step']:.0f}; the checkpoint is damaged, its dtype is too narrow (try --dtype float32), "
            "or the learning rate is too high (try a smaller --set lr=...)"
        )


def _status(seen: list[dict[str, float]], masked: MaskedModel) -> str:
    if not seen:
        return ""
    last = seen[-1]
    return f"loss {last['loss']:.3f}, budget {last['budget']:.4f}, removed {1 - last['left'] / masked.structures.total:.4f}"
