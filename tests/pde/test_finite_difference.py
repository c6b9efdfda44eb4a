"""Finite differences: exact on polynomials, of the order they promise at every point, on any mesh; against torch.gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacrev, jvp, vmap

from difflayers.errors import ShapeError
from difflayers.pde import edge_derivative, finite_difference


def _sine(x: Tensor, order: int) -> Tensor:
    return torch.sin(x + order * math.pi / 2)


def _power(x: Tensor, degree: int, order: int) -> Tensor:
    return math.perm(degree, order) * x ** (degree - order) if degree >= order else torch.zeros_like(x)


def _uneven(n: int) -> Tensor:
    """A rough mesh of [0, 1] whose neighbouring gaps differ by a factor of up to three; twice the n is the same, twice as fine."""
    gaps = torch.tensor([1.0, 0.5, 1.5, 0.8, 0.6], dtype=torch.float64).repeat(n // 5)
    x = gaps.cumsum(0) - 1.0
    return x / gaps.sum()


orders = st.integers(1, 4)
accuracies = st.sampled_from([2, 4, 6])
seeds = st.integers(0, 10**6)


@given(orders, accuracies, st.integers(0, 5), seeds)
def test_exact_on_polynomials(order: int, accuracy: int, more: int, seed: int) -> None:
    points = order + accuracy
    n = points + more
    random = torch.Generator().manual_seed(seed)
    x = torch.linspace(-1, 1, n, dtype=torch.float64)
    uneven = x + (2 / n) * (torch.rand(n, generator=random, dtype=torch.float64) - 0.5) * 0.6
    for mesh, spacing in ((x, 2 / (n - 1)), (uneven, uneven), (-uneven, -uneven)):
        u, exact = (torch.stack([_power(mesh, degree, k) for degree in range(points)]) for k in (0, order))
        found = finite_difference(u, spacing, order=order, accuracy=accuracy)
        torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-13 * (10 * n) ** order)


@given(orders, accuracies)
def test_one_degree_more_is_not_exact_at_the_edge(order: int, accuracy: int) -> None:
    n = order + accuracy + 2
    x = torch.linspace(-1, 1, n, dtype=torch.float64)
    degree = order + accuracy
    found = finite_difference(x**degree, 2 / (n - 1), order=order, accuracy=accuracy)
    assert (found - _power(x, degree, order)).abs()[[0, -1]].min() > 1e-4


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("accuracy", [2, 4, 6])
@pytest.mark.parametrize("mesh", ["uniform", "periodic", "uneven"])
def test_order_of_convergence(order: int, accuracy: int, mesh: str) -> None:
    # Coarse enough that rounding, of the size ε/h^m, does not hide the error.
    sizes = {2: (80, 160), 4: (40, 80), 6: (30, 60)}[accuracy]
    errors = []
    for n in sizes:
        x = _uneven(n) if mesh == "uneven" else torch.arange(n, dtype=torch.float64) / n
        wave = 2 * math.pi if mesh == "periodic" else 3.0 if order < 4 else 7.0
        # Two phases, since the error of one is nearly zero somewhere.
        u, exact = (torch.stack([wave**k * _sine(wave * x + phase, k) for phase in (0, math.pi / 2)]) for k in (0, order))
        found = finite_difference(
            u,
            x if mesh == "uneven" else 1 / n,
            order=order,
            accuracy=accuracy,
            boundary="periodic" if mesh == "periodic" else "one_sided",
        )
        errors.append((found - exact).norm(dim=0))
    coarse, fine = errors
    pairs = [(coarse[i], fine[i]) for i in (0, -1)]
    pairs.append(tuple(error[len(error) // 4 : -len(error) // 4].max() for error in errors))
    for a, b in pairs:
        assert abs(torch.log2(a / b) - accuracy) < (0.3 if accuracy < 6 else 0.6)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_against_torch_gradient(dim: int) -> None:
    u = torch.randn(5, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (exact,) = torch.gradient(u, spacing=0.3, dim=dim, edge_order=2)
    torch.testing.assert_close(finite_difference(u, 0.3, dim=dim), exact)
    x = torch.linspace(1, 2, u.shape[dim], dtype=torch.float64) ** 3
    (exact,) = torch.gradient(u, spacing=(x,), dim=dim, edge_order=2)
    torch.testing.assert_close(finite_difference(u, x, dim=dim), exact)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("accuracy", [2, 4])
@pytest.mark.parametrize("uneven", [False, True])
def test_the_edge_is_that_of_the_whole(order: int, accuracy: int, uneven: bool) -> None:
    u = torch.randn(2, 10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spacing = _uneven(10) if uneven else torch.tensor(0.2, dtype=torch.float64)
    whole = finite_difference(u, spacing, dim=1, order=order, accuracy=accuracy)
    for side, i in (("lower", 0), ("upper", -1)):
        edge = edge_derivative(u, spacing, dim=-2, side=side, order=order, accuracy=accuracy)
        torch.testing.assert_close(edge, whole[:, i], rtol=1e-10, atol=1e-9)


def test_mixed_derivatives_commute_and_converge() -> None:
    errors = []
    for n in (21, 41):
        x, y = torch.linspace(0, 1, n, dtype=torch.float64), torch.linspace(0, 2, n + 3, dtype=torch.float64)
        u = torch.exp(x[:, None] * y)
        u_x = finite_difference(u, 1 / (n - 1), dim=0, accuracy=4)
        u_xyy = finite_difference(u_x, y, dim=1, order=2, accuracy=4)
        other = finite_difference(finite_difference(u, y, dim=1, order=2, accuracy=4), 1 / (n - 1), dim=0, accuracy=4)
        torch.testing.assert_close(u_xyy, other, rtol=1e-9, atol=1e-8)
        exact = (2 * x[:, None] + x[:, None] ** 2 * y) * u
        errors.append((u_xyy - exact).abs().max())
    assert torch.log2(errors[0] / errors[1]) > 3.5


def test_the_least_number_of_points() -> None:
    x = torch.arange(6, dtype=torch.float64)
    for spacing in (1.0, x):
        assert finite_difference(x**2, spacing, order=2, accuracy=4).tolist() == pytest.approx([2.0] * 6)
        with pytest.raises(ShapeError, match=r"takes 6 points, and u of the shape \(5,\) has 5"):
            finite_difference(x[:5], spacing if isinstance(spacing, float) else spacing[:5], order=2, accuracy=4)
        with pytest.raises(ShapeError, match="takes 6 points"):
            edge_derivative(x[:5], spacing if isinstance(spacing, float) else spacing[:5], dim=0, order=2, accuracy=4)
    assert finite_difference(x[:5] * 0 + 1, 1.0, order=2, accuracy=4, boundary="periodic").tolist() == pytest.approx([0.0] * 5)
    with pytest.raises(ShapeError, match="takes 5 points"):
        finite_difference(x[:4], 1.0, order=2, accuracy=4, boundary="periodic")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_that_of_u(dtype: torch.dtype) -> None:
    x = torch.linspace(0, 1, 30, dtype=torch.float64)
    u = torch.sin(x).to(dtype)
    for spacing in (1 / 29, x, x.float(), torch.tensor(1 / 29), torch.tensor(1 / 29, dtype=torch.float64)):
        slope = finite_difference(u, spacing, accuracy=4)
        assert slope.dtype == dtype
        assert edge_derivative(u, spacing, dim=0).dtype == dtype
        assert (slope.double() - torch.cos(x)).abs().max() < 2e-5


@pytest.mark.parametrize("boundary", ["one_sided", "periodic"])
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_in_u_and_the_spacing(boundary: str, order: int) -> None:
    u = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    h = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def call(u: Tensor, h: Tensor) -> Tensor:
        return finite_difference(u, h, order=order, accuracy=4, boundary=boundary)

    assert gradcheck(call, (u, h), check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(call, (u, h), check_fwd_over_rev=True, fast_mode=True)


def test_derivatives_in_the_coordinates() -> None:
    u = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    x = (6 * _uneven(5 + 5)[:6]).requires_grad_()
    for call in (lambda u, x: finite_difference(u, x, dim=0, order=2), lambda u, x: edge_derivative(u, x, dim=0, side="upper", accuracy=4)):
        assert gradcheck(call, (u, x), check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(call, (u, x), check_fwd_over_rev=True, fast_mode=True)


def test_the_derivative_of_a_parabola_moves_with_its_point() -> None:
    # Given at the points wherever they are, a parabola has a slope that moves with its own point only.
    x = _uneven(10)
    jacobian = jacrev(lambda x: finite_difference(x**2, x))(x)
    torch.testing.assert_close(jacobian, 2 * torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-9)


def test_linear_in_u_and_the_same_under_vmap_and_jvp() -> None:
    g = torch.Generator().manual_seed(2)
    u, v = (torch.randn(4, 3, 9, dtype=torch.float64, generator=g) for _ in range(2))
    x = _uneven(10)[:9]
    for spacing in (0.5, x):
        value, tangent = jvp(lambda u: finite_difference(u, spacing), (u,), (v,))  # noqa: B023
        torch.testing.assert_close(tangent, finite_difference(v, spacing))
        mapped = vmap(lambda u: finite_difference(u, spacing, dim=0), in_dims=1, out_dims=1)(u.movedim(-1, 0))  # noqa: B023
        torch.testing.assert_close(mapped, value.movedim(-1, 0))
    many = torch.stack([x, x**2])
    torch.testing.assert_close(
        vmap(finite_difference, in_dims=(None, 0))(u[0], many), torch.stack([finite_difference(u[0], x) for x in many])
    )


def test_a_basis_is_differentiated_function_by_function() -> None:
    basis = torch.randn(2, 5, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(finite_difference(basis, 0.1, dim=-2) @ w, finite_difference(basis @ w, 0.1, dim=-1))


def test_everything_happens_on_the_device_of_u() -> None:
    u, x = torch.ones(3, 8, device="meta"), torch.arange(8.0, device="meta")
    assert finite_difference(u, 0.5, order=2).device.type == "meta"
    assert edge_derivative(u, torch.tensor(0.5), dim=1).device.type == "meta"
    assert vmap(lambda u: finite_difference(u, x))(u).device.type == "meta"  # no look at the values in a transform


def test_coordinates_out_of_order() -> None:
    u = torch.ones(4)
    for x in ([0.0, 2.0, 1.0, 3.0], [0.0, 1.0, 1.0, 3.0], [0.0, 1.0, math.nan, 3.0]):
        for call in (lambda x: finite_difference(u, x), lambda x: edge_derivative(u, x, dim=0)):
            with pytest.raises(ValueError, match="strictly monotone"):
                call(torch.tensor(x))
            assert vmap(call)(torch.tensor([x])).isnan().all()


def test_refusals() -> None:
    u = torch.ones(3, 8)
    with pytest.raises(ShapeError, match=r"floating tensor, got torch\.int64"):
        finite_difference(torch.arange(8), 1.0)
    with pytest.raises(ShapeError, match="got list"):
        finite_difference([1.0, 2.0, 3.0], 1.0)  # ty: ignore
    with pytest.raises(ShapeError, match="no dimension 2"):
        finite_difference(u, 1.0, dim=2)
    for spacing in (torch.ones(3), torch.ones(2, 8), torch.arange(8), torch.tensor(1)):
        with pytest.raises(ShapeError, match=r"coordinates of the points, here \(8,\)"):
            finite_difference(u, spacing)
    for spacing in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive and finite"):
            finite_difference(u, spacing)
    with pytest.raises(ValueError, match="order must be at least 1, got 0"):
        finite_difference(u, 1.0, order=0)
    for accuracy in (0, 1, 3):
        with pytest.raises(ValueError, match="accuracy must be even"):
            finite_difference(u, 1.0, accuracy=accuracy)
    with pytest.raises(ValueError, match="boundary must be"):
        finite_difference(u, 1.0, boundary="mirror")  # ty: ignore
    with pytest.raises(ValueError, match="not the coordinates"):
        finite_difference(u, torch.arange(8.0), boundary="periodic")
    with pytest.raises(ValueError, match="side must be"):
        edge_derivative(u, 1.0, dim=1, side="left")  # ty: ignore
    with pytest.raises(ShapeError, match="coordinates are on"):
        finite_difference(u, torch.arange(8.0, device="meta"))
