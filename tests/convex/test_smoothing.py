"""Smoothed QPs: the definition, the limit, the gradient where the true one is zero, and what has no interior."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflayers import QPLayer, Status
from difflayers.convex import solve_qp
from difflayers.errors import InfeasibleError, NotConvergedError, UnboundedError
from tests.convex.dense_families import FEASIBLE, FLOAT, feasible

WITHOUT_INTERIOR = ("fixed variables", "one feasible point", "equalities as rows", "zero")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(-8, 2))
def test_every_product_of_a_multiplier_and_its_slack_is_mu(seed, exponent):
    mu = 10.0**exponent
    problem = feasible("random", 6, batch=3, seed=seed)
    found = solve_qp(*problem, smoothing=mu)
    slack = problem.h - (problem.G @ found.x.unsqueeze(-1)).squeeze(-1)
    assert (slack > 0).all()
    torch.testing.assert_close(found.z * slack, torch.full_like(slack, mu), rtol=1e-5, atol=0)
    assert found.primal_residual.max() <= 1e-9
    torch.testing.assert_close(found.duality_gap, torch.full_like(found.duality_gap, 6 * mu), rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("family", [kind for kind in FEASIBLE if kind not in WITHOUT_INTERIOR])
def test_it_tends_to_the_solution(family):
    problem = feasible(family, 8)
    values = []
    mu = 1e-5 if family == "ill-conditioned" else 1e-7  # with rows of lengths 1e-3 to 1e3 the last slacks drown in rounding
    for found in (solve_qp(*problem), solve_qp(*problem, smoothing=mu)):
        curve = (problem.P @ found.x.unsqueeze(-1)).squeeze(-1)
        values.append((curve * found.x).sum(-1) / 2 + (problem.q * found.x).sum(-1))
    assert (values[1] >= values[0] - 1e-8 * (1 + values[0].abs())).all()
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-4)


def test_a_linear_program_gets_a_gradient_that_points_the_right_way():
    # The knapsack max cᵀx, Σx ≤ 1, 0 ≤ x ≤ 1: its solution is a vertex, which a small change of c does not move.
    c = torch.tensor([1.0, 0.9, 0.2], **FLOAT, requires_grad=True)
    rows = {"G": torch.ones(1, 3, **FLOAT), "h": torch.ones(1, **FLOAT), "lb": torch.zeros(3, **FLOAT), "ub": torch.ones(3, **FLOAT)}
    exact = torch.autograd.grad(solve_qp(None, -c, **rows).x[1], c)[0]
    assert torch.equal(exact, torch.zeros_like(exact))
    smooth = torch.autograd.grad(solve_qp(None, -c, **rows, smoothing=0.1).x[1], c)[0]
    assert smooth[1] > 0.1
    assert smooth[0] < -0.1


def test_layer_and_options():
    problem = feasible("box", 4)
    layer = QPLayer(smoothing=0.01)
    assert "smoothing=0.01" in repr(layer)
    torch.testing.assert_close(layer(*problem), solve_qp(*problem, smoothing=0.01).x)
    free = problem._replace(lb=None, ub=None)
    torch.testing.assert_close(solve_qp(*free[:2], smoothing=0.01).x, solve_qp(*free[:2]).x)  # nothing to smooth
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="smoothing"):
            solve_qp(*problem, smoothing=wrong)


def test_limits_at_infinity_do_not_push():
    problem = feasible("random", 5, batch=2)
    inf = torch.full((5,), torch.inf, **FLOAT)
    wide = problem._replace(h=problem.h.clone(), lb=-inf, ub=inf)
    wide.h[:, 2] = torch.inf
    keep = [0, 1, 3, 4]
    narrow = problem._replace(G=problem.G[:, keep], h=problem.h[:, keep])
    found = solve_qp(*wide, smoothing=0.1)
    torch.testing.assert_close(found.x, solve_qp(*narrow, smoothing=0.1).x)
    assert torch.equal(found.z[:, 2], torch.zeros(2, **FLOAT))
    assert torch.equal(found.z_box, torch.zeros(2, 5, **FLOAT))


def test_what_has_no_interior_says_so():
    eye, q = torch.eye(2, **FLOAT), torch.ones(2, **FLOAT)
    one, two = torch.ones(2, **FLOAT), torch.full((2,), 2.0, **FLOAT)
    with pytest.raises(InfeasibleError):
        solve_qp(eye, q, lb=two, ub=one, smoothing=0.1)
    with pytest.raises(NotConvergedError):
        solve_qp(eye, q, lb=one, ub=one, smoothing=0.1)
    with pytest.raises(UnboundedError):
        solve_qp(None, q, ub=one, smoothing=0.1)
    batch = torch.stack([two, one])
    found = solve_qp(eye, q, lb=one, ub=batch, smoothing=0.1, on_failure="nan")
    assert found.status.tolist() == [Status.SOLVED, Status.MAX_ITER]
    assert found.x[1].isnan().all()
    torch.testing.assert_close(found.x[0], solve_qp(eye, q, lb=one, ub=two, smoothing=0.1).x)
