"""The relaxed problem behind plans with k nonzeros a column: its value is that of CVXPY, and the gap proves it."""

from __future__ import annotations

import cvxpy
import pytest
import torch

from difflayers.transport.quadratic import quadratic_plan, sparse_plan
from tests.transport.problems import marginal, random_cost


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_relaxation_against_cvxpy(k: int) -> None:
    n, m, gamma = 6, 5, 1.5
    X, a, b = random_cost(1, m, n), marginal(1, n), marginal(1, m, seed=1)
    found = sparse_plan(X, a, b, torch.tensor([gamma], dtype=torch.float64), k, torch.tensor([1e-10], dtype=torch.float64), 300)
    assert bool(found.optimal)
    excess = found.alpha.unsqueeze(-2) + found.beta.unsqueeze(-1) - X
    best = excess.clamp(min=0).topk(k, -1).values.square().sum() / (2 * gamma)
    value = (a * found.alpha).sum() + (b * found.beta).sum() - best
    T, U = cvxpy.Variable((m, n), nonneg=True), cvxpy.Variable((m, n), nonneg=True)
    squares = sum(cvxpy.quad_over_lin(T[j, i], U[j, i]) for j in range(m) for i in range(n))
    constraints = [cvxpy.sum(T, axis=0) == a[0].numpy(), cvxpy.sum(T, axis=1) == b[0].numpy(), U <= 1, cvxpy.sum(U, axis=1) <= k]
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum(cvxpy.multiply(T, X[0].numpy())) + gamma / 2 * squares), constraints)
    problem.solve(solver=cvxpy.CLARABEL)
    assert float(value) == pytest.approx(problem.value, abs=1e-6)
    # The weighted entries of the relaxed plan meet both marginals.
    relaxed = found.share * excess.clamp(min=0) / gamma
    torch.testing.assert_close(relaxed.sum(-2), a, atol=1e-7, rtol=0)
    torch.testing.assert_close(relaxed.sum(-1), b, atol=1e-7, rtol=0)


def test_small_and_large_gamma_in_one_batch() -> None:
    X, a, b = random_cost(1, 20, 15).expand(3, -1, -1), marginal(1, 15).expand(3, -1), marginal(1, 20, seed=1).expand(3, -1)
    gamma = torch.tensor([1e-5, 1.0, 1e4], dtype=torch.float64)
    found = quadratic_plan(X, a, b, gamma, torch.full((3,), 1e-9, dtype=torch.float64), 200)
    plan = torch.where(found.support, found.alpha.unsqueeze(-2) + found.beta.unsqueeze(-1) - X, 0) / gamma[:, None, None]
    torch.testing.assert_close(plan.sum(-2), a, atol=1e-9, rtol=0)
    torch.testing.assert_close(plan.sum(-1), b, atol=1e-9, rtol=0)
    # A plan of the linear program has at most n + m − 1 entries.
    assert int(found.support[0].sum()) <= 34
    assert bool(found.support[2].all())
