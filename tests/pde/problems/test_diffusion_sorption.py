"""Diffusion–sorption against the series of its linear limit, its scaling law, its balance of mass, and itself on finer meshes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from difflayers.pde.problems import DiffusionSorption


def constant(problem: DiffusionSorption, level: float) -> Tensor:
    return torch.full((problem.points,), level, dtype=torch.float64)


def linear_series(problem: DiffusionSorption, level: float, terms: int = 120) -> Tensor:
    """u = 1 − x/(1 + D) + Σ c_n sin(β_n x) e^{−D β_n² t/R} with sin β + D β cos β = 0, for n_f = 1 and L = 1."""
    D, R = problem.diffusivity, 1 + problem.sorption
    x, t = problem.x.numpy(), problem.t.numpy()
    u = np.tile(1 - x / (1 + D), (len(t), 1))
    for n in range(terms):
        beta = brentq(lambda b: math.sin(b) + D * b * math.cos(b), (n + 0.5) * math.pi + 1e-12, (n + 1.5) * math.pi - 1e-12, xtol=1e-14)
        # ∫ (level − 1 + x/(1 + D)) sin βx, over ∫ sin² βx.
        moment = (level - 1) * (1 - math.cos(beta)) / beta + (math.sin(beta) / beta**2 - math.cos(beta) / beta) / (1 + D)
        u += moment / (0.5 - math.sin(2 * beta) / (4 * beta)) * np.sin(beta * x) * np.exp(-D * beta**2 * t / R)[:, None]
    return torch.from_numpy(u)


def test_linear_limit_is_its_series() -> None:
    for diffusivity in (0.4, 5e-4):
        duration = 0.25 / diffusivity
        problem = DiffusionSorption(points=33, times=11, exponent=1.0, diffusivity=diffusivity, duration=duration)
        exact = linear_series(problem, 0.15)
        errors = [float((problem.solve(constant(problem, 0.15), refine=refine) - exact)[1:].abs().max()) for refine in (16, 32)]
        print(f"D {diffusivity}: error {errors[0]:.1e} → {errors[1]:.1e}, order {math.log2(errors[0] / errors[1]):.2f}")
        assert errors[1] < 2e-6
        assert 1.8 < math.log2(errors[0] / errors[1]) < 2.3


def test_a_front_in_a_long_column_depends_on_x_over_the_root_of_t() -> None:
    problem = DiffusionSorption(points=257, times=9, duration=20.0)
    u = problem.solve(constant(problem, 0.1), refine=16)
    # The point x at the time t is the point 2x at the time 4t, as long as the right end is out of reach.
    for now, later in ((1, 4), (2, 8)):
        torch.testing.assert_close(u[now, :65], u[later, 0:129:2], rtol=0, atol=2e-6)


def test_content_changes_by_what_flows_through_the_ends() -> None:
    problem = DiffusionSorption(points=513, times=401)
    u = problem.solve(constant(problem, 0.05), refine=1)
    dt, dx = problem.spacing
    content = u + problem.sorption * u**problem.exponent
    total = dx * (content[:, 1:].sum(-1) - content[:, -1] / 2)
    flow = problem.diffusivity * (u[:, 0] - u[:, 1]) / dx - u[:, -1]
    half = len(total) // 2  # the inflow of the first steps is too steep for a quadrature
    late = flow[half:]
    simpson = dt / 3 * (late[0] + late[-1] + 4 * late[1:-1:2].sum() + 2 * late[2:-1:2].sum())
    torch.testing.assert_close(total[-1] - total[half], simpson, rtol=1e-6, atol=0)


def test_it_converges_with_the_mesh_and_with_the_tolerance() -> None:
    problem = DiffusionSorption(points=65, times=11)
    u0 = constant(problem, 0.02)
    finest = problem.solve(u0, refine=32, rtol=1e-10, atol=1e-12)
    spatial = [float((problem.solve(u0, refine=refine, rtol=1e-10, atol=1e-12) - finest).abs().max()) for refine in (4, 8)]
    print(f"error in space {spatial[0]:.1e} → {spatial[1]:.1e}")
    assert 1.8 < math.log2(spatial[0] / spatial[1]) < 2.3
    temporal = [float((problem.solve(u0, refine=32, rtol=rtol, atol=rtol / 100) - finest).abs().max()) for rtol in (1e-5, 1e-8)]
    print(f"error in time {temporal[0]:.1e} → {temporal[1]:.1e}")
    assert temporal[1] < 1e-7 < temporal[0]
    assert float((problem.solve(u0) - finest).abs().max()) < 1e-5  # the default


def test_solutions_are_ordered_positive_and_obey_the_ends() -> None:
    problem = DiffusionSorption(points=257, times=11)
    u = problem.solve(torch.stack([constant(problem, level) for level in (0.0, 0.05, 0.2)]))
    assert (u[0] >= 0).all()
    assert (u[:, 1:, 1:] > 0).all()
    assert (u <= 1).all()
    assert (u[1:] >= u[:-1] - 1e-9).all()  # a larger beginning stays larger
    assert (u[:, :, 0] == 1).all()
    slope = (1.5 * u[..., -1] - 2 * u[..., -2] + 0.5 * u[..., -3]) / problem.spacing[1]
    torch.testing.assert_close(u[:, 5:, -1], -problem.diffusivity * slope[:, 5:], rtol=0.01, atol=1e-9)


def test_the_regularization_is_not_felt() -> None:
    problem = DiffusionSorption(points=65, times=11)
    u0 = constant(problem, 0.01)
    u = problem.solve(u0, rtol=1e-10, atol=1e-12)
    sharper = dataclasses.replace(problem, regularization=1e-9).solve(u0, rtol=1e-10, atol=1e-12)
    assert (u - sharper).abs().max() < 1e-8
    assert problem.retardation(constant(problem, 0.3))[0] == 1 + problem.sorption * 0.874 * (0.09 + 1e-12) ** (-0.063)


def test_initial_conditions_are_constants_up_to_a_fifth() -> None:
    u0 = DiffusionSorption(points=9).initial(1000, generator=torch.Generator().manual_seed(0))
    assert (u0 == u0[:, :1]).all()
    assert 0 <= u0.min() < 0.01
    assert 0.19 < u0.max() <= 0.2
