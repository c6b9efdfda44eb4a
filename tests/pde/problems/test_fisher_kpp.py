"""The Fisher–KPP equation against its travelling wave, logistic growth, and itself on finer meshes."""

from __future__ import annotations

import itertools
import math

import torch

from difflayers.pde.problems import FisherKPP


def test_travelling_wave() -> None:
    D, r = 0.5, 2.0
    problem = FisherKPP(points=601, times=9, length=60.0, duration=4.0, diffusivity=D, rate=r)
    speed, steepness = 5 * math.sqrt(r * D / 6), math.sqrt(r / (6 * D))
    place = problem.x - 20 - speed * problem.t[:, None]
    wave = (1 + torch.exp(steepness * place)) ** -2
    errors = [float((problem.solve(wave[0], refine=refine) - wave).abs().max()) for refine in (1, 2)]
    print(f"travelling wave: error {errors[0]:.1e} → {errors[1]:.1e}, order {math.log2(errors[0] / errors[1]):.2f}")
    assert errors[1] < 1e-4
    assert 1.7 < math.log2(errors[0] / errors[1]) < 2.3


def test_without_differences_in_space_it_is_logistic_growth() -> None:
    problem = FisherKPP(points=9, times=11)
    grown = torch.sigmoid(torch.logit(torch.tensor(0.02, dtype=torch.float64)) + problem.rate * problem.t)
    u = problem.solve(torch.full((9,), 0.02, dtype=torch.float64), refine=2)
    torch.testing.assert_close(u, grown[:, None].expand(-1, 9), rtol=0, atol=1e-7)


def test_without_growth_the_population_is_kept_and_waves_decay() -> None:
    problem = FisherKPP(points=65, times=6, rate=0.0, diffusivity=0.05)
    wave = torch.cos(torch.pi * problem.x)
    u = problem.solve(0.5 + 0.3 * wave)
    exact = 0.5 + 0.3 * torch.exp(-problem.diffusivity * torch.pi**2 * problem.t[:, None]) * wave
    torch.testing.assert_close(u, exact, rtol=0, atol=3e-6)


def test_it_converges_with_the_mesh() -> None:
    problem = FisherKPP(points=65, times=6)
    u0 = problem.initial(1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    finest = problem.solve(u0, refine=64)
    errors = [float((problem.solve(u0, refine=refine) - finest).abs().max()) for refine in (4, 8, 16)]
    print(f"errors {errors}")
    assert all(1.7 < math.log2(coarse / fine) < 2.3 for coarse, fine in itertools.pairwise(errors))
    assert errors[-1] < 5e-5  # 16 · 64 cells: the default


def test_solutions_are_ordered_and_stay_between_0_and_1() -> None:
    problem = FisherKPP(points=65, times=11)
    u0 = problem.initial(1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    low, high = problem.solve(u0)[0], problem.solve(u0 + 0.2 * (1 - u0))[0]
    assert (low > 0).all()
    assert (high < 1).all()
    assert (high > low).all()
