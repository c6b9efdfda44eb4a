"""Newton's method on the semi-dual: quadratic at the end, safe from anywhere."""

from __future__ import annotations

import torch

from difflayers.transport.newton import newton
from difflayers.transport.sweeps import Scaled, sweep
from tests.transport.problems import marginal, random_cost


def _problem(n: int, m: int, epsilon: float, count: int = 2) -> Scaled:
    return Scaled(random_cost(count, n, m) / epsilon, marginal(count, n), marginal(count, m, seed=1))


def test_same_potentials_as_sweeps() -> None:
    problem = _problem(7, 5, 0.1)
    start, tol = torch.zeros_like(problem.b), torch.full((2,), 1e-13, dtype=torch.float64)
    found = newton(problem, start, tol, max_iter=50)
    exact = sweep(problem, start, tol, max_iter=2000, patience=torch.inf)
    assert bool((found.error <= tol).all())
    assert int(found.iterations.max()) <= 12
    torch.testing.assert_close(
        found.phi.unsqueeze(-1) + found.gamma.unsqueeze(-2), exact.phi.unsqueeze(-1) + exact.gamma.unsqueeze(-2), rtol=0, atol=1e-10
    )


def test_the_end_is_quadratic() -> None:
    problem = _problem(30, 30, 0.01, count=1)
    tol = torch.zeros(1, dtype=torch.float64)
    errors = [float(newton(problem, torch.zeros_like(problem.b), tol, max_iter=k).error) for k in range(40)]
    near = next(k for k, error in enumerate(errors) if error < 1e-3)
    assert errors[near + 3] < 1e-11


def test_steps_stop_at_the_limit_and_where_nothing_is_gained() -> None:
    problem = _problem(10, 8, 0.02)
    start = torch.zeros_like(problem.b)
    assert newton(problem, start, torch.zeros(2, dtype=torch.float64), max_iter=3).iterations.tolist() == [3, 3]
    # A tolerance below rounding is not reached, and the search for it ends.
    found = newton(problem, start, torch.full((2,), 1e-30, dtype=torch.float64), max_iter=500)
    assert int(found.iterations.max()) < 100
    assert float(found.error.max()) < 1e-13


def test_an_element_that_has_arrived_stays() -> None:
    problem = _problem(6, 6, 0.1)
    tol = torch.full((2,), 1e-12, dtype=torch.float64)
    first = newton(problem, torch.zeros_like(problem.b), tol, max_iter=50)
    start = first.gamma.clone()
    start[1] = 0
    again = newton(problem, start, tol, max_iter=50)
    assert again.iterations.tolist() == [0, int(first.iterations[1])]
    assert torch.equal(again.gamma[0], first.gamma[0])
