"""Fourier and Chebyshev derivatives: exact where they should be, faster than any power elsewhere, the highest frequency by the book."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap

from difflayers.errors import ShapeError
from difflayers.pde import chebyshev_derivative, chebyshev_points, finite_difference, spectral_derivative


def _mesh(n: int, length: float = 1.0) -> Tensor:
    return length * torch.arange(n, dtype=torch.float64) / n


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 20), st.integers(1, 4), st.floats(0.1, 10), st.integers(0, 10**6))
def test_exact_on_trigonometric_polynomials(n: int, order: int, length: float, seed: int) -> None:
    waves = torch.arange((n - 1) // 2 + 1, dtype=torch.float64) * 2 * math.pi / length
    amplitudes, phases = _randn(len(waves), seed=seed), _randn(len(waves), seed=seed + 1)
    angles = waves * _mesh(n, length).unsqueeze(-1) + phases
    u, exact = (amplitudes * waves**k * torch.sin(angles + k * math.pi / 2) for k in (0, order))
    found = spectral_derivative(u.sum(-1), length, order=order)
    torch.testing.assert_close(found, exact.sum(-1), rtol=0, atol=1e-12 * float(1 + waves[-1]) ** order)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_error_falls_faster_than_any_power(order: int) -> None:
    # On the circle u is analytic within |Im x| < arccosh(2) / 2π, so a frequency k more divides its part by 2 + √3, times kᵐ.
    def error(n: int) -> float:
        x = _mesh(n).requires_grad_()
        u = 1 / (2 + torch.cos(2 * math.pi * x))
        exact = u
        for _ in range(order):
            (exact,) = torch.autograd.grad(exact.sum(), x, create_graph=True)
        return float((spectral_derivative(u, 1.0, order=order) - exact).detach().norm() / exact.detach().norm())

    rate = (3**order * error(12) / error(36)) ** (1 / 12)
    assert rate == pytest.approx(2 + math.sqrt(3), rel=0.1)
    assert error(64) < 1e-10


@pytest.mark.parametrize("n", [2, 8])
def test_the_highest_frequency(n: int) -> None:
    saw = torch.cos(math.pi * n * _mesh(n))
    for order in (1, 3):
        assert spectral_derivative(saw, 1.0, order=order).abs().max() == 0
    torch.testing.assert_close(spectral_derivative(saw, 1.0, order=2), -((math.pi * n) ** 2) * saw)
    twice = spectral_derivative(spectral_derivative(saw, 1.0), 1.0)
    assert twice.abs().max() == 0, "not the second derivative, as the docstring says"


def test_one_point_is_a_constant() -> None:
    assert spectral_derivative(torch.ones(3, 1), 1.0).tolist() == [[0.0]] * 3


def test_fourier_is_the_limit_of_finite_differences() -> None:
    u = torch.exp(torch.sin(2 * math.pi * _mesh(64)))
    torch.testing.assert_close(
        finite_difference(u, 1 / 64, order=2, accuracy=16, boundary="periodic"), spectral_derivative(u, 1.0, order=2), rtol=0, atol=1e-8
    )


def test_mixed_derivatives_of_a_field_of_vectors() -> None:
    x, y = _mesh(12)[:, None, None], _mesh(9, 2.0)[:, None]
    k = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    u = torch.sin(2 * math.pi * k * x) * torch.cos(math.pi * k * y)
    exact = -(2 * math.pi * k) * (math.pi * k) * torch.cos(2 * math.pi * k * x) * torch.sin(math.pi * k * y)
    torch.testing.assert_close(spectral_derivative(spectral_derivative(u, 1.0, dim=0), 2.0, dim=-2), exact)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 9, 16])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_chebyshev_is_exact_on_polynomials(n: int, order: int) -> None:
    x = chebyshev_points(n, (-1.0, 2.0))
    degrees = range(n)
    u = torch.stack([x**k for k in degrees], -1)
    exact = torch.stack([math.perm(k, order) * x ** (k - order) if k >= order else 0 * x for k in degrees], -1)
    found = chebyshev_derivative(u, (-1.0, 2.0), dim=0, order=order)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-13 * float(1 + exact.abs().max()) * n**2)


def test_chebyshev_error_falls_faster_than_any_power() -> None:
    # The pole of 1 / (1 + 4x²) at i/2 sets the rate of the degree: ρ = 1/2 + √(1/4 + 1).
    def error(n: int) -> float:
        x = chebyshev_points(n)
        u = 1 / (1 + 4 * x**2)
        return float((chebyshev_derivative(u) + 8 * x * u**2).abs().max())

    assert (error(21) / error(41)) ** (1 / 20) == pytest.approx(0.5 + math.sqrt(1.25), rel=0.05)
    assert error(81) < 1e-11


@pytest.mark.parametrize("n", [2, 5, 8])
def test_chebyshev_points_are_symmetric_and_hold_the_ends(n: int) -> None:
    x = chebyshev_points(n)
    assert x[0] == -1
    assert x[-1] == 1
    assert torch.equal(x, -x.flip(0))
    torch.testing.assert_close(x, -torch.cos(math.pi * torch.arange(n, dtype=torch.float64) / (n - 1)))
    assert chebyshev_points(n, (0.0, 3.0), dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("n", [5, 6])
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_in_the_values_and_the_period(n: int, order: int) -> None:
    u, length = _randn(2, n).requires_grad_(), torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    for call, inputs in (
        (lambda u, length: spectral_derivative(u, length, order=order), (u, length)),
        (lambda u: chebyshev_derivative(u, order=order), (u,)),
    ):
        assert gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(call, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("call", [lambda u, dim: spectral_derivative(u, 2.0, dim=dim), lambda u, dim: chebyshev_derivative(u, dim=dim)])
def test_any_dimension_batches_and_transforms(call) -> None:
    u, v = _randn(4, 6, 3), _randn(4, 6, 3, seed=1)
    exact = torch.stack([torch.stack([call(u[i, :, j], 0) for j in range(3)], -1) for i in range(4)])
    for dim in (1, -2):
        torch.testing.assert_close(call(u, dim), exact)
    torch.testing.assert_close(vmap(lambda w: call(w, 1), in_dims=2, out_dims=2)(u), exact)
    torch.testing.assert_close(jvp(lambda w: call(w, 1), (u,), (v,))[1], call(v, 1))
    assert call(u.float(), 1).dtype == torch.float32
    torch.testing.assert_close(call(u.float(), 1).double(), exact, rtol=0, atol=1e-4)
    assert call(u[:0], 1).shape == (0, 6, 3)


def test_a_batch_of_none_has_gradients() -> None:
    u, length = torch.empty(0, 4, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    slopes = torch.autograd.grad(spectral_derivative(u, length).sum(), (u, length))
    assert slopes[0].shape == (0, 4)
    assert slopes[1] == 0


def test_everything_happens_on_the_device_of_u() -> None:
    u = torch.ones(3, 8, device="meta")
    for found in (spectral_derivative(u, 1.0), chebyshev_derivative(u, dim=0), chebyshev_points(4, device="meta")):
        assert found.device.type == "meta"


def test_refusals() -> None:
    u = torch.ones(3, 8)
    for call in (lambda u, **options: spectral_derivative(u, 1.0, **options), chebyshev_derivative):
        with pytest.raises(ShapeError, match=r"floating tensor, got torch\.int64"):
            call(torch.arange(8))
        with pytest.raises(ShapeError, match="no dimension -3"):
            call(u, dim=-3)
        with pytest.raises(ValueError, match="order must be at least 1"):
            call(u, order=0)
    for length in (torch.ones(3), torch.tensor(1)):
        with pytest.raises(ShapeError, match="length must be a number"):
            spectral_derivative(u, length)
    for length in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="length must be positive"):
            spectral_derivative(u, length)
    with pytest.raises(ShapeError, match="at least 2 points"):
        chebyshev_derivative(u[:, :1])
    with pytest.raises(ValueError, match="n must be at least 2"):
        chebyshev_points(1)
    for interval in ((1.0, 1.0), (1.0, 0.0), (0.0, math.inf)):
        with pytest.raises(ValueError, match="lower < upper"):
            chebyshev_points(3, interval)
        with pytest.raises(ValueError, match="lower < upper"):
            chebyshev_derivative(u, interval)
