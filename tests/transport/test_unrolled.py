"""Autograd through the sweeps: the same numbers where it converges, the same failures, much more memory."""

from __future__ import annotations

import pytest
import torch

from difflayers.errors import InfeasibleError, NotConvergedError
from difflayers.transport import sinkhorn
from tests.transport.problems import marginal, random_cost


def test_same_values_and_gradients() -> None:
    cost, a, b = random_cost(2, 5, 4).requires_grad_(), marginal(2, 5).requires_grad_(), marginal(4, seed=1)
    weights = random_cost(5, 4, seed=2)
    results = []
    for backward in ("implicit", "unroll"):
        found = sinkhorn(cost, a, b, epsilon=0.2, backward=backward, tol=1e-14)
        slopes = torch.autograd.grad((weights * found.plan).sum() + found.value.sum() + found.f[0, 0] - found.f[0, 1], (cost, a))
        results.append((found.plan, found.f, found.value, found.dual_value, slopes[0], slopes[1] - slopes[1].mean(-1, keepdim=True)))
    for implicit, unrolled in zip(*results, strict=True):
        torch.testing.assert_close(implicit, unrolled, rtol=1e-9, atol=1e-10)


def test_zero_marginals() -> None:
    cost = random_cost(3, 3).requires_grad_()
    a = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    found = sinkhorn(cost, a, a, epsilon=0.2, backward="unroll")
    assert not found.plan[1].any()
    assert all(bool(torch.isfinite(part).all()) for part in torch.autograd.grad((found.plan**2).sum(), (cost, a)))


def test_failures() -> None:
    cost = random_cost(20, 20)
    with pytest.raises(NotConvergedError):
        sinkhorn(cost, epsilon=1e-3, backward="unroll", max_iter=5)
    with pytest.raises(InfeasibleError):
        sinkhorn(cost, torch.ones(20, dtype=torch.float64), backward="unroll")
    assert sinkhorn(cost * torch.nan, backward="unroll", on_failure="nan").plan.isnan().all()
