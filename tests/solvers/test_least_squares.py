import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflayers import Status
from difflayers.errors import ShapeError
from difflayers.solvers import gauss_newton, levenberg_marquardt

from .checks import D, assert_batch_is_loop, assert_no_graph_no_mutation, assert_solved, randn, statuses

SOLVERS = [levenberg_marquardt, gauss_newton]


def exponentials(data):
    t = torch.linspace(0, 1, data.shape[-1], dtype=data.dtype)
    return lambda p: p[..., :1] * torch.exp(-p[..., 1:] * t) - data


def gradient_norm(residual, x):
    return torch.func.grad(lambda x: (residual(x) ** 2).sum() / 2)(x).norm(dim=-1)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_linear_problems(solver, dtype):
    A, b = randn(4, 20, 5, dtype=dtype), randn(4, 20, dtype=dtype)
    solution = solver(lambda x: (A @ x[..., None]).squeeze(-1) - b, torch.zeros(4, 5, dtype=dtype), batch_ndim=1)
    assert_solved(solution)
    reference = torch.linalg.lstsq(A, b[..., None]).solution.squeeze(-1)
    torch.testing.assert_close(solution.x, reference, atol=1e-10 if dtype == D else 1e-4, rtol=0)
    if solver is gauss_newton and dtype == D:
        assert solution.iterations.tolist() == [1] * 4


@pytest.mark.parametrize("solver", SOLVERS)
def test_rosenbrock_powell_and_a_fit_with_noise(solver):
    starts = torch.tensor([[-1.2, 1.0], [1.0, 1.0], [0.0, 0.0], [30.0, -50.0]], dtype=D)
    rosenbrock = solver(lambda x: torch.stack([10 * (x[..., 1] - x[..., 0] ** 2), 1 - x[..., 0]], -1), starts, batch_ndim=1)
    assert_solved(rosenbrock)
    torch.testing.assert_close(rosenbrock.x, torch.ones(4, 2, dtype=D), atol=1e-8, rtol=0)
    assert int(rosenbrock.iterations[1]) == 0
    # The Jacobian is singular at the solution.
    powell = solver(
        lambda x: torch.stack([x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2]),
        torch.tensor([3.0, -1.0, 0.0, 1.0], dtype=D),
    )
    assert_solved(powell)
    assert float(powell.x.norm()) < 1e-4
    t = torch.linspace(0, 1, 30, dtype=D)
    fit = exponentials(torch.stack([2 * torch.exp(-3 * t), 2 * torch.exp(-3 * t) + 0.1 * randn(30)]))
    solution = solver(fit, torch.ones(2, 2, dtype=D), batch_ndim=1)
    assert_solved(solution, 1e-12)
    torch.testing.assert_close(solution.x[0], torch.tensor([2.0, 3.0], dtype=D), atol=1e-10, rtol=0)
    assert float(gradient_norm(fit, solution.x).max()) < 1e-11


def test_large_residuals_reach_a_small_gradient():
    # The sum of squares stops changing in its last digit at a gradient of 1e-8: the rest is taken on trust.
    W, data = randn(40, 4), 3 * randn(3, 40, seed=1)

    def residual(x):
        return torch.tanh(x @ W.mT) * 2 + 0.3 * x @ W.mT - data

    solution = levenberg_marquardt(residual, torch.full((3, 4), 0.1, dtype=D), batch_ndim=1)
    assert_solved(solution, 1e-12)
    assert float(gradient_norm(residual, solution.x).max()) < 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_unknowns_than_residuals_and_rank_deficiency(solver):
    under = solver(lambda x: (x**2).sum(-1, keepdim=True) - 4, torch.tensor([1.0, 1.0, 3.0], dtype=D))
    assert_solved(under)
    assert float((under.x**2).sum()) == pytest.approx(4.0)
    deficient = solver(lambda x: torch.stack([x[0] + x[1] - 1, 2 * x[0] + 2 * x[1] - 3]), torch.ones(2, dtype=D))
    assert_solved(deficient)
    assert float(deficient.x.sum()) == pytest.approx(1.4)
    # An unknown on which nothing depends stays where it is.
    free = solver(lambda x: x[:1] - 3, torch.tensor([0.0, 7.0], dtype=D))
    assert_solved(free)
    torch.testing.assert_close(free.x, torch.tensor([3.0, 7.0], dtype=D))


@given(st.integers(1, 5), st.integers(0, 10_000))
@settings(max_examples=25)
def test_units_of_the_unknowns_do_not_matter(n, seed):
    W, data = randn(12, n, seed=seed), 0.3 * randn(12, seed=seed + 1)
    units = 10.0 ** (12 * torch.rand(n, dtype=D, generator=torch.Generator().manual_seed(seed)) - 6)

    def residual(x):
        return torch.asinh(x @ W.mT) - data

    plain = levenberg_marquardt(residual, torch.zeros(n, dtype=D))
    scaled = levenberg_marquardt(lambda x: residual(x / units), torch.zeros(n, dtype=D))
    assert_solved(plain)
    assert_solved(scaled)
    torch.testing.assert_close(scaled.x / units, plain.x, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_fail_alone(solver):
    t = torch.linspace(0, 1, 20, dtype=D)
    data = torch.stack([2 * torch.exp(-3 * t), torch.nan * t, 1 + t])
    residual = exponentials(data)
    solution = solver(residual, torch.ones(3, 2, dtype=D), batch_ndim=1)
    assert statuses(solution) == [Status.SOLVED, Status.NUMERICAL_ERROR, Status.SOLVED]
    assert torch.isfinite(solution.x).all()
    # From a point where the residual is not finite beyond a small neighbourhood, the steps must find their way.
    wall = solver(lambda x: torch.log(x) - torch.tensor([[0.0], [5.0]], dtype=D), torch.full((2, 1), 0.01, dtype=D), batch_ndim=1)
    assert_solved(wall)
    torch.testing.assert_close(wall.x[:, 0], torch.tensor([0.0, 5.0], dtype=D).exp())


@pytest.mark.parametrize("solver", SOLVERS)
def test_batch_is_a_loop(solver):
    data, x0 = randn(4, 15) * torch.tensor([0.1, 1.0, 0.5, 0.0], dtype=D)[:, None], torch.full((4, 3), 0.1, dtype=D)
    W = randn(15, 3, seed=4)
    assert_batch_is_loop(lambda data, x0: solver(lambda x: torch.asinh(x @ W.mT) - data, x0, batch_ndim=1), data, x0, atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_pytrees_of_different_structure_and_limits(solver):
    def residual(tree):
        return tree["a"] - 1, {"sum": tree["a"].sum(-1) + tree["b"] - 5}

    solution = solver(residual, {"a": torch.zeros(2, 3), "b": torch.zeros(2)}, batch_ndim=1)
    assert_solved(solution, 1e-6)
    torch.testing.assert_close(solution.x["b"], torch.full((2,), 2.0))
    scalar = solver(lambda x: torch.stack([x - 1, x - 3]), torch.tensor(0.0, dtype=D))
    assert scalar.x.shape == scalar.status.shape == ()
    assert scalar.x.item() == pytest.approx(2.0)
    rosenbrock = {"residual_fn": lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]]), "x0": torch.tensor([-1.2, 1.0])}
    assert statuses(solver(**rosenbrock, max_iter=0)) == [Status.MAX_ITER]
    short = solver(**rosenbrock, max_iter=8)
    assert statuses(short) == [Status.MAX_ITER]
    r0, r = rosenbrock["residual_fn"](rosenbrock["x0"]), rosenbrock["residual_fn"](short.x)
    assert r.norm() < r0.norm()


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_graph_no_mutation(solver):
    assert_no_graph_no_mutation(lambda x0, b: solver(lambda x: torch.sinh(x) - b, x0), randn(3), randn(3, seed=1))


def test_bad_arguments():
    for solver in SOLVERS:
        with pytest.raises(ValueError, match="tol"):
            solver(torch.sinh, torch.zeros(3), tol=-1.0)
        with pytest.raises(ShapeError):
            solver(lambda x: x.sum(), torch.zeros(2, 3), batch_ndim=1)
    with pytest.raises(ValueError, match="damping"):
        levenberg_marquardt(torch.sinh, torch.zeros(3), damping=0.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_normal_equations_of_the_caller(solver):
    A = randn(3, 12, 4)
    b = torch.tanh((A @ randn(3, 4, 1, seed=1)).squeeze(-1)) + 0.05 * randn(3, 12, seed=2)

    def residual(x):
        return torch.tanh((A @ x[..., None]).squeeze(-1)) - b

    def normal_equations(x):
        z = (A @ x[..., None]).squeeze(-1)
        J = (1 - torch.tanh(z) ** 2)[..., None] * A
        return J.mT @ J, (J.mT @ residual(x)[..., None]).squeeze(-1)

    start = torch.zeros(3, 4, dtype=D)
    own, given = solver(residual, start, batch_ndim=1), solver(residual, start, batch_ndim=1, normal_equations=normal_equations)
    assert_solved(given)
    torch.testing.assert_close(given.x, own.x, atol=1e-10, rtol=0)
    assert given.iterations.tolist() == own.iterations.tolist()


def test_newtons_model_ends_what_gauss_newtons_is_slow_on():
    W, data = randn(40, 4), randn(3, 40, seed=1)

    def residual(x):
        return torch.tanh(x @ W.T) - data

    def hessian(x):
        return torch.func.vmap(torch.func.hessian(lambda x, d: ((torch.tanh(W @ x) - d) ** 2).sum() / 2))(x, data)

    start = torch.zeros(3, 4, dtype=D)
    slow, fast = (levenberg_marquardt(residual, start, batch_ndim=1, hessian=h) for h in (None, hessian))
    assert_solved(fast)
    assert (fast.iterations <= slow.iterations).all()
    assert int(fast.iterations.sum()) < int(slow.iterations.sum()) / 2
    assert float(gradient_norm(residual, fast.x).max()) < 1e-9
    alone = levenberg_marquardt(lambda x: torch.tanh(W @ x) - data[1], start[1], hessian=lambda x: hessian(x.expand(3, 4))[1])
    torch.testing.assert_close(alone.x, fast.x[1])
    assert alone.iterations == fast.iterations[1]
