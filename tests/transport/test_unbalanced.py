"""Marginals that may be missed: other solvers, limits, masses that differ, one side alone, hard penalties, failures."""

from __future__ import annotations

import cvxpy as cp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from difflayers import SinkhornLayer
from difflayers.errors import InfeasibleError, NotConvergedError, ShapeError
from difflayers.solution import Status
from difflayers.transport import sinkhorn, sinkhorn_divergence
from tests.transport.problems import COSTS, marginal, random_cost


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    return torch.special.xlogy(p, p / q).sum(-1) - p.sum(-1) + q.sum(-1)


@pytest.mark.parametrize("sides", [(1.0, 1.0), (0.3, 2.0), (None, 0.5), (0.5, None)])
def test_against_a_conic_solver(sides: tuple[float | None, float | None]) -> None:
    cost, a, b, epsilon = random_cost(4, 3), random_cost(4, seed=1) + 0.2, random_cost(3, seed=2) + 0.2, 0.1
    b = b if all(sides) else b * a.sum() / b.sum() * 1.3
    P = cp.Variable((4, 3))
    rows, columns = cp.sum(P, 1), cp.sum(P, 0)
    objective = cp.sum(cp.multiply(P, cost.numpy())) - epsilon * cp.sum(cp.entr(P)) - epsilon * cp.sum(P)
    constraints = []
    for sums, wanted, rho in ((rows, a, sides[0]), (columns, b, sides[1])):
        if rho is None:
            constraints.append(sums == wanted.numpy())
        else:
            objective += rho * cp.sum(cp.kl_div(sums, wanted.numpy()))
    problem = cp.Problem(cp.Minimize(objective), constraints)
    problem.solve(solver="CLARABEL")
    found = sinkhorn(cost, a, b, epsilon=epsilon, marginal_penalty=sides)
    torch.testing.assert_close(found.plan, torch.from_numpy(P.value), rtol=0, atol=5e-5)
    assert float(found.dual_value) == pytest.approx(problem.value + epsilon * float(a.sum() + b.sum()) / 2, abs=1e-6)


def test_the_returned_numbers_are_what_they_say() -> None:
    cost, a, b, rho = random_cost(3, 5, 7), 2 * marginal(3, 5), marginal(7, seed=1), 0.4
    found = sinkhorn(cost, a, b, epsilon=0.05, marginal_penalty=rho)
    plan = torch.exp((found.f.unsqueeze(-1) + found.g.unsqueeze(-2) - cost) / 0.05)
    torch.testing.assert_close(found.plan, plan, rtol=1e-10, atol=0)
    rows, columns = plan.sum(-1), plan.sum(-2)
    torch.testing.assert_close(found.f, -rho * (rows / a).log(), rtol=0, atol=1e-8)
    torch.testing.assert_close(found.g, -rho * (columns / b).log(), rtol=0, atol=1e-8)
    torch.testing.assert_close(found.value, (plan * cost).sum((-1, -2)))
    missed = rho * (_divergence(rows, a) + _divergence(columns, b))
    entropy = 0.05 * ((plan * plan.log()).sum((-1, -2)) - plan.sum((-1, -2)) + (a.sum(-1) + b.sum(-1)) / 2)
    torch.testing.assert_close(found.dual_value, found.value + missed + entropy)
    errors = [
        (sums - part * torch.exp(-potential / rho)).abs().sum(-1) for sums, part, potential in ((rows, a, found.f), (columns, b, found.g))
    ]
    torch.testing.assert_close(found.marginal_error, torch.maximum(*errors), rtol=0.5, atol=1e-14)


def test_the_gradient_of_the_dual_value() -> None:
    cost, a, b = random_cost(5, 4).requires_grad_(), (2 * marginal(5)).requires_grad_(), marginal(4, seed=1).requires_grad_()
    found = sinkhorn(cost, a, b, epsilon=0.05, marginal_penalty=0.3)
    slopes = torch.autograd.grad(found.dual_value, (cost, a, b))
    torch.testing.assert_close(slopes[0], found.plan)
    for slope, potential in zip(slopes[1:], (found.f, found.g), strict=True):
        torch.testing.assert_close(slope, 0.3 * (1 - torch.exp(-potential / 0.3)) + 0.05 / 2)


def test_a_large_penalty_is_the_balanced_problem() -> None:
    cost, a, b = random_cost(6, 5).requires_grad_(), marginal(6), marginal(5, seed=1)
    weights, exact = random_cost(6, 5, seed=2), sinkhorn(cost, a, b, epsilon=0.05)
    wanted = torch.autograd.grad((weights * exact.plan).sum(), cost, retain_graph=True)[0]
    for penalty in (1e7, (1e7, None), torch.tensor(1e7)):
        found = sinkhorn(cost, a, b, epsilon=0.05, marginal_penalty=penalty)
        for name in ("plan", "value", "dual_value"):
            torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=0, atol=1e-7)
        torch.testing.assert_close(found.f - found.f[0], exact.f - exact.f[0], rtol=0, atol=1e-6)
        slope = torch.autograd.grad((weights * found.plan).sum(), cost)[0]
        torch.testing.assert_close(slope, wanted, rtol=0, atol=1e-6)
    for nothing in (None, float("inf"), (None, float("inf"))):
        assert torch.equal(sinkhorn(cost, a, b, epsilon=0.05, marginal_penalty=nothing).plan, exact.plan)


def test_a_small_penalty_gives_everything_up() -> None:
    cost = 1 + random_cost(4, 4)
    assert float(sinkhorn(cost, epsilon=0.01, marginal_penalty=0.01).plan.sum()) < 1e-10


def test_one_side_alone() -> None:
    cost, a = random_cost(5, 4), 3 * marginal(5)
    found = sinkhorn(cost, a, marginal(4), epsilon=0.02, marginal_penalty=(None, 0.1))
    torch.testing.assert_close(found.plan.sum(-1), a, rtol=0, atol=1e-9)
    mirrored = sinkhorn(cost.mT, marginal(4), a, epsilon=0.02, marginal_penalty=(0.1, None))
    torch.testing.assert_close(mirrored.plan.mT, found.plan, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_temperature_and_penalty(name: str, dtype: torch.dtype) -> None:
    cost = COSTS[name].to(dtype).requires_grad_()
    a, b = ((scale * marginal(size)).to(dtype).requires_grad_() for scale, size in zip((1, 2), cost.shape, strict=True))
    for epsilon in (0.1, 1e-2, 1e-3):
        for penalty in (0.05, 1.0, 1e3, (None, 1.0)):
            found = sinkhorn(cost, a, b, epsilon=epsilon, marginal_penalty=penalty)
            assert float(found.marginal_error) <= (1e-9 if dtype == torch.float64 else 2e-6)
            loss = (found.plan * found.plan.detach()).sum() + found.value + found.f.mean()
            slopes = torch.autograd.grad(loss, (cost, a, b))
            assert all(bool(torch.isfinite(part).all()) for part in slopes)


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(-2.5, 1), st.floats(-1, 4), st.integers(0, 10_000))
def test_methods_agree(n: int, m: int, log_epsilon: float, log_ratio: float, seed: int) -> None:
    cost, a, b = random_cost(n, m, seed=seed), 2 * marginal(n, seed=seed), marginal(m, seed=seed + 1)
    epsilon = 10**log_epsilon
    found = [
        sinkhorn(cost, a, b, epsilon=epsilon, marginal_penalty=epsilon * 10**log_ratio, method=method, max_iter=100_000)
        for method in ("auto", "sinkhorn", "newton")
    ]
    for other in found[1:]:
        torch.testing.assert_close(other.plan, found[0].plan, rtol=0, atol=1e-6 * float(found[0].plan.sum()))


def test_gradient_of_the_plan_at_a_low_temperature() -> None:
    cost, a, weights = random_cost(60, 50), 1.5 * marginal(60), random_cost(60, 50, seed=2) - 0.5
    directions = random_cost(60, 50, seed=3) - 0.5, random_cost(60, seed=4) / 60

    def loss(cost: Tensor, a: Tensor, **options: float) -> Tensor:
        return (weights * sinkhorn(cost, a, epsilon=1e-3, marginal_penalty=0.5, **options).plan).sum()

    leaves = cost.clone().requires_grad_(), a.clone().requires_grad_()
    slopes = torch.autograd.grad(loss(*leaves), leaves)
    step = 1e-6

    def along(t: float) -> Tensor:
        return loss(*(x + t * step * v for x, v in zip((cost, a), directions, strict=True)), tol=1e-13)

    exact = (8 * (along(1) - along(-1)) - (along(2) - along(-2))) / (12 * step)
    pushed = sum((slope * v).sum() for slope, v in zip(slopes, directions, strict=True))
    assert float((pushed - exact).abs() / exact.abs()) <= 1e-6


def test_zero_marginals_equal_the_problem_without_them() -> None:
    cost = random_cost(4, 3).requires_grad_()
    a = torch.tensor([0.3, 0.0, 0.3, 0.8], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.0, 0.5, 0.25], dtype=torch.float64, requires_grad=True)
    rows, columns = a.detach().nonzero().squeeze(-1), b.detach().nonzero().squeeze(-1)
    found = sinkhorn(cost, a, b, epsilon=0.05, marginal_penalty=0.5)
    small = sinkhorn(cost[rows][:, columns], a[rows], b[columns], epsilon=0.05, marginal_penalty=0.5)
    assert torch.equal(found.f.isneginf(), a == 0)
    torch.testing.assert_close(found.plan[rows][:, columns], small.plan, rtol=0, atol=1e-12)
    exact = torch.autograd.grad(small.plan.square().sum() + small.f.sum() + small.dual_value, (cost, a, b))
    slopes = torch.autograd.grad(found.plan.square().sum() + found.f[rows].sum() + found.dual_value, (cost, a, b))
    torch.testing.assert_close(slopes[0], exact[0])
    for slope, true, kept in zip(slopes[1:], exact[1:], (rows, columns), strict=True):
        torch.testing.assert_close(slope[kept], true[kept])


def test_failures() -> None:
    cost, a, b = random_cost(3, 2, 2), torch.full((2,), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(InfeasibleError, match="no mass at all"):
        sinkhorn(cost, a, b, marginal_penalty=1.0)
    nothing = sinkhorn(cost, b, b, marginal_penalty=1.0)
    assert not nothing.plan.any()
    rho = torch.tensor([1.0, -1.0, float("nan")], dtype=torch.float64, requires_grad=True)
    found = sinkhorn(cost, a, 2 * a, marginal_penalty=rho, on_failure="nan")
    assert found.status.tolist() == [0, Status.NUMERICAL_ERROR, Status.NUMERICAL_ERROR]
    (slope,) = torch.autograd.grad(found.plan[0].square().sum() + found.plan[1:].nan_to_num().sum(), rho)
    assert slope[0] != 0
    assert not slope[1:].any()
    with pytest.raises(NotConvergedError):
        sinkhorn(cost, a, 2 * a, epsilon=1e-4, marginal_penalty=1e3, method="sinkhorn", max_iter=20)
    with pytest.raises(ShapeError, match="marginal_penalty do not broadcast"):
        sinkhorn(cost, marginal_penalty=torch.ones(5))
    for wrong, message in ((0.0, "must be positive"), ((1.0, 1.0, 1.0), "a pair"), ((-1.0, None), "must be positive")):
        with pytest.raises(ValueError, match=message):
            sinkhorn(cost, marginal_penalty=wrong)
    with pytest.raises(ValueError, match="unroll"):
        sinkhorn(cost, marginal_penalty=1.0, backward="unroll")


def test_module() -> None:
    cost = random_cost(3, 2)
    layer = SinkhornLayer(0.1, marginal_penalty=(None, torch.tensor(0.5, dtype=torch.float64)))
    assert "column_penalty" in layer.state_dict()
    assert repr(layer) == "SinkhornLayer(epsilon=0.1, on_failure='raise', marginal_penalty=(None, ()))"
    assert torch.equal(layer(cost), sinkhorn(cost, epsilon=0.1, marginal_penalty=(None, 0.5)).plan)
    assert repr(SinkhornLayer(marginal_penalty=2.0)) == "SinkhornLayer(epsilon=0.1, on_failure='raise', marginal_penalty=2.0)"


@settings(max_examples=10)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(-2, 0.5), st.floats(-1, 1.5), st.integers(0, 10_000))
def test_the_divergence_of_unbalanced_clouds(n: int, m: int, log_epsilon: float, log_penalty: float, seed: int) -> None:
    x, y = random_cost(n, 2, seed=seed), random_cost(m, 2, seed=seed + 1)
    a, b = 2 * marginal(n, seed=seed), marginal(m, seed=seed)
    options = {"epsilon": 10**log_epsilon, "marginal_penalty": 10**log_penalty}
    assert abs(float(sinkhorn_divergence(x, x, a, a, **options).value)) <= 1e-9
    # A point in two halves is the same measure.
    halves = sinkhorn_divergence(torch.cat([x, x]), x, torch.cat([a, a]) / 2, a, **options)
    assert abs(float(halves.value)) <= 1e-8
    assert float(sinkhorn_divergence(x, y, a, b, **options).value) >= -1e-9


def test_the_gradient_of_the_unbalanced_divergence() -> None:
    inputs = (random_cost(3, 2), random_cost(2, 2, seed=1), 2 * marginal(3), random_cost(1)[0] + 0.1, random_cost(1, seed=5)[0] + 0.3)
    leaves = [part.clone().requires_grad_() for part in inputs]

    def value(x: Tensor, y: Tensor, a: Tensor, epsilon: Tensor, rho: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, a, epsilon=epsilon, marginal_penalty=rho, tol=1e-14).value

    assert torch.autograd.gradcheck(value, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(value, leaves, fast_mode=True)
