import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflayers import Status
from difflayers.errors import ShapeError
from difflayers.solvers import lbfgs

from .checks import D, assert_batch_is_loop, assert_no_graph_no_mutation, assert_solved, quadratic, randn, spd, statuses


def rosenbrock(x):
    return (1 - x[..., 0]) ** 2 + 100 * (x[..., 1] - x[..., 0] ** 2) ** 2


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
def test_quadratics(condition, dtype):
    P, b = spd(20, condition, 3, dtype=dtype), randn(3, 20, dtype=dtype)
    solution = lbfgs(quadratic(P, b), torch.zeros(3, 20, dtype=dtype), batch_ndim=1)
    assert_solved(solution, 1e-12 if dtype == D else 1e-6)
    reference = torch.linalg.solve(P, b[..., None]).squeeze(-1)
    assert float((solution.x - reference).norm() / reference.norm()) < condition * (1e-11 if dtype == D else 1e-5)


@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_rosenbrock(dtype):
    starts = torch.tensor([[-1.2, 1.0], [1.0, 1.0], [0.0, 0.0], [5.0, -5.0]], dtype=dtype)
    solution = lbfgs(rosenbrock, starts, batch_ndim=1)
    assert_solved(solution)
    torch.testing.assert_close(solution.x, torch.ones_like(starts), atol=1e-8 if dtype == D else 1e-3, rtol=0)
    assert int(solution.iterations[1]) == 0
    assert int(solution.iterations.max()) < 80


def test_the_gradient_becomes_small_where_the_objective_is_only_noise():
    # At the minimum f is a million: its decrease drowns in rounding at a gradient of 1e-4.
    solution = lbfgs(lambda x: 1e6 + torch.cosh(x).sum() + x.sum() ** 2, randn(10))
    assert_solved(solution, 1e-12)
    assert float(solution.x.abs().max()) < 1e-9


def test_curvature_that_changes_by_many_orders():
    starts = torch.tensor([[10.0], [1.0], [-5.0]], dtype=D)
    solution = lbfgs(lambda x: (torch.exp(x) - x).sum(-1), starts, batch_ndim=1)
    assert_solved(solution)
    torch.testing.assert_close(solution.x, torch.zeros_like(starts), atol=1e-8, rtol=0)
    # A barrier: half of the trial points are outside the domain.
    barrier = lbfgs(lambda x: (x - torch.log(x)).sum(-1), torch.tensor([[0.01], [1.0], [100.0]], dtype=D), batch_ndim=1)
    assert_solved(barrier)
    torch.testing.assert_close(barrier.x, torch.ones(3, 1, dtype=D))


@given(st.integers(1, 10), st.integers(0, 10_000), st.floats(-6, 6))
@settings(max_examples=25)
def test_logistic_regression_in_any_units(n, seed, exponent):
    X, y = randn(30, n, seed=seed), (randn(30, seed=seed + 1) > 0).to(D)
    unit = 10.0**exponent

    def objective(w):
        z = X @ (w / unit)
        return torch.nn.functional.softplus(z).sum() - y @ z + 0.05 * ((w / unit) ** 2).sum()

    solution = lbfgs(objective, torch.zeros(n, dtype=D))
    assert_solved(solution, 1e-12)
    gradient = torch.func.grad(objective)(solution.x) * unit
    assert float(gradient.norm()) < 1e-9


def test_rows_fail_alone():
    factor = torch.tensor([1.0, torch.nan, 3.0], dtype=D)
    solution = lbfgs(lambda x: factor * ((x - 2) ** 2).sum(-1), torch.ones(3, 2, dtype=D), batch_ndim=1)
    assert statuses(solution) == [Status.SOLVED, Status.NUMERICAL_ERROR, Status.SOLVED]
    torch.testing.assert_close(solution.x[[0, 2]], torch.full((2, 2), 2.0, dtype=D))
    assert torch.isfinite(solution.x).all()


def test_no_minimum_is_not_solved():
    for objective in (lambda x: x.sum(), lambda x: -(x**2).sum(), lambda x: -torch.log1p(x**2).sum()):
        solution = lbfgs(objective, torch.ones(2, dtype=D), max_iter=300)
        assert Status.SOLVED not in statuses(solution)
        assert torch.isfinite(solution.x).all()


def test_batch_is_a_loop():
    b, x0 = randn(4, 6) * torch.tensor([1.0, 1e-4, 30.0, 0.0], dtype=D)[:, None], torch.zeros(4, 6, dtype=D)
    P = spd(6, 20.0)
    assert_batch_is_loop(lambda b, x0: lbfgs(lambda x: torch.cosh(x).sum(-1) + quadratic(P, b)(x), x0, batch_ndim=1), b, x0, atol=1e-8)


def test_pytrees_scalars_and_limits():
    tree = {"a": torch.zeros(2, 3), "b": torch.zeros(2), "n": 3}
    solution = lbfgs(lambda t: ((t["a"] - 1) ** 2).sum(-1) + (t["b"] - 3) ** 2, tree, batch_ndim=1)
    assert_solved(solution)
    torch.testing.assert_close(solution.x["a"], torch.ones(2, 3), atol=1e-3, rtol=0)
    scalar = lbfgs(lambda x: (x - 2) ** 2, torch.tensor(0.0, dtype=D))
    assert scalar.x.shape == scalar.status.shape == ()
    assert scalar.x.item() == pytest.approx(2.0)
    start = torch.tensor([-1.2, 1.0], dtype=D)
    for limit in (0, 5):
        short = lbfgs(rosenbrock, start, max_iter=limit)
        assert statuses(short) == [Status.MAX_ITER]
        assert int(short.iterations) == limit
    assert rosenbrock(short.x) < rosenbrock(start)
    assert lbfgs(lambda x: (x**2).sum(-1), torch.zeros(0, 3), batch_ndim=1).x.shape == (0, 3)


def test_no_graph_no_mutation():
    assert_no_graph_no_mutation(lambda x0, b: lbfgs(lambda x: torch.cosh(x - b).sum(), x0), randn(3), randn(3, seed=1))


def test_bad_arguments():
    with pytest.raises(ShapeError, match="one value per problem"):
        lbfgs(lambda x: x.sum(), torch.zeros(2, 3), batch_ndim=1)
    with pytest.raises(ValueError, match="memory"):
        lbfgs(lambda x: x.sum(), torch.zeros(3), memory=0)
    with pytest.raises(ValueError, match="max_iter"):
        lbfgs(lambda x: x.sum(), torch.zeros(3), max_iter=-1)
