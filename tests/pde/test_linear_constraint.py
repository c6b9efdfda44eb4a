"""The nearest point under linear constraints, in a metric."""

from __future__ import annotations

import cvxpy as cp
import pytest
import torch

from difflayers.errors import InfeasibleError, ShapeError
from difflayers.pde import LinearConstraint, conservation_projection, trapezoid_weights

A = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
b = torch.tensor([1.0, 2.0], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equations_in_every_metric() -> None:
    y, root = normal(7, 4), torch.eye(4, dtype=torch.float64) + 0.2 * normal(4, 4)
    variance = normal(7, 4).exp()
    constraint = LinearConstraint(A, b)
    for u in (constraint(y), constraint(y, variance=variance), constraint(y, root=root)):
        torch.testing.assert_close(u @ A.mT, b.expand(7, 2), rtol=0, atol=1e-12)
    euclidean = conservation_projection(y, torch.ones_like(y), b, A)
    torch.testing.assert_close(constraint(y), euclidean.mean)
    torch.testing.assert_close(constraint(y, variance=variance), conservation_projection(y, variance, b, A).mean)
    full = conservation_projection(y, root @ root.mT, b, A, covariance="full")
    torch.testing.assert_close(constraint(y, root=root), full.mean)


def test_inequalities_against_cvxpy() -> None:
    G, h = -torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    y, variance = 2 * normal(4, seed=3), normal(4, seed=2).exp()
    u = cp.Variable(4)
    distance = cp.sum_squares(cp.multiply(variance.rsqrt().numpy(), u - y.numpy()))
    cp.Problem(cp.Minimize(distance), [A.numpy() @ u == b.numpy(), u >= 0]).solve(solver="CLARABEL")
    found = LinearConstraint(A, b, G, h)(y, variance=variance)
    assert (found < 1e-9).any()
    torch.testing.assert_close(found, torch.from_numpy(u.value), rtol=1e-5, atol=1e-6)


def test_a_profile_that_is_monotone_and_keeps_its_mass() -> None:
    x = torch.linspace(0, 1, 20, dtype=torch.float64)
    G = torch.cat([torch.eye(20, dtype=torch.float64).diff(dim=0), -torch.eye(20, dtype=torch.float64)[-1:]])  # falling, not below zero
    weights = trapezoid_weights(x)
    constraint = LinearConstraint(weights[None], G=G, h=torch.zeros(20, dtype=torch.float64))
    y = (0.6 - x).clamp(min=0) + 0.1 * normal(5, 20)
    u = constraint(y, torch.full((1,), 0.18, dtype=torch.float64))
    torch.testing.assert_close(u @ weights, torch.full((5,), 0.18, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (u.diff() <= 1e-9).all()
    assert (u >= -1e-9).all()


def test_a_low_rank_metric_moves_in_its_range() -> None:
    y, root = normal(4), normal(4, 2, seed=1)
    u = LinearConstraint(A, b)(y, root=root)
    torch.testing.assert_close(A @ u, b)
    assert torch.linalg.matrix_rank(torch.cat([root, (u - y)[:, None]], 1), rtol=1e-10) == 2


def test_a_variable_without_variance_stays() -> None:
    y, variance = normal(4), torch.tensor([1.0, 0.0, 1.0, 2.0], dtype=torch.float64).requires_grad_()
    u = LinearConstraint(A, b)(y, variance=variance)
    assert u[1] == y[1]
    (slope,) = torch.autograd.grad(u.square().sum(), variance)
    assert slope.isfinite().all()
    assert slope[1] == 0


def test_failures() -> None:
    constraint = LinearConstraint(A, b, G=torch.eye(4, dtype=torch.float64), h=torch.full((4,), -1.0, dtype=torch.float64))
    with pytest.raises(InfeasibleError):
        constraint(normal(4))
    with pytest.raises(ValueError, match="neither A nor G"):
        LinearConstraint()
    with pytest.raises(ValueError, match="without its matrix"):
        LinearConstraint(A, b, h=b)
    with pytest.raises(ValueError, match="not both"):
        LinearConstraint(A, b)(normal(4), variance=normal(4).exp(), root=normal(4, 4))
    with pytest.raises(ShapeError, match="b is given neither"):
        LinearConstraint(A)(normal(4))
    with pytest.raises(ShapeError, match=r"\(\*batch, 4\), got \(3,\)"):
        LinearConstraint(A, b)(normal(3))


def test_repr() -> None:
    assert repr(LinearConstraint(A, b)) == "LinearConstraint(A: (2, 4), b: (2,), on_failure='raise')"
