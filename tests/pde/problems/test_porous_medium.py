"""The generalized porous medium equation: exact solutions, masses, and the reference solver that converges to them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from difflayers.errors import ShapeError
from difflayers.pde import HardConstraint
from difflayers.pde.problems import Diffusion, GeneralizedPorousMedium, PorousMedium, Stefan


def initial(problem: Diffusion, batch: int = 2) -> Tensor:
    return problem.initial(batch, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def error(make: Any, points: int) -> float:
    problem = make(points)
    return float((problem.solve(refine=1) - problem.exact()).abs().mean())


def test_diffusion() -> None:
    coarse, fine = (Diffusion(points=points, times=5) for points in (17, 33))
    errors = [float((p.solve(initial(p), refine=1) - p.exact(initial(p))).abs().max()) for p in (coarse, fine)]
    assert 3.8 < errors[0] / errors[1] < 4.2
    exact = fine.exact(initial(fine))
    torch.testing.assert_close(exact[:, 0], initial(fine))
    torch.testing.assert_close(torch.trapezoid(exact, fine.x), fine.mass(initial(fine)), rtol=0, atol=2e-3)
    dense = Diffusion(points=257, times=257)
    residual = dense.mesh_residual(dense.exact(initial(dense)))
    assert residual[:, 20:-2, 2:-2].abs().max() < 5e-3


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
def test_porous_medium(exponent: float) -> None:
    def make(points: int) -> PorousMedium:
        return PorousMedium(points=points, times=4, exponent=exponent)

    errors = [error(make, points) for points in (26, 51)]
    assert errors[1] < 0.6 * errors[0] < 1e-3
    problem = make(2001)
    torch.testing.assert_close(torch.trapezoid(problem.exact(), problem.x), problem.mass(), rtol=0, atol=1e-4)
    behind = problem.x > problem.front()[:, None] + 1e-12
    assert (problem.exact()[behind] == 0).all()
    assert (problem.exact()[:, :-1][~behind[:, 1:]] > 0).all()


def test_the_residual_of_a_smooth_solution_is_zero() -> None:
    problem = PorousMedium(points=201, times=201, exponent=1.0, duration=0.9)
    before = problem.t[:, None] - problem.x > 0.05
    assert problem.mesh_residual(problem.exact())[before].abs().max() < 1e-10  # it is linear there
    problem = PorousMedium(points=401, times=401, exponent=2.0)
    before = problem.t[:, None] - problem.x > 0.2
    assert problem.mesh_residual(problem.exact())[before].abs().max() < 2e-3


def test_barenblatt_keeps_its_mass() -> None:
    errors = []
    for points in (41, 81):
        problem = PorousMedium(points=points, times=5, driven=False, length=2.0, duration=0.5)
        exact = problem.barenblatt(0.1, 0.5)
        assert (exact[:, 0] == 0).all()
        torch.testing.assert_close(torch.trapezoid(exact, problem.x), torch.full((5,), 0.5, dtype=torch.float64), rtol=0, atol=1e-2)
        u = problem.solve(exact[0], refine=1)
        mass = torch.trapezoid(u, problem.x)
        assert (mass - mass[0]).abs().max() < 1e-8
        errors.append(float((u - exact).abs().mean()))
    assert errors[1] < 0.7 * errors[0] < 2.5e-3


@pytest.mark.parametrize("problem", [Diffusion(points=21, times=21), PorousMedium(points=21, times=21, exponent=1.0, duration=0.9)])
def test_a_hard_constraint_finds_the_solution_in_a_basis(problem: GeneralizedPorousMedium) -> None:
    start = problem.initial(2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = problem.exact(start) if isinstance(problem, Diffusion) else problem.solve(start)
    t, x = problem.t[:, None], problem.x
    others = torch.stack([torch.ones_like(t * x), t * torch.ones_like(x), x * torch.ones_like(t), t * x, (x - t).clamp(min=0)], -1)
    basis = torch.cat([exact.unsqueeze(-1), others.expand(2, *others.shape)], -1)
    rows = pickle.loads(pickle.dumps(problem.rows(weight=100.0)))
    constraint = HardConstraint(problem.residual, features=problem.features, rows=rows, grid_ndim=2)
    found = constraint.solve(basis, start)
    assert (found.u - exact).abs().max() < 2e-2


def test_random_initial_conditions() -> None:
    for problem in (Diffusion(), PorousMedium(), PorousMedium(driven=False), Stefan()):
        first, again = (problem.initial(3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        assert first.shape == (3, problem.points)
        assert first.dtype == torch.float32
        assert torch.equal(first, again)
        assert (first[:, [0, -1]].abs() < 1e-6).all()


def test_refuses() -> None:
    with pytest.raises(ValueError, match="exponent"):
        PorousMedium(exponent=0.5)
    with pytest.raises(ValueError, match="front"):
        PorousMedium(duration=2.0)
    with pytest.raises(ShapeError, match="101"):
        PorousMedium().solve(torch.zeros(5))
    with pytest.raises(ValueError, match="negative"):
        PorousMedium().solve(-torch.ones(101))
