"""FitzHugh–Nagumo against ordinary differential equations, finite volumes, its symmetries, and in a constraint."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from difflayers.errors import ShapeError
from difflayers.pde import HardConstraint
from difflayers.pde.problems import FitzHughNagumo
from difflayers.pde.problems.method_of_lines import method_of_lines

# Wide fronts, which few points resolve.
MILD = FitzHughNagumo(points=17, times=9, duration=1.0, diffusivity=(0.05, 0.1), modes=2)


def drawn(problem: FitzHughNagumo, batch: int = 1) -> Tensor:
    return problem.initial(batch, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_shapes_and_reproducible_initial_conditions() -> None:
    u0 = drawn(MILD, 2)
    assert u0.shape == (2, 2, 17, 17)
    assert torch.equal(u0, drawn(MILD, 2))
    u = MILD.solve(u0, refine=1)
    assert u.shape == (2, *MILD.grid) == (2, 2, 9, 17, 17)
    torch.testing.assert_close(u[:, :, 0], u0)
    assert torch.equal(MILD.solve(u0[1], refine=1), u[1])
    single = MILD.solve(u0.float(), refine=1)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, u.float(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match="space"):
        MILD.solve(u0[:, :1])
    large = dataclasses.replace(MILD, modes=4).initial(400, generator=torch.Generator().manual_seed(0))
    assert large[..., :-1, :-1].var() == pytest.approx(1, abs=0.05)  # each point of the mesh for a cell


def test_without_differences_in_space_they_are_ordinary_equations() -> None:
    def rate(t: float, y: Any) -> Any:
        u, v = y
        return np.array([u - u**3 - MILD.threshold - v, u - v])

    start = torch.tensor([0.8, -0.3], dtype=torch.float64)
    exact = method_of_lines(rate, start, MILD.t, rtol=1e-11, atol=1e-12, method="DOP853")
    u = MILD.solve(start[:, None, None].expand(2, 17, 17), refine=1)
    torch.testing.assert_close(u, exact.mT[:, :, None, None].expand_as(u), rtol=0, atol=1e-7)


def test_it_agrees_with_finite_volumes_and_with_itself_on_a_finer_mesh() -> None:
    u0 = drawn(MILD)[0]
    u = MILD.solve(u0, refine=1)
    torch.testing.assert_close(u, MILD.solve(u0, refine=2), rtol=0, atol=1e-5)
    errors = []
    for refine in (1, 2):
        n = 16 * refine + 1
        h = MILD.length / (n - 1)
        wave = torch.pi / MILD.length * torch.arange(2, dtype=torch.float64)
        cosines = (wave[:, None] * h * torch.arange(n)).cos()
        coarse = (wave[:, None] * MILD.x).cos()
        start = cosines.mT @ (torch.linalg.pinv(coarse.mT) @ u0 @ torch.linalg.pinv(coarse)) @ cosines  # the same series

        def rate(t: float, y: Any, n: int = n, h: float = h) -> Any:
            fields = y.reshape(2, n, n)
            padded = np.pad(fields, ((0, 0), (1, 1), (1, 1)), mode="reflect")
            laplacian = padded[:, 2:, 1:-1] + padded[:, :-2, 1:-1] + padded[:, 1:-1, 2:] + padded[:, 1:-1, :-2] - 4 * fields
            u, v = fields
            reaction = np.stack([u - u**3 - MILD.threshold - v, u - v])
            return (np.reshape(MILD.diffusivity, (2, 1, 1)) * laplacian / h**2 + reaction).ravel()

        lines = method_of_lines(rate, start.flatten(), MILD.t, rtol=1e-8, atol=1e-8, method="DOP853")
        lines = lines.unflatten(-1, (2, n, n))[..., ::refine, ::refine].movedim(-4, -3)
        errors.append(float((lines - u).abs().max()))
    print(f"finite volumes: {errors[0]:.1e} → {errors[1]:.1e}, order {math.log2(errors[0] / errors[1]):.2f}")
    assert 1.7 < math.log2(errors[0] / errors[1]) < 2.3


def test_it_is_the_same_in_both_directions() -> None:
    u0 = drawn(MILD)[0]
    torch.testing.assert_close(MILD.solve(u0.mT, refine=1), MILD.solve(u0, refine=1).mT, rtol=0, atol=1e-9)
    stripes = u0[:, :, :1].expand_as(u0)
    u = MILD.solve(stripes, refine=1)
    torch.testing.assert_close(u, u[..., :1].expand_as(u), rtol=0, atol=1e-9)


def test_residual_of_the_reference_vanishes_at_the_order_of_the_stencils() -> None:
    problem = dataclasses.replace(MILD, points=33, times=65)
    u = problem.solve(drawn(problem), refine=1)
    for accuracy in (2, 4):
        sizes = []
        for step in (2, 1):
            coarse = dataclasses.replace(problem, points=32 // step + 1, times=64 // step + 1, accuracy=accuracy)
            residual = coarse.mesh_residual(u[..., ::step, ::step, ::step])
            sizes.append(residual[..., coarse.times // 4 :, :, :].square().mean((-3, -2, -1)).sqrt())
        order = (sizes[0] / sizes[1]).log2()
        print(f"accuracy {accuracy}: residual {sizes[1].tolist()}, order {order.tolist()}")
        assert (order > accuracy - 0.5).all()


def test_a_constraint_finds_the_reference_in_its_basis() -> None:
    problem = dataclasses.replace(MILD, times=17, duration=0.25, accuracy=4)
    u0 = drawn(problem, 2)
    u = problem.solve(u0, refine=1)
    waves = torch.stack([torch.cos(torch.pi * k * problem.x / 2).expand(u.shape) for k in (1, 2, 3)], -1)
    basis = torch.cat([u.unsqueeze(-1) + waves[..., :1], u.unsqueeze(-1) - 2 * waves[..., :1], waves[..., 1:]], -1)
    constraint = HardConstraint(
        problem.residual, features=problem.features, rows=problem.rows(weight=10.0), grid_ndim=4, ridge=1e-4, x0=0.3
    )
    found = constraint(basis, u0, problem.species)
    error = (found - u).flatten(1).norm(dim=-1) / u.flatten(1).norm(dim=-1)
    print(f"relative error {error.tolist()}")
    assert (error < 1e-2).all()
