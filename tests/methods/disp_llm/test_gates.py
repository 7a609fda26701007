"""The gradient estimators against exact gradients, which enumerate both outcomes of a gate: no sampling error."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.methods.disp_llm.gates import GATES, draw_gates

X = torch.tensor([-4.0, -2.5, -0.3, 0.0, 1.7], dtype=torch.float64)


def expected_gradient(f: torch.Tensor, gate: str, bias: float, temperature: float = 1.0) -> torch.Tensor:
    """The mean over the two outcomes of what backward gives for f(B) = f0 + f1 B + f2 B^2 + f3 B^3."""
    pi = torch.sigmoid(X + bias)
    total = torch.zeros_like(X)
    for noise, weight in ((torch.zeros_like(X), pi), (torch.ones_like(X), 1 - pi)):
        x = X.clone().requires_grad_()
        b = draw_gates(x, noise, gate, bias=bias, temperature=temperature)
        assert torch.equal(b.detach(), (noise == 0).to(b.dtype))
        (f[0] + f[1] * b + f[2] * b**2 + f[3] * b**3).sum().backward()
        assert x.grad is not None
        total += weight * x.grad
    return total


def exact_gradient(f: torch.Tensor, bias: float) -> torch.Tensor:
    """d/dx of pi f(1) + (1 - pi) f(0)."""
    pi = torch.sigmoid(X + bias)
    return pi * (1 - pi) * (f[1] + f[2] + f[3])


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_reinmax_is_exact_where_f_is_quadratic(bias: float) -> None:
    for f in ((0.3, -2.0, 0.0, 0.0), (1.0, 0.7, -1.9, 0.0)):
        torch.testing.assert_close(
            expected_gradient(torch.tensor(f), "reinmax", bias), exact_gradient(torch.tensor(f), bias)
        )


def test_reinmax_averages_the_slopes_at_both_ends_for_any_f() -> None:
    f = torch.tensor([0.0, 1.0, 1.0, 2.0])
    pi = torch.sigmoid(X + 3)
    at_0, at_1 = f[1], f[1] + 2 * f[2] + 3 * f[3]
    found = expected_gradient(f, "reinmax", 3.0)
    torch.testing.assert_close(found, pi * (1 - pi) * (at_0 + at_1) / 2)
    assert not torch.allclose(found, exact_gradient(f, 3.0), rtol=0.1), "a cubic is beyond it"


def test_straight_through_is_exact_for_linear_f_alone() -> None:
    linear, quadratic = torch.tensor([1.0, -2.0, 0.0, 0.0]), torch.tensor([1.0, -2.0, 1.5, 0.0])
    torch.testing.assert_close(expected_gradient(linear, "straight-through", 3.0), exact_gradient(linear, 3.0))
    off = (expected_gradient(quadratic, "straight-through", 3.0) - exact_gradient(quadratic, 3.0)).abs()
    assert (off[X != -3] > 1e-3).all(), "away from pi = 1/2 it is wrong for a quadratic f"


def test_the_printed_algorithm_is_ten_times_too_large_where_gates_begin() -> None:
    """At x = 0, c = 3, and f = 2 B: 0.949 in place of 0.090."""
    f, begins = torch.tensor([0.0, 2.0, 0.0, 0.0]), X == 0
    assert expected_gradient(f, "reinmax-printed", 3.0)[begins].item() == pytest.approx(0.949, abs=5e-4)
    assert expected_gradient(f, "reinmax", 3.0)[begins].item() == pytest.approx(0.0904, abs=5e-4)


def literal_reinmax(x: torch.Tensor, noise: torch.Tensor, bias: float, tau: float, *, printed: bool) -> torch.Tensor:
    """Algorithm 2 line by line, with or without the logit in its fourth."""
    logit = x + bias
    pi0 = torch.sigmoid(logit)
    drawn = (noise < pi0).to(x.dtype)
    pi1 = (drawn + torch.sigmoid(logit / tau)) / 2
    place = torch.log(pi1) if printed else torch.log(pi1) - torch.log1p(-pi1)
    pi1 = torch.sigmoid((place - logit).detach() + logit)
    pi2 = 2 * pi1 - pi0 / 2
    return pi2 - pi2.detach() + drawn


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("printed", [False, True])
def test_the_closed_form_equals_the_algorithm_line_by_line(printed: bool, tau: float) -> None:
    noise = torch.rand(X.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = []
    for draw in (
        lambda x: draw_gates(x, noise, "reinmax-printed" if printed else "reinmax", bias=1.0, temperature=tau),
        lambda x: literal_reinmax(x, noise, 1.0, tau, printed=printed),
    ):
        x = X.clone().requires_grad_()
        gate = draw(x)
        (gate * torch.arange(1.0, 6.0)).sum().backward()
        gradients.append((gate.detach(), x.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("gate", GATES)
def test_gates_are_open_as_often_as_their_logits_say_and_far_logits_stay_finite(gate: str) -> None:
    noise = (torch.arange(20_000) + 0.5) / 20_000
    for x in (-4.0, -3.0, 0.0):
        drawn = draw_gates(torch.full((20_000,), x), noise, gate, bias=3.0)
        assert (drawn > 0.5).float().mean().item() == pytest.approx(1 / (1 + math.exp(-x - 3)), abs=1e-3)
    far = torch.tensor([-500.0, 500.0]).requires_grad_()
    drawn = draw_gates(far, torch.tensor([0.0, 0.5]), gate, bias=0.0)
    drawn.sum().backward()
    assert drawn.tolist() == [0.0, 1.0]
    assert far.grad is not None
    assert torch.isfinite(far.grad).all()


def test_the_soft_gate_passes_gradcheck() -> None:
    noise = torch.rand(X.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: draw_gates(x, noise, "gumbel", bias=1.0, temperature=0.7), X.clone().requires_grad_()
    )
