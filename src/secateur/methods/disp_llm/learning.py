"""Learning the gates of a frozen model (arXiv:2410.11988, equations 4 to 6): AdamW at a constant rate on the
hypernetwork alone.

    loss = cross-entropy + lambda |log(T(s) / (p T_total))|

T counts what gates can remove, so that lambda pulls alike whatever the share of the embeddings (the authors' code
counts the matrices of the blocks).

One draw of the gates serves both terms and all windows of a step (the authors' code draws twice). Noise comes from a
seeded generator on the device. Gradients of the first term are taken in the gates, part by part of the step's windows,
summed in the order of the parts, and go through the network once. Several processes share the parts of a step and
nothing else: all of them draw the same gates and take the same step of the optimiser, so that their number does not
change the result. The host waits for the device only when it looks at the losses, shows them or saves the state.

Shape letters: S windows, B windows of a part, T tokens, N gates, M gates and, where they are learned, scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur.core.distributed import check_same, gather, on_first, rank, size
from secateur.core.errors import NotFiniteError, SecateurError
from secateur.core.progress import say, track
from secateur.methods.disp_llm.gates import draw_gates
from secateur.methods.disp_llm.hypernetwork import Hypernetwork
from secateur.methods.disp_llm.masked import MaskedModel
from secateur.train.recent import RecentLoss
from secateur.train.state import read_state, restore_state, save_state
from secateur.train.steps import all_finite, rows_of_step

STEPS = "disp_llm: steps"  # the description of its progress
LOOK_EVERY = 20  # steps between two looks, which bring the losses to the host


@dataclass(frozen=True)
class Learning:
    """The settings of learning; see `DispLLM`."""

    steps: int
    batch: int
    lr: float
    weight_decay: float
    strength: float
    gate: str
    bias: float
    temperature: float
    seed: int
    accumulate: int = 1
    clip: float = 0.0
    save_every: int = 100


def budget_term(left: Tensor | float, target: float, fixed: float = 0.0) -> Tensor:
    """|log(T(s) / (p T_total))|, equation 6, counted over what gates can remove.

    Counted over all parameters, the slope would shrink as more of them are out of reach of the gates: with 80% in the
    embeddings it would be a tenth, and the budget would not be met.

    Args:
        left: T(s), the parameters that the gates leave.
        target: p T_total, the parameters to keep.
        fixed: the parameters that no gate removes, part of both numbers: embeddings, head, final norm, and those that
            heads share.
    """
    return torch.log((torch.as_tensor(left) - fixed) / (target - fixed)).abs()


def learn(
    network: Hypernetwork,
    masked: MaskedModel,
    windows: Tensor,
    target: float,
    how: Learning,
    checkpoint: Path | None = None,
) -> list[dict[str, float]]:
    """Train the network in place.

    Args:
        network: the network that gives the logits of the gates.
        masked: the frozen model, on the device of the network.
        windows: token ids [S, T].
        target: p T_total, the parameters to keep.
        how: the settings.
        checkpoint: the file where the state is saved; if it exists, an interrupted run continues from it. With None no
            state is saved.

    Returns:
        One entry a look: `step`, `loss` (of the language model, mean since the last look), `budget` (the other term,
        without lambda), `left` (T(s), of the last draw).

    Raises:
        NotFiniteError: a loss is NaN or infinite; the message names the step.
        SecateurError: a loss is not finite, but a state was saved before, which stays; the disk is full; the networks
            of two processes are no longer the same; or the interrupted run did more steps than `how.steps`.
    """
    learner = Learner(network, masked, windows, target, how, checkpoint)
    done = learner.resume()
    if done > how.steps:
        raise SecateurError(
            f"disp_llm: the interrupted run has done {done} steps, more than steps={how.steps}; give "
            f"steps={done}, or start again with --overwrite"
        )
    if done:
        say(f"disp_llm: continuing from step {done} of {how.steps}")
    for step in track(range(done + 1, how.steps + 1), STEPS, status=learner.status):
        learner.step(step)
        if step % LOOK_EVERY == 0 or step == how.steps:
            learner.look(step)
        if checkpoint is not None and (step % how.save_every == 0 or step == how.steps):
            learner.save(step, checkpoint)
    return learner.seen


def with_scales(gate_N: Tensor, network: Hypernetwork) -> Tensor:
    """The input of the masked model: the gates, followed by the scales if scales are learned."""
    scale_N = network.scales()
    return gate_N if scale_N is None else torch.cat([gate_N, scale_N])


class Learner:
    """The state of learning: what a step needs and changes."""

    def __init__(
        self,
        network: Hypernetwork,
        masked: MaskedModel,
        windows: Tensor,
        target: float,
        how: Learning,
        checkpoint: Path | None,
    ) -> None:
        self.network, self.masked, self.target, self.how, self.checkpoint = network, masked, target, how, checkpoint
        self.device = next(network.parameters()).device
        self.windows = windows.to(self.device, torch.int32)
        self.count = masked.structures.counter(self.device)
        self.noise = torch.Generator(self.device).manual_seed(how.seed)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=how.lr, weight_decay=how.weight_decay, fused=True)
        self.seen: list[dict[str, float]] = []
        self.recent = RecentLoss()
        self.loss = torch.zeros((), device=self.device)  # sum since the last look
        self.budget = self.left = torch.zeros((), device=self.device)
        self.wrong = torch.zeros((), device=self.device, dtype=torch.int64)  # the first step whose loss was not finite

    def step(self, step: int) -> None:
        """Take one step of the optimiser; the first one is number 1."""
        how = self.how
        logit_N = self.network()
        noise_N = torch.rand(logit_N.shape, generator=self.noise, device=self.device)
        gate_N = draw_gates(logit_N, noise_N, how.gate, bias=how.bias, temperature=how.temperature)
        left = self.count(gate_N)
        budget = budget_term(left, self.target, self.masked.structures.fixed)
        open_M = with_scales(gate_N, self.network)
        loss, slope_M = self._model_loss(step, open_M.detach())
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward((open_M, how.strength * budget), (slope_M, None))
        if how.clip:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), how.clip)
        self.optimizer.step()
        self.loss, self.budget, self.left = self.loss + loss, budget.detach(), left.detach()
        self.recent.add(loss)
        self.wrong = torch.where((self.wrong == 0) & ~torch.isfinite(loss + self.budget), step, self.wrong)

    def _model_loss(self, step: int, open_M: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the language model over the windows of a step, and its gradient in the gates and scales."""
        how, total_M1 = self.how, open_M.new_zeros(len(open_M) + 1)
        rows = rows_of_step(step - 1, len(self.windows), how.batch, how.seed).to(self.device, non_blocking=True)
        parts = rows.chunk(math.lcm(how.accumulate, size()))
        for rows_B in parts[rank() :: size()]:
            part_M = open_M.clone().requires_grad_()
            loss = self.masked.loss(self.windows[rows_B].long(), part_M)
            (slope_M,) = torch.autograd.grad(loss, part_M)
            for part_M1 in gather(torch.cat([slope_M, loss.detach().to(slope_M.dtype)[None]])):
                total_M1 = total_M1 + part_M1  # in the order of the parts, however many processes there are
        mean_M1 = total_M1 / len(parts)
        return mean_M1[-1], mean_M1[:-1]

    def look(self, step: int) -> None:
        """Bring the losses to the host, and raise an error if one is not finite."""
        self._check(step)
        since = step - (int(self.seen[-1]["step"]) if self.seen else 0)
        self.seen.append(
            {"step": step, "loss": float(self.loss) / since, "budget": float(self.budget), "left": float(self.left)}
        )
        self.loss = torch.zeros_like(self.loss)

    def save(self, step: int, file: Path) -> None:
        """Write the state, after a check that it is finite, so that a good file is never replaced by a bad one."""
        self._check(step)
        check_same(self.network.state_dict().values(), f"disp_llm: step {step}: the hypernetwork")
        on_first(
            lambda: save_state(
                file, self.network, self.optimizer, self.noise, {"loss": self.loss}, {"step": step, "seen": self.seen}
            )
        )

    def resume(self) -> int:
        """Load the saved state if it exists, and return the number of steps that are done."""
        file = self.checkpoint
        state = on_first(lambda: read_state(file) if file is not None and file.is_file() else None)
        done = 0
        if state is not None:
            tensors, note = state
            more = restore_state(tensors, self.network, self.optimizer, self.noise)
            self.loss, self.seen, done = more["loss"].to(self.device), note["seen"], int(note["step"])
        check_same(self.network.state_dict().values(), "disp_llm: at the start, the hypernetwork")
        return done

    def status(self) -> str:
        """The text of the progress line: the loss of the last steps, and what the gates of the last one remove."""
        if not (loss := self.recent.words()):
            return ""
        removed = 1 - float(self.left) / self.masked.structures.total
        return f"{loss}, budget {float(self.budget):.4f}, removed {removed:.1%} (last step)"

    def _check(self, step: int) -> None:
        wrong = int(self.wrong)
        if not wrong and all_finite(self.network):
            return
        problem = (
            f"the loss is not finite (NaN or infinity) at step {wrong}"
            if wrong
            else f"a gradient by step {step} is not finite (NaN or infinity)"
        )
        why = (
            f"disp_llm: {problem}; the checkpoint is damaged, its dtype is too narrow (try --dtype float32), "
            "or the learning rate is too high (try a smaller --set lr=...)"
        )
        if self.checkpoint is None or not self.checkpoint.is_file():
            raise NotFiniteError(why)
        raise SecateurError(
            f"{why}; the last saved state is kept: --resume continues from it, --overwrite starts again"
        )
