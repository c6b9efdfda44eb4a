"""The dual functions behind sparse plans: they are concave with the gradient that is claimed, and Newton's method ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difflayers.transport.semismooth import Quadratic, newton, state
from tests.transport.problems import marginal, random_cost


def _problem(k: int | None, count: int = 3, m: int = 5, n: int = 6) -> Quadratic:
    a, b = marginal(count, n), marginal(count, m, seed=1)
    gamma, delta = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64), torch.tensor([0.3, 1.0, 0.1], dtype=torch.float64)
    if k is None:
        return Quadratic(random_cost(count, m, n), a, b, gamma, torch.zeros_like(delta), torch.zeros(count, 1, 1, dtype=torch.float64))
    return Quadratic(random_cost(count, m, n), a, b, gamma, delta, random_cost(count, m, n, seed=3) / n)


def _value(problem: Quadratic, alpha: Tensor, beta: Tensor, k: int | None) -> Tensor:
    now = state(problem, alpha, beta, k)
    conjugate = (now.w.square() * now.share / (problem.gamma[:, None, None] + problem.delta[:, None, None] * now.share)).sum((-1, -2)) / 2
    return (problem.a * alpha).sum(-1) + (problem.b * beta).sum(-1) - conjugate


@pytest.mark.parametrize("k", [None, 1, 2, 4])
def test_the_gradient_is_what_the_marginals_lack(k: int | None) -> None:
    problem = _problem(k)
    alpha, beta = random_cost(3, 6, seed=4), random_cost(3, 5, seed=5) + 0.3
    now = state(problem, alpha, beta, k)
    left, right = random_cost(3, 6, seed=6) - 0.5, random_cost(3, 5, seed=7) - 0.5
    step = 1e-6
    difference = _value(problem, alpha + step * left, beta + step * right, k) - _value(problem, alpha - step * left, beta - step * right, k)
    slope = (now.rows * left).sum(-1) + (now.columns * right).sum(-1)
    torch.testing.assert_close(difference / (2 * step), slope, atol=1e-7, rtol=0)
    assert bool((now.plan >= 0).all())
    if k is not None:
        # All shares are used where more than k entries could be.
        expected = (now.w > 0).sum(-1).clamp(max=k).double()
        torch.testing.assert_close(now.share.sum(-1), expected)


@pytest.mark.parametrize("k", [None, 1, 2, 4])
def test_newton_ends_at_the_maximum(k: int | None) -> None:
    problem = _problem(k)
    start = state(problem, torch.zeros_like(problem.a), torch.ones_like(problem.b), k)
    tol = torch.full((3,), 1e-11, dtype=torch.float64)
    found, steps = newton(problem, start, k, tol, torch.tensor([100, 100, 0]))
    assert bool((found.error()[:2] <= tol[:2]).all())
    assert int(steps[2]) == 0
    assert int(steps.max()) < 60
    torch.testing.assert_close(found.alpha[2], start.alpha[2])
    best = _value(problem, found.alpha, found.beta, k)
    for seed in range(5):
        other = _value(problem, found.alpha + 0.1 * (random_cost(3, 6, seed=seed) - 0.5), found.beta, k)
        assert bool((other[:2] <= best[:2] + 1e-12).all())
