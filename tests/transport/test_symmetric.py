"""Clouds that are moved onto themselves: the same potentials as by other methods, in few sweeps; and what is left to those."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from difflayers.transport import sinkhorn, sinkhorn_divergence
from tests.transport.problems import marginal, random_cost


def self_cost(n: int, seed: int = 0) -> Tensor:
    points = random_cost(n, 2, seed=seed)
    cost = torch.cdist(points, points).square()
    return (cost + cost.mT) / 2


@settings(max_examples=15)
@given(st.integers(1, 12), st.floats(-4, 1), st.integers(0, 10_000))
def test_one_potential_in_few_sweeps(n: int, log_epsilon: float, seed: int) -> None:
    cost, a, epsilon = self_cost(n, seed), marginal(n, seed=seed), 10**log_epsilon
    found, other = (sinkhorn(cost, a, a, epsilon=epsilon, method=method) for method in ("auto", "newton"))
    assert int(found.iterations) <= 60
    assert float(found.marginal_error) <= 1e-9
    torch.testing.assert_close(found.f, found.g, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.plan, other.plan, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.dual_value, other.dual_value, rtol=0, atol=1e-9)


def test_zero_marginals() -> None:
    a = torch.tensor([0.4, 0.0, 0.6], dtype=torch.float64)
    found = sinkhorn(self_cost(3), a, a, epsilon=0.1)
    rest = sinkhorn(self_cost(3)[[0, 2]][:, [0, 2]], a[[0, 2]], a[[0, 2]], epsilon=0.1)
    assert found.f[1] == -torch.inf
    torch.testing.assert_close(found.plan[[0, 2]][:, [0, 2]], rest.plan)
    assert not found.plan[1].any()


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01])
def test_a_kernel_that_is_not_positive_is_left_to_others(epsilon: float) -> None:
    """Staying is dear: the plan is a permutation nearly, and means would swing to and fro."""
    cost, a = 1 - self_cost(6), marginal(6)
    found = sinkhorn(cost, a, a, epsilon=epsilon)
    torch.testing.assert_close(found.plan, sinkhorn(cost, a, a, epsilon=epsilon, method="newton").plan, rtol=0, atol=1e-9)
    assert float(found.marginal_error) <= 1e-9


def test_symmetric_and_other_problems_in_one_batch() -> None:
    cost = torch.stack([self_cost(5), random_cost(5, 5), 1 - self_cost(5, 1), self_cost(5, 2)])
    found = sinkhorn(cost, epsilon=0.02)
    for part, plan, iterations in zip(cost, found.plan, found.iterations, strict=True):
        alone = sinkhorn(part, epsilon=0.02)
        torch.testing.assert_close(plan, alone.plan, rtol=0, atol=1e-13)
        assert iterations == alone.iterations


def test_gradients() -> None:
    cost, a = self_cost(3).requires_grad_(), marginal(3).requires_grad_()

    def value(cost: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        found = sinkhorn(cost, a / a.sum(), a / a.sum(), epsilon=0.3, tol=1e-14)
        return found.plan, found.dual_value

    assert torch.autograd.gradcheck(value, (cost, a), check_forward_ad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_divergence_takes_it(dtype: torch.dtype) -> None:
    x = random_cost(40, 3).to(dtype)
    found = sinkhorn_divergence(x, x.clone(), epsilon=1e-3)
    assert int(found.iterations) <= 200
    assert abs(float(found.value)) <= (1e-9 if dtype == torch.float64 else 1e-5)
