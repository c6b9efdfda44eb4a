"""Stefan's problem: the similarity solution, its mass, and the reference solver that converges to it."""

from __future__ import annotations

import math

import pytest
import torch

from difflayers.pde.problems import Stefan


@pytest.mark.parametrize("low", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_stefan(low: float, threshold: float) -> None:
    def make(points: int) -> Stefan:
        return Stefan(points=points, times=5, threshold=threshold, low=low)

    errors = [float((make(points).solve(refine=1) - make(points).exact()).abs().mean()) for points in (26, 101)]
    assert errors[1] < 0.4 * errors[0] < 0.01
    problem = make(4001)
    exact, front = problem.exact(), problem.front()
    torch.testing.assert_close(torch.trapezoid(exact, problem.x)[1:], problem.mass()[1:], rtol=0, atol=2e-4)
    assert problem.mass()[0] == 0
    assert ((exact >= threshold) == (problem.x <= front[:, None]))[1:].all()
    # The same flux on both sides of the front.
    if low:
        here = torch.searchsorted(problem.x, front[-1:]).item()
        slopes = exact[-1].diff() / problem.x[1]
        torch.testing.assert_close(problem.high * slopes[here - 2], low * slopes[here + 1], rtol=2e-2, atol=0)


def test_stefan_with_one_coefficient_is_diffusion() -> None:
    problem = Stefan(points=11, times=3, high=2.0, low=2.0)
    exact = torch.erfc(problem.x / (2 * (2 * problem.t[1:, None]).sqrt()))
    torch.testing.assert_close(problem.exact()[1:], exact)


def test_the_mass_where_the_front_leaves_the_interval() -> None:
    problem = Stefan(points=2001, times=4, duration=2.0, threshold=0.3)
    assert problem.front()[-1] > problem.length
    torch.testing.assert_close(torch.trapezoid(problem.exact(), problem.x)[1:], problem.mass()[1:], rtol=0, atol=1e-4)


def test_the_flux_fills_the_interval() -> None:
    # dM/dt is the flux at the left end: conservation, in the closed forms themselves.
    problem = Stefan(points=2001, times=2001)
    flux = problem.high * (1 - problem.threshold) / math.erf(problem.speed / 2) / (math.pi * problem.t[1:]).sqrt()
    rate = (problem.mass()[2:] - problem.mass()[:-2]) / (problem.t[2:] - problem.t[:-2])
    torch.testing.assert_close(rate[100:], flux[100:-1], rtol=1e-4, atol=0)


def test_a_lower_coefficient_that_is_nearly_zero() -> None:
    # erfc of a thousand is zero in floating point; its ratios are not.
    none, little = (Stefan(points=41, times=5, low=low) for low in (0.0, 1e-7))
    torch.testing.assert_close(little.mass(), none.mass(), rtol=1e-5, atol=1e-5)
    assert (little.exact() - none.exact()).abs().mean() < 1e-2
    assert little.exact().isfinite().all()


def test_refuses() -> None:
    with pytest.raises(ValueError, match="threshold"):
        Stefan(threshold=1.0)
    with pytest.raises(ValueError, match="low"):
        Stefan(low=2.0)
