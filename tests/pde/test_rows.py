"""Typed rows against what they say of a function, written down."""

import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from difflayers.errors import ShapeError
from difflayers.pde import dirichlet, initial, integral, neumann, pde, periodic, robin
from difflayers.pde.rows import on_points

from .test_structured import D, randn

T, X, N = 6, 41, 3
t, x = torch.linspace(0, 1, T, dtype=D), torch.linspace(0, 2, X, dtype=D)
# A quadratic in x, of which the one-sided differences are exact.
BASIS = torch.stack([torch.ones(T, X, dtype=D), t[:, None] + x, (1 + t[:, None]) * x**2], -1).expand(2, T, X, N)
W = randn(2, N)


def at(rows: nn.Module, *args: Tensor, basis: Tensor = BASIS, grid_ndim: int = 2) -> Tensor:
    return rows(basis, grid_ndim, *args).at(W)


def u_of(weights: Tensor = W) -> Tensor:
    return (BASIS @ weights[:, None, :, None]).squeeze(-1)


def slope() -> Tensor:
    """u_x = w₁ + 2 (1 + t) x w₂."""
    return W[:, 1, None, None] + 2 * (1 + t[:, None]) * x * W[:, 2, None, None]


def test_initial_values() -> None:
    u0 = randn(2, X, seed=1)
    torch.testing.assert_close(at(initial(lambda u0: u0, weight=2.0), u0), 2 * (u_of()[:, 0] - u0))
    torch.testing.assert_close(at(initial(lambda u0: u0, relative=True), u0), u_of()[:, 0] / u0 - 1)
    torch.testing.assert_close(at(initial(u0)), u_of()[:, 0] - u0)


@pytest.mark.parametrize("side", ["lower", "upper"])
def test_the_sides(side: str) -> None:
    end, outward = (0, -1) if side == "lower" else (-1, 1)
    u, du, g = u_of()[..., end], outward * slope()[..., end], randn(2, T, seed=2)
    torch.testing.assert_close(at(dirichlet(0.5, dim=1, side=side)), u - 0.5)
    torch.testing.assert_close(at(dirichlet(lambda g: g, dim=-1, side=side), g), u - g)
    torch.testing.assert_close(at(neumann(g, x[1], dim=1, side=side)), du - g)
    torch.testing.assert_close(at(neumann(g, x, dim=1, side=side)), du - g)
    torch.testing.assert_close(at(robin(g, x[1], dim=1, side=side, a=2.0, b=-0.3)), 2 * u - 0.3 * du - g)


def test_both_ends_of_a_period() -> None:
    u, du = u_of(), slope()
    torch.testing.assert_close(at(periodic(dim=1)), u[..., 0] - u[..., -1])
    expected = torch.stack([u[..., 0] - u[..., -1], du[..., 0] - du[..., -1]], -1).flatten(1)
    torch.testing.assert_close(at(periodic(dim=1, spacing=x[1])), expected)


def test_integrals() -> None:
    weights, mass = randn(X, seed=3), randn(2, T, seed=4)
    torch.testing.assert_close(at(integral(lambda mass: mass, weights, dims=1), mass), u_of() @ weights - mass)
    both = randn(T, X, seed=5)
    torch.testing.assert_close(at(integral(1.0, both, dims=(0, 1))), ((u_of() * both).sum((1, 2)) - 1)[:, None])
    torch.testing.assert_close(at(integral(1.0, both.T.contiguous(), dims=(1, 0))), ((u_of() * both).sum((1, 2)) - 1)[:, None])
    with pytest.raises(ShapeError, match="shape of the dimensions"):
        at(integral(1.0, weights, dims=0))


def test_one_dimension_has_one_boundary_row() -> None:
    basis = BASIS[:, 0]
    torch.testing.assert_close(at(dirichlet(0.5, dim=0), basis=basis, grid_ndim=1), u_of()[:, 0, :1] - 0.5)
    values = randn(2, seed=6)
    torch.testing.assert_close(at(dirichlet(lambda v: v, dim=0), values, basis=basis, grid_ndim=1), u_of()[:, 0, :1] - values[:, None])


def test_the_equation_on_a_region() -> None:
    field = randn(T, X, seed=7)
    row = pde(lambda z, f: z["u"] - f, region=(slice(1, None), slice(1, -1)), weight=3.0)
    block = row({"u": BASIS}, (T, X), field)
    assert block.features["u"].shape == (2, (T - 1) * (X - 2), N)
    torch.testing.assert_close(block.args[0], field[1:, 1:-1].flatten())
    torch.testing.assert_close(block.features["u"], BASIS[:, 1:, 1:-1].flatten(1, 2))
    assert block.weight == 3
    weights = randn(T, X, seed=8)
    torch.testing.assert_close(pde(row.residual_fn, weight=weights)({"u": BASIS}, (T, X)).weight, weights.flatten())


def test_which_arguments_are_split_like_the_grid() -> None:
    grid = (T, X)
    torch.testing.assert_close(on_points(torch.ones(2, T, X), grid), torch.ones(2, T * X))
    torch.testing.assert_close(on_points(torch.arange(X)[None], grid), torch.arange(X).repeat(T))
    assert on_points(torch.ones(2, 1, 1), grid).shape == (2, T * X)
    viscosity = torch.ones(2)
    assert on_points(viscosity, grid) is viscosity
    assert on_points("name", grid) == "name"


def test_values_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"initial rows must be \(\*batch, 41\), got \(2, 6\)"):
        at(initial(torch.ones(2, T)))
    with pytest.raises(ShapeError, match="dimension 2, the grid has 2"):
        at(dirichlet(0.0, dim=2))
    with pytest.raises(ValueError, match="'lower' or 'upper'"):
        dirichlet(0.0, dim=0, side="left")
    with pytest.raises(ShapeError, match="feature 'u'"):
        pde(math.cos)({"u": BASIS}, (X, T))
    with pytest.raises(ShapeError, match="features must return a dict"):
        pde(math.cos)(BASIS, (T, X))


def test_tensors_of_rows_move_and_are_learned() -> None:
    row = dirichlet(nn.Parameter(torch.tensor(0.5)), dim=0, weight=torch.tensor(2.0))
    assert dict(row.named_parameters()).keys() == {"value"}
    assert dict(row.named_buffers()).keys() == {"weight"}
    rows = row(BASIS, 2)
    (slope,) = torch.autograd.grad(rows.target.sum(), row.value)
    assert float(slope) == 2 * X
    assert repr(pickle.loads(pickle.dumps(row))) == repr(row) == "BoundaryRows(dirichlet, dim=0, side='lower', weight=2.0)"
