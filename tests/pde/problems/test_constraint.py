"""A problem is all that a hard constraint needs: with the reference solution in its basis, the constraint finds it."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from difflayers.pde import HardConstraint
from difflayers.pde.problems import Burgers, DiffusionSorption, FisherKPP

PROBLEMS = [
    DiffusionSorption(points=33, times=33),
    Burgers(points=48, times=33, viscosity=0.1, modes=2, accuracy=4, duration=0.25),
    FisherKPP(points=49, times=33, diffusivity=0.02, modes=2, accuracy=4),
]


def basis_around(u: Tensor, N: int = 5) -> Tensor:
    """N functions, of which two thirds of the first and one third of the second make u."""
    t, x = (torch.linspace(0, 1, n, dtype=torch.float64) for n in u.shape[-2:])
    waves = torch.stack([torch.cos(torch.pi * (k + 1) * x) * torch.exp(-k * t)[:, None] for k in range(N - 1)], -1)
    waves = waves.expand(*u.shape[:-2], *waves.shape)
    first = u.unsqueeze(-1) + waves[..., :1]
    second = u.unsqueeze(-1) - 2 * waves[..., :1]
    return torch.cat([first, second, waves[..., 1:]], -1)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: type(problem).__name__)
def test_a_constraint_finds_the_reference_in_its_basis(problem: DiffusionSorption | Burgers | FisherKPP) -> None:
    u0 = problem.initial(2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = problem.solve(u0)
    weight = 1.0 if isinstance(problem, DiffusionSorption) else 10.0
    constraint = HardConstraint(
        problem.residual, features=problem.features, rows=problem.rows(weight=weight), grid_ndim=2, ridge=1e-4, x0=0.3
    )
    basis = basis_around(u).requires_grad_()
    found = constraint(basis, u0)
    error = (found - u).flatten(1).norm(dim=-1) / u.flatten(1).norm(dim=-1)
    print(f"{type(problem).__name__}: relative error {[f'{e:.1e}' for e in error.tolist()]}")
    assert (error < 0.01).all()
    (gradient,) = torch.autograd.grad(problem.mesh_residual(found).square().sum(), basis)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0
    # One sample of mesh points to another, the reference remains the answer.
    sampled = HardConstraint(
        problem.residual, features=problem.features, rows=problem.rows(weight=weight), grid_ndim=2, ridge=1e-4, x0=0.3, points=400
    )
    sampled = pickle.loads(pickle.dumps(sampled))
    again = sampled(basis.detach(), u0, generator=torch.Generator().manual_seed(1))
    assert ((again - u).flatten(1).norm(dim=-1) / u.flatten(1).norm(dim=-1) < 0.02).all()
