"""The engine: every family solved to the optimality conditions, element by element, and no status that the numbers do not bear out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from difflayers import Status
from difflayers.convex.active_set import DenseQP, KKTPoint
from difflayers.convex.interior_point import DenseResult, solve_dense
from tests.convex.dense_families import FEASIBLE, apply, feasible, infeasible, kkt_violation, unbounded


def point_of(result: DenseResult) -> KKTPoint:
    return KKTPoint(*result[:5])


def element(problem: DenseQP, i: int) -> DenseQP:
    return problem.take(torch.tensor([i]))


@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize("kind", FEASIBLE)
def test_every_family_is_solved(kind, n):
    problem = feasible(kind, n, seed=n)
    result = solve_dense(problem)
    assert result.status.tolist() == [Status.SOLVED] * 8
    violation = kkt_violation(problem, point_of(result))
    assert max(violation.values()) <= 1e-8, violation
    assert float(result.primal_residual.max()) <= 1e-8
    assert float(result.dual_residual.max()) <= 1e-8
    assert float(result.duality_gap.max()) <= 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("n", [50, 100])
@pytest.mark.parametrize("kind", FEASIBLE)
def test_every_family_is_solved_at_size(kind, n):
    problem = feasible(kind, n, batch=4, seed=n)
    result = solve_dense(problem)
    assert result.status.tolist() == [Status.SOLVED] * 4
    assert max(kkt_violation(problem, point_of(result)).values()) <= 1e-8


def test_a_degenerate_linear_program_of_permutations():
    problem = feasible("assignment", 4)
    result = solve_dense(problem)
    assert bool((result.status == Status.SOLVED).all())
    for i in range(8):
        exact = linprog(problem.q[i].numpy(), A_eq=problem.A[0].numpy(), b_eq=problem.b[i].numpy(), bounds=(0, 2)).fun
        assert float((problem.q[i] * result.x[i]).sum()) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("kind", ["random", "singular P", "linear", "fixed variables", "far and absent limits", "equalities only"])
def test_a_batch_equals_a_loop(kind):
    problem = feasible(kind, 8, seed=3)
    result = solve_dense(problem)
    for i in range(8):
        alone = solve_dense(element(problem, i))
        for whole, single in zip(point_of(result), point_of(alone), strict=True):
            if whole is not None:
                torch.testing.assert_close(whole[i], single[0], rtol=1e-9, atol=1e-9)
        assert result.iterations[i] == alone.iterations[0]


@pytest.mark.parametrize("kind", ["random", "singular P", "equalities only", "unconstrained"])
def test_shared_matrices_equal_their_copies(kind):
    problem = feasible(kind, 8, seed=4)
    shared = problem._replace(P=problem.P[:1], G=problem.G[:1], A=problem.A[:1])
    inside = torch.ones_like(problem.q)
    shared = shared._replace(h=apply(shared.G, inside) + 1, b=apply(shared.A, inside))
    if problem.lb is not None:
        shared = shared._replace(lb=inside - 1, ub=inside + 1)
    copied = shared._replace(P=shared.P.repeat(8, 1, 1), G=shared.G.repeat(8, 1, 1), A=shared.A.repeat(8, 1, 1))
    mixed = shared._replace(A=copied.A)
    results = [solve_dense(variant) for variant in (shared, copied, mixed)]
    for result in results:
        assert bool((result.status == Status.SOLVED).all())
        torch.testing.assert_close(result.x, results[0].x, rtol=1e-9, atol=1e-9)


def test_the_scale_of_the_data_does_not_matter():
    problem = feasible("random", 8, seed=5)
    reference = solve_dense(problem)
    for cost, length, row in ((1e6, 1.0, 1.0), (1e-4, 1.0, 1.0), (1.0, 1e3, 1.0), (1.0, 1e-3, 1.0), (1.0, 1.0, 1e5)):
        scaled = DenseQP(
            cost / length**2 * problem.P,
            cost / length * problem.q,
            row / length * problem.G,
            row * problem.h,
            problem.A / length,
            problem.b,
        )
        result = solve_dense(scaled)
        assert bool((result.status == Status.SOLVED).all())
        torch.testing.assert_close(result.x / length, reference.x, rtol=1e-7, atol=1e-8)


def test_an_element_that_fails_leaves_its_neighbours_alone():
    good, bad, free = feasible("random", 6), infeasible("opposite rows", 6), unbounded("linear", 6)
    problem = good._replace(P=good.P.clone(), q=good.q.clone(), G=good.G.clone(), h=good.h.clone(), A=good.A[:, :0], b=good.b[:, :0])
    problem.q[1] = torch.nan
    problem.P[2, 0, 0] = torch.inf
    problem.G[3], problem.h[3] = torch.cat((bad.G[0, 1:6], bad.G[0, -1:])), torch.cat((bad.h[0, 1:6], bad.h[0, -1:]))
    problem.G[3, 0], problem.h[3, 0] = bad.G[0, 0], bad.h[0, 0]
    problem.P[4], problem.q[4], problem.G[4], problem.h[4] = 0, free.q[0], free.G[0], free.h[0]
    problem.h[5, 0] = -torch.inf
    result = solve_dense(problem)
    expected = [Status.SOLVED, Status.NUMERICAL_ERROR, Status.NUMERICAL_ERROR, Status.PRIMAL_INFEASIBLE, Status.DUAL_INFEASIBLE]
    assert result.status.tolist() == [*expected, Status.PRIMAL_INFEASIBLE, Status.SOLVED, Status.SOLVED]
    for i in (0, 6, 7):
        torch.testing.assert_close(result.x[i], solve_dense(element(problem, i)).x[0], rtol=1e-9, atol=1e-9)
    assert bool(result.x[1:3].isnan().all())
    assert bool(
        result.factor.solve(KKTPoint(problem.q[:].nan_to_num(), problem.b, 0 * problem.h.nan_to_num(0, 0, 0)))[0].x[0].isfinite().all()
    )


def test_data_that_is_shared_and_broken_fails_everywhere():
    problem = feasible("random", 5)
    problem = problem._replace(P=torch.full_like(problem.P[:1], torch.nan))
    assert solve_dense(problem).status.tolist() == [Status.NUMERICAL_ERROR] * 8


@pytest.mark.parametrize("kind", ["random", "box", "linear", "many rows"])
def test_a_warm_start_costs_no_iteration_where_the_active_set_stays(kind):
    problem = feasible(kind, 10, seed=6)
    first = solve_dense(problem)
    moved = problem._replace(q=problem.q * (1 + 1e-9))
    again = solve_dense(moved, start=point_of(first))
    assert again.status.tolist() == [Status.SOLVED] * 8
    assert again.iterations.tolist() == [0] * 8
    elsewhere = KKTPoint(*(None if t is None else t.flip(0) for t in point_of(first)))
    torch.testing.assert_close(solve_dense(problem, start=elsewhere).x, first.x, rtol=1e-9, atol=1e-9)
    nothing = KKTPoint(*(None if t is None else torch.full_like(t, torch.nan) for t in point_of(first)))
    torch.testing.assert_close(solve_dense(problem, start=nothing).x, first.x, rtol=1e-9, atol=1e-9)


def test_the_iteration_limit_is_told():
    problem = feasible("many rows", 20)
    result = solve_dense(problem, max_iter=2)
    assert Status.MAX_ITER in result.status.tolist()
    unsolved = result.status == Status.MAX_ITER
    error = torch.stack(result[6:9]).amax(0)
    assert bool((error[unsolved] > 1e-9).all())
    assert bool(result.x.isfinite().all())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(0, 7), st.integers(0, 3), st.booleans(), st.booleans())
def test_no_status_that_the_numbers_do_not_bear_out(seed, n, m, p, bounded, definite):
    """Small integers make ties, rank deficiency, degenerate vertices, empty and unbounded sets: every status must be the true one."""
    rng = np.random.default_rng(seed)

    def integers(*size):
        return torch.from_numpy(rng.integers(-2, 3, (4, *size)).astype(float))

    root = integers(n, n if definite else n // 2)
    bounds = {}
    if bounded:
        lb = integers(n) - 1
        ub = lb + torch.from_numpy(rng.integers(0, 4, (4, n)).astype(float))
        bounds = {"lb": torch.where(lb < -2, -torch.inf, lb), "ub": torch.where(ub > 2, torch.inf, ub)}
    problem = DenseQP(root @ root.mT, integers(n), integers(m, n), integers(m), integers(p, n), integers(p), **bounds)
    result = solve_dense(problem)
    for i in range(4):
        data = [None if t is None else t[i].numpy() for t in problem]
        P, q, G, h, A, b, lb, ub = data
        limits = (-np.inf, np.inf) if lb is None else np.stack((lb, ub), -1)
        has_point = linprog(0 * q, A_ub=G, b_ub=h, A_eq=A, b_eq=b, bounds=limits).status == 0
        status = result.status[i].item()
        assert (status == Status.PRIMAL_INFEASIBLE) == (not has_point)
        if has_point:  # unbounded if and only if the cone of recession has a ray in the kernel of P along which q falls
            cone = (-1, 1) if lb is None else np.stack((np.where(np.isinf(lb), -1, 0), np.where(np.isinf(ub), 1, 0)), -1)
            ray = linprog(q, A_ub=G, b_ub=0 * h, A_eq=np.concatenate((P, A)), b_eq=np.zeros(n + p), bounds=cone)
            assert status == (Status.DUAL_INFEASIBLE if ray.fun < -1e-7 else Status.SOLVED)
    solved = (result.status == Status.SOLVED).nonzero().squeeze(-1)
    point = KKTPoint(*(None if t is None else t[solved] for t in point_of(result)))
    # What is certified is relative to the terms of the conditions: of an ill-conditioned P they are large.
    size = 1 + float(point.x.abs().amax() if point.x.numel() else 0.0) ** 2
    assert max(kkt_violation(problem.take(solved), point).values()) <= 1e-8 * size


def test_inputs_stay_and_the_default_dtype_does_not_leak():
    problem = feasible("fixed variables", 6)
    before = [None if t is None else t.clone() for t in problem]
    torch.set_default_dtype(torch.float32)
    result = solve_dense(problem)
    for old, new in zip(before, problem, strict=True):
        assert old is None or torch.equal(old, new)
    assert all(t.dtype == torch.float64 for t in (*point_of(result), *result[6:9]))
    assert not any(t.requires_grad for t in point_of(result))
