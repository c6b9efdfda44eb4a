"""Total variation of images: values, certificates, derivatives on flat regions, warm starts and failures."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from difflayers.errors import ConvergenceWarning, NotConvergedError, ShapeError
from difflayers.prox.operators import prox_tv1d, prox_tv2d, solve_tv2d
from difflayers.prox.operators.split_bregman import differences, differences_adjoint, duality_gap
from difflayers.solution import Status

NORMS = ("isotropic", "anisotropic")


def square(seed: int, *batch: int, height: int = 12, width: int = 12, noise: float = 0.1) -> Tensor:
    x = torch.zeros(height, width, dtype=torch.float64)
    x[height // 4 : -height // 4, width // 4 : -width // 4] = 1
    g = torch.Generator().manual_seed(seed)
    return x + noise * torch.randn(*batch, height, width, generator=g, dtype=torch.float64)


def by_cvxpy(x: Tensor, w: Tensor, norm: str) -> Tensor:
    height, width = x.shape
    u = cp.Variable((height, width))
    across = cp.hstack([cp.diff(u, axis=1), np.zeros((height, 1))])
    down = cp.vstack([cp.diff(u, axis=0), np.zeros((1, width))])
    pairs = cp.vstack([cp.vec(across, order="C"), cp.vec(down, order="C")])
    total = cp.sum(cp.multiply(w.flatten().numpy(), cp.norm(pairs, 2 if norm == "isotropic" else 1, axis=0)))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(u - x.numpy()) / 2 + total))
    problem.solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return torch.as_tensor(u.value)


@pytest.mark.parametrize("norm", NORMS)
def test_value_against_cvxpy(norm: str) -> None:
    x = square(0)
    g = torch.Generator().manual_seed(1)
    weights = 0.5 + torch.rand(12, 12, generator=g, dtype=torch.float64)
    u = prox_tv2d(x, 0.15, weights, norm=norm, tol=1e-8, polish=True)
    torch.testing.assert_close(u, by_cvxpy(x, 0.15 * weights, norm), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_unpolished_is_as_near_as_the_gap_says(norm: str) -> None:
    x = square(2)
    coarse, fine = solve_tv2d(x, 0.15, norm=norm, tol=1e-4), solve_tv2d(x, 0.15, norm=norm, tol=1e-9, polish=True)
    d = differences(fine.u)
    total = (d.square().sum(0).sqrt() if norm == "isotropic" else d.abs()).sum()
    energy = (fine.u - x).square().sum() / 2 + 0.15 * total
    assert coarse.residual <= 1e-4
    assert (coarse.u - fine.u).square().sum() <= 2.1e-4 * energy


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 0.5), st.sampled_from(NORMS))
def test_properties_of_a_proximal_operator(seed: int, lam: float, norm: str) -> None:
    x, y = square(seed, height=5, width=7), square(seed + 1, height=5, width=7)
    u, v = (prox_tv2d(image, lam, norm=norm, tol=1e-7, polish=True) for image in (x, y))
    difference = (u - v).flatten()
    assert difference @ difference <= difference @ (x - y).flatten() + 1e-6  # firmly nonexpansive
    torch.testing.assert_close(u.mean(), x.mean())
    torch.testing.assert_close(prox_tv2d(3 - 2 * x, 2 * lam, norm=norm, tol=1e-7, polish=True), 3 - 2 * u, rtol=0, atol=1e-3)
    if norm == "anisotropic":
        torch.testing.assert_close(prox_tv2d(x.flip(0).mT, lam, norm=norm, tol=1e-7), u.flip(0).mT, rtol=0, atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_one_row_or_column_is_a_sequence(norm: str) -> None:
    x = square(3, height=8)[4]
    exact = prox_tv1d(x, 0.2)
    torch.testing.assert_close(prox_tv2d(x[None], 0.2, norm=norm, tol=1e-9, polish=True)[0], exact)
    torch.testing.assert_close(prox_tv2d(x[:, None], 0.2, norm=norm, tol=1e-9, polish=True)[:, 0], exact)
    assert prox_tv2d(x[:1, None], 0.2, norm=norm).shape == (1, 1)


@pytest.mark.parametrize("norm", NORMS)
def test_derivatives(norm: str) -> None:
    x = square(4, height=4, width=5).requires_grad_()
    lam = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    weights = (1 + 0.2 * torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()

    def prox(x: Tensor, lam: Tensor, weights: Tensor) -> Tensor:
        return prox_tv2d(x, lam, weights, norm=norm)

    assert gradcheck(prox, (x, lam, weights), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(prox, (x, lam, weights), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("norm", NORMS)
def test_derivative_in_lambda_against_differences_of_solutions(norm: str) -> None:
    x = square(5)
    lam = torch.tensor(0.15, dtype=torch.float64, requires_grad=True)
    goal = square(0, noise=0)
    (slope,) = torch.autograd.grad((prox_tv2d(x, lam, norm=norm) - goal).square().sum(), lam)
    ends = [(prox_tv2d(x, 0.15 + h, norm=norm, tol=1e-10, polish=True) - goal).square().sum() for h in (1e-6, -1e-6)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)


def test_batches_share_and_stop_alone() -> None:
    x = square(6, 2, 3, height=8, width=6)
    lam = torch.tensor([0.05, 0.1, 0.4], dtype=torch.float64)
    whole = solve_tv2d(x, lam)
    for i in range(2):
        for j in range(3):
            alone = solve_tv2d(x[i, j], lam[j])
            assert torch.equal(whole.iterations[i, j], alone.iterations)
            torch.testing.assert_close(whole.u[i, j], alone.u, rtol=0, atol=1e-12)
    assert len(set(whole.iterations.flatten().tolist())) > 1
    assert solve_tv2d(x[:0], lam).u.shape == (0, 3, 8, 6)


@pytest.mark.parametrize("norm", NORMS)
def test_certificate_is_a_feasible_dual(norm: str) -> None:
    x = square(7)
    found = solve_tv2d(x, 0.2, norm=norm)
    size = found.dual.square().sum(0).sqrt() if norm == "isotropic" else found.dual.abs()
    assert size.max() <= 0.2 * (1 + 1e-12)
    middle = x.mean()
    gap = duality_gap(found.u - middle, found.dual, x - middle, torch.full((1, 12, 12), 0.2).double(), norm == "isotropic")
    torch.testing.assert_close(gap, found.residual)


def test_transpose() -> None:
    g = torch.Generator().manual_seed(0)
    u, z = torch.randn(3, 4, 5, generator=g), torch.randn(3, 2, 4, 5, generator=g)
    torch.testing.assert_close((differences(u) * z).sum(), (u * differences_adjoint(z)).sum())


def test_warm_start() -> None:
    x = square(8)
    first = solve_tv2d(x, 0.2, tol=1e-8)
    again = solve_tv2d(x, 0.2, tol=1e-8, warm_start=first)
    assert again.iterations < first.iterations
    torch.testing.assert_close(again.u, first.u, rtol=0, atol=1e-3)
    with pytest.raises(ShapeError, match="warm_start"):
        solve_tv2d(x[:5], 0.2, warm_start=first)


@pytest.mark.parametrize("norm", NORMS)
def test_the_ends_of_the_range_of_lambda(norm: str) -> None:
    x = square(9).requires_grad_()
    u = prox_tv2d(x, 0.0, norm=norm)
    torch.testing.assert_close(u, x)
    u = prox_tv2d(x, 100.0, norm=norm)
    torch.testing.assert_close(u, x.mean().expand(12, 12))
    (slope,) = torch.autograd.grad(u[0, 0], x)
    torch.testing.assert_close(slope, torch.full_like(x, 1 / 144))
    assert torch.equal(prox_tv2d(torch.ones(4, 4), 0.3, norm=norm), torch.ones(4, 4))


def test_failures_are_told_apart() -> None:
    x = square(10, 3)
    x[1, 2, 2] = torch.nan
    lam = torch.tensor([0.2, 0.2, -0.1], dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotConvergedError) as failure:
        prox_tv2d(x, lam)
    assert failure.value.indices == [(1,), (2,)]
    x.requires_grad_()
    found = solve_tv2d(x, lam, on_failure="nan")
    assert found.status.tolist() == [Status.SOLVED, Status.NUMERICAL_ERROR, Status.NUMERICAL_ERROR]
    assert torch.isnan(found.u).flatten(1).all(1).tolist() == [False, True, True]
    for slope in torch.autograd.grad(found.u[0].square().sum(), (x, lam)):
        assert torch.isfinite(slope).all()
    with pytest.raises(NotConvergedError, match="MAX_ITER"):
        prox_tv2d(square(10), 0.2, max_iter=5)
    with pytest.warns(ConvergenceWarning):
        best = prox_tv2d(square(10), 0.2, max_iter=20, on_failure="warn")
    torch.testing.assert_close(best, prox_tv2d(square(10), 0.2), rtol=0, atol=0.1)


def test_refuses() -> None:
    x = torch.zeros(3, 4, 5)
    with pytest.raises(ValueError, match="norm='l2'"):
        prox_tv2d(x, 0.1, norm="l2")
    with pytest.raises(ValueError, match="negative"):
        prox_tv2d(x, -0.1)
    with pytest.raises(ShapeError, match="H, W"):
        prox_tv2d(x[0, 0], 0.1)
    with pytest.raises(ShapeError, match=r"lam must have the shape \(\*batch,\) of x"):
        prox_tv2d(x, torch.ones(4))
    with pytest.raises(ShapeError, match="weights"):
        prox_tv2d(x, 0.1, torch.ones(5, 4))
    with pytest.raises(ShapeError, match="floating"):
        prox_tv2d(x.long(), 0.1)


def test_float32_is_computed_in_float64() -> None:
    x = square(11)
    u = prox_tv2d(x.float(), 0.2)
    assert u.dtype == torch.float32
    torch.testing.assert_close(u.double(), prox_tv2d(x, 0.2), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_polishing_ends_on_larger_images(norm: str) -> None:
    for seed in range(4):
        for lam in (0.02, 0.1, 0.4):
            x = square(seed, height=40, width=33)
            found = solve_tv2d(x, lam, norm=norm, polish=True)
            finer = solve_tv2d(x, lam, norm=norm, polish=True, tol=1e-9, max_iter=50_000)
            assert found.residual <= 1e-6
            torch.testing.assert_close(found.u, finer.u, rtol=0, atol=2e-3)
