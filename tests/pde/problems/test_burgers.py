"""Burgers' equation against closed forms, characteristics, an independent spectral solver, and its laws."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from difflayers.pde.problems import Burgers
from difflayers.pde.problems.method_of_lines import method_of_lines


def drawn(problem: Burgers, seed: int = 0) -> Tensor:
    return problem.initial(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[0]


@pytest.mark.parametrize(("viscosity", "a"), [(0.05, 0.9), (0.005, 0.5), (1.0, 0.9)])
def test_one_wave_of_the_heat_equation(viscosity: float, a: float) -> None:
    # φ = 1 + a e^{−νk²t} cos kx solves the heat equation, so u = −2ν φ_x/φ solves this one.
    problem = Burgers(points=128, times=11, viscosity=viscosity)
    k = 2 * math.pi
    decay = a * torch.exp(-viscosity * k**2 * problem.t[:, None])
    exact = 2 * viscosity * k * decay * torch.sin(k * problem.x) / (1 + decay * torch.cos(k * problem.x))
    torch.testing.assert_close(problem.solve(exact[0]), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("viscosity", [0.2, 0.01])
def test_agrees_with_a_spectral_method_of_lines(viscosity: float) -> None:
    problem = Burgers(points=128, times=6, viscosity=viscosity, duration=0.5)
    u0 = 0.4 * drawn(problem) + 0.3
    wave = 2j * np.pi * np.fft.rfftfreq(128, 1 / 128)
    wave[-1] = 0

    def rate(t: float, u: Any) -> Any:
        return np.fft.irfft(-0.5 * wave * np.fft.rfft(u**2) + viscosity * wave**2 * np.fft.rfft(u), 128)

    lines = method_of_lines(rate, u0, problem.t, rtol=1e-10, atol=1e-12, method="LSODA")
    torch.testing.assert_close(problem.solve(u0), lines, rtol=0, atol=2e-7)


def test_quadrature_is_converged_at_its_default() -> None:
    for viscosity in (0.1, 0.01, 1e-4):
        problem = Burgers(points=64, times=6, viscosity=viscosity)
        u0 = drawn(problem)
        torch.testing.assert_close(problem.solve(u0), problem.solve(u0, refine=64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("viscosity", [0.05, 0.0])
def test_a_mean_moves_the_solution_along(viscosity: float) -> None:
    problem = Burgers(points=64, times=5, viscosity=viscosity)
    u0 = drawn(problem)
    u, moving = problem.solve(u0, refine=64), problem.solve(u0 + 1, refine=64)
    for k in range(problem.times):
        torch.testing.assert_close(moving[k], 1 + u[k].roll(16 * k), rtol=0, atol=1e-9)  # x − t, with t = k/4


def test_without_viscosity_values_move_along_characteristics() -> None:
    problem = Burgers(points=128, times=5, viscosity=0.0, duration=0.1)  # the shock comes at 1/(2π)
    u = problem.solve(torch.sin(2 * torch.pi * problem.x))
    for k, t in enumerate(problem.t):
        y = problem.x - t * u[k]
        torch.testing.assert_close(u[k], torch.sin(2 * torch.pi * y), rtol=0, atol=1e-6)


def test_without_viscosity_shocks_have_the_right_place_and_height() -> None:
    problem = Burgers(points=128, times=9, viscosity=0.0, duration=2.0)
    mean = 0.25
    u = problem.solve(mean + torch.sin(2 * torch.pi * problem.x)) - mean
    for k in range(2, problem.times):
        t = float(problem.t[k])
        # In the moving frame the shock stays at ½, and on its left side is a characteristic: v = sin 2πy, ½ = y + t v.
        lower, upper = 0.0, 0.5 - 1e-9
        for _ in range(60):
            middle = (lower + upper) / 2
            lower, upper = (lower, middle) if middle + t * math.sin(2 * math.pi * middle) > 0.5 else (middle, upper)
        height = math.sin(2 * math.pi * lower)
        jump = u[k] - u[k].roll(-1)
        where = (float(problem.x[jump.argmax()]) - mean * t) % 1
        assert where == pytest.approx(0.5, abs=1.01 / 128)
        assert u[k].max() == pytest.approx(height, abs=2 * math.pi / 128)
        assert u[k].min() == pytest.approx(-height, abs=2 * math.pi / 128)


def test_small_viscosity_approaches_none_away_from_shocks() -> None:
    problem = Burgers(points=64, times=5, viscosity=0.0)
    u0 = torch.sin(2 * torch.pi * problem.x)
    sharp = problem.solve(u0)[-1]
    away = (problem.x - 0.5).abs() > 0.1
    errors = [
        float((dataclasses.replace(problem, viscosity=viscosity).solve(u0)[-1] - sharp)[away].abs().max())
        for viscosity in (4e-3, 1e-3, 2.5e-4)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 1e-3


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e-3, 0.03, 0.3]), st.floats(-2, 2))
def test_laws(seed: int, viscosity: float, mean: float) -> None:
    problem = Burgers(points=32, times=5, viscosity=viscosity)
    u0 = mean + drawn(problem, seed)
    u = problem.solve(u0, refine=64)
    fine = Burgers(points=2048, times=5, viscosity=viscosity)  # between the points it may exceed them
    curve = mean + drawn(fine, seed)
    assert curve.min() - 1e-9 <= u.min()
    assert u.max() <= curve.max() + 1e-9
    if viscosity >= 0.03:
        torch.testing.assert_close(u.mean(-1), u0.mean().expand(5), rtol=0, atol=1e-3)
        energy = (u**2).mean(-1)
        assert (energy.diff() <= 1e-3).all()


def test_the_mean_is_kept_and_the_energy_falls() -> None:
    problem = Burgers(points=256, times=11)
    u = problem.solve(drawn(problem) + 0.5)
    torch.testing.assert_close(u.mean(-1), torch.full_like(u[:, 0], 0.5), rtol=0, atol=1e-9)
    slope = torch.fft.irfft(2j * torch.pi * torch.arange(129) * torch.fft.rfft(u), 256)
    dissipated = 2 * problem.viscosity * (slope**2).mean(-1)
    fine = dataclasses.replace(problem, times=161)
    u = fine.solve(u[0])
    energy = (u**2).mean(-1)
    rate = (energy[2:] - energy[:-2]) / (2 * fine.spacing[0])
    torch.testing.assert_close(rate[79::16], -dissipated[5:-1], rtol=1e-3, atol=0)


def test_negative_viscosity_is_refused() -> None:
    with pytest.raises(ValueError, match="viscosity"):
        Burgers(viscosity=-0.1)
