"""The distributions: formulas, regularizers, bounds on the error of a swap, monotone or provably not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from difflayers.sorting.relaxations import DISTRIBUTIONS, ConditionalSwap
from tests.sorting.networks import probability

LINE = torch.linspace(-30, 30, 60001, dtype=torch.float64)
NAMES = sorted(DISTRIBUTIONS)
LINEAR = sorted(set(NAMES) - {"logistic_phi"})  # whose argument is linear in the difference
MONOTONE = ["cauchy", "optimal", "reciprocal"]


def regularizer(alpha: Tensor, name: str) -> Tensor:
    """Ω(α), as the theory page prints it."""
    t = (2 * alpha - 1).abs()
    if name == "gaussian":
        v = math.sqrt(2) * torch.special.erfinv(2 * alpha - 1)
        return -torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
    return {
        "logistic": torch.xlogy(alpha, alpha) + torch.xlogy(1 - alpha, 1 - alpha),
        "cauchy": -torch.log(torch.sin(math.pi * alpha)) / math.pi,
        "reciprocal": -t - torch.log1p(-t),
        "optimal": torch.where(t <= 0.5, t * t / 8, 1 / 32 - torch.log(2 * (1 - t)) / 16),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_swaps_are_those_of_the_papers(name: str) -> None:
    swap = ConditionalSwap(name, 3.0, 0.4)
    # The authors' program, with which we agree, adds 1e-10 to a denominator of the optimal one.
    torch.testing.assert_close(1 - swap.weight(LINE), probability(LINE, name, 3.0, 0.4), rtol=0, atol=2e-10)


@pytest.mark.parametrize("name", LINEAR)
def test_a_swap_solves_its_regularized_linear_program(name: str) -> None:
    alpha = torch.linspace(0.01, 0.99, 98, dtype=torch.float64, requires_grad=True)
    (v,) = torch.autograd.grad(regularizer(alpha, name).sum(), alpha)
    torch.testing.assert_close(DISTRIBUTIONS[name].cdf(v), alpha.detach(), rtol=0, atol=1e-9)
    curvature = torch.func.vmap(torch.func.grad(torch.func.grad(lambda a: regularizer(a, name))))(alpha.detach())
    torch.testing.assert_close(DISTRIBUTIONS[name].density(v), 1 / curvature, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_symmetric_and_increasing(name: str) -> None:
    cdf = DISTRIBUTIONS[name].cdf
    torch.testing.assert_close(cdf(LINE) + cdf(-LINE), torch.ones_like(LINE))
    assert (cdf(LINE).diff() >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_the_derivative(name: str) -> None:
    swap = ConditionalSwap(name, 3.0, 0.4)
    d = torch.linspace(-2, 2, 200, dtype=torch.float64, requires_grad=True)  # even, so that 0 is not among them
    (slope,) = torch.autograd.grad((swap.weight(d) * d).sum(), d)
    torch.testing.assert_close(swap.slope(d.detach()), slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_slope_at_a_tie_is_a_half(name: str) -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    assert ConditionalSwap(name, 10.0, 0.25).slope(zero) == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_monotone_or_provably_not(name: str) -> None:
    slope = ConditionalSwap(name, 1.0, 0.25).slope(LINE)
    assert DISTRIBUTIONS[name].monotone == (name in MONOTONE)
    if name in MONOTONE:
        assert slope.min() >= 0
        assert slope.max() <= 1
    else:  # raising the larger of two values lowers the relaxed minimum
        assert slope.min() < -0.01


@pytest.mark.parametrize(
    ("name", "bound"), [("optimal", 1 / 16), ("cauchy", 1 / math.pi), ("reciprocal", 1), ("logistic", 0.27847), ("gaussian", 0.16998)]
)
@pytest.mark.parametrize("steepness", [1.0, 20.0])
def test_error_of_a_swap_is_bounded_and_the_bound_is_tight(name: str, bound: float, steepness: float) -> None:
    # Farther out than LINE: the errors of two of them only tend to their bound.
    d = torch.logspace(-3, 5, 100001, dtype=torch.float64)
    error = (ConditionalSwap(name, steepness, 0.25).weight(d) * d * steepness).max()
    assert error <= bound * (1 + 1e-4)
    assert error >= bound * (1 - 1e-3)


def test_error_of_logistic_phi_is_not_bounded_by_the_steepness_alone() -> None:
    d = torch.logspace(-9, 0, 1000, dtype=torch.float64)
    errors = [(ConditionalSwap("logistic_phi", s, 0.25).weight(d) * d).max() * s for s in (1e-1, 1e-2, 1e-3)]
    assert errors[0] > errors[1] > errors[2]  # it falls faster than 1/s for flat ones ...
    assert (
        ConditionalSwap("logistic_phi", 100.0, 0.25).weight(d) * d
    ).max() * 100 < 0.2785  # ... and is below the logistic one for steep ones


@pytest.mark.parametrize("name", NAMES)
def test_a_product_that_overflows_is_a_hard_swap(name: str) -> None:
    d = torch.tensor([3e38, -3e38])
    assert ConditionalSwap(name, 10.0, 0.25).weight(d).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_autograd_has_the_slope_of_a_tie(name: str) -> None:
    swap, zero = ConditionalSwap(name, 2.0, 0.25), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(swap.weight(zero), zero)
    near = torch.tensor([1e-13], dtype=torch.float64)
    torch.testing.assert_close(slope, (swap.weight(near) - swap.weight(-near)) / 2e-13, rtol=5e-3, atol=0)


@given(st.sampled_from(NAMES), st.floats(-1e6, 1e6), st.floats(0.01, 1e4))
def test_weights_are_probabilities(name: str, d: float, steepness: float) -> None:
    weight = ConditionalSwap(name, steepness, 0.25).weight(torch.tensor(d, dtype=torch.float64))
    assert 0 <= weight <= 1
