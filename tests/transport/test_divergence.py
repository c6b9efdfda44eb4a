"""The Sinkhorn divergence and the Monge gap: what must be zero, signs, limits, gradients, failures."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from difflayers.errors import InfeasibleError, ShapeError
from difflayers.solution import Status
from difflayers.transport import monge_gap, sinkhorn_divergence
from tests.transport.problems import marginal, plain_sweeps, random_cost


@settings(max_examples=10)
@given(st.integers(1, 8), st.integers(1, 8), st.floats(-3, 1), st.integers(0, 10_000))
def test_zero_for_equal_clouds_and_never_negative(n: int, m: int, log_epsilon: float, seed: int) -> None:
    x, y, epsilon = random_cost(n, 2, seed=seed), random_cost(m, 2, seed=seed + 1), 10**log_epsilon
    a, b = marginal(n, seed=seed), marginal(m, seed=seed)
    assert abs(float(sinkhorn_divergence(x, x, a, a, epsilon=epsilon).value)) <= 1e-10
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert abs(float(sinkhorn_divergence(x, x[order], a, a[order], epsilon=epsilon).value)) <= 1e-9
    forth, back = (sinkhorn_divergence(*clouds, epsilon=epsilon).value for clouds in ((x, y, a, b), (y, x, b, a)))
    assert float(forth) >= -1e-9
    torch.testing.assert_close(forth, back, rtol=0, atol=1e-9)


@pytest.mark.parametrize("epsilon", [1.0, 1e-3])
def test_a_translation_costs_its_square(epsilon: float) -> None:
    x, shift = random_cost(20, 3), torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    value = sinkhorn_divergence(x, x + shift, epsilon=epsilon).value
    torch.testing.assert_close(value, (shift**2).sum(), rtol=0, atol=1e-10)


def test_a_high_temperature_compares_means() -> None:
    x, y = random_cost(10, 2), 2 * random_cost(12, 2, seed=1)
    value = sinkhorn_divergence(x, y, epsilon=1e4).value
    torch.testing.assert_close(value, ((x.mean(0) - y.mean(0)) ** 2).sum(), rtol=1e-3, atol=0)


def test_against_plain_sweeps() -> None:
    x, y = random_cost(15, 2), random_cost(12, 2, seed=1)

    def transport(x: Tensor, y: Tensor) -> Tensor:
        """⟨P, C⟩ + ε KL(P | a ⊗ b)."""
        cost, (a, b) = torch.cdist(x, y) ** 2, (x.new_full((len(side),), 1 / len(side)) for side in (x, y))
        f, g = plain_sweeps(cost, a, b, 0.1, 1000)
        P = torch.exp((f.unsqueeze(-1) + g - cost) / 0.1)
        return (P * cost).sum() + 0.1 * (P * (P * len(x) * len(y)).log()).sum()

    exact = transport(x, y) - (transport(x, x) + transport(y, y)) / 2
    torch.testing.assert_close(sinkhorn_divergence(x, y, epsilon=0.1).value, exact, rtol=0, atol=1e-11)


def test_gradients_and_batches() -> None:
    x, y, logits = random_cost(2, 4, 2).requires_grad_(), random_cost(3, 2, seed=1).requires_grad_(), random_cost(4).requires_grad_()

    def value(x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, logits.softmax(-1), epsilon=0.1, tol=1e-14).value

    assert torch.autograd.gradcheck(value, (x, y, logits), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(value, (x, y, logits), fast_mode=True)
    loop = torch.stack([value(part, y, logits) for part in x])
    torch.testing.assert_close(value(x, y, logits), loop)
    torch.testing.assert_close(vmap(value, (0, None, None))(x, y, logits), loop)


def test_another_cost() -> None:
    x, y = random_cost(5, 1), random_cost(5, 1, seed=1)
    found = sinkhorn_divergence(x, y, epsilon=1e-4, cost=lambda p, q: (p - q.mT).abs())
    exact = (x.sort(0).values - y.sort(0).values).abs().mean()
    torch.testing.assert_close(found.value, exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("epsilon", [0.5, 0.1, 0.02])
def test_monge_gap(epsilon: float) -> None:
    x = random_cost(30, 2) - 0.5
    convex = torch.tensor([[2.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    rotation = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    gaps = [float(monge_gap(x, x @ A, epsilon=epsilon).value) for A in (convex, rotation)]
    assert 0 <= gaps[0] <= epsilon * math.log(30)
    assert gaps[1] >= 0
    if epsilon == 0.02:
        assert gaps[1] > 10 * gaps[0]
        assert float(monge_gap(x, x @ convex, epsilon=1e-4).value) <= 1e-4
    # The identity costs nothing, and but points at one place can be sent anywhere among them.
    torch.testing.assert_close(monge_gap(0 * x, 0 * x, epsilon=epsilon).value, torch.tensor(epsilon * math.log(30), dtype=torch.float64))
    leaf = (x @ rotation).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: monge_gap(x[:5], y, epsilon=epsilon, tol=1e-14).value, leaf[:5].detach().requires_grad_())


def test_failures() -> None:
    x, a = random_cost(2, 4, 2), marginal(2, 4)
    with pytest.raises(InfeasibleError):
        sinkhorn_divergence(x, x, a, 2 * a, epsilon=0.1)
    spoiled = x.clone()
    spoiled[1] = torch.nan
    found = sinkhorn_divergence(x, spoiled, epsilon=0.1, on_failure="nan")
    assert found.status.tolist() == [Status.SOLVED, Status.NUMERICAL_ERROR]
    assert found.value.isnan().tolist() == [False, True]
    assert found.value.shape == found.marginal_error.shape == found.iterations.shape
    for wrong in (x[0, 0], x.long(), x[..., :1], x.float(), 3.0):
        with pytest.raises(ShapeError):
            sinkhorn_divergence(x, wrong, epsilon=0.1)
    with pytest.raises(ShapeError, match="a point for each of x"):
        monge_gap(x, x[:, :3], epsilon=0.1)
