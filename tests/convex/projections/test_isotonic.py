"""Isotonic regression: against SciPy and the quadratic program, weighted, decreasing, blocks in the derivative."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import isotonic_regression
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacrev

from difflayers.convex import solve_qp
from difflayers.convex.projections import projection_isotonic
from difflayers.errors import ShapeError
from tests.convex.projections.checks import rows


@pytest.mark.parametrize("increasing", [True, False])
def test_against_scipy(increasing: bool) -> None:
    x, w = rows(6, 30, seed=0).cumsum(-1), rows(6, 30, seed=1).exp()
    exact = [isotonic_regression(r.numpy(), weights=v.numpy(), increasing=increasing).x for r, v in zip(x, w, strict=True)]
    found = projection_isotonic(x, w, increasing=increasing)
    torch.testing.assert_close(found, torch.stack([torch.from_numpy(row.copy()) for row in exact]), rtol=0, atol=1e-13)


def test_against_a_quadratic_program() -> None:
    x = rows(5, 6, seed=2)
    differences = torch.eye(5, 6, dtype=torch.float64) - torch.eye(5, 6, dtype=torch.float64).roll(1, -1)
    exact = solve_qp(torch.eye(6, dtype=torch.float64), -x, G=differences, h=torch.zeros(5, dtype=torch.float64)).x
    torch.testing.assert_close(projection_isotonic(x), exact, rtol=0, atol=1e-10)


def test_the_jacobian_averages_over_blocks() -> None:
    x = torch.tensor([0.0, 3.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    averages = torch.block_diag(torch.ones(1, 1), torch.full((3, 3), 1 / 3), torch.ones(1, 1)).double()
    torch.testing.assert_close(jacrev(projection_isotonic)(x), averages, rtol=0, atol=1e-7)


def test_gradients_with_shared_weights() -> None:
    x, w = rows(3, 6, seed=3).requires_grad_(), rows(6, seed=4).exp().requires_grad_()
    assert gradcheck(projection_isotonic, (x, w), check_forward_ad=True)
    assert gradgradcheck(projection_isotonic, (x, w), check_fwd_over_rev=True)


def test_large_levels_keep_their_digits() -> None:
    x = torch.tensor([1e8 + 2, 1e8 + 1, 1e8 + 3], dtype=torch.float64)
    assert projection_isotonic(x).tolist() == [1e8 + 1.5, 1e8 + 1.5, 1e8 + 3]


def test_broken_rows_and_edges() -> None:
    x = rows(3, 4, seed=5)
    w = torch.ones(3, 4, dtype=torch.float64)
    w[1, 0] = -1
    p = projection_isotonic(x, w)
    assert p[1].isnan().all()
    assert torch.isfinite(p[[0, 2]]).all()
    assert projection_isotonic(x[:, :0]).shape == (3, 0)
    assert projection_isotonic(x[:0]).shape == (0, 4)
    assert torch.equal(projection_isotonic(x[:, :1]), x[:, :1])
    with pytest.raises(ShapeError, match="weights"):
        projection_isotonic(x, torch.ones(3, dtype=torch.float64))
