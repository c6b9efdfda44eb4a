"""The linear system of an active set against the dense Jacobian of the optimality conditions, and where that is singular."""

import pytest
import torch
from torch.func import jacrev

from difflayers.convex.active_set import ActiveSetFactor, DenseQP, KKTPoint
from difflayers.convex.interior_point import solve_dense
from tests.convex.dense_families import FLOAT, Draw, feasible


def problem_with_sets(bounded: bool, batch: int = 3) -> tuple[DenseQP, list[torch.Tensor | None]]:
    draw = Draw(1)
    root = draw.normal(batch, 7, 7)
    bounds = (-draw.uniform(batch, 7), draw.uniform(batch, 7)) if bounded else (None, None)
    problem = DenseQP(
        root @ root.mT / 7 + 0.1 * torch.eye(7, **FLOAT),
        draw.normal(batch, 7),
        draw.normal(batch, 5, 7),
        draw.normal(batch, 5),
        draw.normal(batch, 2, 7),
        draw.normal(batch, 2),
        *bounds,
    )
    active = draw.uniform(batch, 5).argsort(-1) < 2
    if not bounded:
        return problem, [active, None, None]
    order = draw.uniform(batch, 7).argsort(-1)
    return problem, [active, order == 0, order == 1]


def jacobian(problem: DenseQP, sets: list[torch.Tensor | None], i: int) -> torch.Tensor:
    """The derivative of F for element i, from the definition of F."""
    P, q, G, h, A, b, lb, ub = (None if t is None else t[i] for t in problem)
    active, lower, upper = (None if t is None else t[i] for t in sets)
    sizes = [7, 2, 5] + ([7, 7] if lb is not None else [])

    def conditions(w: torch.Tensor) -> torch.Tensor:
        x, y, z, *sides = w.split(sizes)
        rows = [P @ x + q + A.T @ y + G.T @ z, A @ x - b, torch.where(active, G @ x - h, z)]
        if sides:
            rows[0] = rows[0] - sides[0] + sides[1]
            rows += [torch.where(lower, lb - x, sides[0]), torch.where(upper, x - ub, sides[1])]
        return torch.cat(rows)

    return jacrev(conditions)(torch.zeros(sum(sizes), **FLOAT))


def blocks(vector: torch.Tensor, bounded: bool) -> KKTPoint:
    return KKTPoint(*vector.split([7, 2, 5] + ([7, 7] if bounded else []), -1))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
def test_solves_with_the_jacobian_and_its_transpose(bounded, transpose):
    problem, sets = problem_with_sets(bounded)
    factor = ActiveSetFactor(problem, *sets)
    rhs = Draw(2).normal(4, 3, 28 if bounded else 14)
    solution, residual = factor.solve(blocks(rhs, bounded), transpose=transpose)
    assert residual.shape == (4, 3)
    assert float(residual.max()) < 1e-12
    found = torch.cat([t for t in solution if t is not None], -1)
    for i in range(3):
        matrix = jacobian(problem, sets, i)
        matrix = matrix.T if transpose else matrix
        torch.testing.assert_close(found[:, i], torch.linalg.solve(matrix, rhs[:, i].T).T, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[:, i] @ matrix.T, rhs[:, i], rtol=1e-11, atol=1e-11)
    single, one = factor.solve(blocks(rhs[0], bounded), transpose=transpose)
    assert one.shape == (3,)
    torch.testing.assert_close(torch.cat([t for t in single if t is not None], -1), found[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["random", "linear", "linear, rows only", "ill-conditioned", "fixed variables", "far and absent limits"])
def test_the_factor_of_a_solution_is_accurate(kind):
    problem = feasible(kind, 10, seed=7)
    factor = solve_dense(problem).factor
    draw = Draw(3)
    rhs = KKTPoint(*(None if t is None else draw.normal(*t.shape) for t in (problem.q, problem.b, problem.h, problem.lb, problem.ub)))
    for transpose in (False, True):
        assert float(factor.solve(rhs, transpose=transpose)[1].max()) < 1e-11


def test_the_factor_of_a_batch_that_ends_piece_by_piece_is_in_order():
    problem = feasible("random", 12, batch=32, seed=8)
    result = solve_dense(problem)
    assert len(set(result.iterations.tolist())) > 1
    exact = ActiveSetFactor(problem, result.factor.active)
    rhs = KKTPoint(problem.q, problem.b, problem.h)
    for found, expected in zip(result.factor.solve(rhs)[0], exact.solve(rhs)[0], strict=True):
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(result.factor.active, result.z > 0)


def test_dependent_rows_are_solved_where_they_agree_and_told_where_not():
    problem = feasible("duplicate rows", 8, seed=9)
    problem = problem._replace(A=torch.cat((problem.A, problem.A), 1), b=torch.cat((problem.b, problem.b), 1))
    active = torch.zeros_like(problem.h, dtype=torch.bool)
    active[:, [0, 8]] = True  # row 8 is three times row 0
    factor = ActiveSetFactor(problem, active)
    zero = KKTPoint(problem.q, 0 * problem.b, 0 * problem.h)
    solution, residual = factor.solve(zero)
    assert float(residual.max()) < 1e-11
    # among the multipliers of the duplicates the ones of least norm
    torch.testing.assert_close(solution.y[:, :2], solution.y[:, 2:], rtol=1e-6, atol=1e-6)
    against = torch.zeros_like(problem.h)
    against[:, 0] = 1
    solution, residual = factor.solve(zero._replace(z=against))
    assert float(residual.min()) > 1e-3
    assert all(float(t.abs().max()) < 1e4 for t in solution if t is not None)


def test_a_face_of_solutions_gives_a_finite_answer_and_a_residual():
    eye, one = torch.eye(3, **FLOAT)[None], torch.ones(1, 1, **FLOAT)
    problem = DenseQP(0 * eye, 0 * eye[:, 0], eye[:, :1], one, eye[:, :0], one[:, :0])
    factor = ActiveSetFactor(problem, torch.tensor([[True]]))
    along, residual = factor.solve(KKTPoint(eye[:, 0], one[:, :0], 0 * one))
    assert float(residual) < 1e-12
    assert float(along.z) == pytest.approx(1)
    across, residual = factor.solve(KKTPoint(eye[:, 1], one[:, :0], 0 * one))
    assert float(residual) > 0.5
    assert float(across.x.abs().max()) < 1e-6


def test_equal_bounds_are_active_once():
    result = solve_dense(feasible("fixed variables", 9))
    assert not bool((result.factor.active_lower & result.factor.active_upper).any())
    assert bool((result.factor.active_lower | result.factor.active_upper)[:, :3].all())


def test_without_inequalities_a_shared_matrix_is_factored_once():
    problem = feasible("equalities only", 6)
    problem = problem._replace(P=problem.P[:1], A=problem.A[:1], G=problem.G[:1], b=problem.b)
    result = solve_dense(problem)
    assert result.factor._factor.shape == (1, 6, 6)
    assert bool((result.status == 0).all())
