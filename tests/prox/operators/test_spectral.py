"""The nuclear norm: values against CVXPY, and derivatives where the singular value decomposition has none."""

from __future__ import annotations

import cvxpy as cp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacrev

from difflayers.errors import NotConvergedError, ShapeError
from difflayers.prox.operators import prox_nuclear, soft_threshold
from tests.prox.operators.problems import points, solved

LAM = torch.tensor(0.7, dtype=torch.float64)


def with_values(values: list[float], n: int) -> Tensor:
    m = len(values)
    U, V = torch.linalg.qr(points(m, m)).Q, torch.linalg.qr(points(n, n, seed=1)).Q[:m]
    return (U * torch.tensor(values, dtype=torch.float64)) @ V


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 2)])
def test_solves_its_problem(shape: tuple[int, int]) -> None:
    X = points(*shape)
    exact = solved(lambda U: 0.7 * cp.normNuc(U), X)
    torch.testing.assert_close(prox_nuclear(X, 0.7), exact, rtol=0, atol=1e-8)
    # Where something is differentiated the value comes another way.
    torch.testing.assert_close(prox_nuclear(X.clone().requires_grad_(), 0.7).detach(), exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("values", [[2.0, 2.0, 0.3], [2.0, 2.0, 2.0], [2.0, 0.0, 0.0], [0.3, 0.3, 0.0]])
@pytest.mark.parametrize("n", [3, 4])
def test_derivatives_where_singular_values_repeat_or_are_zero(values: list[float], n: int) -> None:
    inputs = with_values(values, n).requires_grad_(), LAM.clone().requires_grad_()
    assert gradcheck(prox_nuclear, inputs, fast_mode=True)
    assert gradgradcheck(prox_nuclear, inputs, fast_mode=True)


def test_autograd_of_the_decomposition_has_none() -> None:
    X = with_values([2.0, 2.0, 0.0], 3).requires_grad_()
    U, values, V = torch.linalg.svd(X)
    (slope,) = torch.autograd.grad(((U * soft_threshold(values, 0.7)) @ V).square().sum(), X)
    (ours,) = torch.autograd.grad(prox_nuclear(X, 0.7).square().sum(), X)
    assert not slope.isfinite().all() or float((slope - ours).abs().max()) > 1e-3
    assert ours.isfinite().all()


@given(st.integers(0, 2**31), st.floats(0, 3))
def test_firmly_nonexpansive_and_invariant(seed: int, lam: float) -> None:
    X, Y = points(2, 3, 4, seed=seed)
    P, Q = prox_nuclear(X, lam), prox_nuclear(Y, lam)
    assert (P - Q).square().sum() <= ((P - Q) * (X - Y)).sum() + 1e-12
    rotation = torch.linalg.qr(points(3, 3, seed=seed)).Q
    torch.testing.assert_close(prox_nuclear(rotation @ X, lam), rotation @ P, rtol=0, atol=1e-12)
    torch.testing.assert_close(prox_nuclear(X.mT, lam), P.mT, rtol=0, atol=1e-12)


def test_no_weight_nan_and_zero_sizes() -> None:
    X = with_values([2.0, 0.0], 2)
    torch.testing.assert_close(jacrev(lambda Z: prox_nuclear(Z, 0.0))(X).reshape(4, 4), torch.eye(4, dtype=X.dtype))
    stacked = torch.stack([X, X * torch.nan])
    assert prox_nuclear(stacked, 0.5).isnan().all(-1).all(-1).tolist() == [False, True]
    assert prox_nuclear(stacked.requires_grad_(), 0.5).isnan().all(-1).all(-1).tolist() == [False, True]
    for shape in ((0, 2, 3), (2, 0, 3), (2, 3, 0)):
        assert prox_nuclear(torch.ones(shape), 0.5).shape == shape
        assert prox_nuclear(torch.ones(shape, requires_grad=True), 0.5).shape == shape


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="m, n"):
        prox_nuclear(torch.ones(3), 1.0)
    with pytest.raises(ShapeError, match="lam must have the shape"):
        prox_nuclear(torch.ones(2, 3, 3), torch.ones(3))
    with pytest.raises(NotConvergedError, match="lam must not be negative"):
        prox_nuclear(torch.ones(2, 3, 3), torch.tensor([1.0, -1.0]))
