"""Balls, spheres, boxes and half-spaces where a formula has its corners."""

from __future__ import annotations

import pytest
import torch

from difflayers.convex.projections import (
    projection_box,
    projection_halfspace,
    projection_hyperplane,
    projection_l2_ball,
    projection_l2_sphere,
    projection_linf_ball,
)
from difflayers.errors import ConvergenceWarning, InfeasibleError, ShapeError
from tests.convex.projections.checks import rows


def test_infinite_bounds_are_none() -> None:
    x = torch.tensor([-5.0, 5.0])
    assert torch.equal(projection_box(x, (-torch.inf, torch.tensor([0.0, torch.inf]))), x)


def test_a_broken_parameter_is_no_parameter() -> None:
    x, nan = rows(3, 2, seed=1), torch.tensor([1.0, torch.nan, 1.0], dtype=torch.float64)
    a = torch.ones(2, dtype=torch.float64)
    for p in (
        projection_box(x, (-nan.unsqueeze(-1).expand(3, 2), 1.0)),
        projection_linf_ball(x, nan),
        projection_l2_ball(x, nan),
        projection_l2_sphere(x, nan),
        projection_hyperplane(x, (a, nan)),
        projection_halfspace(x, (a, nan)),
    ):
        assert p[1].isnan().all()
        assert torch.isfinite(p[[0, 2]]).all()


def test_a_shared_bound_gets_the_sum() -> None:
    x = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    upper = torch.ones(2, requires_grad=True)
    projection_box(x, (-1.0, upper)).sum().backward()
    assert torch.equal(upper.grad, torch.tensor([2.0, 1.0]))


def test_crossed_bounds_stay_alone() -> None:
    lower = torch.tensor([[0.0, 0.0], [0.0, 3.0]], requires_grad=True)
    with pytest.raises(InfeasibleError) as caught:
        projection_box(torch.ones(2, 2), (lower, 1.0))
    assert caught.value.indices == [(1,)]
    p = projection_box(torch.full((2, 2), -1.0), (lower, 1.0), on_failure="nan")
    assert p[1].isnan().all()
    p.nan_to_num().sum().backward()
    assert torch.equal(lower.grad, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    with pytest.warns(ConvergenceWarning):
        projection_box(torch.ones(2, 2), (lower, 1.0), on_failure="warn")


def test_the_centre_of_the_sphere() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    p = projection_l2_sphere(x, 3.0)
    torch.testing.assert_close(p, torch.full((2, 4), 1.5))
    p.sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 4))


@pytest.mark.parametrize("scale", [1e-200, 1e-8, 1e8, 1e200])
def test_norms_do_not_overflow(scale: float) -> None:
    x = scale * rows(5, 3, seed=0)
    exact = x / scale / torch.linalg.vector_norm(x / scale, dim=-1, keepdim=True)
    torch.testing.assert_close(projection_l2_sphere(x), exact, rtol=0, atol=1e-15)
    if scale > 1:
        torch.testing.assert_close(projection_l2_ball(x), exact, rtol=0, atol=1e-15)


def test_radii_of_a_batch() -> None:
    x = torch.tensor([3.0, 4.0])
    radii = torch.tensor([1.0, 10.0, 0.0], requires_grad=True)
    p = projection_l2_ball(x, radii)
    torch.testing.assert_close(p, torch.tensor([[0.6, 0.8], [3.0, 4.0], [0.0, 0.0]]))
    p.sum().backward()
    torch.testing.assert_close(radii.grad, torch.tensor([1.4, 0.0, 1.4]))


def test_a_hyperplane_without_a_normal() -> None:
    x, zero = torch.ones(2), torch.zeros(2)
    assert torch.equal(projection_hyperplane(x, (zero, 0.0)), x)
    assert torch.equal(projection_halfspace(x, (zero, 1.0)), x)
    for project, offset in ((projection_hyperplane, 1.0), (projection_halfspace, -1.0)):
        with pytest.raises(InfeasibleError):
            project(x, (zero, offset))


def test_refusals() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="negative"):
        projection_l2_ball(x, -1.0)
    with pytest.raises(InfeasibleError):
        projection_linf_ball(x, torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="on_failure"):
        projection_linf_ball(x, 1.0, on_failure="ignore")
    with pytest.raises(ShapeError, match="max_value"):
        projection_l2_ball(x, torch.ones(3))
    with pytest.raises(ShapeError, match="lower"):
        projection_box(x, (torch.zeros(2), 1.0))
    with pytest.raises(ShapeError, match="float64"):
        projection_box(x, (torch.zeros(3, dtype=torch.float64), 1.0))
    with pytest.raises(ShapeError, match="broadcast"):
        projection_hyperplane(x, (torch.ones(4, 3), 1.0))
