"""Train one block of a pruned model towards the output of the dense model.

The error of a token is the squared distance of the block's output from its target, in units of the target's squared
norm: a norm follows every residual stream, so what counts is the direction. It also keeps the few tokens whose
activations are thousands of times as large as the others' from ruling the sum.

Adam steps are in units of each tensor's root mean square, so one learning rate serves matrices, gains and biases of any
model. The state with the lowest error on held-out windows is kept; where none is below that of the start, the block
stays as it was.

Shape letters: S windows, B windows of a batch, T tokens, D residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.train.steps import rows_of_step

_TINY = 1e-12  # of a target's squared norm
_SMALLEST = 1e-3  # the root mean square of a tensor that is nearly zero, a new bias say
_WARM = 0.05  # the share of the steps over which the learning rate rises

Run = Callable[[nn.Module, Tensor], Tensor]
"""Give the output of the block for some windows, by their indices: (module, rows_B) -> [B, T, D]."""
Target = Callable[[Tensor], Tensor]
"""Give the targets of some windows by their indices: rows_B -> [B, T, D]."""


@dataclass(frozen=True)
class How:
    """The settings of a fit.

    Attributes:
        steps: the number of Adam steps for each block.
        batch: windows a step.
        together: windows that run at once; gradients add up over a step.
        lr: the highest learning rate, in units of the root mean square of each tensor.
        held_out: the number of held-out windows, the last ones.
        seed: the seed of the order of windows.
        looks: how often the error on the held-out windows is measured.
    """

    steps: int
    batch: int
    together: int
    lr: float
    held_out: int
    seed: int
    looks: int = 4


@dataclass(frozen=True)
class Fitted:
    """What became of a block.

    Attributes:
        before, after: the error on the held-out windows; `after` is never above `before`.
        step: the step whose state is kept; 0 is the block as it was.
        tensors: the new tensors by their names in the block, in their own dtypes; empty if the block stays.
    """

    before: float
    after: float
    step: int
    tensors: Mapping[str, Tensor]

    @property
    def facts(self) -> dict[str, float]:
        """All but the tensors."""
        return {"before": self.before, "after": self.after, "step": self.step}


def fit(
    module: nn.Module, dtypes: Mapping[str, torch.dtype], run: Run, target: Target, windows: int, how: How
) -> Fitted:
    """Train the parameters of a block.

    Args:
        module: the block, with float32 parameters on its device. It is trained in place.
        dtypes: the dtype that each tensor is stored in; errors are measured after rounding to it.
        run, target: the output of the block, and what it is to be, for windows by their indices.
        windows: the number of windows, the held-out ones included.
        how: the settings.
    """
    trained = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    for p in trained.values():
        p.requires_grad_(True)
        if p.dim() > 1 and bool((p == 0).any()):
            p.register_post_accumulate_grad_hook(_keep_zeros)
    held_out = torch.arange(windows - how.held_out, windows)
    before = best = _error(module, run, target, held_out, how)
    step_of_best, kept = 0, {}
    optimiser = torch.optim.Adam(
        [{"params": [p], "lr": how.lr * _scale(p), "most": how.lr * _scale(p)} for p in trained.values()],
        betas=(0.9, 0.95),
        fused=True,  # in place, without temporaries
    )
    looks = {round(how.steps * look / how.looks) for look in range(1, how.looks + 1)}
    for step in range(how.steps):
        for group in optimiser.param_groups:
            group["lr"] = group["most"] * _course(step, how.steps)
        rows_B = rows_of_step(step, windows - how.held_out, how.batch, how.seed)
        for rows_b in rows_B.split(how.together):
            with torch.enable_grad():
                loss = errors(run(module, rows_b), target(rows_b)).sum() / (len(rows_B))
            loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step + 1 in looks:
            stored = {name: p.detach().to(dtypes[name], copy=True) for name, p in trained.items()}
            error = _error(module, run, target, held_out, how, stored)
            if error < best:
                best, step_of_best, kept = error, step + 1, stored
            del stored
    return Fitted(before, best, step_of_best, kept)


def errors(out_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Return the mean error of the tokens of each window, [B]."""
    target_BTD = target_BTD.float()
    size_BT = target_BTD.square().sum(-1).clamp_min(_TINY)
    return ((out_BTD.float() - target_BTD).square().sum(-1) / size_BT).mean(-1)


@torch.no_grad()
def _error(
    module: nn.Module, run: Run, target: Target, rows: Tensor, how: How, rounded: Mapping[str, Tensor] | None = None
) -> float:
    """Return the mean error on some windows, with the parameters as they would be stored."""
    before = {}
    for name, tensor in (rounded or {}).items():
        parameter = module.get_parameter(name)
        if tensor.dtype != parameter.dtype:
            before[name] = parameter.data
            parameter.data = tensor.to(parameter.dtype)
    total = math.fsum(
        float(errors(run(module, some), target(some)).double().sum()) for some in rows.split(how.together)
    )
    for name, data in before.items():
        module.get_parameter(name).data = data
    return total / len(rows)


def _keep_zeros(matrix: Tensor) -> None:
    """Drop the gradient of the zeros of a matrix: Adam then leaves them as they are, to the bit."""
    assert matrix.grad is not None
    matrix.grad.masked_fill_(matrix.detach() == 0, 0)


def _scale(parameter: Tensor) -> float:
    """Return the root mean square of what is not zero."""
    values = parameter.detach()
    count = int(values.count_nonzero())
    return max(_SMALLEST, math.sqrt(float(values.double().square().sum()) / count)) if count else _SMALLEST


def _course(step: int, steps: int) -> float:
    """Return the share of the highest learning rate at a step: a short rise, then half a cosine down to zero."""
    rise = min(1.0, (step + 1) / max(1.0, _WARM * steps))
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))
