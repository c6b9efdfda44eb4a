import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflayers import Status
from difflayers.errors import ShapeError
from difflayers.solvers import anderson, broyden, picard

from .checks import D, assert_batch_is_loop, assert_no_graph_no_mutation, assert_solved, randn, statuses

SOLVERS = [picard, anderson, broyden]


def orthogonal(n, seed=0):
    return torch.linalg.qr(randn(n, n, seed=seed))[0]


def symmetric(n, rho, seed=0):
    eigenvalues = 2 * torch.rand(n, dtype=D, generator=torch.Generator().manual_seed(seed)) - 1
    eigenvalues[0] = 1
    q = orthogonal(n, seed)
    W, b = rho * (q * eigenvalues) @ q.mT, randn(n, seed=seed + 1)
    return lambda x: x @ W + b


def nonnormal(n, rho, seed=0):
    W, b = torch.triu(randn(n, n, seed=seed)) / (2 * n**0.5), randn(n, seed=seed + 1)
    W.diagonal().copy_(torch.linspace(-rho, rho, n, dtype=D))
    return lambda x: x @ W.mT + b


def random_spectrum(n, rho, seed=0):
    W, b = randn(n, n, seed=seed), randn(n, seed=seed + 1)
    W = rho * W / torch.linalg.eigvals(W).abs().max()
    return lambda x: x @ W.mT + b


def saturating(n, rho, seed=0):
    q = orthogonal(n, seed)
    W, b = rho * (q * torch.linspace(0.1, 1, n, dtype=D)) @ q.mT, 0.01 * randn(n, seed=seed + 1)
    return lambda x: torch.tanh(x @ W + b)


MAPS = [symmetric, nonnormal, random_spectrum, saturating]


@pytest.mark.parametrize("solver", SOLVERS)
def test_closed_forms(solver):
    x0 = torch.ones(1, dtype=D)
    assert solver(torch.cos, x0).x.item() == pytest.approx(0.7390851332151607, abs=1e-11)
    assert solver(lambda x: (x + 2 / x) / 2, x0).x.item() == pytest.approx(math.sqrt(2), abs=1e-12)
    W, b = 0.5 * orthogonal(6), randn(6)
    solution = solver(lambda x: x @ W.mT + b, torch.zeros(6, dtype=D))
    assert_solved(solution, 1e-12)
    torch.testing.assert_close(solution.x, torch.linalg.solve(torch.eye(6, dtype=D) - W, b), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make_map", MAPS)
@pytest.mark.parametrize("n", [2, 5, 30, 100, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rho", [0.9, 0.99])
def test_anderson_needs_no_more_evaluations_than_picard(make_map, n, rho):
    x0 = torch.zeros(n, dtype=D)
    fast, slow = (solver(make_map(n, rho), x0) for solver in (anderson, picard))
    assert_solved(fast, 1e-12)
    assert_solved(slow, 1e-12)
    # "Clearly fewer" where the contraction is weak.
    assert int(fast.iterations) <= (0.5 if rho == 0.99 else 1.0) * int(slow.iterations)
    torch.testing.assert_close(fast.x, slow.x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rho", [0.9, 0.99])
def test_anderson_loses_nothing_where_no_polynomial_helps(rho):
    # The spectrum fills a circle: no Krylov method is faster than Picard.
    W, b = rho * orthogonal(40), 0.01 * randn(40)
    fast, slow = (solver(lambda x: torch.tanh(x @ W.mT + b), torch.zeros(40, dtype=D), tol=1e-8) for solver in (anderson, picard))
    assert_solved(fast, 1e-8)
    assert int(fast.iterations) <= int(slow.iterations)


def test_anderson_is_finite_on_linear_maps_with_enough_memory():
    for n in (1, 3, 8):
        solution = anderson(symmetric(n, 0.95), torch.zeros(n, dtype=D), memory=12)
        assert_solved(solution, 1e-12)
        assert int(solution.iterations) <= n + 4


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_anderson_does_not_depend_on_units(scale):
    make = symmetric(20, 0.95)
    plain = anderson(make, torch.zeros(20, dtype=D))
    scaled = anderson(lambda x: scale * make(x / scale), torch.zeros(20, dtype=D))
    assert abs(int(plain.iterations) - int(scaled.iterations)) <= 2
    torch.testing.assert_close(scaled.x / scale, plain.x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [anderson, broyden])
def test_maps_that_do_not_contract(solver):
    A = torch.diag(torch.tensor([-3.0, 2.0, -1.5], dtype=D))
    b = torch.tensor([4.0, 1.0, 5.0], dtype=D)
    solution = solver(lambda x: x @ A + b, torch.zeros(3, dtype=D))
    assert_solved(solution, 1e-12)
    torch.testing.assert_close(solution.x, torch.tensor([1.0, -1.0, 2.0], dtype=D))
    assert statuses(picard(lambda x: x @ A + b, torch.zeros(3, dtype=D), max_iter=3000)) == [Status.NUMERICAL_ERROR]


@given(st.integers(1, 12), st.floats(0.0, 0.97), st.integers(0, 10_000), st.sampled_from(SOLVERS))
@settings(max_examples=40)
def test_contractions_are_always_solved(n, rho, seed, solver):
    W, b = randn(n, n, seed=seed), randn(n, seed=seed + 1)
    W = rho * W / torch.linalg.matrix_norm(W, 2)
    solution = solver(lambda x: torch.tanh(x @ W.mT) + b, torch.zeros(n, dtype=D))
    assert_solved(solution, 1e-12)
    torch.testing.assert_close(torch.tanh(solution.x @ W.mT) + b, solution.x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_residual_and_iterations_say_what_happened(solver):
    calls = 0

    def count(x):
        nonlocal calls
        calls += 1
        return torch.cos(x)

    solution = solver(count, torch.tensor([0.3, 1.0], dtype=D))
    assert int(solution.iterations) == calls
    assert float((torch.cos(solution.x) - solution.x).norm() / torch.cos(solution.x).norm()) == pytest.approx(
        float(solution.residual), abs=1e-14
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_batch_is_a_loop(solver):
    rho = torch.tensor([0.1, 0.5, 0.9, 0.97], dtype=D)
    W, b, x0 = symmetric_matrix(8) * rho[:, None, None], randn(4, 8), torch.zeros(4, 8, dtype=D)

    def solve(W, b, x0):
        return solver(lambda x: torch.tanh((W @ x[..., None]).squeeze(-1) + b), x0, batch_ndim=1)

    batch = assert_batch_is_loop(solve, W, b, x0, atol=1e-9)
    assert_solved(batch, 1e-12)
    assert batch.iterations[0] < batch.iterations[-1]


def symmetric_matrix(n):
    q = orthogonal(n)
    return (q * torch.linspace(-1, 1, n, dtype=D)) @ q.mT


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_fail_alone(solver):
    b = torch.tensor([1.0, torch.nan, 1.0, 1.0], dtype=D)[:, None]
    slope = torch.tensor([0.5, 0.5, 1.0, 0.9], dtype=D)[:, None]
    solution = solver(lambda x: slope * x + b, torch.zeros(4, 1, dtype=D), batch_ndim=1, max_iter=400)
    assert statuses(solution) == [Status.SOLVED, Status.NUMERICAL_ERROR, Status.MAX_ITER, Status.SOLVED]
    torch.testing.assert_close(solution.x[[0, 3], 0], torch.tensor([2.0, 10.0], dtype=D))
    assert torch.isfinite(solution.x).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_best_iterate_survives_divergence(solver):
    # It contracts up to |x| = 2 and explodes beyond; the start is outside, or the map becomes NaN on the way.
    solution = solver(lambda x: x**3 + 10, torch.full((1,), 3.0, dtype=D), max_iter=50)
    assert torch.isfinite(solution.x).all()
    measured = float((solution.x**3 + 10 - solution.x).abs() / (solution.x**3 + 10).abs().clamp_min(solution.x.abs()))
    assert measured == pytest.approx(float(solution.residual), rel=1e-6, abs=1e-13)
    undefined = solver(lambda x: torch.sqrt(x) - 0.5, torch.full((1,), 0.3, dtype=D), max_iter=50)
    assert torch.isfinite(undefined.x).all()
    assert Status.SOLVED not in statuses(undefined)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_fixed_point_is_not_solved(solver):
    for f in (lambda x: x + 1, lambda x: x**2 + 1, lambda x: 2 * x + x.sign()):
        assert Status.SOLVED not in statuses(solver(f, torch.full((1,), 0.5, dtype=D), max_iter=300))


@pytest.mark.parametrize("solver", SOLVERS)
def test_solutions_at_zero(solver):
    assert_solved(solver(lambda x: 0.5 * x, torch.ones(3, dtype=D)))
    assert_solved(solver(lambda x: 0.5 * x, torch.zeros(3, dtype=D)))
    # A zero that is a difference of ones: no iteration can remove the rounding.
    assert_solved(solver(lambda x: (1 + 0.5 * torch.tanh(x)) - 1, torch.ones(3, dtype=D)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_pytrees_dtypes_and_limits(solver):
    def f(tree):
        return {"a": 0.5 * tree["a"] + tree["b"].sum((-1, -2))[..., None], "b": 0.25 * tree["b"] + 1, "n": tree["n"]}

    start = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 2, 2), "n": 7}
    solution = solver(f, start, batch_ndim=1)
    assert_solved(solution, 1e-6)
    assert solution.x["n"] == 7
    assert solution.x["a"].dtype == torch.float32
    torch.testing.assert_close(solution.x["b"], torch.full((2, 2, 2), 4 / 3))
    torch.testing.assert_close(solution.x["a"], torch.full((2, 3), 2 * 16 / 3))
    scalar = solver(torch.cos, torch.tensor(1.0, dtype=D))
    assert scalar.x.shape == scalar.status.shape == ()
    none = solver(torch.cos, torch.tensor(1.0), max_iter=0)
    assert statuses(none) == [Status.MAX_ITER]
    assert none.x == 1.0
    assert solver(lambda x: 0.5 * x, torch.zeros(0, 3), batch_ndim=1).x.shape == (0, 3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_rounding_level_is_solved_whatever_was_asked(solver):
    solution = solver(symmetric(10, 0.5), torch.zeros(10, dtype=D), tol=0.0, max_iter=2000)
    assert_solved(solution, 100 * 2.3e-16)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_graph_no_mutation(solver):
    assert_no_graph_no_mutation(lambda x0, b: solver(lambda x: 0.5 * torch.tanh(x) + b, x0), randn(4), randn(4, seed=1))


def test_bad_arguments():
    x0 = torch.zeros(3)
    for solver in SOLVERS:
        with pytest.raises(ValueError, match="tol"):
            solver(torch.cos, x0, tol=-1.0)
        with pytest.raises(ValueError, match="max_iter"):
            solver(torch.cos, x0, max_iter=-1)
        with pytest.raises(ShapeError):
            solver(lambda x: x[:2], x0)
        with pytest.raises(ShapeError):
            solver(torch.cos, torch.zeros(3, dtype=torch.int64))
    for solver in (anderson, broyden):
        with pytest.raises(ValueError, match="memory"):
            solver(torch.cos, x0, memory=0)
