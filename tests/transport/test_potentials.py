"""Which method is taken, and that a falling temperature leads to the solution."""

from __future__ import annotations

import pytest
import torch

from difflayers.transport.potentials import find_potentials
from difflayers.transport.sweeps import Scaled
from tests.transport.problems import COSTS, marginal, random_cost

TOL = torch.full((1,), 1e-10, dtype=torch.float64)


@pytest.mark.parametrize("name", COSTS)
def test_very_small_temperatures(name: str) -> None:
    cost = COSTS[name]
    if cost.shape[-1] > cost.shape[-2]:
        cost = cost.mT
    problem = Scaled(cost.unsqueeze(0) / 1e-6, marginal(1, cost.shape[0]), marginal(1, cost.shape[1], seed=1))
    found = find_potentials(problem, TOL * 10, method="auto", max_iter=None)
    assert float(found.error) <= 1e-9


def test_sweeps_where_they_are_fast() -> None:
    problem = Scaled(random_cost(1, 20, 20), marginal(1, 20), marginal(1, 20, seed=1))
    by_sweeps = find_potentials(problem, TOL, method="sinkhorn", max_iter=None)
    chosen = find_potentials(problem, TOL, method="auto", max_iter=None)
    assert torch.equal(chosen.gamma, by_sweeps.gamma)
    assert torch.equal(chosen.iterations, by_sweeps.iterations)


def test_newton_where_sweeps_are_slow() -> None:
    problem = Scaled(random_cost(1, 20, 20) / 1e-3, marginal(1, 20), marginal(1, 20, seed=1))
    assert int(find_potentials(problem, TOL, method="sinkhorn", max_iter=None).iterations) > 1000
    found = find_potentials(problem, TOL, method="auto", max_iter=None)
    assert int(found.iterations) < 150
    assert float(found.error) <= 1e-10
