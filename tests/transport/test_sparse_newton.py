"""Sparse Newton's method: the same plan as sweeps, up at every step, superlinear, and the factorization where it stalls."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from difflayers.solution import Status
from difflayers.transport import potentials, sinkhorn, sparse_newton
from difflayers.transport.sweeps import Scaled, sweep
from tests.transport.problems import COSTS, marginal, plain_sweeps, random_cost

SPARSE = pytest.mark.parametrize("dense_above", [0.0, 1.0], ids=["all entries", "large entries"])


@pytest.fixture(autouse=True)
def _sparse_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "dense_above" in request.fixturenames:
        monkeypatch.setattr("difflayers.transport.kept._DENSE", request.getfixturevalue("dense_above"))


def _problem(n: int, m: int, epsilon: float, count: int = 1, seed: int = 0) -> Scaled:
    return Scaled(random_cost(count, n, m, seed=seed) / epsilon, marginal(count, n), marginal(count, m, seed=1))


def _solve(problem: Scaled, start: Tensor, tol: float, max_iter: int = 100) -> sparse_newton.Swept:
    return sparse_newton.sparse_newton(problem, start, torch.full_like(problem.a[:, 0], tol), max_iter=max_iter)


def _plan(problem: Scaled, found: sparse_newton.Swept) -> Tensor:
    return torch.exp(found.phi.unsqueeze(-1) + found.gamma.unsqueeze(-2) - problem.X)


def _semi_dual(problem: Scaled, gamma: Tensor) -> float:
    phi = problem.a.log() - torch.logsumexp(gamma.unsqueeze(-2) - problem.X, -1)
    return float((problem.a * phi).sum() + (problem.b * gamma).sum())


@SPARSE
@pytest.mark.parametrize(("n", "m"), [(40, 30), (30, 40)])
def test_same_plan_as_long_sweeps(dense_above: float, n: int, m: int) -> None:
    cost, a, b = random_cost(n, m), marginal(n), marginal(m, seed=1)
    f, g = plain_sweeps(cost, a, b, 0.02, 2000)
    found = sinkhorn(cost, a, b, epsilon=0.02, method="sparse_newton", tol=1e-12)
    torch.testing.assert_close(found.plan, torch.exp((f.unsqueeze(-1) + g - cost) / 0.02), rtol=0, atol=1e-10)
    assert int(found.iterations) < 60


@SPARSE
def test_the_dual_rises_and_the_end_is_superlinear(dense_above: float) -> None:
    problem = _problem(60, 60, 0.01)
    start = sweep(problem, torch.zeros_like(problem.b), torch.zeros(1, dtype=torch.float64), max_iter=10, patience=torch.inf).gamma
    tol = 1e-13
    found = [_solve(problem, start, tol, max_iter=k) for k in range(12)]
    errors = [float((_plan(problem, each).sum(-2) - problem.b).abs().sum()) for each in found]
    values = [_semi_dual(problem, each.gamma) for each in found]
    assert all(after >= before - tol for before, after in itertools.pairwise(values))
    last = next(k for k, error in enumerate(errors) if error <= 10 * tol)
    assert last <= 8
    # Each factor by which the error falls is smaller than the one before.
    factors = [after / before for before, after in itertools.pairwise(errors[:last])][-3:]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] < 0.02


def test_dropped_entries_stay_within_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    # Far from the solution the potentials move further than the choice of entries allows for: they are chosen anew.
    problem, rounds = _problem(80, 80, 1e-3), []
    whole = sparse_newton._all_entries
    monkeypatch.setattr(sparse_newton, "_all_entries", lambda *args: rounds.append(1) or whole(*args))
    found = _solve(problem, torch.zeros_like(problem.b), 1e-9)
    assert len(rounds) > 1
    lacking = (_plan(problem, found).sum(-2) - problem.b).abs().sum()
    assert float(lacking) <= max(1e-9, 1.001 * float(found.error))


def test_with_the_wrong_sign_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, right = _problem(30, 30, 0.01), sparse_newton._direction

    def wrong(*args: object) -> tuple[Tensor, bool]:
        step, solved = right(*args)
        return -step, solved

    start = torch.zeros_like(problem.b)
    monkeypatch.setattr(sparse_newton, "_direction", wrong)
    found = _solve(problem, start, 1e-10)
    assert torch.equal(found.gamma, start)
    assert int(found.iterations) == 0
    assert float(found.error) > 1e-2


def test_where_it_stalls_the_factorization_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, taken = COSTS["same points"], []
    right = potentials.newton
    monkeypatch.setattr(potentials, "newton", lambda *args, **options: taken.append(1) or right(*args, **options))
    found = sinkhorn(cost, epsilon=1e-3, method="sparse_newton")
    assert taken
    assert int(found.status) == Status.SOLVED
    torch.testing.assert_close(found.plan, sinkhorn(cost, epsilon=1e-3, method="newton").plan, rtol=0, atol=1e-9)


def test_the_fallback_is_for_the_element_that_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = torch.stack([COSTS["same points"], 0.01 * random_cost(30, 30)])
    sizes, right = [], potentials.newton
    monkeypatch.setattr(
        potentials, "newton", lambda problem, *args, **options: sizes.append(len(problem.X)) or right(problem, *args, **options)
    )
    found = sinkhorn(cost, epsilon=1e-3, method="sparse_newton")
    assert set(sizes) == {1}
    for element, plan in zip(cost, found.plan, strict=True):
        torch.testing.assert_close(plan, sinkhorn(element, epsilon=1e-3, method="newton").plan, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("epsilon", [0.1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_temperature(name: str, epsilon: float, dtype: torch.dtype) -> None:
    cost = COSTS[name].to(dtype).requires_grad_()
    found = sinkhorn(cost, epsilon=epsilon, method="sparse_newton")
    assert found.plan.dtype == dtype
    assert float(found.marginal_error) <= (1e-10 if dtype == torch.float64 else 1e-6)
    slope = torch.autograd.grad((found.plan * torch.linspace(-1, 1, cost.numel(), dtype=dtype).reshape(cost.shape)).sum(), cost)[0]
    assert bool(torch.isfinite(slope).all())


@SPARSE
def test_zero_marginals(dense_above: float) -> None:
    cost, a, b = random_cost(2, 20, 15), marginal(2, 20), marginal(2, 15, seed=1)
    a[0, [0, 7]], b[1, 3] = 0, 0
    a, b = (part / part.sum(-1, keepdim=True) for part in (a, b))
    found = sinkhorn(cost, a, b, epsilon=5e-3, method="sparse_newton", tol=1e-12)
    exact = sinkhorn(cost, a, b, epsilon=5e-3, method="newton", tol=1e-12)
    torch.testing.assert_close(found.plan, exact.plan, rtol=0, atol=1e-11)
    assert bool((found.plan[0, [0, 7]] == 0).all() & (found.plan[1, :, 3] == 0).all())
    assert bool(torch.isneginf(found.f[0, [0, 7]]).all() & torch.isneginf(found.g[1, 3]))


@SPARSE
def test_groups_that_exchange_nothing(dense_above: float) -> None:
    blocks = [random_cost(12, 10, seed=seed) for seed in range(3)]
    cost = torch.full((36, 30), 50.0, dtype=torch.float64)
    for k, block in enumerate(blocks):
        cost[12 * k : 12 * k + 12, 10 * k : 10 * k + 10] = block
    found = sinkhorn(cost, epsilon=0.02, method="sparse_newton", tol=1e-12)
    for k, block in enumerate(blocks):
        alone = sinkhorn(block, epsilon=0.02, tol=1e-12).plan / 3
        torch.testing.assert_close(found.plan[12 * k : 12 * k + 12, 10 * k : 10 * k + 10], alone, rtol=0, atol=1e-11)


def test_large_plans_take_it_and_agree_with_the_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, taken = random_cost(2, 320, 300), []
    right = potentials.sparse_newton
    monkeypatch.setattr(potentials, "sparse_newton", lambda *args, **options: taken.append(1) or right(*args, **options))
    found = sinkhorn(cost, epsilon=2e-3, tol=1e-12)
    assert taken
    torch.testing.assert_close(found.plan, sinkhorn(cost, epsilon=2e-3, tol=1e-12, method="newton").plan, rtol=0, atol=1e-12)


def test_steps_stop_at_the_limit() -> None:
    problem = _problem(20, 15, 0.01, count=2)
    found = _solve(problem, torch.zeros_like(problem.b), 1e-12, max_iter=3)
    assert found.iterations.tolist() == [3, 3]
