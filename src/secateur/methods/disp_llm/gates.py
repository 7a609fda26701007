"""Binary gates with gradients: ReinMax, straight-through and Gumbel-sigmoid.

DISP-LLM (arXiv:2410.11988, algorithm 2) samples B ~ Bernoulli(pi0), pi0 = sigmoid(l), l = x + c, and wants the gradient
of E f(B) in l. ReinMax (arXiv:2304.08612) averages the two ends of the step from 0 to 1 (Heun's method), which for
classes i with logits l_i is

    pi1 = (onehot(B) + softmax(l / tau)) / 2,    pi2 = 2 softmax(stop(ln(pi1) - l) + l) - pi0 / 2,    B + pi2 -
    stop(pi2)

Two classes have the logits (l, 0). A softmax over two classes is the sigmoid of the difference of its arguments, so the
second term is sigmoid(stop(ln(pi1) - ln(1 - pi1) - l) + l) with pi1 that of class 1: the logit of pi1 stands where
algorithm 2 prints ln(pi1). Its value is pi1 and its slope pi1 (1 - pi1); averaged over B at tau = 1 the slope of the
whole is pi (1 - pi) (f'(0) + f'(1)) / 2, exact for f quadratic in each gate. The printed form has sigmoid(ln(pi1)) =
pi1 / (1 + pi1) instead, and is kept as `reinmax-printed`.

Every form is B plus a slope times (l - stop(l)), with the slope computed in closed form: nothing overflows where pi1 is
0 or 1.

Shape letter: N gates.
"""

from __future__ import annotations

import torch
from torch import Tensor

GATES = ("reinmax", "reinmax-printed", "straight-through", "gumbel")


def draw_gates(
    x_N: Tensor, noise_N: Tensor, gate: str = "reinmax", *, bias: float = 3.0, temperature: float = 1.0
) -> Tensor:
    """One draw of gates.

    Args:
        x_N: the learned values; a gate is open with probability sigmoid(x + bias).
        noise_N: uniform in [0, 1); equal noise gives equal gates.
        gate: one of `GATES`. All give exactly 0 or 1, except `gumbel`, which is soft.
        bias: c; at x = 0 it decides how many gates are open.
        temperature: tau.

    Returns:
        The gates, with gradients to `x_N`.
    """
    logit_N = x_N + bias
    if gate == "gumbel":  # the difference of two Gumbels is logistic
        tiny = torch.finfo(noise_N.dtype).tiny
        return torch.sigmoid((logit_N + torch.log(noise_N.clamp(min=tiny)) - torch.log1p(-noise_N)) / temperature)
    with torch.no_grad():
        open_N = torch.sigmoid(logit_N)
        drawn_N = (noise_N < open_N).to(x_N.dtype)
        slope_N = _slope(logit_N, open_N, drawn_N, gate, temperature)
    return drawn_N + slope_N * (logit_N - logit_N.detach())


def _slope(logit_N: Tensor, open_N: Tensor, drawn_N: Tensor, gate: str, temperature: float) -> Tensor:
    """The slope of each gate in its logit."""
    warm_N = torch.sigmoid(logit_N / temperature)
    if gate == "straight-through":
        return warm_N * (1 - warm_N) / temperature
    assert gate in ("reinmax", "reinmax-printed"), gate
    middle_N = (drawn_N + warm_N) / 2
    if gate == "reinmax-printed":
        middle_N = middle_N / (1 + middle_N)
    return 2 * middle_N * (1 - middle_N) - open_N * (1 - open_N) / 2
