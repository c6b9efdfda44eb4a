"""The vorticity equation: its features and residual, random initial vorticities, and the reference solver against what is known exactly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from difflayers.errors import NotConvergedError, ShapeError
from difflayers.pde import HardConstraint, finite_difference
from difflayers.pde.problems import NavierStokes, navier_stokes

PI2 = 4 * math.pi**2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mesh(n: int, length: float = 1.0) -> tuple[Tensor, Tensor]:
    x = torch.arange(n, dtype=torch.float64) * length / n
    return x[:, None], x


def close(a: Tensor, b: Tensor, tol: float) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def vortices(problem: NavierStokes, batch: int = 2) -> Tensor:
    return problem.initial(batch, deviation=2.0, smoothness=5.0, generator=generator(), dtype=torch.float64)


@pytest.mark.parametrize("length", [1.0, 2.0])
def test_a_single_mode_decays(length: float) -> None:
    problem = NavierStokes(points=16, times=5, viscosity=0.01, forcing=0.0, length=length)
    x, y = mesh(16, length)
    k = 2 * math.pi / length
    wave = torch.cos(k * (3 * x + 2 * y))
    taylor_green = torch.cos(k * x) * torch.cos(k * y)
    decay = [torch.exp(-0.01 * k**2 * size * problem.t)[:, None, None] for size in (13, 2)]
    close(problem.solve(torch.stack([wave, taylor_green])), torch.stack([decay[0] * wave, decay[1] * taylor_green]), 1e-12)


def test_forcing_from_rest() -> None:
    problem = NavierStokes(points=9, times=5, viscosity=0.01, forcing=0.3, duration=4.0)
    rate = 0.01 * 2 * PI2
    expected = -torch.expm1(-rate * problem.t)[:, None, None] / rate * problem.force
    close(problem.solve(torch.zeros(9, 9, dtype=torch.float64)), expected, 1e-12)


def test_fourth_order_in_time() -> None:
    problem = NavierStokes(points=16, times=3, viscosity=5e-3)
    initial = vortices(problem)
    trusted = problem.solve(initial, refine=2, steps=96)
    errors = [(problem.solve(initial, refine=2, steps=steps) - trusted).norm() for steps in (6, 12, 24)]
    for coarse, fine in itertools.pairwise(errors):
        assert 3.6 < math.log2(coarse / fine) < 4.5


def test_tolerance_is_kept_in_space_and_time() -> None:
    problem = NavierStokes(points=12, times=3, viscosity=5e-3)
    initial = vortices(problem, 1)
    trusted = problem.solve(initial, refine=8, steps=64)
    for tol in (1e-3, 1e-5):
        found = problem.solve(initial, tol=tol)
        assert (found - trusted).norm() < tol * trusted.norm()


def test_energy_and_enstrophy_balance() -> None:
    problem = NavierStokes(points=24, times=41, viscosity=5e-3, duration=0.5, forcing=2.0)
    vorticity = problem.solve(vortices(problem, 1)[0], tol=1e-7)
    velocity, features = problem.velocity(vorticity), problem.features(vorticity.unsqueeze(-1))
    energy = velocity.square().sum(-3).mean((-2, -1)) / 2
    enstrophy = vorticity.square().mean((-2, -1)) / 2
    stream = problem.force / (2 * PI2)  # of the flow whose vorticity is f: ∫ψf = ∫ω (−Δ)⁻¹f
    gradient = sum(features[name].squeeze(-1).square().mean((-2, -1)) for name in ("vorticity_x", "vorticity_y"))
    step = problem.spacing[0]
    gained = finite_difference(energy, step, accuracy=6)
    close(gained, (vorticity * stream).mean((-2, -1)) - 2 * 5e-3 * enstrophy, 1e-5)
    close(finite_difference(enstrophy, step, accuracy=6), (vorticity * problem.force).mean((-2, -1)) - 5e-3 * gradient, 1e-3)
    close(vorticity.mean((-2, -1)), torch.zeros(41, dtype=torch.float64), 1e-13)


def test_larger_square_is_the_same_flow_with_larger_viscosity() -> None:
    small = NavierStokes(points=12, times=3, viscosity=5e-3)
    large = NavierStokes(points=12, times=3, viscosity=5e-3 * 9, length=3.0)
    initial = vortices(small)
    close(large.solve(initial), small.solve(initial), 1e-10)
    close(large.velocity(initial), 3 * small.velocity(initial), 1e-12)


def test_velocity_has_this_vorticity_and_no_divergence() -> None:
    problem = NavierStokes(points=10)
    vorticity = vortices(problem)
    u, v = problem.velocity(vorticity).unbind(-3)
    of_u, of_v = (problem.features(part[..., None, :, :, None].expand(*part.shape[:-2], 5, 10, 10, 1)) for part in (u, v))
    close(of_v["vorticity_x"][..., 0, :, :, 0] - of_u["vorticity_y"][..., 0, :, :, 0], vorticity, 1e-12)
    close(of_u["vorticity_x"] + of_v["vorticity_y"], torch.zeros_like(of_u["vorticity_x"]), 1e-12)


def test_features_of_a_function_with_known_derivatives() -> None:
    problem = NavierStokes(points=12, times=9, duration=2.0, length=2.0)
    x, y = mesh(12, 2.0)
    k, t = math.pi, problem.t[:, None, None]
    features = problem.features((t**3 * torch.sin(k * x) * torch.cos(2 * k * y))[..., None])
    exact = {
        "vorticity_t": 3 * t**2 * torch.sin(k * x) * torch.cos(2 * k * y),
        "velocity_x": t**3 * torch.sin(k * x) * -2 * k * torch.sin(2 * k * y) / (5 * k**2),
        "velocity_y": -(t**3) * k * torch.cos(k * x) * torch.cos(2 * k * y) / (5 * k**2),
        "vorticity_x": t**3 * k * torch.cos(k * x) * torch.cos(2 * k * y),
        "vorticity_y": t**3 * torch.sin(k * x) * -2 * k * torch.sin(2 * k * y),
        "laplacian": -(t**3) * 5 * k**2 * torch.sin(k * x) * torch.cos(2 * k * y),
    }
    for name, feature in exact.items():
        close(features[name].squeeze(-1), feature, 1e-11)


def test_highest_mode_of_an_even_mesh_has_no_slope() -> None:
    problem = NavierStokes(points=8, times=5)
    checkered = torch.cos(8 * math.pi * mesh(8)[0]).expand(8, 8)
    features = problem.features(checkered.expand(5, 8, 8).unsqueeze(-1))
    assert features["vorticity_x"].abs().max() < 1e-12
    close(features["laplacian"][0, ..., 0], -16 * PI2 * checkered, 1e-10)


def test_residual_of_a_correction_is_that_of_the_sum() -> None:
    problem = NavierStokes(points=8, times=6, viscosity=0.02)
    initial = vortices(problem)
    basis = problem.corrections(torch.randn(2, 6, 8, 8, 3, generator=generator(1), dtype=torch.float64))
    weights = torch.randn(2, 3, generator=generator(2), dtype=torch.float64)

    def combined(functions: Tensor) -> Tensor:
        return torch.einsum("btxyn,bn->btxy", functions, weights)

    products = {name: combined(feature) for name, feature in problem.features(basis).items()}
    expected = problem.mesh_residual(initial.unsqueeze(1) + combined(basis))
    close(problem.residual(products, *problem.arguments(initial)), expected, 1e-10)
    close(problem.mesh_residual(combined(basis), *problem.arguments(initial)), expected, 1e-10)
    assert basis[:, 0].abs().max() == 0
    assert basis.mean((-3, -2)).abs().max() < 1e-15


def test_residual_of_the_reference_is_that_of_the_differences_in_time() -> None:
    residuals = []
    for times in (21, 41):
        problem = NavierStokes(points=16, times=times, viscosity=2e-2)
        residuals.append(problem.mesh_residual(problem.solve(vortices(problem, 1), tol=1e-7))[:, times // 2].abs().max())
    assert 3.5 < math.log2(residuals[0] / residuals[1]) < 4.6


def test_initial_vorticity_has_its_covariance() -> None:
    problem = NavierStokes(points=8)
    drawn = problem.initial(4000, generator=generator(), dtype=torch.float64)
    k = torch.fft.fftfreq(8, 1 / 8, dtype=torch.float64)
    squares = k[:, None].square() + k.square()
    expected = 7**1.5 * (PI2 * squares + 49) ** -2.5
    expected = torch.where((squares == 0) | (torch.maximum(k[:, None].abs(), k.abs()) == 4), 0.0, expected)
    torch.testing.assert_close(torch.fft.fft2(drawn).abs().square().mean(0) / 8**4, expected, rtol=0.12, atol=1e-12)


def test_initial_vorticity_of_given_deviation() -> None:
    problem = NavierStokes(points=16, length=3.0)
    drawn = problem.initial(2000, deviation=2.5, smoothness=3.0, wavenumber=4.0, generator=generator(), dtype=torch.float64)
    assert abs(drawn.std() - 2.5) < 0.05
    assert drawn.mean((-2, -1)).abs().max() < 1e-13
    again = problem.initial(2000, deviation=2.5, smoothness=3.0, wavenumber=4.0, generator=generator(), dtype=torch.float32)
    assert again.dtype == torch.float32
    close(again.double(), drawn, 1e-5)


def test_shapes_dtypes_and_single_elements() -> None:
    problem = NavierStokes(points=8, times=5, viscosity=0.02)
    initial = problem.initial(6, deviation=1.0, generator=generator(), dtype=torch.float64)
    together = problem.solve(initial.reshape(2, 3, 8, 8), refine=2, steps=3)
    assert together.shape == (2, 3, 5, 8, 8)
    close(together[1, 2], problem.solve(initial[5], refine=2, steps=3), 1e-13)
    assert problem.solve(initial[0].float()).dtype == torch.float32
    arguments = problem.arguments(initial.float())
    assert all(part.shape == (6, 1, 8, 8) and part.dtype == torch.float32 for part in arguments)


def test_solution_is_differentiable_in_the_initial_vorticity() -> None:
    problem = NavierStokes(points=4, times=3, viscosity=0.05, duration=0.2)
    initial = problem.initial(1, deviation=1.0, generator=generator(), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda start: problem.solve(start, refine=2, steps=2)[..., 1:, :, :], (initial,))


def test_hard_constraint_finds_the_reference_in_a_basis() -> None:
    problem = NavierStokes(points=12, times=13, viscosity=2e-2, duration=0.5)
    initial = vortices(problem)
    truth = problem.solve(initial)
    others = problem.corrections(torch.randn(2, 1, 12, 12, 5, generator=generator(1), dtype=torch.float64).expand(2, 13, 12, 12, 5))
    basis = torch.cat([others, (truth - initial.unsqueeze(1)).unsqueeze(-1) / 4], dim=-1)
    constraint = HardConstraint(problem.residual, features=problem.features, grid_ndim=3)
    arguments = problem.arguments(initial)
    found = constraint.solve(basis, *arguments)
    close(found.weights, torch.tensor([0.0] * 5 + [4.0], dtype=torch.float64).expand(2, 6), 2e-3)
    close(initial.unsqueeze(1) + found.u, truth, 5e-3)
    residual = problem.mesh_residual(found.u, *arguments)
    close(found.residual_norm, torch.linalg.vector_norm(residual.flatten(1), dim=-1), 1e-9)


def test_derivative_of_the_constrained_flow() -> None:
    problem = NavierStokes(points=6, times=6, viscosity=5e-2, duration=0.5)
    constraint = HardConstraint(problem.residual, features=problem.features, grid_ndim=3, tol=1e-12)
    initial = vortices(problem, 1)
    basis, along, test = (torch.randn(1, 6, 6, 6, 3, generator=generator(seed), dtype=torch.float64) for seed in (1, 2, 3))
    turn = vortices(problem, 2)[1:]

    def loss(step: Tensor) -> Tensor:
        start = initial + step * turn
        u = constraint(problem.corrections(basis + step * along), *problem.arguments(start))
        return ((start.unsqueeze(1) + u) * test[..., 0]).sum()

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(step), step)
    with torch.no_grad():
        h = torch.tensor(1e-4, dtype=torch.float64)
        expected = (8 * (loss(h) - loss(-h)) - loss(2 * h) + loss(-2 * h)) / (12 * h)
    close(slope, expected, 1e-7)


def test_what_is_refused() -> None:
    for constants in ({"viscosity": 0.0}, {"duration": -1.0}):
        with pytest.raises(ValueError, match="positive"):
            NavierStokes(**constants)
    problem = NavierStokes(points=8, times=5)
    initial = problem.initial(1, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"\(8, 8\)"):
        problem.solve(initial[..., :4])
    with pytest.raises(ShapeError, match="8 × 8"):
        problem.features(torch.zeros(5, 8, 4, 2))
    with pytest.raises(ShapeError, match=r"\(5, 8, 8\)"):
        problem.mesh_residual(torch.zeros(4, 8, 8))
    with pytest.raises(ShapeError, match=r"arguments\(initial\), got 0"):
        problem.residual({})
    with pytest.raises(ValueError, match="not finite"):
        problem.solve(initial * torch.nan)
    for option in ({"refine": 1}, {"steps": 0}):
        with pytest.raises(ValueError, match=r"refine = 1|steps = 0"):
            problem.solve(initial, **option)


def test_a_tolerance_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(navier_stokes, "_TRIES", 3)
    with pytest.raises(NotConvergedError, match="refine and steps"):
        NavierStokes(points=4, times=3, duration=0.01).solve(torch.eye(4, dtype=torch.float64), tol=1e-30)
