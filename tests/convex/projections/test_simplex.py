"""The simplex and its relatives: against a quadratic program, at corners, for numbers of any size."""

from __future__ import annotations

import pytest
import torch

from difflayers.convex import solve_qp
from difflayers.convex.projections import projection_l1_ball, projection_l1_sphere, projection_simplex
from difflayers.errors import InfeasibleError, ShapeError
from tests.convex.projections.checks import rows


def test_against_a_quadratic_program() -> None:
    x = rows(20, 7, seed=0).requires_grad_()
    r = torch.linspace(0.1, 5, 20, dtype=torch.float64, requires_grad=True)
    eye, ones = torch.eye(7, dtype=torch.float64), torch.ones(1, 7, dtype=torch.float64)
    exact = solve_qp(eye, -x, A=ones, b=r.unsqueeze(-1), lb=torch.zeros(7, dtype=torch.float64)).x
    p = projection_simplex(x, r)
    torch.testing.assert_close(p, exact, rtol=0, atol=1e-12)
    weights = rows(20, 7, seed=1)
    for ours, theirs in zip(
        torch.autograd.grad((p * weights).sum(), (x, r)), torch.autograd.grad((exact * weights).sum(), (x, r)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("r", [1e-6, 1.0, 1e3])
def test_sums_are_exact(scale: float, r: float) -> None:
    p = projection_simplex(scale * rows(50, 30, seed=2), r)
    assert (p >= 0).all()
    # x itself has no more digits than this.
    assert ((p.sum(-1) - r).abs() <= 1e-14 * max(r, 1) + 1e-15 * scale * (r < scale)).all()


def test_no_radius_gives_zero() -> None:
    x = rows(3, 4, seed=3).requires_grad_()
    for project in (projection_simplex, projection_l1_ball, projection_l1_sphere):
        p = project(x, 0.0)
        assert not p.any()
        assert torch.isfinite(torch.autograd.grad(p.sum(), x)[0]).all()


def test_masked_logits() -> None:
    x = torch.tensor([[0.3, -torch.inf, 0.1]], requires_grad=True)
    p = projection_simplex(x)
    torch.testing.assert_close(p, torch.tensor([[0.6, 0.0, 0.4]]))
    p[0, 0].backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.5, 0.0, -0.5]]))


def test_a_broken_radius_stays_alone() -> None:
    r = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    for project in (projection_simplex, projection_l1_ball, projection_l1_sphere):
        p = project(rows(2, 3, seed=5), r)
        assert p[1].isnan().all()
        assert torch.isfinite(p[0]).all()


def test_ties_share() -> None:
    p = projection_simplex(torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(p, torch.full((5,), 0.2, dtype=torch.float64))
    corner = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    jacobian = torch.func.jacrev(projection_simplex)(corner)
    torch.testing.assert_close(jacobian, torch.eye(3, dtype=torch.float64) - 1 / 3)


def test_the_sphere_from_inside_and_outside() -> None:
    x = rows(40, 5, seed=4)
    for r in (0.1, 10.0):
        p = projection_l1_sphere(x, r)
        torch.testing.assert_close(p.abs().sum(-1), torch.full((40,), r, dtype=torch.float64))
        assert ((p * x) >= 0).all()
    assert projection_l1_sphere(torch.zeros(2), 1.0).tolist() == [0.5, 0.5]


def test_radii_of_a_batch_and_refusals() -> None:
    x = torch.tensor([1.0, 2.0])
    assert projection_simplex(x, torch.tensor([1.0, 5.0])).tolist() == [[0.0, 1.0], [2.0, 3.0]]
    with pytest.raises(InfeasibleError) as caught:
        projection_simplex(x, torch.tensor([1.0, -5.0]))
    assert caught.value.indices == [(1,)]
    with pytest.raises(ValueError, match="negative"):
        projection_simplex(x, -1.0)
    with pytest.raises(ShapeError, match="at least 1"):
        projection_simplex(torch.zeros(3, 0))
