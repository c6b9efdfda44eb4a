"""The compiled solver and its certificate: what is certified is right, and nothing degenerate or broken is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflayers.convex.interior_point import solve_dense
from difflayers.convex.native import certify, is_available, solve_native
from difflayers.convex.normal_equations import DenseQP
from tests.convex.dense_families import FEASIBLE, feasible

FLOAT = {"dtype": torch.float64}


def test_it_is_installed():
    assert is_available()


@pytest.mark.parametrize("family", FEASIBLE)
def test_a_certified_point_is_that_of_the_interior_point_engine(family):
    problem = feasible(family, 8)
    native, robust = solve_native(problem), solve_dense(problem)
    yes = native.solved
    for mine, other in zip(native.point, robust[:5], strict=True):
        if mine is not None:
            torch.testing.assert_close(mine[yes], other[yes], rtol=1e-7, atol=1e-8)
    assert (native.primal_residual[yes] <= 1e-9).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(0, 8), st.integers(0, 2), st.booleans())
def test_random_definite_problems_are_certified_and_right(seed, n, m, p, boxed):
    draw = torch.Generator().manual_seed(seed)
    root, inside = torch.randn(5, n, n, generator=draw, **FLOAT), torch.randn(5, n, generator=draw, **FLOAT)
    p = min(p, n - 1)
    G, A = torch.randn(5, m, n, generator=draw, **FLOAT), torch.randn(5, p, n, generator=draw, **FLOAT)
    times = lambda matrix: (matrix @ inside.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    h = times(G) + torch.rand(5, m, generator=draw, **FLOAT)
    box = (
        (inside - torch.rand(5, n, generator=draw, **FLOAT), inside + torch.rand(5, n, generator=draw, **FLOAT)) if boxed else (None, None)
    )
    problem = DenseQP(root @ root.mT + 0.1 * torch.eye(n, **FLOAT), torch.randn(5, n, generator=draw, **FLOAT), G, h, A, times(A), *box)
    native, robust = solve_native(problem), solve_dense(problem)
    assert native.solved.float().mean() >= 0.6  # a nearly degenerate one is left to the other engine
    torch.testing.assert_close(native.point.x[native.solved], robust.x[native.solved], rtol=1e-8, atol=1e-9)


def square(*limits: float) -> DenseQP:
    """Two unknowns pushed to (3, 3), rows x₁ ≤ limits[0], x₂ ≤ limits[1], ..."""
    eye = torch.eye(2, **FLOAT)
    rows = eye[torch.arange(len(limits)) % 2]
    return DenseQP(eye[None], torch.full((1, 2), -3.0, **FLOAT), rows[None], torch.tensor([limits], **FLOAT), eye[None, :0], eye[:1, :0])


def test_degenerate_and_broken_elements_are_left_to_the_other_engine():
    assert solve_native(square(1.0, 1.0)).solved.all()
    assert not solve_native(square(1.0, 3.0)).solved.any()  # the second row is active without a multiplier
    assert not solve_native(square(1.0, 1.0, 1.0)).solved.any()  # a row comes twice
    assert not solve_native(square(torch.nan, 1.0)).solved.any()
    singular = square(1.0, 1.0)._replace(P=torch.zeros(1, 2, 2, **FLOAT))
    assert not solve_native(singular).solved.any()
    indefinite = square(1.0, 1.0)._replace(P=torch.diag(torch.tensor([1.0, -1.0], **FLOAT))[None])
    assert not solve_native(indefinite).solved.any()
    rows = torch.ones(1, 2, 2, **FLOAT)
    twice = DenseQP(torch.eye(2, **FLOAT)[None], rows[:, 0], rows[:, :0], rows[:, 0, :0], rows, rows[:, 0])
    assert not solve_native(twice).solved.any()  # the multipliers of redundant equations are a matter of choice


def test_one_broken_element_does_not_touch_its_neighbours():
    problem = feasible("random", 6)
    before = solve_native(problem).point.x
    spoiled = problem._replace(q=problem.q.clone(), h=problem.h.clone())
    spoiled.q[1], spoiled.h[2] = torch.nan, -1e6
    after = solve_native(spoiled)
    assert not after.solved[1]
    others = torch.tensor([i for i in range(before.shape[0]) if i not in (1, 2)])
    assert torch.equal(after.point.x[others], before[others])


def test_certify_refuses_what_is_not_a_solution():
    problem = square(1.0, 1.0)
    x, y, z = torch.ones(1, 2, **FLOAT), torch.zeros(1, 0, **FLOAT), torch.full((1, 2), 2.0, **FLOAT)
    assert certify(problem, x, y, z, None).solved.all()
    assert not certify(problem, x + 1e-9, y, z, None).solved.any()
    assert not certify(problem, x, y, z * (1 + 1e-9), None).solved.any()
    assert not certify(problem, x, y, -z, None).solved.any()
    assert not certify(problem, x * torch.nan, y, z, None).solved.any()


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3, 1e8])
def test_the_certificate_does_not_depend_on_the_units(scale):
    problem = square(1.0, 1.0)
    cost = problem._replace(P=scale * problem.P, q=scale * problem.q)
    rows = problem._replace(G=scale * problem.G, h=scale * problem.h)
    wrong = torch.tensor([[1.0, 1.001]], **FLOAT)
    for scaled, z in ((cost, 2.0 * scale), (rows, 2.0 / scale)):
        found = solve_native(scaled)  # DAQP drops rows of length 1e-8: the certificate sees it
        assert bool(found.solved.all()) == bool(torch.allclose(found.point.x, torch.ones(1, 2, **FLOAT)))
        multipliers = torch.full((1, 2), z, **FLOAT)
        assert not certify(scaled, wrong, torch.zeros(1, 0, **FLOAT), multipliers, None).solved.any()


def test_threads_change_nothing():
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(16, 60, 60, generator=draw, **FLOAT)
    problem = DenseQP(
        root @ root.mT / 60 + 0.1 * torch.eye(60, **FLOAT),
        torch.randn(16, 60, generator=draw, **FLOAT),
        torch.randn(16, 60, 60, generator=draw, **FLOAT),
        torch.rand(16, 60, generator=draw, **FLOAT),
        root[:, :0],
        root[:, 0, :0],
    )
    one = solve_native(problem)
    torch.set_num_threads(3)
    try:
        three = solve_native(problem)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one.point[:3], three.point[:3], strict=True))
