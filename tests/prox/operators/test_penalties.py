"""Log and lp penalties: the global minimizer on a fine grid, jumps, kinks, all scales, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad

from difflayers.errors import NotConvergedError
from difflayers.prox.operators import prox_log, prox_lp, prox_squared_l2, soft_threshold

GRID = torch.linspace(-6, 6, 240_001, dtype=torch.float64)
POINTS = torch.tensor([-5.0, -3.1, -1.2, -0.7, 0.0, 0.3, 0.55, 1.0, 1.3, 2.49, 4.0], dtype=torch.float64)
FINE = 6e-5


def on_a_grid(penalty: Tensor) -> Tensor:
    return torch.stack([GRID[(penalty + (GRID - x) ** 2 / 2).argmin()] for x in POINTS])


@pytest.mark.parametrize("lam", [0.1, 0.5, 1.5])
@pytest.mark.parametrize("epsilon", [0.05, 0.5, 1.0, 2.0])
def test_log_is_the_global_minimizer(lam: float, epsilon: float) -> None:
    exact = on_a_grid(lam * torch.log1p(GRID.abs() / epsilon))
    torch.testing.assert_close(prox_log(POINTS, lam, epsilon), exact, rtol=0, atol=FINE)


@pytest.mark.parametrize("lam", [0.1, 0.5, 1.5])
@pytest.mark.parametrize("p", [0.1, 0.5, 2 / 3, 0.9, 1.0, 1.01, 1.5, 2.0, 4.0])
def test_lp_is_the_global_minimizer(lam: float, p: float) -> None:
    exact = on_a_grid(lam * GRID.abs() ** p)
    torch.testing.assert_close(prox_lp(POINTS, lam, p), exact, rtol=0, atol=FINE)


@given(st.floats(-5, 5), st.floats(1e-3, 3), st.floats(0.05, 6))
def test_lp_satisfies_its_equation(x: float, lam: float, p: float) -> None:
    u = float(prox_lp(torch.tensor(x, dtype=torch.float64), lam, p))
    if u:
        size = abs(u)
        assert abs(size + lam * p * size ** (p - 1) - abs(x)) <= 1e-13 * (1 + abs(x) + lam * p * size ** (p - 1))
        assert (u > 0) == (x > 0)
    value = lam * abs(u) ** p + (u - x) ** 2 / 2
    assert value <= x * x / 2 + 1e-12
    assert value <= lam * abs(x) ** p + 1e-12


def test_the_powers_that_have_a_formula() -> None:
    x, lam = POINTS, torch.tensor(0.4, dtype=torch.float64)
    torch.testing.assert_close(prox_lp(x, lam, 1.0), soft_threshold(x, lam))
    torch.testing.assert_close(prox_lp(x, lam, 2.0), prox_squared_l2(x, 2 * lam))
    # Of λ|u|^(1/2), by a cosine (Xu, Chang, Xu and Zhang, IEEE TNNLS 23 (2012)).
    far = x[x.abs() > 1.0]
    angle = torch.arccos(lam / 4 * (far.abs() / 3) ** -1.5)
    half = far * 2 / 3 * (1 + torch.cos(2 * torch.pi / 3 - 2 * angle / 3))
    torch.testing.assert_close(prox_lp(far, lam, 0.5), half)


def test_jumps() -> None:
    lam, p = 0.5, 0.5
    beta = (2 * lam * (1 - p)) ** (1 / (2 - p))
    threshold = beta + lam * p * beta ** (p - 1)
    x = torch.tensor([threshold * (1 - 1e-9), threshold * (1 + 1e-9)], dtype=torch.float64)
    below, above = prox_lp(x, lam, p).tolist()
    assert below == 0
    assert abs(above - beta) < 1e-7
    # λ > ε²: it jumps where zero and the root are equally good.
    x = torch.linspace(0, 3, 30_001, dtype=torch.float64)
    steps = prox_log(x, 1.0, 0.5).diff()
    assert float(steps.max()) > 0.5
    assert float(prox_log(x, 1.0, 1.0).diff().max()) < 0.02


def test_at_zero_and_without_weight() -> None:
    zero = torch.tensor(0.0, dtype=torch.float64)
    for p, slope in ((0.5, 0.0), (1.0, 0.0), (1.5, 0.0), (2.0, 1 / 1.8), (3.0, 1.0)):
        assert abs(float(grad(prox_lp)(zero, 0.4, p)) - slope) < 1e-15
        assert float(grad(prox_lp)(zero, 0.0, p)) == 1
        torch.testing.assert_close(prox_lp(POINTS, 0.0, p), POINTS)
    assert float(grad(prox_log)(zero, 0.4)) == 0
    assert float(grad(prox_log)(zero, 0.0)) == 1
    torch.testing.assert_close(prox_log(POINTS, 0.0), POINTS)
    # −R'(x)
    two = torch.tensor(2.0, dtype=torch.float64)
    torch.testing.assert_close(grad(prox_lp, 1)(two, zero, 1.5), -1.5 * two**0.5)
    torch.testing.assert_close(grad(prox_log, 1)(two, zero, 0.5), -1 / (two + 0.5))


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_of_all_scales(scale: float) -> None:
    x = torch.tensor([-3.0, 0.2, 2.0], dtype=torch.float64)
    for p in (0.5, 1.5, 3.0):
        torch.testing.assert_close(prox_lp(scale * x, 0.4 * scale ** (2 - p), p), scale * prox_lp(x, 0.4, p))
    torch.testing.assert_close(prox_log(scale * x, 0.4 * scale**2, 0.3 * scale), scale * prox_log(x, 0.4, 0.3))


def test_tiny_minimizers_keep_their_digits() -> None:
    # u^(p − 1) = x / (λ p) to leading order.
    u = prox_lp(torch.tensor(1e-3, dtype=torch.float64), 1.0, 1.1)
    torch.testing.assert_close(u, torch.tensor((1e-3 / 1.1) ** 10, dtype=torch.float64), rtol=1e-11, atol=0)


def test_shapes_nan_and_refusals() -> None:
    x = torch.ones(2, 3)
    for operator, name in ((prox_log, "epsilon"), (prox_lp, "p")):
        assert operator(x, torch.ones(3), torch.full((2, 1), 0.5)).shape == (2, 3)
        assert operator(torch.ones(2, 0), 1.0, 0.5).shape == (2, 0)
        assert operator(torch.tensor([torch.nan, 3.0]), 0.1, 0.5).isnan().tolist() == [True, False]
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            operator(x, 1.0, 0.0)
        with pytest.raises(ValueError, match="lam must not be negative"):
            operator(x, -1.0, 0.5)
        with pytest.raises(NotConvergedError, match=f"{name} must be positive"):
            operator(x, 1.0, torch.tensor([1.0, 0.0, 1.0]))
        assert operator(x[0], 0.1, torch.tensor([1.0, 0.0, 1.0]), on_failure="nan").isnan().tolist() == [False, True, False]
