"""Sweeps: the log domain where numbers would overflow, products where they do not, and each element its own end."""

from __future__ import annotations

import torch

from difflayers.transport.sweeps import Scaled, log_sums, sweep
from tests.transport.problems import marginal, random_cost


def test_log_sums() -> None:
    X, potential = 2000 * random_cost(2, 4, 5), 500 * random_cost(2, 5, seed=1)
    torch.testing.assert_close(log_sums(X, potential, -1), torch.logsumexp(potential.unsqueeze(-2) - X, -1))
    rows = 500 * random_cost(2, 4, seed=2)
    torch.testing.assert_close(log_sums(X, rows, -2), torch.logsumexp(rows.unsqueeze(-1) - X, -2))


def test_against_plain_sweeps_in_the_log_domain() -> None:
    X, a, b = 30 * random_cost(1, 6, 4), marginal(1, 6), marginal(1, 4, seed=1)
    gamma = torch.zeros_like(b)
    for _ in range(11):  # one in the log domain and ten products
        phi = a.log() - torch.logsumexp(gamma.unsqueeze(-2) - X, -1)
        gamma = b.log() - torch.logsumexp(phi.unsqueeze(-1) - X, -2)
    found = sweep(Scaled(X, a, b), torch.zeros_like(b), torch.zeros(1, dtype=torch.float64), max_iter=10, patience=torch.inf)
    torch.testing.assert_close(found.gamma, gamma)
    torch.testing.assert_close(found.phi, phi)
    assert int(found.iterations) == 10


def test_scalings_that_grow_are_absorbed() -> None:
    # From potentials that are far off, scalings of e^±500 are passed on the way.
    X, a, b = 1000 * random_cost(1, 5, 5), marginal(1, 5), marginal(1, 5, seed=1)
    far = 3000 * random_cost(1, 5, seed=2)
    found = sweep(Scaled(X, a, b), far, torch.full((1,), 1e-10, dtype=torch.float64), max_iter=5000, patience=torch.inf)
    plan = torch.exp(found.phi.unsqueeze(-1) + found.gamma.unsqueeze(-2) - X)
    assert float((plan.sum(-2) - b).abs().sum()) <= 1e-10
    assert float((plan.sum(-1) - a).abs().sum()) <= 1.1 * max(float(found.error), 1e-10)


def test_a_slow_element_is_given_up_and_a_fast_one_finished() -> None:
    X = torch.stack([random_cost(20, 20) * 1000, random_cost(20, 20)])
    uniform = torch.full((2, 20), 1 / 20, dtype=torch.float64)
    tol = torch.full((2,), 1e-11, dtype=torch.float64)
    found = sweep(Scaled(X, uniform, uniform), torch.zeros_like(uniform), tol, max_iter=10_000, patience=100.0)
    assert float(found.error[0]) > 1e-11 >= float(found.error[1])
    assert int(found.iterations[0]) <= 30
