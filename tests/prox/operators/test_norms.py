"""Norms: values against CVXPY, Moreau's identity, kinks and scales."""

from __future__ import annotations

from collections.abc import Callable

import cvxpy as cp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import hessian, jacrev

from difflayers.convex.projections import projection_l1_ball, projection_l2_ball
from difflayers.errors import ShapeError
from difflayers.prox.operators import prox_elastic_net, prox_huber, prox_l2, prox_linf, prox_squared_l2
from tests.prox.operators.problems import points, solved

CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[cp.Variable], cp.Expression]]] = {
    "l2": (lambda x: prox_l2(x, 0.8), lambda u: 0.8 * cp.norm2(u)),
    "squared_l2": (lambda x: prox_squared_l2(x, 0.8), lambda u: 0.4 * cp.sum_squares(u)),
    "linf": (lambda x: prox_linf(x, 1.8), lambda u: 1.8 * cp.norm_inf(u)),
    "elastic_net": (lambda x: prox_elastic_net(x, 0.5, 0.7), lambda u: 0.5 * cp.norm1(u) + 0.35 * cp.sum_squares(u)),
    "huber": (lambda x: prox_huber(x, 0.6, 0.9), lambda u: 0.3 * cp.sum(cp.huber(u, 0.9))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_solves_its_problem(name: str, seed: int) -> None:
    operator, penalty = CASES[name]
    x = points(5, seed=seed)
    torch.testing.assert_close(operator(x), solved(penalty, x), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 2**31))
def test_firmly_nonexpansive(name: str, seed: int) -> None:
    operator, _ = CASES[name]
    x, y = points(2, 5, seed=seed)
    p, q = operator(x), operator(y)
    assert (p - q).square().sum() <= (p - q) @ (x - y) + 1e-12


@given(st.integers(0, 2**31), st.floats(0.01, 3))
def test_moreau_decomposition(seed: int, lam: float) -> None:
    x = points(5, seed=seed)
    torch.testing.assert_close(prox_l2(x, lam) + projection_l2_ball(x, lam), x)
    torch.testing.assert_close(prox_linf(x, lam) + projection_l1_ball(x, lam), x)


def test_at_zero_and_without_weight() -> None:
    zero, x = torch.zeros(3, dtype=torch.float64), points(3)
    identity = torch.eye(3, dtype=torch.float64)
    for operator in (prox_l2, prox_squared_l2, prox_linf, prox_huber, lambda x, lam: prox_elastic_net(x, lam, 0.0)):
        for point in (zero, x):
            torch.testing.assert_close(operator(point, 0.0), point)
            if point is x or operator in (prox_l2, prox_squared_l2, prox_huber):
                torch.testing.assert_close(jacrev(lambda v: operator(v, 0.0))(point), identity)  # noqa: B023
    assert not hessian(lambda v: prox_l2(v, 1.0).sum())(zero).any()
    slope = jacrev(prox_l2, 1)(zero, torch.tensor(0.0, dtype=torch.float64))
    assert not slope.any()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_of_all_scales(scale: float) -> None:
    x = points(4)
    torch.testing.assert_close(prox_l2(scale * x, torch.tensor(scale, dtype=x.dtype)), scale * prox_l2(x, 1.0))
    jacobian = jacrev(lambda v: prox_l2(v, torch.tensor(scale, dtype=torch.float64)))(scale * x)
    torch.testing.assert_close(jacobian, jacrev(lambda v: prox_l2(v, 1.0))(x))


def test_batches_of_weights_and_zero_sizes() -> None:
    x, lam = points(2, 3, 4), points(3, seed=1).abs()
    for operator in (prox_l2, prox_linf):
        p = operator(x, lam)
        for j in range(3):
            torch.testing.assert_close(p[:, j], operator(x[:, j], float(lam[j])))
        with pytest.raises(ShapeError, match="lam must have the shape"):
            operator(x, torch.ones(4, dtype=x.dtype))
        with pytest.raises(ValueError, match="lam must not be negative"):
            operator(x, -1.0)
    assert prox_l2(torch.ones(2, 0), 1.0).shape == (2, 0)
    assert prox_l2(torch.tensor([[torch.nan, 1.0], [3.0, 4.0]]), 1.0).isnan().tolist() == [[True, True], [False, False]]
