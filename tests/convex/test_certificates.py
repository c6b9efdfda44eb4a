"""Proofs of infeasibility and unboundedness: found for every construction, valid by definition, never for a problem with a solution."""

import pytest
import torch

from difflayers import Status
from difflayers.convex.active_set import KKTPoint
from difflayers.convex.certificates import proves_infeasible, proves_unbounded
from difflayers.convex.interior_point import solve_dense
from tests.convex.dense_families import FEASIBLE, INFEASIBLE, UNBOUNDED, Draw, apply, feasible, infeasible, unbounded


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("n", [2, 6, 20])
@pytest.mark.parametrize("kind", INFEASIBLE)
def test_infeasible_problems_come_with_a_farkas_certificate(kind, n, linear):
    problem = infeasible(kind, n, seed=n, linear=linear)
    result = solve_dense(problem)
    assert result.status.tolist() == [Status.PRIMAL_INFEASIBLE] * 16
    pull = apply(problem.A.mT, result.y) + apply(problem.G.mT, result.z)
    value = (problem.b * result.y).sum(-1) + (problem.h * result.z).sum(-1)
    if problem.lb is not None:
        pull = pull - result.z_lower + result.z_upper
        value = value - (problem.lb * result.z_lower).sum(-1) + (problem.ub * result.z_upper).sum(-1)
        assert bool((result.z_lower >= 0).all())
        assert bool((result.z_upper >= 0).all())
    assert bool((result.z >= 0).all())
    assert bool((value < 0).all())
    assert bool((pull.abs().amax(-1) <= 1e-7 * -value).all())


@pytest.mark.parametrize("n", [2, 6, 20])
@pytest.mark.parametrize("kind", UNBOUNDED)
def test_unbounded_problems_come_with_a_ray(kind, n):
    problem = unbounded(kind, n, seed=n)
    result = solve_dense(problem)
    assert result.status.tolist() == [Status.DUAL_INFEASIBLE] * 16
    ray = result.x
    assert bool((ray.abs().amax(-1) == 1).all())
    assert bool(((problem.q * ray).sum(-1) < 0).all())
    assert float(apply(problem.P, ray).abs().max()) < 1e-9
    assert float(apply(problem.A, ray).abs().sum()) < 1e-9
    assert bool((apply(problem.G, ray) <= 1e-9).all())
    if problem.lb is not None:
        assert bool((ray[problem.lb.isfinite()] >= -1e-9).all())
        assert bool((ray[problem.ub.isfinite()] <= 1e-9).all())


@pytest.mark.parametrize("kind", FEASIBLE)
def test_nothing_random_proves_a_problem_with_a_solution_infeasible_or_unbounded(kind):
    problem, draw = feasible(kind, 6), Draw(1)
    for size in (1.0, 1e6):
        y, z = size * draw.normal(8, problem.b.shape[1]), size * draw.uniform(8, problem.h.shape[1]) * problem.h.isfinite()
        bounds = (None, None) if problem.lb is None else [size * draw.uniform(8, 6) * t.isfinite() for t in (problem.lb, problem.ub)]
        assert not bool(proves_infeasible(problem, KKTPoint(problem.q, y, z, *bounds)).any())
        assert not bool(proves_unbounded(problem, size * draw.normal(8, 6)).any()) or kind == "zero"


def test_bad_rows_far_from_the_solution_are_still_found():
    problem = infeasible("opposite rows", 5, seed=11)
    far = problem._replace(G=torch.cat((problem.G, problem.G), 1), h=torch.cat((problem.h, problem.h.abs() + 1e6), 1))
    assert solve_dense(far).status.tolist() == [Status.PRIMAL_INFEASIBLE] * 16
