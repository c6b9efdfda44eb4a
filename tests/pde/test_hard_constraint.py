"""HardConstraint on equations whose solution is known."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from difflayers import Status
from difflayers.errors import NotConvergedError, ShapeError
from difflayers.pde import HardConstraint, dirichlet, finite_difference, initial, integral, neumann, pde

from .test_structured import D, randn

t, x = torch.linspace(0, 1, 21, dtype=D), torch.linspace(0, 1, 31, dtype=D)
MODES = torch.arange(1, 5, dtype=D)
NU = 0.05


def heat_features(basis: Tensor, *args: Tensor) -> dict[str, Tensor]:
    """With derivatives accurate enough for the modes below."""
    return {
        "u": basis,
        "u_t": finite_difference(basis, t[1], dim=-3, accuracy=6),
        "u_xx": finite_difference(basis, x[1], dim=-2, order=2, accuracy=6),
    }


def heat(z: dict[str, Tensor], *args: Tensor) -> Tensor:
    return z["u_t"] - NU * z["u_xx"]


def burgers_like(z: dict[str, Tensor], *args: Tensor) -> Tensor:
    return z["u_t"] - NU * z["u_xx"] + 0.5 * z["u"] ** 2


def modes() -> Tensor:
    """The solutions of the heat equation with the mode sin kπx, and distractors."""
    solutions = torch.sin(math.pi * MODES * x[:, None]) * torch.exp(-NU * (math.pi * MODES) ** 2 * t[:, None, None])
    return torch.cat([solutions, torch.stack([torch.cos(3 * x) * t[:, None], x * (1 - t[:, None])], -1)], -1)


def u_zero(*args: Tensor) -> Tensor:
    return args[0]


ROWS = [initial(u_zero, weight=3.0), dirichlet(0.0, dim=1), dirichlet(0.0, dim=1, side="upper")]


def test_the_solution_is_found_in_the_span_of_the_basis() -> None:
    weights = randn(3, 4)
    u0 = torch.sin(math.pi * x[:, None] * MODES) @ weights[..., None]
    found = HardConstraint(heat, features=heat_features, rows=ROWS, grid_ndim=2).solve(modes(), u0.squeeze(-1))
    assert found.u.shape == (3, 21, 31)
    assert found.weights.shape == (3, 6)
    assert (found.status == Status.SOLVED).all()
    torch.testing.assert_close(found.weights[:, :4], weights, atol=2e-4, rtol=0)
    assert float(found.residual_norm.max()) < 0.05
    assert (found.iterations <= 10).all()


def test_gradients_at_the_default_tolerance() -> None:
    # Relative to finite differences, in every argument and in what the residual closes over.
    nu = torch.tensor(NU, dtype=D, requires_grad=True)
    basis = (modes() + 0.1 * randn(2, 1, 31, 6)).requires_grad_()
    u0 = randn(2, 31, seed=1).requires_grad_()
    source = randn(1, 31, seed=2).requires_grad_()

    def residual(z: dict[str, Tensor], u0: Tensor, source: Tensor) -> Tensor:
        return z["u_t"] - nu * z["u_xx"] + z["u"] ** 2 - source

    layer = HardConstraint(residual, features=heat_features, rows=ROWS, grid_ndim=2)

    def loss() -> Tensor:
        return layer(basis, u0, source).square().sum()

    inputs = (basis, u0, source, nu)
    for value, slope in zip(inputs, torch.autograd.grad(loss(), inputs), strict=True):
        direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(3), dtype=D)
        step, sums = 1e-6 if value is basis else 1e-5, []
        with torch.no_grad():
            for sign in (1, -2, 1):
                value += sign * step * direction
                sums.append(loss())
        difference = (sums[0] - sums[1]) / (2 * step)
        assert float(((slope * direction).sum() - difference).abs() / difference.abs()) < 1e-5


def test_with_and_without_features() -> None:
    def free(u: Tensor, u0: Tensor) -> Tensor:
        u_t, u_xx = finite_difference(u, t[1], dim=-2, accuracy=6), finite_difference(u, x[1], order=2, accuracy=6)
        return u_t - NU * u_xx + 0.5 * u**2

    basis, u0 = modes() + 0.1 * randn(2, 1, 31, 6), randn(2, 31, seed=1)
    fast = HardConstraint(burgers_like, features=heat_features, rows=ROWS, grid_ndim=2).solve(basis, u0)
    general = HardConstraint(free, rows=ROWS, grid_ndim=2).solve(basis, u0)
    torch.testing.assert_close(fast.weights, general.weights, atol=1e-9, rtol=0)
    torch.testing.assert_close(fast.residual_norm, general.residual_norm)
    only_rows = HardConstraint(None, rows=[*ROWS, pde(burgers_like, heat_features)], grid_ndim=2)
    torch.testing.assert_close(only_rows(basis, u0), fast.u)


def test_linear_rows_alone_are_interpolation() -> None:
    sites = torch.tensor([0, 10, 20, 30])
    basis = torch.stack([x**k for k in range(4)], -1).requires_grad_()
    rows = [dirichlet(1.0, dim=0), dirichlet(2.0, dim=0, side="upper"), integral(0.5, torch.full((31,), 1 / 30, dtype=D), dims=0)]
    found = HardConstraint(None, rows=[*rows, neumann(0.0, x[1], dim=0)]).solve(basis)
    assert found.status == Status.SOLVED
    assert float(found.residual_norm) < 1e-10
    torch.testing.assert_close(found.u[sites[[0, 3]]], torch.tensor([1.0, 2.0], dtype=D))
    assert torch.autograd.grad(found.u[15], basis)[0].isfinite().all()


def test_what_the_equations_read_is_remembered_for_backward() -> None:
    basis = (modes()[0] + 0.1 * randn(31, 6)).requires_grad_()
    slopes = []
    for changed in (False, True):
        first, second = 1.0, 2.0
        rows = [pde(lambda z: z["u"] ** 2 - first, as_is), pde(lambda z: z["u"] ** 3 - second, as_is)]  # noqa: B023  (they change)
        u = HardConstraint(None, rows=rows, ridge=0.1, x0=0.1)(basis)
        if changed:
            first, second = 10.0, 20.0
        slopes.append(torch.autograd.grad(u.square().sum(), basis)[0])
    torch.testing.assert_close(*slopes, rtol=0, atol=0)


def test_sampled_points() -> None:
    u0 = (torch.sin(math.pi * x[:, None] * MODES) @ randn(2, 4, 1)).squeeze(-1)
    basis, source = modes().expand(2, -1, -1, -1), torch.cos(3 * x) * t[:, None]

    def residual(z: dict[str, Tensor], u0: Tensor, source: Tensor) -> Tensor:
        return burgers_like(z) - source

    def layer(points: int | None) -> HardConstraint:
        return HardConstraint(residual, features=heat_features, rows=ROWS, grid_ndim=2, points=points)

    def solve(points: int | None, seed: int = 0) -> Tensor:
        return layer(points)(basis, u0, source, generator=torch.Generator().manual_seed(seed))

    every = layer(None)(basis, u0, source)
    torch.testing.assert_close(solve(21 * 31), every)
    torch.testing.assert_close(solve(400), solve(400), rtol=0, atol=0)
    assert not torch.equal(solve(400), solve(400, seed=1))
    assert float((solve(600) - every).norm()) < float((solve(60) - every).norm()) < 0.2 * float(every.norm())


def test_a_network_is_trained_through_it() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(31, 16), nn.Tanh(), nn.Linear(16, 2), nn.Softplus()).double()  # the rates of decay
    layer = HardConstraint(heat, features=heat_features, rows=ROWS, grid_ndim=2, ridge=1e-3)
    u0 = torch.sin(math.pi * x) * torch.tensor([[1.0], [0.5]], dtype=D)
    exact = u0[:, None] * torch.exp(-NU * math.pi**2 * t)[:, None]
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        basis = torch.sin(math.pi * MODES[:2] * x[:, None]) * torch.exp(-network(u0)[:, None, None] * t[:, None, None])
        loss = (layer(basis, u0) - exact).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_single_precision_inputs_have_honest_gradients() -> None:
    basis = (modes() + 0.1 * randn(2, 1, 31, 6)).float()
    u0 = randn(2, 31, seed=1).float()
    options = {"features": heat_features, "rows": ROWS, "grid_ndim": 2}

    def slope(basis: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        basis = basis.clone().requires_grad_()
        u = HardConstraint(burgers_like, precision=precision, **options)(basis, u0)
        assert u.dtype == basis.dtype
        return u, torch.autograd.grad(u.square().sum(), basis)[0].double()

    u, exact = slope(basis.double(), torch.float64)
    for precision, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-3)):
        single, gradient = slope(basis, precision)
        torch.testing.assert_close(single.double(), u, atol=10 * tolerance, rtol=0)
        assert float((gradient - exact).norm() / exact.norm()) < tolerance


def test_a_problem_that_fails_leaves_its_neighbours_alone() -> None:
    basis = (modes() + 0.1 * randn(3, 1, 31, 6)).clone()
    basis[1, ..., 5] = basis[1, ..., 4]
    basis[2, 0, 0, 0] = torch.nan
    basis.requires_grad_()
    u0 = randn(3, 31, seed=1)
    layer = HardConstraint(burgers_like, features=heat_features, rows=ROWS, grid_ndim=2, on_failure="nan")
    found = layer.solve(basis, u0)
    assert found.status.tolist() == [Status.SOLVED, Status.SINGULAR, Status.NUMERICAL_ERROR]
    assert found.u[1:].isnan().all()
    (slope,) = torch.autograd.grad(found.u[0].sum(), basis)
    alone = basis.detach()[:1].requires_grad_()
    torch.testing.assert_close(slope[:1], torch.autograd.grad(layer(alone, u0[:1]).sum(), alone)[0])
    assert not slope[1:].any()


def test_not_converged_is_an_error_with_the_weights_so_far() -> None:
    basis, u0 = modes() + 0.1 * randn(2, 1, 31, 6), randn(2, 31, seed=1)
    layer = HardConstraint(burgers_like, features=heat_features, rows=ROWS, grid_ndim=2, max_iter=1)
    with pytest.raises(NotConvergedError, match="HardConstraint: 2 of 2 problems") as error:
        layer(basis, u0)
    assert error.value.solution.x.shape == (2, 6)


def test_the_start_chooses_the_minimum() -> None:
    # u² = 1 has the solutions ±1.
    def square(z: dict[str, Tensor]) -> Tensor:
        return z["u"] ** 2 - 1

    basis = torch.ones(4, 1, dtype=D)
    for start in (2.0, -0.1):
        layer = HardConstraint(square, features=as_is, x0=start)
        torch.testing.assert_close(layer(basis), torch.full((4,), math.copysign(1, start), dtype=D))


def as_is(basis: Tensor, *args: Tensor) -> dict[str, Tensor]:
    return {"u": basis}


def test_vmap_over_everything_and_over_parameters() -> None:
    basis, u0 = modes() + 0.1 * randn(2, 1, 31, 6), randn(2, 31, seed=1)
    layer = HardConstraint(burgers_like, features=heat_features, rows=ROWS, grid_ndim=2)
    torch.testing.assert_close(vmap(layer)(basis, u0), layer(basis, u0))
    learned = HardConstraint(heat, features=heat_features, rows=[initial(nn.Parameter(u0[0])), *ROWS[1:]], grid_ndim=2)
    several = vmap(lambda value: functional_call(learned, {"rows.1.value": value}, (basis[0],)))(u0)
    torch.testing.assert_close(several[0], learned(basis[0]))


def test_shapes_that_do_not_fit() -> None:
    layer = HardConstraint(heat, features=heat_features, rows=ROWS, grid_ndim=2)
    with pytest.raises(ShapeError, match="basis must be a floating tensor"):
        layer(torch.ones(21, 31, dtype=torch.long), randn(31))
    with pytest.raises(ShapeError, match="must broadcast"):
        layer(modes().expand(3, -1, -1, -1), randn(2, 31))
    with pytest.raises(ShapeError, match=r"the residual must be a tensor \(\*batch, ...\) with the batch \(2,\)"):
        HardConstraint(lambda u: u.sum(), grid_ndim=2)(modes().expand(2, -1, -1, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "newton"}, "solver 'newton' is not known"),
        ({"hessian": "bfgs"}, "hessian 'bfgs' is not known"),
        ({"precision": torch.float16}, "precision must be"),
        ({"points": 0}, "must be positive"),
        ({"ridge": -1.0}, "not negative"),
        ({"residual_fn": None}, "needs a residual or rows"),
        ({"features": None, "rows": [pde(heat)]}, "pde rows need features"),
    ],
)
def test_options_without_a_meaning(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HardConstraint(**({"residual_fn": heat, "features": heat_features} | options))
