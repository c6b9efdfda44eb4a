"""What every problem must keep: shapes, dtypes, reproducible initial conditions, the residual of a reference solution, errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from difflayers.errors import ShapeError
from difflayers.pde.problems import Burgers, DiffusionSorption, FisherKPP, Problem

SMALL = [
    DiffusionSorption(points=17, times=6),
    Burgers(points=16, times=6, viscosity=0.05),
    FisherKPP(points=17, times=6),
]
# Fine enough for the stencils of fourth order to show theirs.
FINE = [
    DiffusionSorption(points=257, times=257),
    Burgers(points=256, times=257, viscosity=0.1, modes=2),
    FisherKPP(points=257, times=257, diffusivity=0.02, modes=2),
]
problems = pytest.mark.parametrize("problem", SMALL, ids=lambda problem: type(problem).__name__)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(problem: Problem, batch: int = 2, seed: int = 0) -> Tensor:
    return problem.initial(batch, generator=generator(seed), dtype=torch.float64)


@problems
def test_mesh(problem: Problem) -> None:
    dt, dx = problem.spacing
    assert problem.grid == (problem.times, problem.points)
    assert problem.t.shape == (problem.times,)
    assert problem.x.shape == (problem.points,)
    torch.testing.assert_close(problem.t.diff(), torch.full_like(problem.t[1:], dt))
    torch.testing.assert_close(problem.x.diff(), torch.full_like(problem.x[1:], dx))
    assert problem.t[-1] == problem.duration
    assert float(problem.x[-1]) + (dx if problem.periodic else 0) == pytest.approx(problem.length)


@problems
def test_initial_conditions_are_reproducible(problem: Problem) -> None:
    u0 = drawn(problem, 3)
    assert u0.shape == (3, problem.points)
    assert torch.equal(u0, drawn(problem, 3))
    assert not torch.equal(u0, drawn(problem, 3, seed=1))
    assert not torch.equal(u0[0], u0[1])
    single = problem.initial(3, generator=generator())
    assert single.dtype == torch.float32
    assert torch.equal(single, u0.float())
    assert problem.initial(0).shape == (0, problem.points)


@problems
def test_reference_keeps_shape_and_dtype(problem: Problem) -> None:
    u0 = drawn(problem, 4)
    kept = u0.clone()
    u = problem.solve(u0.requires_grad_(), refine=4)
    assert u.shape == (4, *problem.grid)
    assert not u.requires_grad
    assert torch.equal(u0, kept)
    assert torch.equal(problem.solve(u0[1], refine=4), u[1])
    assert torch.equal(problem.solve(u0.reshape(2, 2, -1), refine=4), u.reshape(2, 2, *problem.grid))
    single = problem.solve(u0.detach().float(), refine=4)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, u.float(), rtol=1e-4, atol=1e-5)
    assert problem.solve(u0[:0]).shape == (0, *problem.grid)


@problems
def test_reference_begins_with_the_initial_condition(problem: Problem) -> None:
    u0 = drawn(problem)
    torch.testing.assert_close(problem.solve(u0)[:, 0, 1:], u0[:, 1:])  # the left end may be held at a value of its own


@problems
def test_residual_is_pointwise_in_linear_features(problem: Problem) -> None:
    basis = torch.rand(2, *problem.grid, 3, dtype=torch.float64, generator=generator())
    w = torch.rand(2, 3, dtype=torch.float64, generator=generator())
    u = torch.einsum("btxn,bn->btx", basis, w)
    features = problem.features(basis)
    products = {name: torch.einsum("btxn,bn->btx", feature, w) for name, feature in features.items()}
    expected = problem.mesh_residual(u)
    torch.testing.assert_close(problem.residual(products), expected)
    chosen = torch.randperm(expected[0].numel(), generator=generator())[:7]
    sampled = {name: product.flatten(1)[:, chosen] for name, product in products.items()}
    torch.testing.assert_close(problem.residual(sampled), expected.flatten(1)[:, chosen])


@problems
def test_residual_has_finite_derivatives_everywhere(problem: Problem) -> None:
    names = list(problem.features(drawn(problem)[:, None, :, None].expand(2, *problem.grid, 1)))
    for value in (-1.0, -1e-6, 0.0, 1e-6, 1.0):
        z = torch.full((len(names),), value, dtype=torch.float64)

        def residual(z: Tensor) -> Tensor:
            return problem.residual(dict(zip(names, z, strict=True)))

        assert torch.isfinite(residual(z))
        assert torch.isfinite(torch.func.grad(residual)(z)).all()
        assert torch.isfinite(torch.func.hessian(residual)(z)).all()


@problems
def test_mesh_residual_is_differentiable(problem: Problem) -> None:
    small = dataclasses.replace(problem, points=5, times=4)
    u = (0.2 + torch.rand(1, *small.grid, dtype=torch.float64, generator=generator())).requires_grad_()
    assert torch.autograd.gradcheck(small.mesh_residual, u, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(small.mesh_residual, u)


@pytest.mark.parametrize("problem", FINE, ids=lambda problem: type(problem).__name__)
def test_residual_of_the_reference_vanishes_at_the_order_of_the_stencils(problem: Problem) -> None:
    u = problem.solve(drawn(problem, 1), refine=8)
    for accuracy in (2, 4):
        sizes = []
        for step in (16, 8):
            coarse = dataclasses.replace(problem, points=problem.x[::step].numel(), times=problem.t[::step].numel(), accuracy=accuracy)
            late = coarse.mesh_residual(u[:, ::step, ::step])[:, coarse.times // 2 : -3, 3:-3]
            sizes.append(float(late.norm()) / math.sqrt(late.numel()))
        order = math.log2(sizes[0] / sizes[1])
        print(f"{type(problem).__name__}, accuracy {accuracy}: residual {sizes[0]:.1e} → {sizes[1]:.1e}, order {order:.2f}")
        assert accuracy - 0.4 < order < accuracy + 1


@problems
def test_refused_initial_conditions(problem: Problem) -> None:
    u0 = drawn(problem)
    with pytest.raises(ShapeError, match=rf"\(2, {problem.points - 1}\)"):
        problem.solve(u0[:, 1:])
    with pytest.raises(ShapeError, match="int64"):
        problem.solve(u0.long())
    with pytest.raises(ValueError, match="not finite"):
        problem.solve(u0 * torch.nan)
    if problem.nonnegative:
        with pytest.raises(ValueError, match="negative"):
            problem.solve(u0 - 1)
    with pytest.raises(ShapeError, match="grid"):
        problem.mesh_residual(u0)


@problems
def test_refused_constants(problem: Problem) -> None:
    for name in ("length", "duration"):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(problem, **{name: 0.0})
    for name in ("points", "times"):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(problem, **{name: 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.length = 2.0
