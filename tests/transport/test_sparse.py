"""Sparse transport: closed forms, other solvers, every choice of supports, finite differences, and what must not hold."""

from __future__ import annotations

import itertools
import warnings

import cvxpy
import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from difflayers.convex import solve_qp
from difflayers.convex.projections import projection_transport
from difflayers.errors import ConvergenceWarning, InfeasibleError, NotConvergedError, ShapeError
from difflayers.solution import Status
from difflayers.transport import SparseTransportLayer, TransportSolution, sparse_transport
from tests.transport.problems import COSTS, marginal, random_cost

ignore_misses = pytest.mark.filterwarnings("ignore::difflayers.errors.ConvergenceWarning")


def _problem(n: int = 7, m: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return random_cost(n, m, seed=seed), marginal(n, seed=seed), marginal(m, seed=seed + 1)


def _regularized_value(found: TransportSolution, gamma: float) -> Tensor:
    return found.value + gamma / 2 * found.plan.square().sum((-1, -2))


def _against_differences(function, inputs, directions, steps, tolerance):
    leaves = [part.clone().requires_grad_() for part in inputs]
    slopes = torch.autograd.grad(function(*leaves), leaves)
    for i, (slope, direction, step) in enumerate(zip(slopes, directions, steps, strict=True)):
        moved = [[part + sign * step * direction if i == j else part for j, part in enumerate(inputs)] for sign in (1, -1)]
        difference = (function(*moved[0]) - function(*moved[1])) / (2 * step)
        torch.testing.assert_close((slope * direction).sum(), difference, rtol=tolerance, atol=tolerance)


def test_without_costs_in_closed_form() -> None:
    a, b = marginal(4), marginal(6, seed=1)
    found = sparse_transport(torch.zeros(4, 6, dtype=torch.float64), a, b, gamma=0.7)
    torch.testing.assert_close(found.plan, a[:, None] / 6 + b / 4 - 1 / 24)
    torch.testing.assert_close(found.dual_value, 0.35 * found.plan.square().sum())


def test_two_by_two_in_closed_form() -> None:
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    for gamma in (1.0, 3.0, 20.0):
        moved = max(0.25 - 1 / (2 * gamma), 0.0)
        expected = torch.tensor([[0.5 - moved, moved], [moved, 0.5 - moved]], dtype=torch.float64)
        torch.testing.assert_close(sparse_transport(cost, gamma=gamma).plan, expected)


@pytest.mark.parametrize("shape", [(7, 5), (5, 9)])
def test_against_cvxpy(shape: tuple[int, int]) -> None:
    C, a, b = _problem(*shape)
    T = cvxpy.Variable(shape, nonneg=True)
    objective = cvxpy.sum(cvxpy.multiply(T, C.numpy())) + 0.15 * cvxpy.sum_squares(T)
    rows, columns = cvxpy.sum(T, axis=1) == a.numpy(), cvxpy.sum(T, axis=0) == b.numpy()
    problem = cvxpy.Problem(cvxpy.Minimize(objective), [rows, columns])
    problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    found = sparse_transport(C, a, b, gamma=0.3)
    torch.testing.assert_close(found.plan, torch.from_numpy(T.value), atol=1e-7, rtol=0)
    torch.testing.assert_close(float(found.dual_value), problem.value, atol=1e-9, rtol=0)
    torch.testing.assert_close(_regularized_value(found, 0.3), found.dual_value)
    f = torch.from_numpy(-rows.dual_value)
    torch.testing.assert_close(found.f - found.f[0], f - f[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", list(COSTS))
@pytest.mark.parametrize("gamma", [1e-3, 0.3, 50.0])
def test_every_cost_is_solved(name: str, gamma: float) -> None:
    cost = COSTS[name]
    for a, b in ((None, None), (marginal(cost.shape[0]), marginal(cost.shape[1], seed=1))):
        found = sparse_transport(cost, a, b, gamma=gamma)
        assert int(found.status) == Status.SOLVED
        torch.testing.assert_close(_regularized_value(found, gamma), found.dual_value, atol=1e-9, rtol=1e-9)
        # The plan is the positive part of f ⊕ g − cost, everywhere: with the marginals that proves it.
        expected = (found.f[:, None] + found.g - cost).clamp(min=0) / gamma
        torch.testing.assert_close(found.plan, expected, atol=1e-9, rtol=0)


def test_it_is_a_projection() -> None:
    C, a, b = _problem(12, 20)
    torch.testing.assert_close(sparse_transport(C, a, b, gamma=0.4).plan, projection_transport(-C / 0.4, (a, b)), atol=1e-9, rtol=0)


@pytest.mark.parametrize("gamma", [0.05, 1.0])
def test_gradients_at_200_points(gamma: float) -> None:
    n = 200
    generator = torch.Generator().manual_seed(0)
    C, a, b = _problem(n, n)
    weights = torch.randn(n, n, dtype=torch.float64, generator=generator) * n
    sides = torch.randn(2, n, dtype=torch.float64, generator=generator)
    sides = (sides - sides.mean(-1, keepdim=True)) * a.min()

    def loss(C: Tensor, a: Tensor, b: Tensor, gamma: Tensor) -> Tensor:
        return (weights * sparse_transport(C, a, b, gamma=gamma, tol=1e-13).plan).sum()

    directions = (torch.randn(n, n, dtype=torch.float64, generator=generator), *sides, torch.ones((), dtype=torch.float64))
    steps = (1e-7 * gamma, 1e-4, 1e-4, 1e-5 * gamma)
    _against_differences(loss, (C, a, b, torch.tensor(gamma, dtype=torch.float64)), directions, steps, 1e-6)


def test_second_derivatives() -> None:
    C, left, right = _problem(4, 5)

    def plan(C: Tensor, left: Tensor, right: Tensor, gamma: Tensor) -> Tensor:
        return sparse_transport(C, left / left.sum(), right / right.sum(), gamma=gamma, tol=1e-13).plan

    leaves = tuple(part.requires_grad_() for part in (C, left, right, torch.tensor(0.6, dtype=torch.float64)))
    assert torch.autograd.gradcheck(plan, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(plan, leaves, fast_mode=True)


@ignore_misses
def test_enough_nonzeros_are_no_constraint() -> None:
    C, a, b = _problem(20, 30)
    free = sparse_transport(C, a, b, gamma=0.5)
    most = int((free.plan > 0).sum(0).max())
    for k in range(most, most + 3):
        found = sparse_transport(C, a, b, gamma=0.5, k=k)
        torch.testing.assert_close(found.plan, free.plan, atol=1e-11, rtol=0)
        torch.testing.assert_close(found.dual_value, free.dual_value)
    assert int(sparse_transport(C, a, b, gamma=0.5, k=1, on_failure="nan").status) == Status.NOT_TIGHT


@ignore_misses
@pytest.mark.parametrize("seed", range(3))
def test_the_relaxation_between_linear_program_and_free_plan(seed: int) -> None:
    C, a, b = _problem(6, 8, seed)
    gamma = 2.0
    values = torch.stack([sparse_transport(C, a, b, gamma=gamma, k=k, on_failure="warn").dual_value for k in range(1, 7)])
    assert bool((values.diff() <= 1e-12).all())
    equations = np.concatenate([np.kron(np.eye(6), np.ones(8)), np.kron(np.ones(6), np.eye(8))])
    linear = scipy.optimize.linprog(C.numpy().ravel(), A_eq=equations, b_eq=np.concatenate([a, b])).fun
    torch.testing.assert_close(float(values[0]), linear + gamma / 2 * float(b.square().sum()), atol=1e-9, rtol=0)
    torch.testing.assert_close(values[-1], sparse_transport(C, a, b, gamma=gamma).dual_value)


@ignore_misses
@pytest.mark.parametrize("seed", range(6))
def test_against_all_choices_of_supports(seed: int) -> None:
    n, m, k, gamma = 4, 3, 2, 0.5
    C, a, b = _problem(n, m, seed)
    choices = list(itertools.combinations(range(n), k))
    masks = torch.zeros(len(choices) ** m, n, m, dtype=torch.float64)
    for mask, supports in zip(masks, itertools.product(choices, repeat=m), strict=True):
        for j, support in enumerate(supports):
            mask[list(support), j] = 1
    rows = torch.kron(torch.eye(n, dtype=torch.float64), torch.ones(1, m, dtype=torch.float64))
    columns = torch.kron(torch.ones(1, n, dtype=torch.float64), torch.eye(m, dtype=torch.float64))
    solved = solve_qp(
        gamma * torch.eye(n * m, dtype=torch.float64),
        C.flatten(),
        A=torch.cat([rows, columns[:-1]]),
        b=torch.cat([a, b[:-1]]),
        lb=torch.zeros(n * m, dtype=torch.float64),
        ub=masks.flatten(1),
        on_failure="nan",
    )
    best = (gamma / 2 * solved.x.square().sum(-1) + solved.x @ C.flatten()).nan_to_num(nan=torch.inf).min()
    found = sparse_transport(C, a, b, gamma=gamma, k=k, on_failure="warn")
    assert float(found.dual_value) <= float(best) + 1e-9
    assert int(found.status) in (Status.SOLVED, Status.NOT_TIGHT)
    if int(found.status) == Status.SOLVED:
        torch.testing.assert_close(_regularized_value(found, gamma), best, atol=1e-8, rtol=0)


def test_balanced_assignment_is_tight_although_columns_tie() -> None:
    # 4 rows take 6 columns each; the linear program has such a solution, with ties in the potentials at many columns.
    cost = random_cost(4, 24)
    found = sparse_transport(cost, gamma=1.0, k=1)
    assert int(found.status) == Status.SOLVED
    assert torch.equal((found.plan > 0).sum(0), torch.ones(24, dtype=torch.int64))
    rows, columns = scipy.optimize.linear_sum_assignment(cost.repeat_interleave(6, 0).numpy())
    torch.testing.assert_close(float(found.value), float(cost[rows // 6, columns].mean()))


@ignore_misses
def test_rows_that_are_missed_are_reported() -> None:
    C, a, b = _problem()
    with pytest.raises(NotConvergedError, match="NOT_TIGHT") as caught:
        sparse_transport(C, a, b, gamma=0.5, k=2)
    assert int(caught.value.solution.status) == Status.NOT_TIGHT
    found = sparse_transport(C, a, b, gamma=0.5, k=2, on_failure="warn")
    assert bool(((found.plan > 0).sum(0) <= 2).all())
    torch.testing.assert_close(found.plan.sum(0), b)
    error = (found.plan.sum(1) - a).abs().sum()
    torch.testing.assert_close(found.marginal_error, error)
    assert float(error) > 1e-3
    # Each column is a best response to the potentials: the projection of its two largest entries.
    v = (found.f[:, None] - C) / 0.5
    for j in range(5):
        gain = {support: _best_response(v[list(support), j], b[j]) for support in itertools.combinations(range(7), 2)}
        chosen = (found.plan[:, j] * v[:, j] - found.plan[:, j].square() / 2).sum()
        torch.testing.assert_close(chosen, torch.stack(list(gain.values())).max(), atol=1e-8, rtol=0)


def _best_response(v: Tensor, mass: Tensor) -> Tensor:
    first = ((v[0] - v[1] + mass) / 2).clamp(min=torch.zeros(()), max=mass)
    y = torch.stack([first, mass - first])
    return (y * v - y * y / 2).sum()


def test_a_warning_and_an_iteration_limit() -> None:
    C, a, b = _problem()
    with pytest.warns(ConvergenceWarning, match="NOT_TIGHT"):
        sparse_transport(C, a, b, gamma=0.5, k=2, on_failure="warn")
    assert int(sparse_transport(C, a, b, gamma=0.5, k=2, max_iter=2, on_failure="nan").status) == Status.MAX_ITER
    assert int(sparse_transport(C, a, b, gamma=0.5, max_iter=2, on_failure="nan").status) == Status.MAX_ITER


@pytest.mark.parametrize("k", [1, 2])
def test_not_tight_is_never_said_before_the_maximum(k: int) -> None:
    C, a, b = _problem()
    best = sparse_transport(C, a, b, gamma=0.5, k=k, on_failure="nan")
    assert int(best.status) == Status.NOT_TIGHT
    value = _silently(C, a, b, k, None).dual_value
    found = [_silently(C, a, b, k, steps) for steps in range(1, int(best.iterations) + 1)]
    assert int(found[0].status) == Status.MAX_ITER
    assert int(found[-1].status) == Status.NOT_TIGHT
    for each in found:
        if int(each.status) == Status.NOT_TIGHT:
            torch.testing.assert_close(each.dual_value, value, atol=1e-9, rtol=0)


def _silently(C: Tensor, a: Tensor, b: Tensor, k: int, max_iter: int | None) -> TransportSolution:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparse_transport(C, a, b, gamma=0.5, k=k, max_iter=max_iter, on_failure="warn")


def test_failures_leave_neighbours_alone() -> None:
    C, a, b = _problem()
    costs = torch.stack([C, C * torch.nan, C, C]).requires_grad_()
    masses = torch.stack([a, a, 2 * a, a]).requires_grad_()
    gamma = torch.tensor([0.5, 0.5, 0.5, 5.0], dtype=torch.float64)
    found = sparse_transport(costs, masses, b, gamma=gamma, k=4, on_failure="nan")
    assert found.status.tolist() == [Status.SOLVED, Status.NUMERICAL_ERROR, Status.PRIMAL_INFEASIBLE, found.status[3]]
    alone = sparse_transport(C, a, b, gamma=0.5, k=4)
    torch.testing.assert_close(found.plan[0], alone.plan)
    assert bool(found.plan[1:3].isnan().all())
    slopes = torch.autograd.grad(found.plan[0].square().sum() + found.plan[1:3].nan_to_num(0).sum(), (costs, masses))
    for slope in slopes:
        assert bool(torch.isfinite(slope).all())
        assert not bool(slope[1:].any())
    with pytest.raises(InfeasibleError, match="same total mass"):
        sparse_transport(C, 2 * a, b, gamma=0.5)


@ignore_misses
def test_derivatives_where_the_relaxation_is_not_tight() -> None:
    # The plan moves like the one on its support with the marginals that it has.
    C, a, b = (part.requires_grad_() for part in _problem())
    found = sparse_transport(C, a, b, gamma=0.5, k=2, on_failure="warn")
    weights = random_cost(7, 5, seed=9)
    slopes = torch.autograd.grad((weights * found.plan).sum(), (C, a, b))
    barred = torch.where(found.plan > 0, 0.0, 1e3).detach()
    rows = found.plan.detach().sum(1).requires_grad_()
    same = sparse_transport(C + barred, rows, b, gamma=0.5)
    torch.testing.assert_close(same.plan, found.plan, atol=1e-9, rtol=0)
    expected = torch.autograd.grad((weights * same.plan).sum(), (C, rows, b))
    for slope, true in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, true, atol=1e-8, rtol=1e-8)


@ignore_misses
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_relaxed_value_has_exact_derivatives(k: int) -> None:
    C, a, b = _problem()
    gamma = torch.tensor(0.5, dtype=torch.float64)

    def value(C: Tensor, a: Tensor, b: Tensor, gamma: Tensor) -> Tensor:
        return sparse_transport(C, a, b, gamma=gamma, k=k, on_failure="warn").dual_value

    sides = [part - part.mean() for part in (marginal(7, seed=5), marginal(5, seed=6))]
    directions = (random_cost(7, 5, seed=7), *sides, torch.ones_like(gamma))
    _against_differences(value, (C, a, b, gamma), directions, (1e-6,) * 4, 1e-7)
    # The gradient in the cost is the relaxed plan, which meets both marginals.
    slope = torch.func.grad(value)(C, a, b, gamma)
    torch.testing.assert_close(slope.sum(1), a, atol=1e-9, rtol=0)
    torch.testing.assert_close(slope.sum(0), b, atol=1e-9, rtol=0)


def test_supports_that_fall_apart() -> None:
    # Two groups that exchange nothing. Mass that goes round within a group has a derivative; mass from one to the other has none.
    cost = torch.full((5, 6), 9.0, dtype=torch.float64)
    cost[:2, :3], cost[2:, 3:] = random_cost(2, 3), random_cost(3, 3, seed=1)
    a, b = (torch.tensor(part, dtype=torch.float64) for part in ([0.23, 0.27, 0.22, 0.1, 0.18], [0.2, 0.1, 0.2, 0.13, 0.17, 0.2]))
    weights = random_cost(5, 6, seed=2)

    def loss(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (weights * sparse_transport(cost, a, b, gamma=0.6, tol=1e-12).plan).sum()

    sides = torch.tensor([1.0, -1, 1, -2, 1], dtype=torch.float64), torch.tensor([1.0, 1, -2, -1, 1, 0], dtype=torch.float64)
    _against_differences(loss, (cost, a, b), (random_cost(5, 6, seed=3), *sides), (1e-6,) * 3, 1e-7)
    slopes = torch.func.grad(loss, (1, 2))(cost, a, b)
    for rows, columns in ((slice(0, 2), slice(0, 3)), (slice(2, 5), slice(3, 6))):
        torch.testing.assert_close(slopes[0][rows].sum(), slopes[1][columns].sum())


def test_zero_marginals() -> None:
    C, a, b = _problem()
    zero_a, zero_b = a.clone(), b.clone()
    zero_a[2], zero_b[1] = 0, 0
    zero_a, zero_b = zero_a / zero_a.sum(), zero_b / zero_b.sum()
    leaves = [part.requires_grad_() for part in (C, zero_a, zero_b)]
    for k in (None, 5):
        found = sparse_transport(*leaves, gamma=0.5, k=k)
        assert found.f[2] == -torch.inf
        assert found.g[1] == -torch.inf
        rows, columns = [i for i in range(7) if i != 2], [j for j in range(5) if j != 1]
        part = sparse_transport(C[rows][:, columns], zero_a[rows], zero_b[columns], gamma=0.5, k=k)
        torch.testing.assert_close(found.plan[rows][:, columns], part.plan, atol=1e-10, rtol=0)
        assert not bool(found.plan[2].any())
        assert not bool(found.plan[:, 1].any())
        slopes = torch.autograd.grad(found.plan.square().sum(), leaves)
        assert all(bool(torch.isfinite(slope).all()) for slope in slopes)
        assert slopes[1][2] == 0
        assert slopes[2][1] == 0
    nothing = sparse_transport(C, torch.zeros_like(a), torch.zeros_like(b), gamma=0.5)
    assert int(nothing.status) == Status.SOLVED
    assert not bool(nothing.plan.any())


@ignore_misses
@pytest.mark.parametrize("k", [None, 2])
def test_a_batch_is_a_loop(k: int | None) -> None:
    costs = random_cost(2, 3, 6, 9)
    a, b = marginal(3, 6), marginal(9, seed=1)
    gamma = torch.tensor([[0.01], [3.0]], dtype=torch.float64)
    leaves = [part.requires_grad_() for part in (costs, a, b, gamma)]
    found = sparse_transport(*leaves[:3], gamma=gamma, k=k, on_failure="warn")
    slopes = torch.autograd.grad(found.plan.square().sum() + found.dual_value.sum(), leaves)
    total = [torch.zeros_like(part) for part in leaves]
    for i, j in itertools.product(range(2), range(3)):
        alone = sparse_transport(costs[i, j], a[j], b, gamma=gamma[i, 0], k=k, on_failure="warn")
        torch.testing.assert_close(found.plan[i, j], alone.plan, atol=1e-12, rtol=1e-10)
        assert found.status[i, j] == alone.status
        assert found.iterations[i, j] == alone.iterations
        for target, slope in zip(total, torch.autograd.grad(alone.plan.square().sum() + alone.dual_value, leaves), strict=True):
            target += slope
    for slope, expected in zip(slopes, total, strict=True):
        torch.testing.assert_close(slope, expected, atol=1e-8, rtol=1e-8)
    mapped = torch.func.vmap(lambda c: sparse_transport(c, a, b, gamma=0.5, k=k, on_failure="warn").plan)(costs)
    torch.testing.assert_close(mapped, sparse_transport(costs, a, b, gamma=0.5, k=k, on_failure="warn").plan)


def test_single_precision() -> None:
    C, a, b = (part.float() for part in _problem())
    found = sparse_transport(C, a, b, gamma=0.5)
    assert found.plan.dtype == found.marginal_error.dtype == torch.float32
    torch.testing.assert_close(found.plan.double(), sparse_transport(*_problem(), gamma=0.5).plan, atol=1e-5, rtol=0)


@ignore_misses
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 8), m=st.integers(1, 8), k=st.none() | st.integers(1, 8), scale=st.floats(-2, 2), seed=st.integers(0, 1000),
    grid=st.booleans(),
)  # fmt: skip
def test_what_holds_for_every_problem(n: int, m: int, k: int | None, scale: float, seed: int, grid: bool) -> None:
    C, a, b = _problem(n, m, seed)
    C = (3 * C).round() if grid else C
    gamma = 10**scale
    found = sparse_transport(C, a, b, gamma=gamma, k=k, on_failure="warn")
    assert int(found.status) in ((Status.SOLVED,) if k is None else (Status.SOLVED, Status.NOT_TIGHT))
    assert bool((found.plan >= 0).all())
    torch.testing.assert_close(found.plan.sum(0), b, atol=1e-9, rtol=0)
    assert bool(((found.plan > 0).sum(0) <= (k or n)).all())
    if int(found.status) == Status.SOLVED:
        torch.testing.assert_close(found.plan.sum(1), a, atol=1e-9, rtol=0)
        torch.testing.assert_close(_regularized_value(found, gamma), found.dual_value, atol=1e-7, rtol=1e-7)
    free = sparse_transport(C, a, b, gamma=gamma)
    assert float(found.dual_value) >= float(free.dual_value) - 1e-9 * (1 + gamma)


def test_arguments_that_do_not_fit() -> None:
    C, a, b = _problem()
    for k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="k must be a positive integer"):
            sparse_transport(C, a, b, gamma=1.0, k=k)
    with pytest.raises(ValueError, match="gamma must be positive"):
        sparse_transport(C, a, b, gamma=0.0)
    with pytest.raises(ValueError, match="max_iter"):
        sparse_transport(C, a, b, gamma=1.0, max_iter=0)
    with pytest.raises(ShapeError, match=r"b must have the shape \(\*batch, 5\)"):
        sparse_transport(C, a, a, gamma=1.0)
    with pytest.raises(ShapeError, match=r"do not broadcast: .*a, b and gamma"):
        sparse_transport(C.expand(2, 7, 5), a, b, gamma=torch.ones(3, dtype=torch.float64))


def test_the_module() -> None:
    layer = SparseTransportLayer(torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64)), k=3, tol=1e-9)
    assert repr(layer) == "SparseTransportLayer(gamma=(), k=3, tol=1e-09, on_failure='raise')"
    cost = random_cost(3, 5)
    found = layer.solve(cost)
    torch.testing.assert_close(layer(cost), found.plan)
    found.plan.square().sum().backward()
    assert layer.gamma.grad is not None
    assert "gamma" in dict(SparseTransportLayer(torch.tensor(1.0)).named_buffers())
