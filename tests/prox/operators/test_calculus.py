"""Conjugates, affine maps, indicators and the Moreau envelope."""

from __future__ import annotations

import pickle

import cvxpy as cp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, vmap

from difflayers.convex.projections import projection_l1_ball, projection_linf_ball, projection_simplex
from difflayers.errors import ShapeError
from difflayers.prox.operators import (
    moreau_envelope,
    prox_affine,
    prox_conjugate,
    prox_indicator,
    prox_l2,
    prox_linf,
    prox_nuclear,
    prox_squared_l2,
    soft_threshold,
)
from tests.prox.operators.problems import points, solved


@given(st.integers(0, 2**31), st.floats(0.01, 5))
def test_conjugates(seed: int, gamma: float) -> None:
    x = points(5, seed=seed)
    torch.testing.assert_close(prox_conjugate(soft_threshold, x, gamma), projection_linf_ball(x, 1.0))
    torch.testing.assert_close(prox_conjugate(prox_indicator(projection_l1_ball, 1.0), x, gamma), prox_linf(x, gamma))
    torch.testing.assert_close(prox_conjugate(prox_squared_l2, x, gamma), prox_squared_l2(x, gamma))
    # The conjugate of the conjugate.
    torch.testing.assert_close(prox_conjugate(lambda v, s: prox_conjugate(prox_l2, v, s), x, gamma), prox_l2(x, gamma))


def test_affine_maps() -> None:
    x, b = points(5), points(5, seed=1)
    exact = solved(lambda u: 0.7 * cp.norm2(-1.5 * u + b.numpy()), x)
    torch.testing.assert_close(prox_affine(prox_l2, x, 0.7, scale=-1.5, shift=b), exact, rtol=0, atol=1e-7)
    scale = points(5, seed=2)
    exact = solved(lambda u: 0.7 * cp.norm1(cp.multiply(scale.numpy(), u) + b.numpy()), x)
    torch.testing.assert_close(prox_affine(soft_threshold, x, 0.7, scale=scale, shift=b), exact, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="zero"):
        prox_affine(soft_threshold, x, scale=0.0)


def test_indicators() -> None:
    simplex = prox_indicator(projection_simplex, 2.0, on_failure="nan")
    x = points(5)
    assert torch.equal(simplex(x), projection_simplex(x, 2.0))
    assert torch.equal(pickle.loads(pickle.dumps(simplex))(x, 3.0), simplex(x))


def test_the_envelope_of_the_absolute_value_is_hubers_function() -> None:
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)
    huber = torch.nn.functional.huber_loss(x, torch.zeros_like(x), reduction="none", delta=0.5)
    torch.testing.assert_close(moreau_envelope(torch.abs, soft_threshold, x, 0.5), huber / 0.5)


def test_the_envelope_differentiates_no_function_where_it_has_a_kink() -> None:
    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    gamma = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def nuclear(X: Tensor, gamma: Tensor, weight: Tensor) -> Tensor:
        return moreau_envelope(lambda U: weight * torch.linalg.svdvals(U).sum(-1), lambda V, s: prox_nuclear(V, s * weight), X, gamma)

    def length(x: Tensor, gamma: Tensor, weight: Tensor) -> Tensor:
        return moreau_envelope(lambda u: weight * torch.linalg.vector_norm(u, dim=-1), lambda v, s: prox_l2(v, s * weight), x, gamma)

    # Singular values that repeat, and some that the operator takes to zero.
    X = torch.diag(torch.tensor([2.0, 2.0, 0.1], dtype=torch.float64)).requires_grad_()
    short = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
    for function, point in ((nuclear, X), (length, short)):
        assert gradcheck(function, (point, gamma, weight), fast_mode=True)
        assert gradgradcheck(function, (point, gamma, weight), fast_mode=True)


def test_second_derivatives_and_batches() -> None:
    x = torch.tensor([[3.0, 0.5, -2.0], [0.1, 4.0, 0.2]], dtype=torch.float64)

    def envelope(x: Tensor) -> Tensor:
        return moreau_envelope(lambda u: u.abs().sum(-1), soft_threshold, x, 0.8)

    small = (x.abs() < 0.8).double()
    torch.testing.assert_close(vmap(hessian(envelope))(x), torch.diag_embed(small / 0.8))
    torch.testing.assert_close(envelope(x), torch.stack([envelope(row) for row in x]))
    assert envelope(x[:0]).shape == (0,)


def test_a_network_inside_the_function_is_differentiated() -> None:
    scale = torch.nn.Parameter(torch.tensor([0.3, 0.7], dtype=torch.float64))
    x = torch.tensor([2.0, -1.0], dtype=torch.float64)
    value = moreau_envelope(lambda u: (scale * u.abs()).sum(-1), lambda v, s: soft_threshold(v, s * scale), x)
    (slope,) = torch.autograd.grad(value, scale)
    torch.testing.assert_close(slope, x.abs() - scale.detach())


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="fun must return one value"):
        moreau_envelope(lambda u: u.sum(0), soft_threshold, torch.ones(2, 3))
    for function in (lambda x, g: prox_conjugate(soft_threshold, x, g), lambda x, g: moreau_envelope(torch.abs, soft_threshold, x, g)):
        with pytest.raises(ValueError, match="gamma must be positive"):
            function(torch.ones(3), 0.0)
