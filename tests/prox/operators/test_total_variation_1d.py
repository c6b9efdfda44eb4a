"""Total variation of sequences: values, pieces, derivatives, what must hold for any of them."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacrev

from difflayers.errors import NotConvergedError, ShapeError
from difflayers.prox.operators import prox_tv1d


def noisy_steps(seed: int, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    steps = torch.randn(*shape[:-1], -(-shape[-1] // 5), generator=g, dtype=torch.float64)
    return steps.repeat_interleave(5, -1)[..., : shape[-1]] + 0.3 * torch.randn(shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("lam", [0.05, 0.5, 3.0])
def test_value_against_cvxpy(lam: float) -> None:
    x = noisy_steps(0, 40)
    w = torch.rand(39, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    u = cp.Variable(40)
    cost = cp.sum_squares(u - x.numpy()) / 2 + lam * cp.norm1(cp.multiply(w.numpy(), cp.diff(u)))
    cp.Problem(cp.Minimize(cost)).solve(solver="CLARABEL", tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
    torch.testing.assert_close(prox_tv1d(x, lam, w), torch.as_tensor(u.value), rtol=0, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 300), st.floats(0, 20))
def test_optimality_conditions(seed: int, n: int, lam: float) -> None:
    x = noisy_steps(seed, 3, n)
    u = prox_tv1d(x, lam)
    z = (u - x).cumsum(-1)
    assert z[:, -1].abs().max() <= 1e-11 * n
    assert (z.abs().max() if n > 1 else 0) <= lam + 1e-11 * n
    # ⟨z, Du⟩ = −λ‖Du‖₁ would be a multiplier of the wrong sign.
    jumps = u.diff(dim=-1)
    torch.testing.assert_close((z[:, :-1] * jumps).sum(-1), lam * jumps.abs().sum(-1), rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 3))
def test_properties_of_a_proximal_operator(seed: int, lam: float) -> None:
    x, y = noisy_steps(seed, 50), noisy_steps(seed + 1, 50)
    u, v = prox_tv1d(x, lam), prox_tv1d(y, lam)
    assert torch.dot(u - v, u - v) <= torch.dot(u - v, x - y) + 1e-10  # firmly nonexpansive
    torch.testing.assert_close(u.mean(), x.mean())
    torch.testing.assert_close(prox_tv1d(x + 3, lam), u + 3)
    torch.testing.assert_close(prox_tv1d(-x, lam), -u)
    torch.testing.assert_close(prox_tv1d(x.flip(-1), lam), u.flip(-1))
    # One step of size λ after another is a step of their sum.
    torch.testing.assert_close(prox_tv1d(u, 0.7), prox_tv1d(x, lam + 0.7))


def test_batches_share_and_broadcast() -> None:
    x, lam = noisy_steps(2, 2, 3, 20), torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    w = torch.rand(2, 1, 19, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = prox_tv1d(x, lam, w)
    for i in range(2):
        for j in range(3):
            assert torch.equal(u[i, j], prox_tv1d(x[i, j], lam[j], w[i, 0]))
    assert torch.equal(prox_tv1d(x[0, 0], lam)[1], prox_tv1d(x[0, 0], 0.5))


def test_jacobian_averages_over_pieces() -> None:
    x = torch.tensor([1.0, 1.1, 0.9, 4.0, 4.2], dtype=torch.float64)
    averages = torch.block_diag(torch.full((3, 3), 1 / 3), torch.full((2, 2), 1 / 2)).double()
    torch.testing.assert_close(jacrev(prox_tv1d)(x, 0.2), averages)
    # The jump up pulls the first piece up by λ/3 and the second down by λ/2.
    slope = jacrev(prox_tv1d, 1)(x, torch.tensor(0.2, dtype=torch.float64))
    torch.testing.assert_close(slope, torch.tensor([1 / 3] * 3 + [-1 / 2] * 2, dtype=torch.float64))


def test_derivatives() -> None:
    x = noisy_steps(3, 2, 12).requires_grad_()
    lam = torch.tensor([0.2, 0.6], dtype=torch.float64, requires_grad=True)
    w = (0.5 + torch.rand(2, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    assert gradcheck(prox_tv1d, (x, lam, w), check_forward_ad=True)
    assert gradgradcheck(prox_tv1d, (x, lam, w), check_fwd_over_rev=True)


def test_the_ends_of_the_range_of_lambda() -> None:
    x = noisy_steps(4, 30)
    assert torch.equal(prox_tv1d(x, 0.0), x)
    torch.testing.assert_close(prox_tv1d(x, torch.inf), x.mean().expand(30))
    assert torch.equal(prox_tv1d(x[:1], 5.0), x[:1])
    assert prox_tv1d(x.new_zeros(0, 30), 1.0).shape == (0, 30)


def test_ties_are_one_piece() -> None:
    x = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    u = prox_tv1d(x, 0.5)  # at λ = 1/2 the bump has just melted
    torch.testing.assert_close(u, torch.full_like(x, 0.5))
    (slope,) = torch.autograd.grad(u[0], x)
    torch.testing.assert_close(slope, torch.full_like(x, 0.25))


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_scales(scale: float) -> None:
    x = noisy_steps(5, 100)
    torch.testing.assert_close(prox_tv1d(scale * x, scale * 0.5) / scale, prox_tv1d(x, 0.5))


def test_levels_far_apart_and_many_rounds() -> None:
    x = torch.logspace(0, 300, 600, base=2, dtype=torch.float64)
    u = prox_tv1d(x, 1.0)
    assert torch.isfinite(u).all()
    torch.testing.assert_close(u[-1], x[-1] - 1)
    torch.testing.assert_close(prox_tv1d(1e8 + noisy_steps(6, 50), 0.5) - 1e8, prox_tv1d(noisy_steps(6, 50), 0.5), rtol=0, atol=1e-7)


def test_a_row_that_has_no_answer_is_alone() -> None:
    x = noisy_steps(7, 4, 10)
    x[1, 3] = torch.nan
    lam = torch.tensor([0.2, 0.2, -0.2, 0.2], dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    with pytest.raises(NotConvergedError, match="negative") as failure:
        prox_tv1d(x, lam)
    assert failure.value.indices == [(2,)]
    u = prox_tv1d(x, lam, on_failure="nan")
    assert torch.isnan(u).all(-1).tolist() == [False, True, True, False]
    slopes = torch.autograd.grad(u[[0, 3]].square().sum(), (x, lam))
    assert all(torch.isfinite(slope).all() for slope in slopes)
    assert torch.equal(u[0], prox_tv1d(x[0], 0.2))
    with pytest.raises(NotConvergedError):
        prox_tv1d(x[0], lam[2], -torch.ones(9, dtype=torch.float64))


def test_refuses() -> None:
    x = torch.zeros(3, 5)
    with pytest.raises(ValueError, match="negative"):
        prox_tv1d(x, -1.0)
    with pytest.raises(ShapeError, match=r"\(\*batch, 4\)"):
        prox_tv1d(x, 1.0, torch.ones(5))
    with pytest.raises(ShapeError, match=r"lam must have the shape \(\*batch,\) of x"):
        prox_tv1d(x, torch.ones(4))
    with pytest.raises(ShapeError, match="float64"):
        prox_tv1d(x, torch.ones(3, dtype=torch.float64))
    with pytest.raises(ShapeError, match="floating"):
        prox_tv1d(torch.zeros(3, dtype=torch.int64), 1.0)


def test_float32_is_computed_in_float64() -> None:
    x = noisy_steps(8, 1000)
    u = prox_tv1d(x.float(), 0.5)
    assert u.dtype == torch.float32
    np.testing.assert_allclose(u, prox_tv1d(x, 0.5), atol=1e-6)
