"""The reduced system against the dense Jacobian of the optimality conditions."""

import pytest
import torch

from difflayers.convex.reduced import ReducedFactor, TinyFactor
from tests.convex.dense_families import FLOAT, Draw
from tests.convex.test_active_set import problem_with_sets


def jacobian(problem, active, i):
    """The derivative of F in (x, y, z, z_box), row by row."""
    p, n = problem.A.shape[1], 7
    P, A, G = (part[min(i, part.shape[0] - 1)] for part in (problem.P, problem.A, problem.G))
    C = torch.cat([A, G, *([torch.eye(n, **FLOAT)] if active.shape[1] > p + G.shape[0] else [])])
    held = active[i].to(P.dtype)
    return torch.cat([torch.cat([P, C.mT], 1), torch.cat([held[:, None] * C, torch.diag(1 - held)], 1)])


@pytest.mark.parametrize("kind", [ReducedFactor, TinyFactor])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_solves_with_the_jacobian_and_its_transpose(kind, bounded, shared, transpose):
    problem, (rows, *sides) = problem_with_sets(bounded)
    if shared:
        problem = problem._replace(P=problem.P[:1], A=problem.A[:1], G=problem.G[:1])
    active = torch.cat([rows.new_ones(3, 2), rows, *([sides[0] | sides[1]] if bounded else [])], -1)
    rhs = Draw(2).normal(4, 3, 7 + active.shape[1])
    solution, residual = kind(problem, active).solve(rhs, transpose=transpose)
    assert (residual <= 1e-12).all()
    for i in range(3):
        J = jacobian(problem, active, i)
        torch.testing.assert_close((solution[:, i] @ (J if transpose else J.mT)), rhs[:, i], rtol=1e-9, atol=1e-9)
    single, _ = kind(problem, active).solve(rhs[0], transpose=transpose)
    torch.testing.assert_close(single, solution[0], rtol=1e-11, atol=1e-12)


def test_a_singular_system_says_so():
    problem, (rows, *_) = problem_with_sets(False)
    twice = problem._replace(A=problem.A[:, :1].expand(-1, 2, -1).contiguous())
    active = torch.cat([rows.new_ones(3, 2), rows], -1)
    residual = TinyFactor(twice, active).solve(Draw(3).normal(3, 14))[1]
    assert not (residual <= 1e-12).all()


def test_nothing_active():
    problem, (rows, *_) = problem_with_sets(False)
    free = problem._replace(A=problem.A[:, :0], b=problem.b[:, :0])
    rhs = Draw(4).normal(3, 12)
    found = [kind(free, torch.zeros_like(rows)).solve(rhs)[0] for kind in (ReducedFactor, TinyFactor)]
    torch.testing.assert_close(*found)
