"""The root problem behind the derivatives, against its dense Jacobian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from difflayers.transport import sinkhorn
from difflayers.transport.kept import Kept
from difflayers.transport.laplacian import Laplacian
from difflayers.transport.marginals import Marginals, Options, _is_connected, plan_of
from tests.transport.problems import marginal, random_cost

OPTIONS = Options("auto", 1e-12, None, "raise", 1e-9)


def _point(n: int, m: int) -> tuple[Tensor, ...]:
    """A point that is not a solution."""
    a, b = marginal(n), marginal(m, seed=1)
    x = 0.1 * random_cost(n + m, seed=2)
    return x, random_cost(n, m), a, b, torch.tensor(0.3, dtype=torch.float64), torch.tensor(True)


@pytest.mark.parametrize(("n", "m"), [(4, 3), (3, 4), (1, 3), (2, 2)])
def test_operator_and_solve(n: int, m: int) -> None:
    x, *theta = _point(n, m)
    problem = Marginals(0, OPTIONS)
    dense = jacrev(lambda z: problem.residual(z, *theta))(x)
    torch.testing.assert_close(dense, dense.mT)
    u = random_cost(n + m, seed=3)
    for transpose in (False, True):
        torch.testing.assert_close(problem.operator((x, *theta), transpose)(u), dense @ u)
    found = problem.solve_linear((x, *theta), dense @ u, False, False)
    torch.testing.assert_close(dense @ found.x, dense @ u)
    assert float(found.residual) <= 1e-13
    columns = problem.solve_linear((x, *theta), torch.stack([dense @ u, 0 * u, 2 * dense @ u]), True, True)
    torch.testing.assert_close(columns.x, torch.stack([found.x, 0 * u, 2 * found.x]))


def test_pullback_is_that_of_the_residual() -> None:
    x, *theta = _point(3, 4)
    problem, u = Marginals(0, OPTIONS), random_cost(7, seed=4)
    leaves = [part.clone().requires_grad_() for part in theta[:4]]
    exact = torch.autograd.grad(problem.residual(x, *leaves, theta[4]), leaves, u)
    for value, true in zip(problem.pullback(x, theta, range(4), u), exact, strict=True):
        torch.testing.assert_close(value, true)


def test_the_plan_is_zero_where_a_marginal_is() -> None:
    a, b = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5, 0.0])
    plan = plan_of(torch.zeros(5), torch.zeros(2, 3), a, b, torch.tensor(0.1))
    assert torch.equal(plan, torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("epsilon", [0.3, 1e-4])
def test_conjugate_gradients_and_the_factorization_agree(epsilon: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # At the lower temperature the plan falls apart, conjugate gradients give up, and the factorization takes over.
    cost, a = random_cost(2, 30, 20).requires_grad_(), marginal(30).requires_grad_()
    weights = random_cost(30, 20, seed=5)
    slopes = []
    for limit in (10**9, 1):
        monkeypatch.setattr("difflayers.transport.marginals._ITERATED_FROM", limit)
        plan = sinkhorn(cost, a, epsilon=epsilon, tol=1e-13).plan
        slopes.append(torch.autograd.grad((weights * plan).sum(), (cost, a)))
    torch.testing.assert_close(slopes[0][0], slopes[1][0], rtol=1e-6, atol=1e-9 * float(slopes[0][0].abs().max()))
    torch.testing.assert_close(slopes[0][1], slopes[1][1], rtol=1e-8, atol=1e-10)


def test_a_large_sparse_plan_and_the_factorization_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, a, b = random_cost(320, 300).requires_grad_(), marginal(320).requires_grad_(), marginal(300, seed=1).requires_grad_()
    weights = random_cost(320, 300, seed=5)
    slopes, factorized = [], []
    right = Laplacian.refined
    monkeypatch.setattr(Laplacian, "refined", lambda *args: factorized.append(1) or right(*args))
    for limit in (300, 10**9):
        monkeypatch.setattr("difflayers.transport.marginals._ITERATED_FROM", limit)
        plan = sinkhorn(cost, a, b, epsilon=3e-3, tol=1e-13).plan
        slopes.append(torch.autograd.grad((weights * plan).sum(), (cost, a, b)))
        assert len(factorized) == (limit > 300)
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9 * float(other.abs().max()))


def test_groups_that_hardly_exchange_mass_are_seen() -> None:
    P = torch.block_diag(random_cost(6, 5) + 0.1, random_cost(5, 6, seed=1) + 0.1)
    for link, connected in ((1e-3, True), (1e-7, False)):
        P[0, 7] = link
        assert _is_connected(Kept(P, 1e-12), P.sum(1), P.sum(0)) == connected
    # Lines and columns without mass do not count.
    P = torch.nn.functional.pad(random_cost(4, 3), (1, 0, 1, 0))
    assert _is_connected(Kept(P, 1e-12), P.sum(1), P.sum(0))
